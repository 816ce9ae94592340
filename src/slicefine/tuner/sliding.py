"""Write back, count, slide, reset: what has to happen after every optimizer step, without anybody calling it.

One process-wide hook runs after `step()` of every torch optimizer. It looks for masters among the optimizer's parameters
and finds their layers through a weak set, because a parameter loses what is attached to it when a model is copied.
"""

from __future__ import annotations

import os
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from slicefine.errors import SliceFineError, SliceFineWarning
from slicefine.kernel import reset_moments

if TYPE_CHECKING:
    from slicefine.tuner.layer import SliceLinear

_layers: weakref.WeakSet[SliceLinear] = weakref.WeakSet()
_warned: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def watch(layer: SliceLinear) -> None:
    """Let `layer` be looked after from now on, for as long as it lives."""
    _layers.add(layer)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not _layers or _skipped(optimizer):
        return
    group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    stepped: list[tuple[SliceLinear, str]] = []
    for layer in _layers:
        adapter = layer.installed
        if adapter is not None and id(layer.slicefine_weight[adapter]) in group_of:
            stepped.append((layer, adapter))
    refuse_sharding([layer.slicefine_weight[adapter] for layer, adapter in stepped])
    if not stepped:
        return
    _warn_of_weight_decay(optimizer, [group_of[id(layer.slicefine_weight[adapter])] for layer, adapter in stepped])

    writes = [pair for layer, adapter in stepped for pair in layer.pending_writes(adapter)]
    torch._foreach_copy_([destination for destination, _ in writes], [source for _, source in writes])
    for layer, adapter in stepped:
        state = layer.slicefine_state[adapter]
        state.step += 1
        if state.schedule.moves(state.step) != state.schedule.moves(state.step - 1):
            layer.slide(adapter)
            reset_moments(optimizer, [layer.slicefine_weight[adapter]])


def refuse_sharding(masters: list[nn.Parameter]) -> None:
    """Raise `SliceFineError` if an engine has taken the parameters apart, so that slices would not be trained, or wrongly."""
    engines = [name for name in ("FSDP", "DEEPSPEED") if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true"]
    kinds = sorted({type(master).__name__ for master in masters if type(master) is not nn.Parameter})
    if engines or kinds:
        raise SliceFineError(
            f"{' and '.join(engines + kinds)}: the parameters that slices live in are cut or replaced, which is not supported "
            "yet. Use plain data parallelism (DDP), or one device."
        )


def _skipped(optimizer: Optimizer) -> bool:
    """Whether a gradient scaler found an overflow: fused optimizers are stepped all the same, and do nothing."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


def _warn_of_weight_decay(optimizer: Optimizer, groups: list[dict[str, Any]]) -> None:
    if optimizer in _warned:
        return
    _warned.add(optimizer)
    decay = max(group.get("weight_decay") or 0 for group in groups)
    if decay:
        warnings.warn(
            f"{type(optimizer).__name__} applies weight_decay={decay} to slices. A slice is a piece of a pretrained weight, so "
            "decay pulls the weight itself towards zero, and not an update of it. Set weight_decay=0 for the adapter.",
            SliceFineWarning,
            stacklevel=3,
        )


register_optimizer_step_post_hook(_after_step)
