"""A label that is a number, from the recipe to a model folder that transformers loads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from slicefine import SliceFineError
from slicefine.training.export import export
from slicefine.training.export_check import same_kernels
from slicefine.training.recipe import Recipe
from slicefine.training.record import RunRecord
from slicefine.training.run import train

GIVEN = {"ball": 0.0, "soup": 2.5, "moon": 5.0}


def rows(count: int) -> list[dict[str, Any]]:
    """Texts of three words; the label is the mean of their numbers."""
    words = [[list(GIVEN)[(n // 3**place) % 3] for place in range(3)] for n in range(count)]
    return [{"text": " ".join(text), "label": float(np.mean([GIVEN[word] for word in text]))} for text in words]


@pytest.fixture
def numbers(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "numbers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(54)))
    changed = {"data.train": str(path), "data.label_kind": "number", "training.num_train_epochs": 20}
    return settings | changed | {"training.learning_rate": 2e-2, "training.report_to": "none"}


def test_from_recipe_to_model_folder(numbers: dict[str, Any], tmp_path: Path) -> None:
    record = train(Recipe.from_flat(numbers))
    assert record.status == "finished"
    assert record.metrics["after"].keys() == {"loss", "pearson", "spearman", "mse"}
    assert record.metrics["after"]["mse"] < 0.5 * record.metrics["before"]["mse"]
    assert record.metrics["after"]["mse"] == pytest.approx(record.metrics["after"]["loss"], rel=1e-4)
    assert record.metrics["after"]["pearson"] > 0.8
    assert "classes" not in RunRecord.read(tmp_path / "run").data

    adapter, merged = tmp_path / "run" / "adapter", tmp_path / "merged"
    export(adapter, "merged", merged)
    config = AutoConfig.from_pretrained(merged)
    assert (config.num_labels, config.problem_type) == (1, "regression")
    batch = AutoTokenizer.from_pretrained(merged)(["ball ball ball", "moon moon moon"], return_tensors="pt")
    model = AutoModelForSequenceClassification.from_pretrained(merged).eval()
    base = AutoModelForSequenceClassification.from_pretrained(numbers["model.name"], config=config)
    tuned = PeftModel.from_pretrained(base, str(adapter)).eval()
    same_kernels(model)
    same_kernels(tuned)
    with torch.no_grad():
        low, high = model(**batch).logits[:, 0].tolist()
        assert torch.equal(model(**batch).logits, tuned(**batch).logits)
    assert low + 1 < high


def test_a_head_of_another_size_goes_through_training_and_export(numbers: dict[str, Any], tmp_path: Path) -> None:
    """As with a model that was tuned to three classes before."""
    classified = AutoModelForSequenceClassification.from_pretrained(numbers["model.name"], num_labels=3)
    classified.save_pretrained(tmp_path / "classified")
    AutoTokenizer.from_pretrained(numbers["model.name"]).save_pretrained(tmp_path / "classified")
    short = {"model.name": str(tmp_path / "classified"), "training.max_steps": 4, "slice.slide_every": 1}
    record = train(Recipe.from_flat(numbers | short))
    assert record.notes == [
        f"The head of 3 classes in the files of {tmp_path / 'classified'} was replaced by a new one of 1."
    ]
    assert record.modules_to_save == ["classifier"]
    export(tmp_path / "run" / "adapter", "merged", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.classifier.weight.shape == (1, 32)


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "high", True])
def test_what_is_no_number_is_found_before_training(value: Any, numbers: dict[str, Any], tmp_path: Path) -> None:
    path = Path(numbers["data.train"])
    path.write_text(path.read_text() + json.dumps({"text": "ball", "label": value}) + "\n")
    with pytest.raises(SliceFineError, match=r"numbers\.jsonl:55: 'label' must be a finite number; got "):
        train(Recipe.from_flat(numbers))
    assert not (tmp_path / "run").exists()


def test_numbers_as_classes_get_a_hint(numbers: dict[str, Any]) -> None:
    with pytest.raises(SliceFineError, match=r"To predict a number, set `data\.label_kind`"):
        train(Recipe.from_flat(numbers | {"data.label_kind": "class"}))
