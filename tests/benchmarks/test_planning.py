from __future__ import annotations

import json

import pytest

SMALL = "--threads 1 --models roberta-base-small mixtral-small --large llama-3.2-3b-small --batch 1 --tokens 8"


@pytest.mark.usefixtures("imported")
def test_it_runs_and_writes_every_figure(tmp_path, monkeypatch):
    import planning

    monkeypatch.setattr(planning, "SETTINGS", {name: planning.SETTINGS[name] for name in ("fp32", "bf16")})
    planning.main([*SMALL.split(), "--output", str(tmp_path)])
    (path,) = tmp_path.glob("planning-*.json")
    figures, rows, large = json.loads(path.read_text())["tables"]
    assert [row["verdict"] for row in figures["rows"]] == ["met", "met", "", "met"]
    assert {(row["settings"], row["method"]) for row in rows["rows"]} == {
        (settings, method) for settings in ("fp32", "bf16") for method in ("rows", "columns", "LoRA", "full")
    }
    assert all(row["real peak, bytes"] > row["real saved, bytes"] > 0 for row in rows["rows"])
    assert large["rows"][0]["saved by few layers / by all"] == 1
