from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from slicefine import SliceFineError
from slicefine.training import labels
from slicefine.training.data import Table


def table(values: list[Any], source: str = "train.jsonl", *, typed: bool = True, **declared: list[str]) -> Table:
    return Table(
        source=source,
        fingerprint="",
        rows=[{"label": value} for value in values],
        places=[f"{source}:{number}" for number in range(1, len(values) + 1)],
        typed=typed,
        class_names=declared,
    )


def refusal(function: Any, train: Table, validation: Table | None = None, **settings: Any) -> str:
    tables = {"train": train} | ({"validation": validation} if validation else {})
    with pytest.raises(SliceFineError) as error:
        function(tables, "label", where="Data", **settings)
    return str(error.value)


def test_one_numbering_for_all_sets() -> None:
    tables = {"train": table([10, 9, 2, 9]), "validation": table([9, 2, 10], "other.jsonl")}
    found = labels.number(tables, "label", where="Data")
    assert found.classes == ["2", "9", "10"]
    assert found.numbers == {"train": [2, 1, 0, 1], "validation": [1, 0, 2]}


def test_zeros_before_a_number_are_a_part_of_the_name() -> None:
    tables = {"train": table(["010", "001", "7", "010", "007"], "train.csv", typed=False)}
    assert labels.number(tables, "label", where="Data").classes == ["001", "007", "010", "7"]


def test_classes_that_are_hardly_there_are_noted() -> None:
    tables = {"train": table(["a", "a", "b", "c", "c", "d"]), "validation": table(["a", "b", "a"], "other.jsonl")}
    assert labels.number(tables, "label", where="Data").notes == [
        "Classes with one training example alone: 'b', 'd'.",
        "Classes without a validation example: 'c', 'd'.",
    ]
    tables = {"train": table([0, 0, 2, 2], label=["no", "maybe", "yes"])}
    assert labels.number(tables, "label", where="Data").notes == ["Classes without a training example: 'maybe'."]
    tables = {"train": table([0, 0, 1, 1])}
    assert labels.number(tables, "label", where="Data").notes == []


def test_of_many_classes_a_few_are_named() -> None:
    train = [number for number in range(9) for _ in range(2)]
    assert labels.not_validated([f"c{number}" for number in range(9)], train, [0]) == [
        "Classes without a validation example: 'c1', 'c2', 'c3' and 5 more."
    ]


def test_a_label_that_training_lacks() -> None:
    message = refusal(labels.number, table([0, 1, 0]), table([0, 7, 8], "other.jsonl"))
    assert "other.jsonl:2: label 7 is not among the 2 classes of the training examples." in message
    assert "other.jsonl:3: label 8" in message


@pytest.mark.parametrize("typed", [True, False])
def test_numbers_are_no_classes_and_the_message_says_what_they_could_be(typed: bool) -> None:
    values = [0.5, 1.25, 3.0] if typed else ["0.5", "1.25", "3.0"]
    message = refusal(labels.number, table(values, typed=typed))
    assert "To predict a number, set `data.label_kind` to number." in message
    assert "label_kind" not in refusal(labels.number, table(["x", "y", "z"]))


def test_fractions_are_no_classes_in_a_file_of_texts_either() -> None:
    """As in one where numbers are numbers; with a word among them they are words, and folders may be called so."""
    values = ["0.5", "1.5", "3", "3"] * 2
    message = refusal(labels.number, table(values, "train.csv", typed=False))
    assert "4 problems" in message
    assert (
        "train.csv:2: 'label' is an integer or a string; got 1.5. To predict a number, set `data.label_kind` to number."
        in message
    )
    assert (
        refusal(labels.number, table([0.5, 1.5] * 2))
        .splitlines()[1]
        .endswith(
            "train.jsonl:1: 'label' is an integer or a string; got 0.5. To predict a number, set `data.label_kind` to number."
        )
    )
    for others in (table([*values, "high", "high"], "train.csv", typed=False), table(values, "photos", typed=False)):
        assert "1.5" in labels.number({"train": others}, "label", where="Data").classes
    integers = table(["10", "9"] * 2, "train.csv", typed=False)
    assert labels.number({"train": integers}, "label", where="Data").classes == ["9", "10"]


def test_what_was_found_elsewhere_is_raised_with_it() -> None:
    message = refusal(labels.number, table([0, None, 1]), problems=["train.jsonl:1: 'text' is empty."])
    assert "2 problems" in message
    assert "train.jsonl:1: 'text' is empty." in message
    assert "train.jsonl:2: 'label' is an integer or a string; got null." in message
    assert "the train set is empty" in refusal(labels.number, table([]))


def test_numbers_to_predict() -> None:
    tables = {"train": table([1, 2.5, -3]), "validation": table(["1.5", " 2"], "other.csv", typed=False)}
    assert labels.values(tables, "label", where="Data") == {"train": [1.0, 2.5, -3.0], "validation": [1.5, 2.0]}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "", "2.5", True, [1.0], 10**400], ids=repr)
def test_what_is_no_number_is_named_by_line(value: Any) -> None:
    message = refusal(labels.values, table([1.0, value, 2.0, value]))
    assert "2 problems" in message
    assert "train.jsonl:2: 'label' must be a finite number; got " in message
    assert "train.jsonl:4: 'label' must be a finite number; got " in message


@pytest.mark.parametrize("value", ["nan", "inf", "", "two"])
def test_what_is_no_number_in_a_file_of_texts(value: str) -> None:
    assert f"other.csv:2: 'label' must be a finite number; got {value!r}." in refusal(
        labels.values, table([1, 2]), table(["1", value], "other.csv", typed=False)
    ).replace("got nothing.", "got ''.")


def test_labels_that_are_all_one_number() -> None:
    assert "a regression needs labels that differ; all 3 in 'label' of train.jsonl are 2.0." in refusal(
        labels.values, table([2, 2, 2])
    )


def test_a_fraction_of_each_class_is_split_off_and_one_of_each_stays(tmp_path: Path) -> None:
    numbers = [0] * 10 + [1] * 20 + [2]
    kept, off = labels.split(numbers, 0.2)
    assert sorted([*kept, *off]) == list(range(31))
    assert [[numbers[row] for row in off].count(n) for n in range(3)] == [2, 4, 0]
    assert labels.split(numbers, 0.2) == (kept, off)
