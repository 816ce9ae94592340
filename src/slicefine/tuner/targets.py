"""Which layers an adapter trains, and whether it can: everything that can be wrong is found before anything is changed."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from slicefine.errors import SliceFineError, by_text, did_you_mean
from slicefine.slicing import ALTERNATE, COLUMN, ROW
from slicefine.tuner.base_layers import BASE_LAYERS, BASE_LAYERS_IN_WORDS, LINEAR_LAYERS, Place
from slicefine.tuner.config import ALL_LINEAR, SliceFineConfig
from slicefine.tuner.layer import SliceLayer
from slicefine.tuner.sliding import refuse_sharding

if TYPE_CHECKING:
    from slicefine.slicing import Shape


def find_targets(model: nn.Module, config: SliceFineConfig) -> dict[str, nn.Module]:
    """The modules of `model` that `config` targets, by name, as PEFT will match them. Inside of tuner layers nothing matches."""
    expanded = _maybe_include_all_linear_layers(copy.deepcopy(config), model)
    tuned = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    found = {
        name: module
        for name, module in model.named_modules()
        if name and not name.startswith(tuned) and check_target_module_exists(expanded, name)
    }
    if not names_all_linear(config) or config.layers_to_transform is None:
        return found
    by_suffix = copy.deepcopy(config)
    by_suffix.target_modules = [name.rpartition(".")[2] for name in found]
    return {name: module for name, module in found.items() if check_target_module_exists(by_suffix, name)}


def names_all_linear(config: SliceFineConfig) -> bool:
    """Whether the layers were left to us: then what does not fit is adjusted and listed, and not refused."""
    return isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR


def find_problems(model: nn.Module, config: SliceFineConfig, targets: dict[str, nn.Module]) -> list[str]:
    """Everything that keeps `config` from being attached to the `targets` of `model`, one sentence each."""
    problems = _environment_problems(model)
    problems += _matching_problems(model, config, targets)
    parents = dict(model.named_modules())
    owners = Counter(
        id(parameter) for _, m in model.named_modules(remove_duplicate=False) for parameter in m._parameters.values()
    )
    sound = {}
    for name, module in targets.items():
        trained = ("weight", "bias") if config.bias != "none" else ("weight",)
        problem = _layer_problem(module, parents[name.rpartition(".")[0]], owners, trained)
        if problem:
            problems.append(f"{name}: {problem}")
        else:
            sound[name] = module
    if not names_all_linear(config) and config.seals is None:
        problems += by_text(
            {
                name: f"r={config.r} is more than the {_narrowest(config, shape)} {_axis_names(config, shape)} of its weight of shape {shape}. "
                "Lower `r`, or leave the layer out."
                for name, shape in clamped(sound, config).items()
            }
        )
    return problems


def clamped(targets: dict[str, nn.Module], config: SliceFineConfig) -> dict[str, Shape]:
    """The targets whose weight is narrower than `r` along an axis in use, with the shape of the weight."""
    bases = {name: m.get_base_layer() if isinstance(m, SliceLayer) else m for name, m in targets.items()}
    shapes = {name: Place(base).shape for name, base in bases.items() if isinstance(base, BASE_LAYERS)}
    return {name: shape for name, shape in shapes.items() if _narrowest(config, shape) < config.r}


def _narrowest(config: SliceFineConfig, shape: Shape) -> int:
    return {ROW: shape[0], COLUMN: shape[1], ALTERNATE: min(shape)}[config.axis]


def _axis_names(config: SliceFineConfig, shape: Shape) -> str:
    return "rows" if _narrowest(config, shape) == shape[0] and config.axis != COLUMN else "columns"


def _matching_problems(model: nn.Module, config: SliceFineConfig, targets: dict[str, nn.Module]) -> list[str]:
    names = [name for name, _ in model.named_modules() if name]
    linear = [name for name, module in model.named_modules() if isinstance(module, (*BASE_LAYERS, SliceLayer))]
    problems = []
    for setting in ("target_modules", "exclude_modules", "modules_to_save"):
        wanted = getattr(config, setting)
        if (
            isinstance(wanted, str)
            and setting == "exclude_modules"
            and not any(re.fullmatch(wanted, key) for key in names)
        ):
            problems.append(f"`exclude_modules` is a regular expression that matches no module; got {wanted!r}.")
        if wanted is None or isinstance(wanted, str):
            continue
        if setting == "target_modules" and config.seals is not None:
            continue  # PEFT has spelled out "all-linear", heads included; the seals name what has to be there
        if setting == "modules_to_save":  # PEFT adds all usual names of a head, of which a model has one
            wanted = [name for name in wanted if name not in SEQ_CLS_HEAD_NAMES]
        counts = {name: sum(_ends_with(key, name) for key in names) for name in sorted(wanted)}
        for name, count in counts.items():
            if not count:
                others = ", ".join(f"{other} ({number})" for other, number in counts.items() if number) or "none"
                known = {key.rpartition(".")[2] for key in (names if setting == "modules_to_save" else linear)}
                problems.append(
                    f"`{setting}` names {name!r}, which no module of the model is called; of the names given, these match: "
                    f"{others}.{did_you_mean(name, known)} Linear layers here: {_list(Counter(k.rpartition('.')[2] for k in linear))}."
                )
    if config.layers_to_transform is not None:
        wanted = config.layers_to_transform
        present = _blocks(targets)
        everywhere = copy.copy(config)
        everywhere.layers_to_transform = everywhere.layers_pattern = None
        blocks = _blocks(find_targets(model, everywhere))
        missing = sorted(set([wanted] if isinstance(wanted, int) else wanted) - present)
        if missing:
            problems.append(
                f"`layers_to_transform` names blocks that hold no target: {missing}; got {wanted!r}. Blocks with targets: {_ranges(blocks)}."
            )
    if not targets and not problems:
        note = "" if config.layers_to_transform is None else f" with layers_to_transform={config.layers_to_transform!r}"
        if isinstance(config.target_modules, str) and not names_all_linear(config):
            words = [word.strip() for word in config.target_modules.split(",")]
            known = {key.rpartition(".")[2] for key in linear} | {ALL_LINEAR}
            near = did_you_mean(words[0], known) if re.fullmatch(r"[\w-]+", words[0]) else ""
            note += f" (a string is a regular expression for the whole name; for layers by name write {words!r}.{near})"
        problems.append(
            f"no module matches target_modules={config.target_modules!r}{note}, exclude_modules={config.exclude_modules!r}. "
            f"Linear layers here: {_list(Counter(k.rpartition('.')[2] for k in linear))}."
        )
    return problems


def _blocks(names: Iterable[str]) -> set[int]:
    return {int(part) for name in names for part in name.split(".") if part.isdigit()}


def _ranges(blocks: set[int]) -> str:
    return f"{min(blocks)} to {max(blocks)}" if blocks else "none"


def _ends_with(key: str, name: str) -> bool:
    return key == name or key.endswith(f".{name}")


def _list(counts: Counter[str]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in sorted(counts.items())) or "none"


def _environment_problems(model: nn.Module) -> list[str]:
    problems = []
    try:
        refuse_sharding([])
    except SliceFineError as error:
        problems.append(str(error))
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        problems.append(
            "the base model is quantized: a trained slice cannot be written back into packed weights. "
            "Load it in bf16, fp16 or fp32."
        )
    if (getattr(model, "_tp_size", None) or 1) > 1:
        problems.append(
            "the base model runs with tensor parallelism, which is not supported yet. Load it without `tp_plan`."
        )
    return problems


def _layer_problem(module: nn.Module, parent: nn.Module, owners: Counter[int], trained: tuple[str, ...]) -> str | None:
    if isinstance(module, SliceLayer):
        return None
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if isinstance(module, BaseTunerLayer):
        return f"another PEFT method tunes this layer already ({kind}). Merge or unload it first."
    if not isinstance(module, BASE_LAYERS):
        return f"slices live in torch.nn.Linear layers and transformers' Conv1D; this is a {kind}. Leave it out with `exclude_modules`."
    leave_out = "Leave it out with `exclude_modules`."
    weight = module.weight
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        return f"a slice needs a weight in bf16, fp16, fp32 or fp64; this one is {weight.dtype} ({kind}). Load the model unquantized."
    if type(weight.data) is not Tensor and not isinstance(weight, DTensor):
        return f"its weight is a {type(weight.data).__name__}, which stores its values in a way of its own. {leave_out}"
    if isinstance(weight, DTensor) or any(key in vars(weight) for key in ("ds_id", "_is_flat_param")):
        return f"its weight is cut into shards ({type(weight).__name__}), which is not supported yet. Attach to an unsharded model."
    hook = getattr(module, "_hf_hook", None)
    if getattr(hook, "offload", False):
        return (
            "its weight is offloaded to the CPU or to disk, which is not supported yet. Load the model onto one device."
        )
    known = any(type(module).forward is base.forward for base in BASE_LAYERS)
    if not known or hasattr(module, "parametrizations"):
        return f"it is a {kind}, a linear layer with a way of its own to compute or store its weight. {leave_out}"
    if isinstance(parent, nn.MultiheadAttention):
        return f"torch.nn.MultiheadAttention reads its weight without calling the layer, so a slice would get no gradient. {leave_out}"
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(hooks) or "forward" in vars(module):
        return f"it has hooks or a `forward` of its own, which training a slice would pass by. Remove them, or register them after attaching. {leave_out}"
    for kind in trained:
        if module._parameters[kind] is not None and owners[id(module._parameters[kind])] > 1:
            return (
                f"its {kind} is tied: another module, or another name of this one, has the same and would change with it. "
                f"Untie them, or leave it out with `exclude_modules`."
            )
    return None
