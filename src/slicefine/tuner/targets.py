"""Which layers an adapter trains, and whether it can: everything that can be wrong is found before anything is changed."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn

from slicefine.errors import SliceFineError, by_text, did_you_mean, listed
from slicefine.slicing import ALTERNATE, COLUMN, COUPLED, ROW
from slicefine.tuner.base_layers import BASE_LAYERS, LINEAR_LAYERS, Place
from slicefine.tuner.config import ALL_LINEAR, SliceFineConfig
from slicefine.tuner.layer import SliceLayer, layers_around
from slicefine.tuner.sliding import refuse_sharding
from slicefine.tuner.suitable import base_place, memory_of, why_not

if TYPE_CHECKING:
    from slicefine.slicing import Shape


def find_targets(model: nn.Module, config: SliceFineConfig) -> dict[str, Place]:
    """What `config` targets in `model`, by the name that its tuner layer has, as PEFT will match it.

    Inside of tuner layers nothing matches. Where a target has a tuner layer of ours already, that is the module of its place.
    """
    expanded: Any = _maybe_include_all_linear_layers(copy.deepcopy(config), model)
    found = {
        name: module
        for name, module in _untuned_or_outermost(model)
        if expanded.target_modules and check_target_module_exists(expanded, name)
    }
    if names_all_linear(config):
        # PEFT trains in full whatever ends as a head is called: "pre_classifier" too (DistilBERT).
        found = {
            name: module for name, module in found.items() if not name.endswith(tuple(config.modules_to_save or ()))
        }
    if names_all_linear(config) and config.layers_to_transform is not None:
        by_suffix = copy.deepcopy(config)
        by_suffix.target_modules = [name.rpartition(".")[2] for name in found]
        found = {name: module for name, module in found.items() if check_target_module_exists(by_suffix, name)}
    places = {name: Place(module) for name, module in found.items()}
    for name, parameters in find_parameters(model, config).items():
        places |= _nested(name, model.get_submodule(name), parameters)
    return places


def find_parameters(model: nn.Module, config: SliceFineConfig) -> dict[str, list[str]]:
    """Name of a module -> those of its parameters that `config.target_parameters` names, in the order of the module."""
    wanted: dict[str, list[str]] = {}
    for name, module in _untuned_or_outermost(model):
        holder = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        matched = [p for p in holder._parameters if _names(config.target_parameters, f"{name}.{p}")]
        if matched and config.layers_to_transform is not None:
            by_suffix = copy.deepcopy(config)
            by_suffix.target_modules = matched
            matched = [p for p in matched if check_target_module_exists(by_suffix, f"{name}.{p}")]
        if matched and not _names(config.exclude_modules, name):
            wanted[name] = matched
    return wanted


def _around_parameters(model: nn.Module, config: SliceFineConfig) -> set[str]:
    """The targets whose tuner layers stand around parameters, by the names that those layers have."""
    return {key for name, parameters in find_parameters(model, config).items() for key in layer_names(name, parameters)}


def _nested(name: str, module: nn.Module, parameters: list[str]) -> dict[str, Place]:
    """The places of parameters of one module: their tuner layers stand one around the other, the last one outermost."""
    below = dict(zip(layer_names(name, parameters), reversed(parameters), strict=True))
    if not isinstance(module, SliceLayer):
        return {key: Place(module, parameter) for key, parameter in below.items()}
    layers = list(layers_around(module))
    if [layer.parameter for layer in layers] == [*below.values()]:
        return {key: Place(layer) for key, layer in zip(below, layers, strict=True)}
    return {key: Place(module, _OF_OTHERS) for key in below}


def weight_name(target: str, place: Place) -> str:
    """The name, in the base model, of the parameter that is the weight of a target."""
    while target.endswith(".base_layer"):
        target = target.removesuffix(".base_layer")
    return f"{target}.{place.parameter}"


_OF_OTHERS = ""
"""In a place whose module is one of our layers: that layer is of other parameters."""


def layer_names(name: str, parameters: list[str]) -> list[str]:
    """The names of the tuner layers around the module `name`, the outermost, which is that of the last parameter, first."""
    return [f"{name}{'.base_layer' * depth}" for depth in range(len(parameters))]


def _untuned_or_outermost(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules by name, but for those inside of tuner layers."""
    tuned = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return [(name, module) for name, module in model.named_modules() if name and not name.startswith(tuned)]


def _names(names: list[str] | str | None, key: str) -> bool:
    """Whether a list of names or suffixes, or a regular expression, names `key`."""
    if isinstance(names, str):
        return re.fullmatch(names, key) is not None
    return any(_ends_with(key, name) for name in names or [])


def names_all_linear(config: SliceFineConfig) -> bool:
    """Whether the layers were left to us: then what does not fit is adjusted and listed, and not refused."""
    return isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR


def find_problems(model: nn.Module, config: SliceFineConfig, targets: dict[str, Place]) -> list[str]:
    """Everything that keeps `config` from being attached to the `targets` of `model`, one sentence each."""
    problems = _environment_problems(model)
    problems += _matching_problems(model, config, targets)
    owners = Counter(
        memory_of(parameter)
        for _, m in model.named_modules(remove_duplicate=False)
        for parameter in m._parameters.values()
        if parameter is not None
    )
    sound = {}
    parameters = _around_parameters(model, config)
    for name, place in targets.items():
        problem = why_not(place, owners, as_parameter=name in parameters, train_bias=config.bias != "none")
        if problem:
            problems.append(f"{weight_name(name, place) if name in parameters else name}: {problem}")
        else:
            sound[name] = place
    problems += _parameter_problems(model, config, targets)
    return problems + narrow_problems(model, config, sound)


def narrow_problems(model: nn.Module, config: SliceFineConfig, targets: dict[str, Place]) -> list[str]:
    """What is narrower than `r` though it was asked for by name."""
    if names_all_linear(config) or config.seals is not None:
        return []
    parameters = _around_parameters(model, config)
    return by_text(
        {
            weight_name(name, targets[name])
            if name in parameters
            else name: f"r={config.r} is more than the {_narrowest(config, shape)} {_axis_names(config, shape)} of its weight of shape {shape}. "
            "Lower `r`, or leave the layer out."
            for name, shape in clamped(targets, config).items()
        }
    )


def _parameter_problems(model: nn.Module, config: SliceFineConfig, targets: dict[str, Place]) -> list[str]:
    """What is wrong with the modules around whose parameters layers are to stand, or stand already."""
    named = find_parameters(model, config)
    tuned = {name: m for name, m in _untuned_or_outermost(model) if isinstance(m, SliceLayer) and not m.place.is_layer}
    problems = []
    for holder in named:
        within = [
            name for name in targets if name.startswith(f"{holder}.") and name not in layer_names(holder, named[holder])
        ]
        inner = [
            name for name, m in model.named_modules() if isinstance(m, SliceLayer) and name.startswith(f"{holder}.")
        ]
        within += [] if holder in tuned else inner
        if within:
            problems.append(f"{holder}: {_APART}: {listed(dict.fromkeys(within))}. {_ONE_OF_THEM}")
        full = [
            name for name in config.modules_to_save or () if re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", holder)
        ]
        if full:
            problems.append(
                f"{holder}: it is trained in full (`modules_to_save` names {full[0]!r}) or by slices, not both."
            )
        if isinstance(model.get_submodule(holder), nn.ParameterList | nn.ParameterDict):
            problems.append(
                f"{holder}: a list of parameters is read by the module around it, which slices cannot see. Leave it out."
            )
    for holder, layer in tuned.items():
        within = [
            f"{holder}.{name}"
            for name, m in layer.get_base_layer().named_modules()
            if name and _wants(config, f"{holder}.{name}", m)
        ]
        if within:
            problems.append(f"{holder}: {_APART}: {listed(within)}. {_ONE_OF_THEM}")
    return problems


_APART = "its parameters and layers within it are not trained together, because the name of a layer would depend on what stands around it"
_ONE_OF_THEM = "Leave one of them out (`target_parameters`, `exclude_modules`)."


def _wants(config: SliceFineConfig, name: str, module: nn.Module) -> bool:
    if names_all_linear(config):
        return isinstance(module, LINEAR_LAYERS)
    return bool(config.target_modules) and bool(check_target_module_exists(config, name))


def clamped(targets: dict[str, Place], config: SliceFineConfig) -> dict[str, Shape]:
    """The targets whose weight is narrower than `r` along an axis in use, with the shape of the weight."""
    shapes = {name: base_place(place).shape for name, place in targets.items()}
    if config.axis == COUPLED:  # `coupling.py` looks at those with partners, as soon as they are found
        shapes = {name: shape for name, shape in shapes.items() if name not in (config.couplings or shapes)}
    return {name: shape for name, shape in shapes.items() if _narrowest(config, shape) < config.r}


def _narrowest(config: SliceFineConfig, shape: Shape) -> int:
    return {ROW: shape[0], COLUMN: shape[1], ALTERNATE: min(shape[:2]), COUPLED: shape[0]}[config.axis]


def _axis_names(config: SliceFineConfig, shape: Shape) -> str:
    return "rows" if _narrowest(config, shape) == shape[0] and config.axis != COLUMN else "columns"


def _matching_problems(model: nn.Module, config: SliceFineConfig, targets: dict[str, Place]) -> list[str]:
    names = [name for name, _ in model.named_modules() if name]
    linear = [name for name, module in model.named_modules() if isinstance(module, (*LINEAR_LAYERS, SliceLayer))]
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
    parameters = [name.replace(".base_layer", "") for name, _ in model.named_parameters()]
    for name in config.target_parameters or []:
        if not any(_ends_with(key, name) for key in parameters):
            known = {".".join(key.split(".")[-2:]) for key in parameters}
            problems.append(
                f"`target_parameters` names {name!r}, which no parameter of the model is called.{did_you_mean(name, known)}"
            )
        elif name in parameters and "." not in name:
            problems.append(
                f"`target_parameters` names {name!r}, a parameter of the model itself, around which no layer can stand. Leave it out."
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
            f"Linear layers here: {_list(Counter(k.rpartition('.')[2] for k in linear))}.{_others(model, linear)}"
        )
    return problems


def _others(model: nn.Module, linear: list[str]) -> str:
    """What can be named where there are no linear layers."""
    others = Counter(name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, BASE_LAYERS))
    return f" Name other layers in `target_modules`: {_list(others)}." if others and not linear else ""


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
