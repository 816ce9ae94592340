"""What would be silently wrong, found: parameters that something else has changed, stale gradients, ranks that differ, state dicts of half a layer."""

from __future__ import annotations

import hashlib
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slicefine.errors import SliceFineError, SliceFineWarning
from slicefine.slicing import SLICE_AXES
from slicefine.tuner.base_layers import present_values, same_values

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
    master = layer.slicefine_weight[adapter]
    if master.dtype != torch.promote_types(master.dtype, torch.float32):
        raise SliceFineError(
            f"{layer.name}: `slicefine_weight` of adapter {adapter!r} stays float32, or updates would drown; it is {master.dtype} now. Cast the model "
            "with `model.to(dtype)`, which leaves it alone, and not parameter by parameter."
        )
    pairs = layer.pending_writes(adapter)
    untrained = not state.schedule.own(state.step)
    if untrained:  # what has not been trained is original; not so an average of a model that has been
        where = state.active.axis, tuple(state.active.indices)
        pairs.append((layer.trained_values(adapter, *where), layer.original_values(adapter, *where)))
    for weight, parameter in pairs:
        if not same_values(weight, parameter.to(weight.dtype)):
            raise SliceFineError(
                f"{layer.name}: the weight and the parameter of its slice (adapter {adapter!r}) differ: one of them was changed by something "
                "other than a step of a torch.optim.Optimizer. Let your optimizer derive from torch.optim.Optimizer; do not assign to, "
                "average (EMA, SWA) or perturb (SAM) `slicefine_weight`: merge first, or work on the base weights."
                + (_ALIKE if untrained and _distributed() else "")
                + (" It rests below the depth window, and a step leaves it alone." if state.resting else "")
                + (
                    " If it has just been loaded: adapter_config.json must be the one saved with it."
                    if untrained
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


def refuse_unready_ranks(layer: SliceLayer) -> None:
    """Raise if DistributedDataParallel would wait for the gradient of a layer that rests, now or in another turn."""
    ddp: Any = getattr(torch.nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
    if ddp is None or not layer.state.schedule.rests:
        return
    if not ddp.find_unused_parameters or ddp.static_graph:
        raise SliceFineError(
            f"{layer.name}: it rests when it is below the depth window, and DistributedDataParallel waits for the gradient of every parameter; got "
            f"find_unused_parameters={ddp.find_unused_parameters}, static_graph={ddp.static_graph}. Build it with find_unused_parameters=True and without "
            "static_graph (`ddp_find_unused_parameters`, `ddp_static_graph` in TrainingArguments), or leave out `depth_window`."
        )


def warn_of_no_end(layer: SliceLayer) -> None:
    """Warn that the output of a layer that rests wants a gradient: the window then saves nothing."""
    adapter = layer.installed
    if adapter is None or layer.merged_adapters or not layer.state.resting:
        return
    if layer.slicefine_weight[adapter].requires_grad:
        # Without a name, so that it is said once and not by every layer.
        warnings.warn(
            "Backpropagation goes on below the depth window, because inputs of layers that rest there want a gradient: the window saves neither time nor memory. "
            "`enable_input_require_grads()` makes them want it, and so do transformers' `activation_checkpointing_enable()` and TRL with `gradient_checkpointing`: "
            "with use_reentrant=False nothing needs it, so call `disable_input_require_grads()` on the model after them. If something below the blocks is "
            "trained in full (`modules_to_save`), leave out `depth_window`; if it is a target, leave it out with `exclude_modules`.",
            SliceFineWarning,
            stacklevel=2,
        )


def state_problems(layer: SliceLayer, given: dict[str, Tensor], weight: Tensor | None) -> list[str]:
    """What would leave weight and positions at odds if a state dict with `weight` and with the positions `given` were loaded."""
    if weight is None:
        return [
            f"the state dict has the position of adapter {adapter!r} after {int(given[f'{adapter}.step'])} steps, and no values for the "
            "weight, which holds what was trained. Keep `base_layer` in it, or use `save_pretrained`."
            for adapter, state in layer.slicefine_state.items()
            if int(given.get(f"{adapter}.step", state.step)) != state.step
        ]
    if not given and layer.installed is not None:
        return [
            f"the weight holds what adapter {layer.installed!r} has trained, and the state dict has values for the weight alone. Load "
            "those of a base model within `disable_adapter()`."
        ]
    if not given:
        base = layer.place.oriented(weight)
        return [
            f"adapter {adapter!r} has trained rows or columns of this layer, and the state dict has other values for them. Load the adapter onto a new "
            "model with that base; it was trained on this one."
            for adapter, state in layer.slicefine_state.items()
            if state.schedule.own(state.step) and not _same_base(layer, adapter, base)
        ]
    for adapter, state in layer.slicefine_state.items():
        told = given.get(f"{adapter}.schedule")
        if told is not None and (theirs := bytes(told.tolist()).decode()) != str(state.schedule):
            return [
                f"adapter {adapter!r} was trained with {theirs}, and this one has {state.schedule}. Build it with the same settings."
            ]
    strangers = {key.rpartition(".")[0] for key, tensor in given.items() if key.endswith(".installed") and bool(tensor)}
    return [
        f"its weight holds the values of adapter {adapter!r}, which this model does not have. Add the adapter first."
        for adapter in strangers - layer.slicefine_state.keys()
    ]


def _same_base(layer: SliceLayer, adapter: str, base: Tensor) -> bool:
    """Whether `base` `(d_out, d_in, *kernel)` has the original values of all that `adapter` has covered."""
    region, active = layer.region(adapter), layer.slicefine_state[adapter].active
    covered = {axis: region.along(axis) for axis in SLICE_AXES}
    covered[active.axis] = tuple(sorted({*covered[active.axis], *active.indices}))
    return all(
        same_values(present_values(base, axis, indices).to(layer.dtype), layer.original_values(adapter, axis, indices))
        for axis, indices in covered.items()
        if indices
    )


def warn_of_hooks(layer: SliceLayer) -> None:
    """Warn of hooks on the base layer, which training a slice passes by."""
    base: Any = layer.get_base_layer()
    hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
    if any(hooks) and layer.trains_now() and not layer.place.is_read:  # in this order: Trainer asks at every step
        # Without a name, so that it is said once and not by every layer.
        warnings.warn(
            "Hooks on the layer within a tuner layer are passed by while its slice is trained. Register them on the tuner layer, "
            "which is where the layer was.",
            SliceFineWarning,
            stacklevel=2,
        )


_ALIKE = " Or the weight is a new one, and every rank has drawn its own: call `set_seed` before the model is loaded, on every rank."


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _check_ranks(layer: SliceLayer, adapter: str) -> None:
    if not _distributed():
        return
    state = layer.slicefine_state[adapter]
    if int(layer.slicefine_start[adapter]) != state.start:
        raise SliceFineError(
            f"{layer.name}: all ranks of a distributed run start with the same SliceFineConfig and the same step; this rank has "
            f"{state.schedule}, step {state.step}, rank 0 something else. Build or load the adapter in the same way on every rank."
        )
