"""Text classification: one text, or a pair, to one of several classes, or to a number (regression)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    TrainingArguments,
)

from slicefine.errors import SliceFineError, first_line
from slicefine.training.checked import CheckedTrainer
from slicefine.training.data import Table, read_tables, shorten
from slicefine.training.heads import load_base_classifier, load_classifier
from slicefine.training.interrupts import not_swallowed
from slicefine.training.labels import not_validated, number, split, values
from slicefine.training.metrics import scores_of
from slicefine.training.named import other_classes
from slicefine.training.recipe import DataSettings, ModelSettings, Recipe
from slicefine.training.tasks import Prepared
from slicefine.training.tokenizer import load_tokenizer, refuse_unknown

PEFT_TASK_TYPE = "SEQ_CLS"
TRAINER = CheckedTrainer
PRETRAINED = AutoModel


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Checked examples; `labels` index `Examples.classes`, or are numbers (float) if there are none."""

    classes: list[str]
    train: Dataset
    """Columns `text`, `text_pair` (for pairs) and `labels`."""
    validation: Dataset
    sources: dict[str, dict[str, Any]]
    notes: list[str]

    def summary(self) -> dict[str, Any]:
        """Sources, sizes and classes, for the run record."""
        return {**self.sources, "classes": self.classes} if self.classes else self.sources


def arguments(data: DataSettings, settings: dict[str, Any]) -> TrainingArguments:
    """What `TRAINER` takes beside model and examples."""
    return TrainingArguments(**settings)


def read(data: DataSettings) -> Examples:
    """Read and check the examples and number the classes (see `labels.py`).

    A fraction for validation is split off class by class, always in the same way for the same examples.

    Raises `SliceFineError` with every problem.
    """
    columns = [column for column in (data.text, data.text_pair, data.label) if column]
    tables = read_tables(data, columns)
    texts = columns[:-1]
    problems = [problem for table in tables.values() for problem in shorten(text_problems(table, texts))]
    notes = [note for table in tables.values() for note in _half_empty(table, texts)]
    classes: list[str] = []
    numbers: Mapping[str, Sequence[float]]
    if data.label_kind == "number":
        numbers = values(tables, data.label, where="Data", problems=problems)
    else:
        found = number(tables, data.label, where="Data", problems=problems)
        classes, numbers = found.classes, found.numbers
        notes += found.notes
        if others := other_classes(data.name, classes):
            raise SliceFineError(
                f"Data: {others} Name the column of its classes with --data.label, or leave out `data.name`."
            )

    sets = {name: _columns(table, data, numbers[name]) for name, table in tables.items()}
    sources: dict[str, dict[str, Any]] = {
        name: {"source": table.source, "fingerprint": table.fingerprint} for name, table in tables.items()
    }
    if isinstance(data.validation, float):
        labels = sets["train"]["labels"]
        kept, split_off = split(labels if classes else [0] * len(labels), data.validation)
        if not split_off:
            of_each = " of each class" if classes else ""
            raise SliceFineError(
                f"Data: the validation set is empty: a fraction of {data.validation} of the {len(kept)} examples of "
                f"{data.train} is less than one example{of_each}. Set `data.validation` (in `slicefine bench quality` "
                "`--held_out`) to a larger fraction, or to a file."
            )
        whole = sets["train"]
        sets = {
            name: {column: [cells[i] for i in rows] for column, cells in whole.items()}
            for name, rows in (("train", kept), ("validation", split_off))
        }
        sources["validation"] = {
            "source": f"{data.validation} of train",
            "fingerprint": sources["train"]["fingerprint"],
        }
        if classes:
            notes += not_validated(classes, sets["train"]["labels"], sets["validation"]["labels"])
    for name, columns_of in sets.items():
        sources[name]["examples"] = len(columns_of["labels"])
    return Examples(
        classes=classes,
        train=Dataset.from_dict(sets["train"]),
        validation=Dataset.from_dict(sets["validation"]),
        sources=sources,
        notes=notes,
    )


@not_swallowed()
def prepare(recipe: Recipe, examples: Examples) -> Prepared:
    """Load tokenizer and model, and tokenize the examples. Padding is left to each batch."""
    settings = recipe.model
    try:
        tokenizer = load_tokenizer(settings.name)
        if tokenizer.pad_token is None:  # decoders have none, and look for the last token before the padding
            tokenizer.pad_token = tokenizer.eos_token
        config = AutoConfig.from_pretrained(
            settings.name,
            **_outputs(examples.classes),
            pad_token_id=tokenizer.pad_token_id,
            trust_remote_code=False,
        )
    except SliceFineError:
        raise
    except (OSError, ValueError) as error:
        raise SliceFineError(_not_loaded(settings, error)) from error
    refuse_unknown(tokenizer, examples.train["text"], settings.name)
    _refuse_longer(recipe, tokenizer.model_max_length, getattr(config, "max_position_embeddings", None))
    found = load_classifier(
        AutoModelForSequenceClassification, settings, config, lambda error: _not_loaded(settings, error)
    )
    model = found.model
    _refuse_longer(recipe, positions(model))

    def tokenize(batch: dict[str, list[Any]]) -> Any:
        return tokenizer(batch["text"], batch.get("text_pair"), truncation=True, max_length=recipe.data.max_length)

    texts = [column for column in examples.train.column_names if column != "labels"]
    return Prepared(
        model=model,
        processor=tokenizer,
        train=examples.train.map(tokenize, batched=True, remove_columns=texts),
        validation=examples.validation.map(tokenize, batched=True, remove_columns=texts),
        collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=scores_of(recipe.data, examples.classes),
        new_modules=found.trained_in_full,
        notes=[*examples.notes, *found.notes],
    )


def load_base(name: str, folder: Path) -> PreTrainedModel:
    """The base model with the classes and dtype that `config.json` in the adapter's `folder` says."""
    return load_base_classifier(AutoModelForSequenceClassification, name, folder)


def _outputs(classes: list[str]) -> dict[str, Any]:
    """What the configuration of the model says of its head."""
    names = classes or ["LABEL_0"]  # as transformers calls the one output of a regression
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
        "problem_type": "single_label_classification" if classes else "regression",
    }


def _refuse_longer(recipe: Recipe, *longest: int | None) -> None:
    most = min((length for length in longest if length), default=recipe.data.max_length)
    if recipe.data.max_length > most:
        raise SliceFineError(
            f"`data.max_length` is at most what {recipe.model.name} can read, {most} tokens; got {recipe.data.max_length}."
        )


def positions(model: PreTrainedModel) -> int | None:
    """Tokens that the table of positions has room for, where it counts from behind the pad token, as RoBERTa's does."""
    counts = [
        module.num_embeddings - module.padding_idx - 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None
    ]
    return min(counts, default=None)


def text_problems(table: Table, columns: list[str]) -> list[str]:
    """What is wrong with the texts in `columns`, by place."""
    problems = []
    for place, row in zip(table.places, table.rows, strict=True):
        wrong = [column for column in columns if not isinstance(row[column], str)]
        problems += [
            f"{place}: {column!r} is a text; got {'null' if row[column] is None else repr(row[column])}."
            for column in wrong
        ]
        if not wrong and not any(row[column].strip() for column in columns):
            named = " and ".join(map(repr, columns))
            problems.append(f"{place}: {named} {'is' if len(columns) == 1 else 'are'} empty.")
    return problems


def _half_empty(table: Table, columns: list[str]) -> list[str]:
    """A note of the pairs of which one text is empty: they can be learned, and may be a mistake."""
    places = [
        place
        for place, row in zip(table.places, table.rows, strict=True)
        if any(isinstance(row[column], str) and not row[column].strip() for column in columns)
    ]
    return [f"Pairs with one text empty: {len(places)}, the first at {places[0]}."] if places else []


def _columns(table: Table, data: DataSettings, labels: Sequence[float]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {"text": [row[data.text] for row in table.rows]}
    if data.text_pair:
        columns["text_pair"] = [row[data.text_pair] for row in table.rows]
    return columns | {"labels": list(labels)}


def _not_loaded(settings: ModelSettings, error: Exception) -> str:
    return (
        "`model.name` is a folder with a pretrained model and its tokenizer, or the name of one on the hub; "
        f"{settings.name!r} did not load: {first_line(error)}."
    )
