from __future__ import annotations

from typing import Any

import pytest
import torch

from slicefine.training import frozen_limit
from slicefine.training import run as runs
from slicefine.training.recipe import Recipe


def test_long_runs_are_measured_and_left_as_they_were(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the share allows: the weights are those that were saved, and what wants a gradient does so still."""
    seen: dict[str, Any] = {}
    measure = frozen_limit.measure

    def watched(trainer: Any, seconds: float, step_seconds: float) -> Any:
        before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        wanting = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
        found = measure(trainer, 1e6, step_seconds)
        after = trainer.model.state_dict()
        seen["same"] = all(torch.equal(before[name], after[name]) for name in before)
        seen["wanting"] = wanting == [name for name, p in trainer.model.named_parameters() if p.requires_grad]
        seen["grads"] = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        return found

    monkeypatch.setattr(frozen_limit, "measure", watched)
    record = runs.train(recipe)
    ratio = record.timings["frozen_limit_ratio"]
    assert 0 < ratio["least"] <= ratio["median"] <= ratio["greatest"]
    assert seen == {"same": True, "wanting": True, "grads": []}


def test_short_runs_are_not(recipe: Recipe) -> None:
    assert runs.train(recipe).timings["frozen_limit_ratio"] is None


def test_a_model_that_takes_no_gradient_where_it_begins_is_not_measured(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Swin's patch embeddings give a tuple, say: the run has ended well all the same."""
    monkeypatch.setattr(frozen_limit, "SHARE", 1e9)

    def refuse(*_: Any) -> None:
        raise AttributeError("'tuple' object has no attribute 'requires_grad_'")

    monkeypatch.setattr(frozen_limit, "_frozen", refuse)
    record = runs.train(recipe)
    assert (record.status, record.timings["frozen_limit_ratio"]) == ("finished", None)
