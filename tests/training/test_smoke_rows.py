"""Which examples a smoke test takes."""

from __future__ import annotations

from collections import Counter
from typing import Any

from classifiers import reviews, text_model, write_table

from slicefine.training.recipe import Recipe
from slicefine.training.smoke import smoke
from slicefine.training.smoke_rows import common, evenly, spread


def test_rows_of_every_class_where_they_are_sorted_by_class() -> None:
    labels = ["cat"] * 80 + ["dog"] * 40 + ["eel"]
    rows = spread(labels, common(labels, []), 64)
    counts = Counter(labels[row] for row in rows)
    assert counts == {"cat": 21, "dog": 21, "eel": 1}
    assert rows[0] == 0
    assert rows[20] > 70  # from end to end


def test_a_few_classes_that_are_validated_and_have_most_examples() -> None:
    labels = [number for number in range(20) for _ in range(1 + number)]
    assert common(labels, []) == set(range(12, 20))
    assert common(labels, [0, 1]) == {0, 1, *range(14, 20)}


def test_evenly() -> None:
    assert evenly(range(10), 4) == [0, 2, 5, 7]
    assert evenly(range(3), 4) == [0, 1, 2]


def test_texts_sorted_by_class_and_classes_that_are_not_all_tried(settings: dict[str, Any], tmp_path: Any) -> None:
    rows = [{"text": row["text"], "label": f"c{number}"} for number in range(12) for row in reviews(range(1, 9))]
    train = write_table(tmp_path / "many.jsonl", rows)
    held = write_table(tmp_path / "held.jsonl", rows[::5])
    model = text_model(tmp_path / "model")
    of = {"model.name": str(model), "data.train": str(train), "data.validation": str(held)}
    recipe = Recipe.from_flat(settings | of)
    (tmp_path / "smoke").mkdir()
    said = "\n".join(smoke(recipe, tmp_path / "smoke"))
    assert "finished: 4 steps" in said
