"""Text classification: one text, or a pair, to one of several classes."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from sklearn.metrics import accuracy_score, f1_score
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from slicefine.errors import SliceFineError, raise_all
from slicefine.training.checked import CheckedTrainer
from slicefine.training.data import Table, read_tables, shorten
from slicefine.training.recipe import DataSettings, ModelSettings, Recipe
from slicefine.training.tasks import Prepared

PEFT_TASK_TYPE = "SEQ_CLS"
TRAINER = CheckedTrainer
PRETRAINED = AutoModel


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Checked examples; `labels` index `Examples.classes`."""

    classes: list[str]
    train: Dataset
    """Columns `text`, `text_pair` (for pairs) and `labels`."""
    validation: Dataset
    sources: dict[str, dict[str, Any]]

    def summary(self) -> dict[str, Any]:
        """Sources, sizes and classes, for the run record."""
        return {**self.sources, "classes": self.classes}


def arguments(data: DataSettings, settings: dict[str, Any]) -> TrainingArguments:
    """What `TRAINER` takes beside model and examples."""
    return TrainingArguments(**settings)


def read(data: DataSettings) -> Examples:
    """Read and check the examples and number the classes.

    Classes are the distinct labels of the training examples in sorted order (integers as numbers), or those a hub data
    set declares. A fraction for validation is split off class by class, always in the same way for the same examples.

    Raises `SliceFineError` with every problem.
    """
    columns = [column for column in (data.text, data.text_pair, data.label) if column]
    tables = read_tables(data, columns)
    problems = []
    for name, table in tables.items():
        if not table.rows:
            problems.append(f"the {name} set is empty: {table.source} has no examples.")
        problems += shorten(_text_problems(table, [data.text, *([data.text_pair] if data.text_pair else [])]))
    labels, label_problems = _labels(tables, data.label)
    raise_all(problems + label_problems, "Data")

    names = tables["train"].class_names.get(data.label)
    known: list[int | str] = list(range(len(names))) if names else sorted(set(labels["train"]))
    if len(known) < 2:
        raise SliceFineError(f"Data: classification needs two classes or more; {data.train} has {len(known)}: {known}.")
    index = {label: number for number, label in enumerate(known)}
    unseen = [
        f"{place}: label {label!r} is not among the {len(known)} classes of the training examples."
        for name, table in tables.items()
        for place, label in zip(table.places, labels[name], strict=True)
        if label not in index
    ]
    if len(known) == len(labels["train"]) and (unseen or "validation" not in tables):
        raise SliceFineError(
            f"Data: the examples of a class share its label; in {data.label!r} of {data.train} each of the {len(known)} rows has "
            "one of its own. Set `data.label` to the column of the classes."
        )
    raise_all(shorten(unseen), "Data")

    sets = {name: _columns(table, data, [index[label] for label in labels[name]]) for name, table in tables.items()}
    sources: dict[str, dict[str, Any]] = {
        name: {"source": table.source, "fingerprint": table.fingerprint} for name, table in tables.items()
    }
    if isinstance(data.validation, float):
        kept, split_off = _split(sets["train"]["labels"], data.validation)
        if not split_off:
            raise SliceFineError(
                f"Data: the validation set is empty: a fraction of {data.validation} of the {len(kept)} examples of "
                f"{data.train} is less than one example of each class. Set `data.validation` to a larger fraction, or to a "
                "file."
            )
        whole = sets["train"]
        sets = {
            name: {column: [values[i] for i in rows] for column, values in whole.items()}
            for name, rows in (("train", kept), ("validation", split_off))
        }
        sources["validation"] = {
            "source": f"{data.validation} of train",
            "fingerprint": sources["train"]["fingerprint"],
        }
    for name, columns_of in sets.items():
        sources[name]["examples"] = len(columns_of["labels"])
    return Examples(
        classes=names or [str(label) for label in known],
        train=Dataset.from_dict(sets["train"]),
        validation=Dataset.from_dict(sets["validation"]),
        sources=sources,
    )


def prepare(recipe: Recipe, examples: Examples) -> Prepared:
    """Load tokenizer and model, and tokenize the examples. Padding is left to each batch."""
    settings = recipe.model
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(settings.name, trust_remote_code=False)
        if tokenizer.pad_token is None:  # decoders have none, and look for the last token before the padding
            tokenizer.pad_token = tokenizer.eos_token
        config = AutoConfig.from_pretrained(
            settings.name,
            num_labels=len(examples.classes),
            id2label=dict(enumerate(examples.classes)),
            label2id={name: number for number, name in enumerate(examples.classes)},
            problem_type="single_label_classification",
            pad_token_id=tokenizer.pad_token_id,
            trust_remote_code=False,
        )
    except (OSError, ValueError) as error:
        raise SliceFineError(_not_loaded(settings, error)) from error
    longest = min(
        tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or recipe.data.max_length
    )
    if recipe.data.max_length > longest:
        raise SliceFineError(
            f"`data.max_length` is at most what {settings.name} can read, {longest} tokens; got {recipe.data.max_length}."
        )
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            settings.name,
            config=config,
            dtype=settings.dtype,
            attn_implementation=settings.attn_implementation,
            output_loading_info=True,
            trust_remote_code=False,
        )
    except ImportError as error:  # of flash attention
        raise SliceFineError(f"`model.attn_implementation`: {str(error).splitlines()[0]}") from error
    except (OSError, ValueError) as error:
        raise SliceFineError(_not_loaded(settings, error)) from error

    def tokenize(batch: dict[str, list[Any]]) -> Any:
        return tokenizer(batch["text"], batch.get("text_pair"), truncation=True, max_length=recipe.data.max_length)

    texts = [column for column in examples.train.column_names if column != "labels"]
    return Prepared(
        model=model,
        tokenizer=tokenizer,
        train=examples.train.map(tokenize, batched=True, remove_columns=texts),
        validation=examples.validation.map(tokenize, batched=True, remove_columns=texts),
        collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=scores,
        new_modules=sorted({key.rpartition(".")[0] for key in report["missing_keys"]}),
    )


def load_base(name: str, folder: Path) -> PreTrainedModel:
    """The base model with the classes and dtype that `config.json` in the adapter's `folder` says."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return AutoModelForSequenceClassification.from_pretrained(
        name, config=config, dtype=config.dtype, trust_remote_code=False
    )


def scores(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy and macro F1, 0 to 1. Predictions are logits `(examples, classes)`, or a tuple that begins with them."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    predicted = np.argmax(logits, axis=-1)
    return {
        "accuracy": float(accuracy_score(prediction.label_ids, predicted)),
        "f1_macro": float(f1_score(prediction.label_ids, predicted, average="macro")),
    }


def _text_problems(table: Table, columns: list[str]) -> list[str]:
    problems = []
    for place, row in zip(table.places, table.rows, strict=True):
        for column in columns:
            text = row[column]
            if not isinstance(text, str):
                problems.append(f"{place}: {column!r} is a text; got {'null' if text is None else repr(text)}.")
            elif not text.strip():
                problems.append(f"{place}: {column!r} is empty.")
    return problems


def _labels(tables: dict[str, Table], column: str) -> tuple[dict[str, list[Any]], list[str]]:
    """The labels of each table as integers or strings, and what is wrong with them."""
    labels = {name: [row[column] for row in table.rows] for name, table in tables.items()}
    untyped = [name for name, table in tables.items() if not table.typed]
    if untyped and all(re.fullmatch(r"-?\d+", label) for name in untyped for label in labels[name]):
        labels |= {name: [int(label) for label in labels[name]] for name in untyped}
    problems = []
    first: dict[type, str] = {}
    for name, table in tables.items():
        names = table.class_names.get(column)
        bad = []
        for place, label in zip(table.places, labels[name], strict=True):
            if type(label) not in (int, str) or label == "":
                shown = "null" if label is None else "nothing" if label == "" else repr(label)
                bad.append(f"{place}: {column!r} is an integer or a string; got {shown}.")
                continue
            first.setdefault(type(label), f"{label!r} ({place})")
            if isinstance(label, int) and (label < 0 or (names is not None and label >= len(names))):
                most = f" to {len(names) - 1}" if names else " or above"
                bad.append(
                    f"{place}: label {label} is out of range; an integer label is 0{most} (-1 often means unlabelled)."
                )
        problems += shorten(bad)
    if len(first) > 1:
        problems.append(
            f"labels are all integers or all strings; {column!r} has {first[int]} and {first[str]}. Write all one way."
        )
    return labels, problems


def _columns(table: Table, data: DataSettings, labels: list[int]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {"text": [row[data.text] for row in table.rows]}
    if data.text_pair:
        columns["text_pair"] = [row[data.text_pair] for row in table.rows]
    return columns | {"labels": labels}


def _split(labels: list[int], fraction: float) -> tuple[list[int], list[int]]:
    """Row numbers that stay and that are split off: `fraction` of each class, and at least one of each stays."""
    rows_of: dict[int, list[int]] = defaultdict(list)
    for row, label in enumerate(labels):
        rows_of[label].append(row)
    shuffle = random.Random(0)  # the split is part of the data: runs that differ in their seed alone share it
    split_off: set[int] = set()
    for label in sorted(rows_of):
        rows = rows_of[label]
        split_off.update(shuffle.sample(rows, min(round(fraction * len(rows)), len(rows) - 1)))
    return [row for row in range(len(labels)) if row not in split_off], sorted(split_off)


def _not_loaded(settings: ModelSettings, error: Exception) -> str:
    return (
        "`model.name` is a folder with a pretrained model and its tokenizer, or the name of one on the hub; "
        f"{settings.name!r} did not load: {str(error).splitlines()[0]}"
    )
