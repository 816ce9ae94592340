"""What bfloat16 costs on this machine."""

from __future__ import annotations

import statistics
import time

import torch

from slicefine.training.recipe import Recipe
from slicefine.training.threads import cpu_threads

WORTH_TELLING = 3.0
"""How many times as long as in float32."""
SIZE = 256
REPEATS = 5


def bf16_notes(recipe: Recipe) -> list[str]:
    """That a run in bfloat16 is slow here: a CPU without instructions for it computes number by number."""
    half = {
        "training.bf16 false": recipe.training.bf16,
        "model.dtype float32": recipe.model.dtype == "bfloat16",
    }
    if torch.accelerator.is_available() or not any(half.values()):
        return []
    times = _seconds(torch.bfloat16) / _seconds(torch.float32)
    if times < WORTH_TELLING:
        return []
    faster = " ".join(f"--{flag}" for flag, given in half.items() if given)
    return [f"On this CPU a product in bfloat16 takes {times:.0f} times as long as in float32. Faster here: {faster}."]


def _seconds(dtype: torch.dtype) -> float:
    """Of a product of matrices, the median."""
    a, b = torch.ones(SIZE // 4, SIZE, dtype=dtype), torch.ones(SIZE, SIZE, dtype=dtype)
    found = []
    with cpu_threads(1):  # several would wait for one another where the cores are busy, which says nothing of the dtype
        for _ in range(REPEATS + 1):
            began = time.perf_counter()
            torch.mm(a, b)
            found.append(time.perf_counter() - began)
    return statistics.median(found[1:])  # the first one prepares
