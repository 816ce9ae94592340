from __future__ import annotations

import json

import pytest

TINY = "--threads 1 --rounds 2 --warmup 1 --batch 1 --tokens 8 --layers 1 --hidden 16 --intermediate 24 --heads 2 --vocab 32 --r 2"


@pytest.mark.usefixtures("imported")
def test_it_runs_and_writes_every_figure(tmp_path):
    import preflight

    preflight.main([*TINY.split(), "--output", str(tmp_path)])
    (path,) = tmp_path.glob("preflight-*.json")
    figures, rounds = json.loads(path.read_text())["tables"]
    assert [row["figure"] for row in figures["rows"]] == [
        "pre-flight / training step",
        "first pre-flight / training step",
        "check / training step",
    ]
    assert all(row["value"] > 0 for row in figures["rows"])
    assert len(rounds["rows"]) == 2
