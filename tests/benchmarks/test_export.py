from __future__ import annotations

import argparse
import json
import sys
import warnings

import pytest
import torch

TINY = (
    "--threads 1 --repeats 1 --hidden 16 --intermediate 24 --layers 1 --heads 2 --vocab 64 --r 2 --steps 3 --tokens 8"
)


def test_it_runs_and_writes_every_figure(tmp_path, monkeypatch):
    import export

    def here(options, *arguments):
        """What the processes do, without the seconds that each takes to import."""
        monkeypatch.setattr(sys, "argv", ["-c", "1", *arguments])
        with warnings.catch_warnings():
            exec(export.BARE + (export.EXPORT if arguments else ""), {})
        return 2**28 + 2**20 * len(arguments)

    monkeypatch.setattr(export, "peak", here)
    export.main([*TINY.split(), "--output", str(tmp_path)])
    (path,) = tmp_path.glob("export-*.json")
    figures, processes = json.loads(path.read_text())["tables"]
    memory, verified, differing, lora, rounded = figures["rows"]
    assert memory["value"] > 0
    assert verified["value"] == memory["value"]
    assert differing["value"] == 0
    assert lora["value"] <= 1e-5
    assert lora["value"] < rounded["value"]
    assert len(processes["rows"]) == 1
    assert processes["rows"][0]["imports alone"] == 2**28 / 1e6


def test_memory_is_that_of_the_process_itself_however_large_the_one_that_starts_it(monkeypatch):
    import export

    options, large = argparse.Namespace(threads=1), torch.ones(2**28, dtype=torch.uint8)
    monkeypatch.setattr(export, "BARE", "")
    bare = export.peak(options)
    monkeypatch.setattr(export, "PEAK", "held = b'x' * 2**26\n" + export.PEAK)
    assert export.peak(options) - bare == pytest.approx(2**26, rel=0.05)
    assert bare < large.nbytes / 8


def test_a_tensor_that_differs_is_counted(tmp_path):
    import export
    from safetensors.torch import save_file

    state = {"a": torch.ones(3), "b": torch.ones(2), "c": torch.ones(2), "d": torch.ones(1)}
    save_file(state, tmp_path / "model.safetensors")
    assert export.differing(tmp_path, state) == 0
    changed = {"a": torch.tensor([1, 1, 1.0001]), "b": torch.ones(2).bfloat16(), "d": state["d"], "e": torch.ones(1)}
    assert export.differing(tmp_path, changed) == 4
