"""The benchmarks are scripts beside the package; these tests import them from where they stand."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put the folder of the scripts on the path, and undo the number of threads that a script sets."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def imported(importable: None) -> None:
    """What the scripts import is there, and none of the garbage collector's business: they call it often."""
    import saved_activations
    import step_time

    assert saved_activations.main is not step_time.main
    gc.freeze()
