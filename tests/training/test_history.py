from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slicefine.training import run as runs
from slicefine.training.progress import Interrupt
from slicefine.training.recipe import Recipe


def read(folder: str) -> dict[str, Any]:
    return json.loads(Path(folder, "history.json").read_text(encoding="utf-8"))


def test_losses_validations_and_moves(recipe: Recipe) -> None:
    record = runs.train(recipe)
    found = read(recipe.output)
    losses = [entry for entry in found["log"] if "loss" in entry]
    validations = [entry for entry in found["log"] if "eval_loss" in entry]
    assert [entry["step"] for entry in losses] == [1, 2, 4, 6, 8, 10, 12]
    assert [entry["step"] for entry in validations] == [6, 12]
    assert all({"learning_rate", "grad_norm", "slicefine/moves"} <= entry.keys() for entry in losses)
    assert found["moves"] == [4, 8]
    assert len(found["moves"]) == record.moves


def test_positions_at_the_start_and_after_a_move(recipe: Recipe) -> None:
    runs.train(recipe)
    places = {
        entry["step"]: value
        for entry in read(recipe.output)["log"]
        for key, value in entry.items()
        if key == "slicefine/position/encoder.layer.0.attention.self.query"
        or key.endswith("/position/bert.encoder.layer.0.attention.self.query")
    }
    # Rows 0-1, columns 0-1, rows 2-3, and after the last step columns 2-3, which nothing trains.
    assert places == {1: 0, 4: 0, 8: 2, 12: 2}


def test_a_resumed_run_has_the_whole_history(
    recipe: Recipe, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Recipe.from_flat(settings | {"output": str(tmp_path / "whole")})
    runs.train(whole)
    with monkeypatch.context() as patch:
        patch.setattr(
            Interrupt,
            "on_step_begin",
            lambda self, args, state, control, **_: setattr(self, "asked", state.global_step == 7),
        )
        assert runs.train(recipe).steps == 8
    assert [entry["step"] for entry in timeless(recipe.output)] == [1, 2, 4, 6, 6, 8]
    assert runs.train(recipe, resume=True).status == "finished"
    assert timeless(recipe.output) == timeless(whole.output)


def timeless(folder: str) -> list[dict[str, Any]]:
    """Losses and validations without their speeds."""
    found = [entry for entry in read(folder)["log"] if "loss" in entry or "eval_loss" in entry]
    return [{key: value for key, value in entry.items() if not key.endswith(("time", "per_second"))} for entry in found]
