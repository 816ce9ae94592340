"""Labelled examples, from where they are to the inputs of a model: texts here, images and clips in `media_inputs`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch.utils.data import Dataset
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from slicefine.errors import SHOWN, SliceFineError, listed, raise_all
from slicefine.evaluation import models
from slicefine.evaluation.contamination import normalised
from slicefine.evaluation.models import Source
from slicefine.training.data import SUFFIXES, Table, read_table, shorten
from slicefine.training.recipe import DataSettings
from slicefine.training.tasks import get_task
from slicefine.training.tasks.text_classification import positions, text_problems


class Examples(Protocol):
    """The examples of one source; rows are counted from 0."""

    table: Table
    """Labels, places and fingerprint."""

    def refuse_bad(self, rows: Sequence[int]) -> dict[int, str]:
        """What is wrong with the examples in `rows` that are left out; raises `SliceFineError` if none may be."""
        ...

    def processor(self, source: Source) -> Any:
        """What makes inputs from such examples, for the model that `source` names."""
        ...

    def inputs(self, source: Source, processor: Any, model: PreTrainedModel, rows: Sequence[int]) -> Inputs:
        """The examples in `rows`, ready for `model`."""
        ...

    def identities(self, of: Examples) -> Iterator[str | None]:
        """What is the same for two examples that are the same, row by row; None for those that `of` cannot have."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """Inputs of a model."""

    dataset: Dataset[dict[str, Any]]
    lengths: list[int]
    """Of each, in tokens; all 1 where they are equally long."""
    collator: Any


def read(task: str, data: DataSettings, config: Any) -> Examples:
    """The examples in `data.train`, and nothing else. Raises `SliceFineError` for what is wrong with the source.

    Args:
        task: A key of `TASKS`, a classification.
        data: Where they are, and which columns they have.
        config: Configuration of the model that they are for; it says how many frames of a clip it sees.
    """
    get_task(task)  # raises if a package that it needs is not installed
    _refuse_other_columns(task, data)
    if task == "text-classification":
        return Texts(data)
    from slicefine.evaluation import media_inputs

    return media_inputs.read(task, data, config)


def _refuse_other_columns(task: str, data: DataSettings) -> None:
    """What `read_table` says of missing columns names flags of the training, which an evaluation does not have."""
    assert data.train is not None
    if Path(data.train).suffix.lower() not in SUFFIXES:
        return
    names = ("text", "text_pair", "label") if task == "text-classification" else (task.partition("-")[0], "label")
    wanted = {name: getattr(data, name) for name in names if getattr(data, name)}
    rows = read_table(data.train, None).rows
    missing = [column for column in wanted.values() if rows and not any(column in row for row in rows)]
    if missing:
        present = list(dict.fromkeys(column for row in rows for column in row))
        said = ", ".join(f"{name} {column!r}" for name, column in wanted.items())
        raise SliceFineError(
            f"Test sets: {data.train} has no column {', '.join(map(repr, missing))}; there are {listed(map(repr, present), SHOWN)}. Columns are "
            f"called as in the recipe that the model was trained with ({said}): rename those of the file."
        )


class Texts:
    """Texts, or pairs of them."""

    def __init__(self, data: DataSettings) -> None:
        assert data.train is not None
        self._data = data
        self._columns = [column for column in (data.text, data.text_pair) if column]
        self.table = read_table(data.train, [*self._columns, data.label], subset=data.subset, split=data.train_split)

    def refuse_bad(self, rows: Sequence[int]) -> dict[int, str]:
        raise_all(shorten(text_problems(self.table, self._columns)), "Test sets")
        return {}

    def processor(self, source: Source) -> PreTrainedTokenizerBase:
        tokenizer = models.load_tokenizer(source)
        if tokenizer.pad_token is None:  # decoders have none, and look for the last token before the padding
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def inputs(self, source: Source, processor: Any, model: PreTrainedModel, rows: Sequence[int]) -> Inputs:
        tokenizer: PreTrainedTokenizerBase = processor
        config: Any = model.config
        if config.pad_token_id is None:
            config.pad_token_id = tokenizer.pad_token_id
        limits = [models.context_length(config, tokenizer), positions(model)]
        if source.run:
            limits.append(self._data.max_length)
        texts = [[self.table.rows[row][column] for row in rows] for column in self._columns]
        longest = min((limit for limit in limits if limit), default=None)
        encoded = tokenizer(
            texts[0], texts[1] if len(texts) > 1 else None, truncation=longest is not None, max_length=longest
        )
        examples = [{name: encoded[name][n] for name in encoded} for n in range(len(rows))]  # pyright: ignore[reportIndexIssue, reportCallIssue, reportArgumentType] -- lists, without return_tensors
        return Inputs(
            dataset=Listed(examples),
            lengths=[len(example["input_ids"]) for example in examples],
            collator=DataCollatorWithPadding(tokenizer),
        )

    def identities(self, of: Examples) -> Iterator[str]:
        for row in self.table.rows:
            texts = [str(row[column]) for column in self._columns]
            yield "\n".join(normalised(text) or text.strip() for text in texts)


class Listed(Dataset[dict[str, Any]]):
    """Examples that are in memory."""

    def __init__(self, examples: list[dict[str, Any]]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self._examples[number]
