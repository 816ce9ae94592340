"""Memory of a training step, by method: bytes saved for backward, gradients, moments; on a GPU also the peak.

On a GPU steps are run. On a CPU, which has no such peak, the same graph is run without values, so that models of any size are counted.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from slicefine.benchmarking.attaching import Attached
from slicefine.benchmarking.counting import Need, dense_deltas, needed, size
from slicefine.benchmarking.methods import Method
from slicefine.benchmarking.results import Row
from slicefine.benchmarking.saved_bytes import count
from slicefine.benchmarking.settings import REFERENCES
from slicefine.benchmarking.setups import NEVER, Setup
from slicefine.benchmarking.speed import LEARNING_RATE
from slicefine.benchmarking.timing import reason, release

MIB = 2**20
STEPS = 2
"""Steps before memory is read: the first makes the moments, the second has them from the beginning."""

INTRO = """\
Memory of a training step (forward, backward, AdamW) of models with random weights and batches of random inputs, {dtype}, on {device}{checkpointing}{compile}. One method \
after another in one process, each alone. MiB of 2^20 bytes. "saved": for backward at the end of the forward pass, every storage \
once, parameters and buffers left out; counted by autograd's own hooks, so it does not vary between runs, and on the model as it is written, also if it is compiled. "weights": parameters and buffers, masters and adapters among \
them. Slices that alternate stand on rows, where they keep more. {how}"""
HOW = {
    "cuda": f'"peak": the most that torch had allocated on the GPU during a step, after {STEPS} others.',
    "cpu": "The graph was run on tensors that have a shape and no values.",
}
"""Device -> how it was found."""


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
            for reference in REFERENCES:
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
    need, peak = (needed(setup, method), None) if setup.device == "cpu" else _run(setup, method)
    return {
        "active": need.active,
        "saved MiB": need.step.saved / MIB,
        "gradients MiB": need.step.gradients / MIB,
        "moments MiB": need.moments / MIB,
        "weights MiB": need.weights / MIB,
        "peak MiB": peak and peak / MIB,
    }


def _run(setup: Setup, method: Method) -> tuple[Need, int]:
    """What real steps need, and the most bytes that torch had allocated on the GPU during one."""
    attached = setup.attach(method, slide_every=NEVER)
    model, optimizer, batch = attached.model, attached.optimizer(LEARNING_RATE), setup.batch(0)
    for number in range(STEPS + 1):
        if setup.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        _step(attached, optimizer, batch, number)
    peak = torch.cuda.max_memory_allocated() if setup.device == "cuda" else 0
    with dense_deltas():
        step = count(model, lambda: model(**batch).loss)
    state = optimizer.state.values() if optimizer is not None else ()
    moments = size(tensor for of in state for tensor in of.values() if isinstance(tensor, Tensor))
    weights = size([*model.parameters(), *model.buffers()])
    return Need(active=attached.counts.active, step=step, moments=moments, weights=weights), peak


def _step(attached: Attached, optimizer: Any, batch: dict[str, Any], number: int) -> None:
    attached.model(**batch).loss.backward()
    if optimizer is not None:
        optimizer.step()
        if attached.after_step is not None:
            attached.after_step(number)
        optimizer.zero_grad()
