"""What is said of bfloat16 on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slicefine.training import precision
from slicefine.training.precision import bf16_notes
from slicefine.training.recipe import Recipe


def recipe(**settings: Any) -> Recipe:
    return Recipe.from_flat(
        {"task": "text-classification", "model.name": "m", "data.train": "t", "output": "o"} | settings
    )


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without instructions for bfloat16."""
    monkeypatch.setattr(precision, "_seconds", lambda dtype: 40.0 if dtype is torch.bfloat16 else 1.0)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("settings", "faster"),
    [
        ({"training.bf16": True}, "--training.bf16 false"),
        ({"model.dtype": "bfloat16"}, "--model.dtype float32"),
        ({"training.bf16": True, "model.dtype": "bfloat16"}, "--training.bf16 false --model.dtype float32"),
    ],
)
@pytest.mark.usefixtures("slow")
def test_where_it_is_slow_that_is_said_with_what_is_faster(settings: dict[str, Any], faster: str) -> None:
    says = f"On this CPU a product in bfloat16 takes 40 times as long as in float32. Faster here: {faster}."
    assert bf16_notes(recipe(**settings)) == [says]


@pytest.mark.usefixtures("slow")
def test_who_does_not_use_it_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bf16_notes(recipe()) == []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert bf16_notes(recipe(**{"training.bf16": True})) == []


def test_it_is_measured() -> None:
    assert 0 < precision._seconds(torch.float32) < 1
