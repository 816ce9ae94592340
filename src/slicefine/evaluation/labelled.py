"""The labelled examples that a classifier is scored on, their labels in the classes of the model."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from slicefine.errors import SHOWN, SliceFineError, listed, raise_all
from slicefine.evaluation import inputs
from slicefine.evaluation.inputs import Examples
from slicefine.evaluation.sets import LabelledSet
from slicefine.training.data import Table, shorten
from slicefine.training.labels import INTEGER, values

HIDDEN = "-1 stands for a hidden label: those of GLUE's test sets are not public. Score the validation split."


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A set that has been read and checked."""

    of: LabelledSet
    examples: Examples
    rows: list[int]
    """Those that are scored, from 0."""
    labels: dict[int, Any]
    """By row: the name of a class of the model, or a float."""
    texts: dict[str, str]
    """`text`, and of pairs `text_pair` -> its column; none of images and clips."""
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.of.name

    @property
    def source(self) -> dict[str, Any]:
        """What the results say of it."""
        table = self.examples.table
        split = {} if self.of.data.train_split == "train" else {"split": self.of.data.train_split}
        return {
            "source": table.source, **split, "fingerprint": table.fingerprint, "examples": len(table.rows),
            "notes": self.notes,
        }  # fmt: skip


def read(chosen: LabelledSet, task: str, config: Any, limit: int | None) -> Labelled:
    """Read a set; with a `limit`, as many of its examples, evenly spaced, because sets are often sorted by class.

    Raises `SliceFineError` with every problem of its examples and labels, by file and line.
    """
    examples = inputs.read(task, chosen.data, config)
    table, column = examples.table, chosen.data.label
    count = len(table.rows)
    raise_all([] if count else [f"{table.source} has no examples."], "Test sets")
    notes: list[str] = []
    found: list[Any]
    if chosen.data.label_kind == "number":
        if all(row[column] in (-1, "-1") for row in table.rows):
            raise SliceFineError(f"Test sets: all {count} labels of {table.source} are -1. {HIDDEN}")
        found = values({"test": table}, column, where="Test sets")["test"]
    else:
        found, notes = _names(table, column, classes_of(config), own=chosen.own)
    rows = list(range(count)) if limit is None or limit >= count else [n * count // limit for n in range(limit)]
    bad = examples.refuse_bad(rows)
    if bad:
        notes.append(
            f"{len(bad)} of {len(rows)} files of {table.source} are left out, because they cannot be used, the first: "
            + next(f"{table.places[row]}: {problem}" for row, problem in bad.items())
        )
    rows = [row for row in rows if row not in bad]
    raise_all([] if rows else [f"no file of {table.source} can be used."], "Test sets")
    columns = {"text": chosen.data.text, "text_pair": chosen.data.text_pair} if task == "text-classification" else {}
    return Labelled(
        of=chosen,
        examples=examples,
        rows=rows,
        labels={row: found[row] for row in rows},
        texts={name: column for name, column in columns.items() if column},
        notes=[*chosen.notes, *notes],
    )


def classes_of(config: Any) -> list[str]:
    """Names of the model's classes, in the order of its outputs."""
    return [str(config.id2label[number]) for number in range(config.num_labels)]


def head_problems(config: Any, sets: list[LabelledSet]) -> list[str]:
    """Why a model with this configuration has no answer to what the sets ask."""
    problems = []
    classes = classes_of(config)
    if config.problem_type == "multi_label_classification":
        problems.append("the model gives an example several classes (multi_label_classification); one is scored.")
    if len(set(classes)) < len(classes):
        problems.append(
            f"the model has classes of the same name: {listed(sorted(classes))}. Correct id2label in its config.json."
        )
    for chosen in sets:
        wanted = chosen.data.label_kind
        if wanted == "number" and len(classes) > 1:
            problems.append(
                f"{chosen.name} asks for a number; the model has {len(classes)} classes ({listed(classes)})."
            )
        if wanted == "class" and len(classes) == 1:
            problems.append(f"{chosen.name} asks for a class; the model predicts a number (num_labels is 1).")
    return problems


def _names(table: Table, column: str, classes: list[str], *, own: bool) -> tuple[list[str], list[str]]:
    """The class of each row by its name in the model, and notes of how it was found."""
    known = set(classes)
    unnamed = _unnamed(classes)
    declared = table.class_names.get(column)
    if declared and set(declared) != known and not (unnamed and len(declared) == len(classes)):
        raise SliceFineError(
            f"A model is scored on the classes that it has. {table.source} has {len(declared)} ({listed(declared)}), the model "
            f"{len(classes)} ({listed(classes)}). Score it on a set with the same classes."
        )
    names = declared if declared and not unnamed else None
    notes: list[str] = []
    labels = [_integer(row[column], known, typed=table.typed) for row in table.rows]
    named = any(isinstance(label, int) and str(label) in known for label in labels)
    by_number = False
    found, problems, hidden, unknown = [], [], [], False
    for place, label in zip(table.places, labels, strict=True):
        if isinstance(label, bool) or not isinstance(label, int | str):
            problems.append(
                f"{place}: {column!r} is an integer or a string; got {'null' if label is None else repr(label)}."
            )
        elif isinstance(label, str) and label in known:
            found.append(label)
        elif label == -1:
            hidden.append(place)
        elif isinstance(label, int) and names and 0 <= label < len(names):
            found.append(names[label])
        elif isinstance(label, int) and not names and str(label) in known:
            found.append(str(label))
        elif isinstance(label, int) and not names and not named and (own or unnamed) and 0 <= label < len(classes):
            found.append(classes[label])
            by_number = True
        else:
            problems.append(f"{place}: label {label!r} is not among the {len(classes)} classes of the model.")
            unknown = True
    if hidden:
        problems.insert(0, f"{hidden[0]}: {len(hidden)} of {len(table.rows)} labels are -1. {HIDDEN}")
    known_ones = f", for a model with the classes {listed(classes, SHOWN)}" if unknown else ""
    raise_all(shorten(problems), f"Test sets{known_ones}")
    if by_number:
        numbers = listed(f"{number} = {name}" for number, name in enumerate(classes))
        notes.append(f"The labels of {table.source} are taken as the numbers of the model's classes: {numbers}.")
    return found, notes


def _integer(label: Any, known: Collection[str], *, typed: bool) -> Any:
    """The label; as an integer if it is one in a file that has texts alone, and is no name of a class."""
    text = isinstance(label, str) and not typed and label not in known
    return int(label) if text and INTEGER.fullmatch(label) else label


def _unnamed(classes: list[str]) -> bool:
    """Whether the names are numbers, or transformers' stand-ins for names."""
    return any(classes == [f"{word}{number}" for number in range(len(classes))] for word in ("", "LABEL_"))
