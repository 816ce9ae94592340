from __future__ import annotations

import json

import pytest

TINY = (
    "--threads 1 --rounds 1 --warmup 1 --batch 1 --tokens 8 --layers 1 --hidden 16 --intermediate 24 --heads 2 --vocab 32 "
    "--switches 7 --long 60 --moves 3 --r 2"
)


@pytest.mark.usefixtures("imported")
def test_it_runs_and_writes_every_figure(tmp_path):
    import exchange

    exchange.main([*TINY.split(), "--output", str(tmp_path)])
    (path,) = tmp_path.glob("exchange-*.json")
    figures, rounds = json.loads(path.read_text())["tables"]
    time, differing, memory = figures["rows"]
    assert time["value"] > 0
    assert differing["value"] == 0
    assert memory["value"] == 1.0
    assert len(rounds["rows"]) == 1


@pytest.mark.usefixtures("imported")
def test_an_exchange_that_loses_a_bit_is_counted(monkeypatch):
    import argparse

    import exchange

    from slicefine.tuner.originals import Originals

    lossless = Originals.exchange

    def lossy(self, weight):
        lossless(self, weight)
        weight.data[-1, -1] += 1e-3

    options = argparse.Namespace(
        seed=0, hidden=16, intermediate=24, layers=1, heads=2, vocab=32, tokens=8, batch=1, r=2, moves=3, switches=4
    )
    assert exchange.differing_after_switches(options) == 0
    monkeypatch.setattr(Originals, "exchange", lossy)
    assert exchange.differing_after_switches(options) > 0
