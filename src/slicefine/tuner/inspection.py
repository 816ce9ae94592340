"""Looking into a model: where its slices are, what they have touched, how much is trained."""

from __future__ import annotations

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from slicefine.errors import SliceFineError
from slicefine.slicing import SLICE_AXES, ParameterCounts, Slice, active_size, touched_size
from slicefine.tuner.artifact import PEFT_ROOT
from slicefine.tuner.layer import SliceLayer
from slicefine.tuner.targets import weight_name


def active_slices(model: nn.Module) -> dict[str, Slice]:
    """Target name -> the slice that the next optimizer step trains.

    Names are those of the base model. Targets of the active adapter only, without those that rest below its depth window; none while
    adapters are disabled. Raises `SliceFineError` if `model` has no slicefine layer.
    """
    states = {name: layer.slicefine_state[adapter] for name, layer, adapter in tuned(model)}
    return {name: state.active for name, state in states.items() if not state.resting}


def touched_slices(model: nn.Module) -> dict[str, list[Slice]]:
    """Target name -> the distinct slices that optimizer steps have trained, in the order of their first training.

    Raises `SliceFineError` if `model` has no slicefine layer.
    """
    found = {}
    for name, layer, adapter in tuned(model):
        state = layer.slicefine_state[adapter]
        found[name] = state.schedule.touched(state.step, layer.shape)
    return found


def parameter_counts(model: nn.Module, steps: int | None = None) -> ParameterCounts:
    """Exact counts from the real shapes; the authority where other counts differ.

    PEFT's `print_trainable_parameters` counts the parameters that hold the slices: with `axis="alternate"` these are as long
    as the longer side of a weight and partly unused.

    Args:
        model: A model with slicefine layers, as a `PeftModel` or with the adapter injected.
        steps: Length of the run in optimizer steps, for `planned`.

    Raises `SliceFineError` if `model` has no slicefine layer, or `steps` is negative.
    """
    if steps is not None and steps < 0:
        raise SliceFineError(f"`steps` is the length of a run in optimizer steps, at least 0; got {steps}.")
    active = touched = planned = 0
    for _, layer, adapter in tuned(model):
        state = layer.slicefine_state[adapter]
        schedule = state.schedule
        bias = layer.slicefine_bias[adapter].numel() if adapter in layer.slicefine_bias else 0
        active += active_size(schedule, layer.shape, state.step) + (0 if state.resting else bias)
        touched += touched_size(schedule, layer.shape, state.step) + (bias if schedule.own(state.step) else 0)
        planned += touched_size(schedule, layer.shape, steps or 0) + (bias if schedule.own(steps or 0) else 0)
    layers = [module for module in model.modules() if isinstance(module, SliceLayer)]
    masters = {p for m in layers for name in m.adapter_layer_names for p in getattr(m, name).parameters()}
    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    wrapped = {p for m in wrappers for p in m.parameters()}
    originals = {p for m in wrappers for p in m.original_module.parameters()}
    added = masters | (wrapped - originals)
    return ParameterCounts(
        active=active,
        touched=touched,
        planned=None if steps is None else planned,
        added=0,
        total=sum(p.numel() for p in model.parameters() if p not in added),
        modules_to_save=sum(p.numel() for p in wrapped if p.requires_grad),
    )


def update_norms(model: nn.Module) -> dict[str, float]:
    """Target name -> `update_norm` of its active slice."""
    return {name: update_norm(layer, layer.slicefine_state[adapter].active) for name, layer, adapter in tuned(model)}


def update_norm(layer: SliceLayer, piece: Slice) -> float:
    """How far a slice of the installed adapter has moved: `||now - original|| / ||original||`, Frobenius norms."""
    assert layer.installed is not None
    where = layer.installed, piece.axis, tuple(piece.indices)
    now, original = layer.trained_values(*where).float(), layer.original_values(*where).float()
    return float((now - original).norm() / original.norm().clamp_min(torch.finfo(torch.float32).tiny))


def unmoved(model: nn.Module) -> list[str]:
    """Targets that optimizer steps have trained, and whose touched rows and columns are still the original bytes."""
    still = []
    for name, layer, adapter in tuned(model):
        region = layer.region(adapter)
        pairs = [(axis, region.along(axis)) for axis in SLICE_AXES if region.along(axis)]
        if pairs and all(
            torch.equal(layer.trained_values(adapter, *pair), layer.original_values(adapter, *pair)) for pair in pairs
        ):
            still.append(name)
    return still


def tuned(model: nn.Module) -> list[tuple[str, SliceLayer, str]]:
    """Name in the base model, layer and active adapter of every target that trains.

    Raises `SliceFineError` if `model` has no slicefine layer.
    """
    layers = [(_target_name(name, m), m) for name, m in model.named_modules() if isinstance(m, SliceLayer)]
    if not layers:
        raise SliceFineError(
            f"The model has no slicefine layer; got a {type(model).__name__}. Attach one with "
            "`get_peft_model(model, SliceFineConfig())`, or pass the model before `merge_and_unload`."
        )
    return [(name, layer, layer.installed) for name, layer in layers if layer.installed is not None]


def _target_name(path: str, layer: SliceLayer) -> str:
    name = path.removeprefix(PEFT_ROOT)
    return name if layer.place.is_layer else weight_name(name, layer.place)
