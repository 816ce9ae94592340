from __future__ import annotations

import json

import pytest

TINY = "--threads 1 --rounds 1 --warmup 1 --batch 1 --tokens 8 --layers 1 --hidden 32 --intermediate 48 --heads 2 --vocab 64"


@pytest.mark.usefixtures("imported")
def test_it_runs_and_writes_every_figure(tmp_path, capsys):
    import step_time

    step_time.main([*TINY.split(), "--output", str(tmp_path)])
    (path,) = tmp_path.glob("step-time-*.json")
    figures, steps, moves, extra, raw = json.loads(path.read_text())["tables"]
    assert [row["variant"] for row in steps["rows"]] == [row["variant"] for row in raw["rows"]]
    assert {"frozen limit", "full", "LoRA r8 all-linear", "SliceFine row r1"} <= {r["variant"] for r in steps["rows"]}
    assert all(row["median ms"] > 0 for row in steps["rows"])
    assert len(moves["rows"]) == 6
    assert {row["target"] for row in figures["rows"]} >= {"at most 1.05", "at most 1", "at most 0.05"}

    # One layer, r = 1, fp32, 10 moves: 11 of the rows of each of 7 weights are trained and their originals are kept.
    row = next(row for row in extra["rows"] if row["variant"] == "SliceFine row r1")
    inputs = 6 * 32 + 48  # of q, k, v, o, gate and up; of down
    assert row["masters KiB"] == row["gradients KiB"] == inputs * 4 / 1024
    scalars = 7 * 4  # Adam's step
    assert row["moments KiB"] == (2 * inputs * 4 + scalars) / 1024
    originals = 11 * inputs * 4 / 1024
    assert (
        originals <= row["originals and all else KiB"] <= originals + 7 * 13 * 8 / 1024
    )  # indices and the declared step, int64
    assert "warm-up round" in capsys.readouterr().err
