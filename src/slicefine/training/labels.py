"""Labels of examples, whatever the examples are: numbered classes, or numbers to predict; and what is wrong with them."""

from __future__ import annotations

import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slicefine.errors import SliceFineError, listed, raise_all
from slicefine.training.data import Table, shorten
from slicefine.training.metrics import scores as _scores_of_names

scores = _scores_of_names(("accuracy", "f1_macro"))
INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")
"""As integers are written; 007 is a name."""
HINT = " To predict a number, set `data.label_kind` to number."


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Numbered classes; `numbers` index `classes`."""

    classes: list[str]
    numbers: dict[str, list[int]]
    """Of each table, row by row."""
    notes: list[str] = field(default_factory=list)
    """What is no mistake, and worth knowing: classes that are hardly there."""


def number(tables: dict[str, Table], column: str, *, where: str, problems: Sequence[str] = ()) -> Labels:
    """Check the labels in `column` of `"train"` and, if it is there, `"validation"`, and number their classes.

    Classes are the distinct labels of the training examples in sorted order (integers as numbers), or those a hub data
    set declares.

    Raises `SliceFineError` with every problem, and with the `problems` already found elsewhere, as found in `where`.
    """
    labels, label_problems = _labels(tables, column)
    raise_all([*_empty(tables), *problems, *label_problems], where)
    train = tables["train"]
    names = train.class_names.get(column)
    known: list[int | str] = list(range(len(names))) if names else sorted(set(labels["train"]))
    if len(known) < 2:
        raise SliceFineError(
            f"{where}: classification needs two classes or more; {train.source} has {len(known)}: {known}."
        )
    index = {label: number for number, label in enumerate(known)}
    unseen = [
        f"{place}: label {label!r} is not among the {len(known)} classes of the training examples."
        for name, table in tables.items()
        for place, label in zip(table.places, labels[name], strict=True)
        if label not in index
    ]
    if len(known) == len(labels["train"]) and (unseen or "validation" not in tables):
        hint = HINT if all(_float(row[column], typed=train.typed) is not None for row in train.rows) else ""
        raise SliceFineError(
            f"{where}: the examples of a class share its label; in {column!r} of {train.source} each of the {len(known)} rows "
            f"has one of its own. Set `data.label` to the column of the classes.{hint}"
        )
    raise_all(shorten(unseen), where)
    classes = names or [str(label) for label in known]
    numbers = {name: [index[label] for label in of_table] for name, of_table in labels.items()}
    counts = Counter(numbers["train"])
    notes = [
        *_note("without a training example", [name for n, name in enumerate(classes) if not counts[n]]),
        *_note("with one training example alone", [name for n, name in enumerate(classes) if counts[n] == 1]),
    ]
    if "validation" in numbers:
        notes += not_validated(classes, numbers["train"], numbers["validation"])
    return Labels(classes=classes, numbers=numbers, notes=notes)


def not_validated(classes: list[str], train: list[int], validation: list[int]) -> list[str]:
    """A note of the classes of the training examples that no validation example is of; empty if there is none."""
    absent = sorted(set(train) - set(validation))
    return _note("without a validation example", [classes[n] for n in absent])


def values(
    tables: dict[str, Table], column: str, *, where: str, problems: Sequence[str] = ()
) -> dict[str, list[float]]:
    """The labels of a regression: finite numbers, or texts that are numbers where the file has texts alone (CSV).

    Raises as `number`; those of `"train"`, if it is there, must differ.
    """
    found: dict[str, list[float]] = {}
    wrong = [*_empty(tables), *problems]
    for name, table in tables.items():
        bad, numbers = [], []
        for place, row in zip(table.places, table.rows, strict=True):
            value = _float(row[column], typed=table.typed)
            if value is None:
                bad.append(f"{place}: {column!r} must be a finite number; got {_shown(row[column])}.")
            else:
                numbers.append(value)
        found[name] = numbers
        wrong += shorten(bad)
    raise_all(wrong, where)
    if "train" in found and len(set(found["train"])) < 2:
        raise SliceFineError(
            f"{where}: a regression needs labels that differ; all {len(found['train'])} in {column!r} of "
            f"{tables['train'].source} are {found['train'][0]}."
        )
    return found


def split(labels: list[int], fraction: float) -> tuple[list[int], list[int]]:
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


def _empty(tables: dict[str, Table]) -> list[str]:
    return [
        f"the {name} set is empty: {table.source} has no examples." for name, table in tables.items() if not table.rows
    ]


def _labels(tables: dict[str, Table], column: str) -> tuple[dict[str, list[Any]], list[str]]:
    """The labels of each table as integers or strings, and what is wrong with them."""
    labels = {name: [row[column] for row in table.rows] for name, table in tables.items()}
    untyped = [name for name, table in tables.items() if not table.typed]
    if untyped and all(INTEGER.fullmatch(label) for name in untyped for label in labels[name]):
        labels |= {name: [int(label) for label in labels[name]] for name in untyped}
    # What a typed file would have as fractions; folders may be called so.
    files = [name for name in untyped if Path(tables[name].source).suffix.lower() == ".csv"]
    fractions = files and all(_float(label, typed=False) is not None for name in files for label in labels[name])
    problems = []
    first: dict[type, str] = {}
    for name, table in tables.items():
        names = table.class_names.get(column)
        bad = []
        for place, label in zip(table.places, labels[name], strict=True):
            fraction = isinstance(label, float) or (fractions and name in files and not re.fullmatch(r"-?\d+", label))
            if type(label) not in (int, str) or label == "" or fraction:
                hint = HINT if fraction else ""
                bad.append(
                    f"{place}: {column!r} is an integer or a string; got {label if fraction else _shown(label)}.{hint}"
                )
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


def _float(value: Any, *, typed: bool) -> float | None:
    """`value` as a finite float; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float) if typed else str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _shown(label: Any) -> str:
    return "null" if label is None else "nothing" if label == "" else repr(label)


def _note(what: str, classes: list[str]) -> list[str]:
    return [f"Classes {what}: {listed(map(repr, classes))}."] if classes else []
