from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slicefine.training import run as runs
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


def test_a_resumed_run_has_the_whole_history(recipe: Recipe, settings: dict[str, Any], tmp_path: Path) -> None:
    whole = Recipe.from_flat(settings | {"output": str(tmp_path / "whole")})
    runs.train(whole)
    stopped = Recipe.from_flat(settings | {"training.num_train_epochs": 2, "output": str(tmp_path / "stopped")})
    runs.train(stopped)
    (tmp_path / "stopped" / "history.json").unlink()
    last = tmp_path / "stopped" / "checkpoints" / "checkpoint-12"
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    runs.train(stopped, resume=True)
    timeless = (
        "eval_runtime",
        "eval_samples_per_second",
        "eval_steps_per_second",
        "train_runtime",
        "train_samples_per_second",
    )
    first, second = (
        [
            {
                k: v
                for k, v in entry.items()
                if k not in (*timeless, "train_steps_per_second", "train_loss", "total_flos")
            }
            for entry in read(str(one))["log"]
        ]
        for one in (tmp_path / "whole", tmp_path / "stopped")
    )
    assert [entry for entry in first if "loss" in entry or "eval_loss" in entry] == [
        entry for entry in second if "loss" in entry or "eval_loss" in entry
    ]
