"""What would be silently wrong, found: parameters that something else has changed, stale gradients, ranks that differ."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch

from slicefine.errors import SliceFineError
from slicefine.tuner.base_layers import same_values

if TYPE_CHECKING:
    from slicefine.tuner.layer import SliceLayer


def check_written(layer: SliceLayer) -> None:
    """Raise `SliceFineError` if the weight does not follow the parameters of the installed adapter.

    Steps of optimizers are written into the weight by hooks. Whatever else changes a parameter is found here, by value:
    version counters tell nothing, fused optimizers do not raise them.
    """
    adapter = layer.installed
    if adapter is None or layer.is_meta:
        return
    _check_ranks(layer, adapter)
    state = layer.slicefine_state[adapter]
    pairs = layer.pending_writes(adapter)
    if state.step == 0:  # what has not been trained is original; not so an average of a model that has been
        where = state.active.axis, tuple(state.active.indices)
        pairs.append((layer.trained_values(adapter, *where), layer.original_values(adapter, *where)))
    for weight, parameter in pairs:
        if not same_values(weight, parameter.to(weight.dtype)):
            raise SliceFineError(
                f"{layer.name}: the weight and the parameter of its slice (adapter {adapter!r}) differ: one of them was changed by something "
                "other than a step of a torch.optim.Optimizer. Let your optimizer derive from torch.optim.Optimizer; do not assign to, "
                "average (EMA, SWA) or perturb (SAM) `slicefine_weight`: merge first, or work on the base weights."
                + (
                    " If it has just been loaded: adapter_config.json must be the one saved with it."
                    if not state.step
                    else ""
                )
            )
    layer.has_followed(adapter)


def check_shown(layer: SliceLayer, shown: str | None, *_: Any) -> None:
    """Raise if a backward pass meets other values than its forward pass, made with adapter `shown`: `dx` would be wrong."""
    if layer.installed != shown:
        then, now = (f"adapter {a!r}" if a else "no adapter" for a in (shown, layer.installed))
        raise SliceFineError(
            f"{layer.name}: a backward pass needs the values of its forward pass; that was made with {then}, the weight now holds "
            f"the values of {now}. Call backward() before adapters are switched, enabled or disabled, or run the forward pass that needs no "
            "gradient under torch.no_grad()."
        )


def start_of(layer: SliceLayer, adapter: str) -> int:
    """Which layer this is, its settings, and how far it is, in one number.

    The layer keeps it in a buffer too, which DistributedDataParallel overwrites with that of rank 0.
    """
    state = layer.slicefine_state[adapter]
    start = hashlib.sha256(f"{layer.name} {state.schedule}".encode()).digest()
    return (int.from_bytes(start[:8]) >> 2) + state.step


def refuse_unready_ranks(name: str) -> None:
    """Raise if DistributedDataParallel would wait for the gradient of a layer that rests."""
    ddp: Any = getattr(torch.nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
    if ddp is not None and not ddp.find_unused_parameters:
        raise SliceFineError(
            f"{name}: it rests below the depth window, and DistributedDataParallel waits for the gradient of every parameter. Build it with "
            "find_unused_parameters=True (`ddp_find_unused_parameters=True` in TrainingArguments), or leave out `depth_window`."
        )


def _check_ranks(layer: SliceLayer, adapter: str) -> None:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    state = layer.slicefine_state[adapter]
    if int(layer.slicefine_start[adapter]) != state.start:
        raise SliceFineError(
            f"{layer.name}: all ranks of a distributed run start with the same SliceFineConfig and the same step; this rank has "
            f"{state.schedule}, step {state.step}, rank 0 something else. Build or load the adapter in the same way on every rank."
        )
