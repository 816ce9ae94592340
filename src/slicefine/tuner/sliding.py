"""Write back, count, slide, reset: what has to happen after every optimizer step, without anybody calling it.

Process-wide hooks run around `step()` of every torch optimizer. They look for masters among the optimizer's parameters
and find their layers through a weak set, because a parameter loses what is attached to it when a model is copied.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
import weakref
from collections.abc import Container
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from slicefine.errors import SliceFineError, SliceFineWarning, listed
from slicefine.kernel import reset_moments

if TYPE_CHECKING:
    from slicefine.tuner.layer import SliceLayer

_layers: weakref.WeakSet[SliceLayer] = weakref.WeakSet()
_optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
"""Those that have trained slices. Several may hold the same ones, and a move concerns them all."""
_checked: weakref.WeakSet[Optimizer] = weakref.WeakSet()
_threads = threading.local()
_lock = threading.Lock()


def watch(layer: SliceLayer) -> None:
    """Let `layer` be looked after from now on, for as long as it lives."""
    with _lock:
        _layers.add(layer)


def layers_of(parameters: Container[int]) -> list[SliceLayer]:
    """Layers with a master among `parameters`, which are identities."""
    with _lock:
        layers = list(_layers)
    return [
        layer
        for layer in layers
        if any(id(m) in parameters for m in (*layer.slicefine_weight.values(), *layer.slicefine_bias.values()))
    ]


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not _layers:
        return
    running = _running()
    if not running:
        _threads.inner = []
        if optimizer not in _checked:
            _check(optimizer)
            _checked.add(optimizer)
        _let_rest(optimizer)
    running.append((optimizer, sys._getframe(1)))


def _let_rest(optimizer: Optimizer) -> None:
    """Take zeros for gradients from what rests: an optimizer with moments would move it all the same."""
    with _lock:
        resting = [(layer, a) for layer in _layers for a, state in layer.slicefine_state.items() if state.resting]
    if not resting:
        return
    held = _held([optimizer])
    for layer, adapter in resting:
        for master in (layer.slicefine_weight[adapter], layer.slicefine_bias.get(adapter)):
            if master is not None and id(master) in held:
                master.grad = None


def _check(optimizer: Optimizer) -> None:
    """Before the first step of an optimizer: raise if it cannot train slices, warn of what it would do to them."""
    held = _held([optimizer])
    if not held:
        _warn(
            f"{type(optimizer).__name__} holds no parameter: its steps train nothing. An adapter is loaded for inference unless it is loaded "
            "with is_trainable=True."
        )
    stepped = _stepped_layers(held)
    masters = [layer.slicefine_weight[adapter] for layer, adapter in stepped]
    if not masters:
        return
    mine = [
        (layer.name, m)
        for (layer, a), m in zip(stepped, masters, strict=True)
        if id(m) in held and not layer.slicefine_state[a].resting
    ]
    unreached = [name for name, master in mine if master.requires_grad and master.grad is None]
    reached = any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"])
    if unreached and reached:
        _warn(
            f"No gradient has reached {len(unreached)} of {len(mine)} slices before the first step of {type(optimizer).__name__}: "
            f"{listed(unreached)}. A part of the model that such examples do not use does this, and code that computes with `weight.data` "
            "instead of calling the layer. Leave these layers out with `exclude_modules` if no later batch is to reach them."
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise SliceFineError(
            "LBFGS evaluates the model between updates within one step, and a slice is written back after the step. Use an "
            "optimizer that evaluates once per step, such as AdamW."
        )
    refuse_sharding(masters)
    groups = [held[id(master)] for master in masters if id(master) in held]
    if any(layer.slicefine_state[adapter].schedule.rests for layer, adapter in stepped):
        _refuse_where_some_rest(optimizer, groups)
    if any("step" in group for group in groups):
        _warn(
            f"{type(optimizer).__name__} counts its steps once for all parameters, so its bias correction does not start again when a slice moves. "
            "Use an optimizer that counts per parameter, such as torch.optim.AdamW(fused=True)."
        )
    decay = max((group.get("weight_decay") or 0 for group in groups), default=0)
    if decay:
        _warn(
            f"{type(optimizer).__name__} applies weight_decay={decay} to slices. A slice is a piece of a pretrained weight, so "
            "decay pulls the weight itself towards zero, and not an update of it. Set weight_decay=0 for the adapter."
        )


def _refuse_where_some_rest(optimizer: Optimizer, groups: list[dict[str, Any]]) -> None:
    """Raise if an optimizer cannot train slices of which some rest."""
    name = type(optimizer).__name__
    if torch._C._current_graph_task_id() >= 0:  # within a backward pass
        raise SliceFineError(
            f"`depth_window` counts the steps of layers that rest as well, and an optimizer that is stepped inside of the backward pass ({name}) is not "
            "stepped for them: they have no gradient. Step after backward, or leave out `depth_window`."
        )
    if isinstance(optimizer, torch.optim.SGD) and any(g.get("fused") and g.get("momentum") for g in groups):
        raise SliceFineError(
            f"`depth_window` wakes layers one after the other, and {name} with fused=True and momentum wants to begin with all parameters at once. Use "
            "fused=False, or another optimizer."
        )


def _warn(text: str) -> None:
    warnings.warn(text, SliceFineWarning, stacklevel=5)


def _running() -> list[tuple[Optimizer, FrameType]]:
    """The optimizers that are stepping in this thread, outermost first, each with the frame of its step.

    One that wraps another steps around the other's step. One whose step has raised is not on the stack any more.
    """
    entered: list[tuple[Optimizer, FrameType]] = _threads.__dict__.setdefault("entered", [])
    if entered:
        alive, frame = set(), sys._getframe(1)
        while frame is not None:
            alive.add(id(frame))
            frame = frame.f_back
        entered[:] = [entry for entry in entered if id(entry[1]) in alive]
    return entered


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    running = _running()
    inner = _threads.__dict__.setdefault("inner", [])
    while running and running.pop()[0] is not optimizer:
        pass
    if running:
        inner.append(optimizer)
        return
    optimizers, _threads.inner = [optimizer, *inner], []
    if _layers and not _skipped(optimizer):
        _settle(optimizers)


def _held(optimizers: list[Optimizer]) -> dict[int, dict[str, Any]]:
    """Identity of each parameter of the optimizers -> its parameter group."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return {id(parameter): group for group in groups for parameter in group["params"]}


def _stepped_layers(held: dict[int, dict[str, Any]]) -> list[tuple[SliceLayer, str]]:
    """Layers and adapters with a master among the parameters `held`.

    An adapter is stepped if it has a gradient, or zeros in its place; the installed one also if it is only trainable, and what rests of
    another one if anything else of it is stepped.
    """
    stepped = []
    with _lock:
        layers = list(_layers)
    for layer in layers:
        for adapter, master in layer.slicefine_weight.items():
            masters = [master, layer.slicefine_bias.get(adapter)]
            mine = [m for m in masters if m is not None and id(m) in held]
            asked = adapter == layer.installed and any(m.requires_grad for m in mine)
            if mine and (asked or any(m.grad is not None for m in mine)):
                stepped.append((layer, adapter))
    hidden = {adapter for layer, adapter in stepped if adapter != layer.installed}
    return stepped + [
        (layer, adapter)
        for layer in (layers if hidden else [])
        for adapter, state in layer.slicefine_state.items()
        if adapter in hidden and adapter != layer.installed and state.resting
        if id(layer.slicefine_weight[adapter]) in held
    ]


def _settle(optimizers: list[Optimizer]) -> None:
    held = _held(optimizers)
    stepped = _stepped_layers(held)
    if not stepped:
        return
    _optimizers.update(optimizers)
    trained = [(layer, a) for layer, a in stepped if a == layer.installed and not layer.slicefine_state[a].resting]
    writes = [pair for layer, a in trained for pair in layer.pending_writes(a, held)]
    if writes:
        torch._foreach_copy_([destination for destination, _ in writes], [source for _, source in writes])
    for layer, adapter in stepped:
        resting = layer.slicefine_state[adapter].resting
        with layer.shown(adapter) as was_hidden:
            if was_hidden and not resting:  # stepped while disabled, or while another adapter was active
                for destination, source in layer.pending_writes(adapter, held):
                    destination.copy_(source)
            if id(layer.slicefine_weight[adapter]) not in held:
                continue
            if not resting:  # whatever has changed what rests is to be noticed by the next forward pass
                layer.has_followed(adapter)
            if layer.count_step(adapter):
                layer.slide(adapter)
                for optimizer in _optimizers:
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


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
