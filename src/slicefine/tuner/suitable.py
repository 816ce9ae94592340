"""Whether a layer or parameter can hold slices, and why not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from slicefine.tuner.base_layers import BASE_LAYERS_IN_WORDS, WEIGHT, Place
from slicefine.tuner.layer import SliceLayer

LEAVE_OUT = "Leave it out with `exclude_modules`."


def base_place(place: Place) -> Place:
    """Where the weight itself is: a place may be that of our tuner layer around it."""
    return place.module.place if isinstance(place.module, SliceLayer) else place


def memory_of(parameter: Tensor) -> Hashable:
    """What two parameters have in common that are one: where their values lie, or who they are if they have none."""
    if type(parameter) is not nn.Parameter or parameter.is_meta or not parameter.numel():
        return id(parameter)
    return parameter.untyped_storage().data_ptr(), parameter.storage_offset(), parameter.shape


def why_not(place: Place, owners: Counter[Hashable], *, as_parameter: bool, train_bias: bool) -> str | None:
    """What keeps a weight from holding slices; None if nothing does.

    Args:
        place: The weight.
        owners: `memory_of` each parameter of the model -> under how many names the model has it.
        as_parameter: Whether it was named as a parameter, and not as a layer.
        train_bias: Whether the bias of the layer is to be trained.
    """
    module = place.module
    if isinstance(module, SliceLayer):
        return None if place.parameter == WEIGHT else _OTHER_PARAMETERS
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if isinstance(module, BaseTunerLayer):
        return f"another PEFT method tunes this layer already ({kind}). Merge or unload it first."
    if as_parameter and place.is_layer:
        return f"it is the weight of a layer ({kind}). Name the layer in `target_modules`."
    if not as_parameter and not place.is_layer:
        return f"slices live in {BASE_LAYERS_IN_WORDS}; this is a {kind}. {LEAVE_OUT}"
    problem = _parameter_problem(place, kind) if as_parameter else _layer_problem(module, kind)
    problem = problem or _value_problem(place.stored, kind) or _module_problem(place)
    if problem:
        return problem
    for name, parameter in ((place.parameter, place.stored), ("bias", place.bias if train_bias else None)):
        if parameter is not None and owners[memory_of(parameter)] > 1:
            return (
                f"its {name} is tied: another module, or another name of this one, has the same and would change with it. "
                f"Untie them, or leave it out with `exclude_modules`."
            )
    return None


_OTHER_PARAMETERS = (
    "another adapter trains other parameters of this module, and their layers stand one around the other. Give all adapters of a model "
    "the same `target_parameters`."
)


def _value_problem(weight: Tensor, kind: str) -> str | None:
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        return f"a slice needs a weight in bf16, fp16, fp32 or fp64; this one is {weight.dtype} ({kind}). Load the model unquantized."
    if type(weight.data) is not Tensor and not isinstance(weight, DTensor):
        return f"its weight is a {type(weight.data).__name__}, which stores its values in a way of its own. {LEAVE_OUT}"
    if isinstance(weight, DTensor) or any(key in vars(weight) for key in ("ds_id", "_is_flat_param")):
        return f"its weight is cut into shards ({type(weight).__name__}), which is not supported yet. Attach to an unsharded model."
    return None


def _module_problem(place: Place) -> str | None:
    module = place.module
    if getattr(getattr(module, "_hf_hook", None), "offload", False):
        return (
            "its weight is offloaded to the CPU or to disk, which is not supported yet. Load the model onto one device."
        )
    if hasattr(module, "_hf_hook"):
        return "accelerate moves its inputs from device to device, as with a `device_map` over several, which is not supported yet. Load the model onto one device: device_map={'': 0}."
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if not place.is_read and (any(hooks) or "forward" in vars(module)):
        return f"it has hooks or a `forward` of its own, which training a slice would pass by. Remove them, or register them after attaching. {LEAVE_OUT}"
    return None


def _layer_problem(module: nn.Module, kind: str) -> str | None:
    if WEIGHT not in module._parameters:
        return f"it is a {kind}, a layer with a way of its own to store its weight. {LEAVE_OUT}"
    if isinstance(module, nn.Embedding):
        odd = [
            f"{name}={value}"
            for name in ("max_norm", "scale_grad_by_freq", "sparse")
            if (value := getattr(module, name))
        ]
        if odd:
            return f"it is an embedding with {', '.join(odd)}, which its slices would pass over. {LEAVE_OUT}"
    return None


def _parameter_problem(place: Place, kind: str) -> str | None:
    shape = tuple(place.stored.shape)
    if len(shape) in (2, 3):
        return None
    return (
        f"`target_parameters` are matrices, or those of several experts in one, (experts, d_out, d_in); this one has shape {shape} ({kind}). "
        "Leave it out."
    )
