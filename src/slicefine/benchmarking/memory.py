"""Memory of a training step, by method: bytes saved for backward, gradients, moments; on a GPU also the peak."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from slicefine.benchmarking.attaching import Attached
from slicefine.benchmarking.methods import FROZEN, Method
from slicefine.benchmarking.results import Row
from slicefine.benchmarking.saved_bytes import count
from slicefine.benchmarking.settings import REFERENCES
from slicefine.benchmarking.setups import Setup
from slicefine.benchmarking.speed import LEARNING_RATE, NEVER
from slicefine.benchmarking.timing import reason, release

MIB = 2**20
LORA8 = REFERENCES[1]
STEPS = 2
"""Steps before memory is read: the first makes the moments, the second has them from the beginning."""

INTRO = """\
Memory of a training step (forward, backward, AdamW) of models with random weights and batches of random inputs, {dtype}, on {device}{checkpointing}{compile}. One method \
after another in one process, each alone: what the one before held is given back first. MiB of 2^20 bytes. "saved": for backward at the end of the forward pass, every storage \
once, parameters and buffers left out; counted by autograd's own hooks, so it does not vary between runs, and on the model as it is written, also if it is compiled. "weights": parameters and buffers, masters and adapters among \
them. Slices that alternate stand on rows, where they keep more. "peak": the most that torch had allocated on the GPU during a step, after {steps} others."""


def memory(setup: Setup, methods: Sequence[Method]) -> tuple[list[Row], bool]:
    """One row a method, and whether Ctrl-C ended it; what fails is a row with the reason."""
    rows: list[Row] = []
    interrupted = False
    gc.freeze()  # what is there stays: it need not be looked through after every method
    with tqdm(methods, desc=f"{setup.of.name}, memory", unit="method", leave=False) as bar:
        try:
            for one in bar:
                rows.append(_row(setup, one))
                release()
        except KeyboardInterrupt:
            interrupted = True
        finally:
            gc.unfreeze()
    by_name = {row["method"]: row for row in rows}
    for row in rows:
        for part in ("saved MiB", "peak MiB"):
            for reference in (FROZEN, LORA8):
                row[f"{part} / {reference}"] = _over(row[part], by_name.get(reference, {}).get(part))
        row["not measured"] = row.pop("not measured")  # at the end
    return rows, interrupted


def _over(value: float | None, reference: float | None) -> float | None:
    return value / reference if value and reference else None


def _row(setup: Setup, method: Method) -> Row:
    empty = dict.fromkeys(("active", "saved MiB", "gradients MiB", "moments MiB", "weights MiB", "peak MiB"))
    try:
        return {"method": method.name, **_measured(setup, method), "not measured": ""}
    except Exception as error:  # a method that fails in any way is a row with the reason
        return {"method": method.name, **empty, "not measured": reason(error)}


def _measured(setup: Setup, method: Method) -> Row:
    attached = setup.attach(method, slide_every=NEVER)
    optimizer = attached.optimizer(LEARNING_RATE)
    batch = setup.batch(0)
    peak = None
    for number in range(STEPS + 1):
        if setup.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        _step(attached, optimizer, batch, number)
    if setup.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / MIB
    counted = count(attached.model, lambda: attached.model(**batch).loss)
    state = optimizer.state.values() if optimizer is not None else ()
    model = attached.model
    return {
        "active": attached.counts.active,
        "saved MiB": counted.saved / MIB,
        "gradients MiB": counted.gradients / MIB,
        "moments MiB": _size(t for of in state for t in of.values() if isinstance(t, Tensor)) / MIB,
        "weights MiB": _size([*model.parameters(), *model.buffers()]) / MIB,
        "peak MiB": peak,
    }


def _step(attached: Attached, optimizer: Any, batch: dict[str, Any], number: int) -> None:
    attached.model(**batch).loss.backward()
    if optimizer is not None:
        optimizer.step()
        if attached.after_step is not None:
            attached.after_step(number)
        optimizer.zero_grad()


def _size(tensors: Iterable[Tensor]) -> int:
    """Bytes, every storage once."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in found}.values())
