"""What a model refuses: adapters that are not of it, state that it does not hold, values that are not finite."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from slicefine.errors import SliceFineError, by_text, listed, raise_all
from slicefine.slicing import SLICE_AXES, Region
from slicefine.tuner import targets
from slicefine.tuner.base_layers import Place, present_values, same_values
from slicefine.tuner.config import SliceFineConfig
from slicefine.tuner.full_modules import full_parameters
from slicefine.tuner.layer import SliceLayer, slice_layers
from slicefine.tuner.seal import Seal


def name_problems(model: nn.Module, adapter_name: str) -> list[str]:
    """What keeps a name from being used: parameters are kept under it, as in PEFT's own methods."""
    if slice_layers(model, adapter_name):
        return [
            f"the model has a slicefine adapter {adapter_name!r} already. Add one under another name (`add_adapter`), or `merge_and_unload()` or "
            "`unload()` first."
        ]
    if "." in adapter_name or hasattr(nn.ParameterDict(), adapter_name):
        return [
            f"an adapter's name has no dot and is no attribute of a torch module; got {adapter_name!r}. Choose another name."
        ]
    return []


def base_problems(found: dict[str, Place], config: SliceFineConfig) -> list[str]:
    """Targets whose original values are not those that a saved adapter was trained on."""
    assert config.seals is not None
    problems = dict.fromkeys(
        found.keys() - config.seals.keys(),
        "the saved adapter has nothing for it. Load it with the targets it was saved with.",
    )
    problems |= dict.fromkeys(
        config.seals.keys() - found.keys(), "the saved adapter trains it, this model has no such layer."
    )
    for name in found.keys() & config.seals.keys():
        place = targets.base_place(found[name])
        module = found[name].module
        if isinstance(module, SliceLayer):
            shape, original = module.shape, module.base_values
        else:
            shape, original = place.shape, functools.partial(present_values, place.matrix)
        seal = Seal.parse(config.seals[name])
        schedule = config.schedule_of(name)
        region = Region.of(schedule.touched(seal.step, shape))
        try:
            problem = seal.settings_problem(schedule) or seal.base_problem(region, original)
        except SliceFineError as error:  # a base without values
            problem = str(error)
        if problem:
            problems[name] = problem
    return by_text(problems)


def check_state_dict(layers: dict[str, SliceLayer], adapter: str, state_dict: dict[str, Tensor]) -> None:
    """Raise if there is nothing to be saved, on the meta device, or not what the layers hold: `save_pretrained(state_dict=...)` with an average, say."""
    empty = [name for name, layer in layers.items() if layer.is_meta]
    if empty:
        raise SliceFineError(
            f"An adapter is saved from the values of its weights; {listed(empty)} are on the meta device and have none. Load the base model first."
        )
    for name, layer in layers.items():
        given, held = state_dict.get(f"{name}.slicefine_weight.{adapter}"), layer.slicefine_weight[adapter]
        if given is not None and not same_values(given.to(held), held):
            raise SliceFineError(
                f"{name}: an adapter is saved from the model, whose touched rows and columns are no parameters; the state dict that was given "
                "holds other values. Load it into the model first (`model.load_state_dict`), then save without `state_dict`."
            )


def check_heads(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Raise if a head of the file is not as large as that of the model, or not finite."""
    present = dict(model.named_parameters())
    problems = [
        f"{key}: the file has shape {tuple(tensor.shape)}, this model {tuple(present[key].shape)}. Load the base with as many labels as the "
        "adapter was trained for (`num_labels`)."
        for key, tensor in tensors.items()
        if key in present and present[key].shape != tensor.shape
    ]
    problems += [
        f"{key}: a head holds finite numbers; got NaN or Inf. Go back to an earlier checkpoint."
        for key, tensor in tensors.items()
        if not bool(torch.isfinite(tensor).all())
    ]
    raise_all(problems, "The file does not fit the model; nothing was loaded")


def check_finite(model: nn.Module, adapter_names: list[str]) -> None:
    """Raise if a merge would leave NaN or Inf in the model; before the first layer is merged."""
    bad = [name for adapter in adapter_names for name in unfinite(slice_layers(model, adapter), adapter)]
    bad += [
        key
        for a in adapter_names
        for key, values in full_parameters(model, a).items()
        if not bool(torch.isfinite(values).all())
    ]
    if bad:
        raise SliceFineError(
            f"Only finite values are merged; {len(bad)} layers have NaN or Inf in what was trained: {listed(bad, 5)}. "
            "Nothing was merged. Train again with a lower learning rate or gradient clipping, or "
            "`unload()` to get the base model back."
        )


def unfinite(layers: dict[str, SliceLayer], adapter: str) -> list[str]:
    """The layers in which `adapter` has trained something to NaN or Inf."""
    bad = []
    for name, layer in layers.items():
        region = layer.region(adapter)
        values = [layer.trained_values(adapter, axis, region.along(axis)) for axis in SLICE_AXES]
        if adapter in layer.slicefine_bias:
            values.append(layer.slicefine_bias[adapter].detach())
        if not all(bool(torch.isfinite(tensor).all()) for tensor in values):
            bad.append(name)
    return bad
