"""`SliceFineModel`: the tuner that PEFT puts around a base model."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import EMBEDDING_LAYER_NAMES, SEQ_CLS_HEAD_NAMES
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, _get_submodules
from torch import Tensor, nn

from slicefine.errors import SHOWN, SliceFineError, SliceFineWarning, by_text, listed, raise_all
from slicefine.slicing import ALTERNATE, COUPLED, SLICE_AXES, Region
from slicefine.tuner import artifact, coupling, depth, targets
from slicefine.tuner.arrival import Arrival
from slicefine.tuner.base_layers import BASE_LAYERS, LINEAR_LAYERS, Place, present_values, same_values
from slicefine.tuner.config import SliceFineConfig
from slicefine.tuner.layer import SliceLayer, SliceLinear, layers_around
from slicefine.tuner.parameter import SliceLinearParameter, SliceParameter
from slicefine.tuner.seal import Seal

MANY_EXPERTS = 0.1
"""Share of a model that is not left out without a word."""


class SliceFineModel(BaseTuner):
    """A base model whose targeted linear layers train one sliding slice each.

    Args:
        model: The base model, changed in place.
        config: A `SliceFineConfig`, or a dictionary from adapter name to config, as PEFT passes it.
        adapter_name: Name of the adapter.
    """

    prefix: str = artifact.PREFIX
    tuner_layer_cls = SliceLayer

    # ------------------------------------------------------------------ attaching

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, after every check that can be made: a refused adapter leaves the model as it was.

        Raises `SliceFineError` that lists all problems at once, before the first layer is replaced.
        """
        config = self.peft_config[adapter_name]
        # The live configuration of a trained adapter stands for that adapter: so TRL makes the reference of its trainers.
        source = next((n for n, c in self.peft_config.items() if c is config and n != adapter_name), None)
        # The adapter owns its configuration: the user may attach the same object elsewhere.
        config = copy.deepcopy(config)
        assert isinstance(config, SliceFineConfig)
        found = targets.find_targets(model, config)
        problems = targets.find_problems(model, config, found) + _name_problems(model, adapter_name)
        if not problems and config.axis == COUPLED:
            if config.couplings is None:
                config.couplings = coupling.find_couplings(model, found)
            problems = coupling.problems(config, found) + targets.narrow_problems(model, config, found)
        if not problems and config.depth_window is not None:
            if config.depth_stack is None:
                config.depth_stack, problems = depth.find_stack(model, found)
            problems = problems or depth.problems(model, config, found)
        if not problems and config.seals is not None:
            problems = _base_problems(found, config)
        of = (
            f", trained on {config.base_model_name_or_path!r},"
            if config.seals and config.base_model_name_or_path
            else ""
        )
        raise_all(problems, f"Adapter {adapter_name!r}{of} cannot be attached")
        if targets.names_all_linear(config) and (config.layers_to_transform is not None or config.modules_to_save):
            # PEFT heeds the blocks only for layers that are given by suffix, and would slice what it is to train in full.
            config.target_modules = sorted(name for name, place in found.items() if targets.base_place(place).is_layer)
        _warn_of_adjustments(config, found)
        _warn_of_experts(model, config)
        self.peft_config[adapter_name] = config
        self._arrival = Arrival(self, adapter_name) if config.seals is not None else None
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._arrival = None
        config.step, config.seals, config.heads = 0, None, None
        if source is not None:
            _copy_adapter(model, source, adapter_name)

    def _create_and_replace(
        self,
        peft_config: SliceFineConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target
        if parameter_name is not None:
            layer = next((m for m in layers_around(target) if m.parameter == parameter_name), None)
            if layer is None:
                name = targets.weight_name(current_key, Place(target, parameter_name))
                layer = SliceParameter(target, name, parameter_name)
                self._replace_module(parent, target_name, layer, target)
        elif not isinstance(layer, SliceLayer):
            layer = _layer_class(target)(target, current_key)
            self._replace_module(parent, target_name, layer, target)
        layer.add(
            adapter_name,
            peft_config.schedule_of(current_key),
            train_bias=peft_config.bias != "none",
            perturb=not peft_config.init_weights,
        )
        if self._arrival is not None:
            self._arrival.expect(current_key, layer, Seal.parse((peft_config.seals or {})[current_key]))

    def _inject_parameters(
        self, peft_config: SliceFineConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """PEFT's own knows only its own class of layers around parameters."""
        wanted = targets.find_parameters(model, peft_config)
        for name, parameters in wanted.items():
            for key, parameter in zip(reversed(targets.layer_names(name, parameters)), parameters, strict=True):
                parent, target, target_name = _get_submodules(model, name)
                self._create_and_replace(
                    peft_config, adapter_name, target, target_name, parent, current_key=key, parameter_name=parameter
                )
        return [f"{name}.{parameter}" for name, parameters in wanted.items() for parameter in parameters]

    def _check_new_adapter_config(self, config: Any) -> None:
        """Nothing to refuse: PEFT allows one adapter with biases, because it trains them in place; here each has its own."""

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        with torch.no_grad():  # in which a layer's bias is the base's own
            super()._mark_only_adapters_as_trainable(model)
        # PEFT unfreezes the base biases; here a bias is trained through an fp32 master like the slices.
        for layer in _layers(model).values():
            if (bias := layer.place.bias) is not None:
                bias.requires_grad = False

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Without PEFT's copying of weight and bias, which a head of several layers (ELECTRA, RoBERTa) has not."""
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT enters this around every forward pass; without it `adapter_names` would be passed over in silence."""
        if kwargs.get("adapter_names") is not None:
            raise SliceFineError(
                "One slicefine adapter is active at a time, so a batch cannot be split between several; got "
                f"adapter_names={kwargs['adapter_names']!r}. Call `set_adapter`, and run one batch per adapter."
            )
        yield

    def disable_adapter_layers(self) -> None:
        """As PEFT's, without its warning: trained biases are put back as well, so the output is the base model's."""
        self._enable_adapter_layers(enabled=False)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        self._check_written()
        super()._enable_adapter_layers(enabled)

    def set_adapter(self, adapter_name: str | list[str], *args: Any, **kwargs: Any) -> None:
        """As PEFT's."""
        self._check_written()
        super().set_adapter(adapter_name, *args, **kwargs)

    def train(self, mode: bool = True) -> Any:
        """As `nn.Module.train`."""
        if not mode:
            self._check_written()
        return super().train(mode)

    def _check_written(self) -> None:
        """Raise for any layer before the first one is changed."""
        for layer in _layers(self.model).values():
            layer.check_written()

    # ------------------------------------------------------------------ merging

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        _refuse_unfinite(self.model, adapter_names or self.active_adapters)
        self._check_written()
        super().merge_adapter(adapter_names, safe_merge=safe_merge)
        _show_heads(self.model, adapter_names or self.active_adapters)

    def unmerge_adapter(self) -> None:
        super().unmerge_adapter()
        _show_heads(self.model, self.active_adapters)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            _refuse_unfinite(self.model, adapter_names or self.active_adapters)
            self._check_written()
        else:
            for layer in _layers(self.model).values():
                layer.withdraw()
        _show_heads(self.model, (adapter_names or self.active_adapters) if merge else [])
        layers = _layers(self.model).values()
        unloaded = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        for layer in layers:
            layer.let_go()
        return unloaded

    def leave_nothing_behind(self, adapter_name: str, active_before: list[str]) -> None:
        """Undo attaching an adapter."""
        for layer in _layers(self.model, adapter_name).values():
            layer.withdraw()
        if len(self.peft_config) > 1:
            if active_before:
                self.set_adapter(active_before)
            self.delete_adapter(adapter_name)
        else:
            self.unload()
            if getattr(self.model, "_hf_peft_config_loaded", False):  # where transformers notes that it has adapters
                self.model._hf_peft_config_loaded = False

    # ------------------------------------------------------------------ saving and loading

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: SliceFineConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """The artifact, taken from the layers. What describes it goes into `config`, which PEFT saves next."""
        layers = _layers(model, adapter_name)
        for layer in layers.values():
            layer.check_written()
        _refuse_other_values(layers, adapter_name, state_dict)
        # Of embeddings that are targeted PEFT saves the whole table next, from this dictionary; their slices are all there is to save.
        tables = tuple(f"{name}." for name in layers if name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES)
        for key in [key for key in state_dict if key.startswith(tables)]:
            del state_dict[key]
        tensors: dict[str, Tensor] = {}
        seals = {}
        for name, layer in layers.items():
            region = layer.region(adapter_name)
            state = layer.slicefine_state[adapter_name]
            seal, parts = artifact.seal(
                state.schedule,
                state.step,
                region,
                functools.partial(layer.original_values, adapter_name),
                master=layer.slicefine_weight[adapter_name].detach(),
                values={axis: layer.trained_values(adapter_name, axis, region.along(axis)) for axis in SLICE_AXES},
                bias=layer.slicefine_bias[adapter_name].detach() if adapter_name in layer.slicefine_bias else None,
            )
            tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
            seals[artifact.bare(name)] = str(seal)
        if bad := _unfinite(layers, adapter_name):
            warnings.warn(
                f"The adapter is saved with NaN or Inf in {len(bad)} layers ({', '.join(bad[:3])}, ...), and will be refused when it is "
                "loaded or merged. Go back to an earlier checkpoint, and lower the learning rate or clip gradients.",
                SliceFineWarning,
                stacklevel=2,
            )
        config.describe(
            step=max((layer.slicefine_state[adapter_name].step for layer in layers.values()), default=0),
            seals=seals,
            heads=artifact.head_digests(_heads(model, adapter_name)),
        )
        return tensors

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key if artifact.is_ours(key) else super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SliceFineConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Load the artifact into the layers, or refuse it as a whole; hand the rest to PEFT."""
        layers = {artifact.bare(name): layer for name, layer in _layers(model, adapter_name).items()}
        awaited = (layer.arrival for layer in layers.values())
        arrival = next((a for a in awaited if a is not None and a.adapter == adapter_name), None)
        if arrival is not None:
            arrival.end()
        ours = {key: tensor for key, tensor in state_dict.items() if artifact.is_ours(key)}
        rest = {key: tensor for key, tensor in state_dict.items() if not artifact.is_ours(key)}
        try:
            _refuse_heads(model, rest)
            parsed = artifact.parse(ours, {name: layer.target(adapter_name) for name, layer in layers.items()})
        except SliceFineError:
            if arrival is not None:
                arrival.refuse()
            raise
        for name, values in parsed.items():
            layers[name].load(
                adapter_name, step=values.seal.step, master=values.master, values=values.values, bias=values.bias
            )
        # PEFT reports parameters that a file did not hold; these are loaded.
        for name, layer in _layers(model, adapter_name).items():
            rest |= {f"{name}.{key}": tensor for key, tensor in layer.state_tensors(adapter_name).items()}
            rest[f"{name}.slicefine_weight.{adapter_name}"] = layer.slicefine_weight[adapter_name].detach()
            if adapter_name in layer.slicefine_bias:
                rest[f"{name}.slicefine_bias.{adapter_name}"] = layer.slicefine_bias[adapter_name].detach()
        return rest


def _layer_class(base_layer: nn.Module) -> type[SliceLayer]:
    if isinstance(base_layer, LINEAR_LAYERS):
        return SliceLinearParameter if Place(base_layer).is_read else SliceLinear
    return SliceParameter if Place(base_layer).is_read else SliceLayer


def _layers(model: nn.Module, adapter_name: str | None = None) -> dict[str, SliceLayer]:
    """The tuner layers of `model` by name; those that have `adapter_name`, if it is given."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SliceLayer) and (adapter_name is None or adapter_name in module.slicefine_weight)
    }


def _show_heads(model: nn.Module, adapter_names: list[str]) -> None:
    """Let modules that are trained in full be those of the adapters named; PEFT keeps to the active one, whatever is merged."""
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            trains = {parameter: parameter.requires_grad for parameter in module.parameters()}
            module.set_adapter([name for name in adapter_names if name in module._adapters])
            for parameter, requires_grad in trains.items():
                parameter.requires_grad = requires_grad


def _name_problems(model: nn.Module, adapter_name: str) -> list[str]:
    """What keeps a name from being used: parameters are kept under it, as in PEFT's own methods."""
    if _layers(model, adapter_name):
        return [
            f"the model has a slicefine adapter {adapter_name!r} already. Add one under another name (`add_adapter`), or `merge_and_unload()` or "
            "`unload()` first."
        ]
    if "." in adapter_name or hasattr(nn.ParameterDict(), adapter_name):
        return [
            f"an adapter's name has no dot and is no attribute of a torch module; got {adapter_name!r}. Choose another name."
        ]
    return []


def _heads(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The parameters of the modules that are trained in full, by their keys in the file."""
    wrappers: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)}
    return {
        f"{name}.{key}": tensor
        for name, wrapper in wrappers.items()
        if adapter_name in wrapper._adapters
        for key, tensor in wrapper.adapter_state_dict(adapter_name, wrapper.state_dict()).items()
    }


def _base_problems(found: dict[str, Place], config: SliceFineConfig) -> list[str]:
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
        if problem := seal.settings_problem(schedule) or seal.base_problem(region, original):
            problems[name] = problem
    return by_text(problems)


def _warn_of_adjustments(config: SliceFineConfig, found: dict[str, Place]) -> None:
    narrow = targets.clamped(found, config)
    if narrow and config.seals is None:
        shapes = listed((f"{name} {shape}" for name, shape in narrow.items()), SHOWN)
        warnings.warn(
            f"r={config.r} is more than some weights have rows or columns; their slices are as wide as the weight: {shapes}.",
            SliceFineWarning,
            stacklevel=2,
        )
    heads = [name for name in found if name in SEQ_CLS_HEAD_NAMES]
    if heads and targets.names_all_linear(config) and config.seals is None:
        warnings.warn(
            f"The head {heads[0]!r} is sliced like any other layer. If it is new, its random values are in no file and the adapter will "
            f"fit no other copy of the model: train it in full with modules_to_save={heads!r}, or say what the model is for with "
            "task_type='SEQ_CLS'.",
            SliceFineWarning,
            stacklevel=2,
        )
    lonely = coupling.uncoupled(list(found), config)
    if lonely and config.seals is None:
        warnings.warn(
            f"axis='coupled': {len(lonely)} of {len(found)} weights have no partner among the others, and train rows: {listed(lonely, SHOWN)}.",
            SliceFineWarning,
            stacklevel=2,
        )
    if config.axis == ALTERNATE and config.slide_every is None and config.seals is None:
        warnings.warn(
            "axis='alternate' changes the axis at every move, and slide_every=None never moves: only rows will be trained. "
            "Set axis='row' or axis='column', or a number of steps for slide_every.",
            SliceFineWarning,
            stacklevel=2,
        )


def _warn_of_experts(model: nn.Module, config: SliceFineConfig) -> None:
    """Most of a mixture of experts may be in parameters that are no layers, and so are not among all linear layers."""
    if not targets.names_all_linear(config) or config.target_parameters or config.seals is not None:
        return
    of_layers = {id(p) for m in model.modules() if isinstance(m, BASE_LAYERS) for p in m.parameters()}
    experts = {
        n: p for n, p in model.named_parameters() if p.dim() == 3 and min(p.shape) > 1 and id(p) not in of_layers
    }
    share = sum(p.numel() for p in experts.values()) / max(1, sum(p.numel() for p in model.parameters()))
    if share > MANY_EXPERTS:
        names = sorted({".".join(name.split(".")[-2:]) for name in experts})
        warnings.warn(
            f"{share:.0%} of the model are parameters of three dimensions (of experts, say) that are no layers ({listed(experts)}), so target_modules='all-linear' "
            f"trains none of them. Train them with target_parameters={names!r}, or name the layers that are meant.",
            SliceFineWarning,
            stacklevel=3,
        )


def _copy_adapter(model: nn.Module, source: str, adapter: str) -> None:
    """Make a new adapter what a trained one is now, down to its heads."""
    layers = _layers(model, source)
    steps = max(layer.slicefine_state[source].step for layer in layers.values())
    if not steps:
        return
    trains = any(layer.slicefine_weight[source].requires_grad for layer in layers.values())
    frozen = "" if trains else f" {source!r} itself is frozen: to train it, load it with is_trainable=True."
    warnings.warn(
        f"Adapter {adapter!r} was given the configuration of {source!r} itself, which has made {steps} steps, and starts as a copy of "
        f"it, as the reference adapters of TRL must. For one that starts from the base model pass a new SliceFineConfig.{frozen}",
        SliceFineWarning,
        stacklevel=3,
    )
    for layer in layers.values():
        layer.copy(source, adapter)
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and {source, adapter} <= module.modules_to_save.keys():
            module.modules_to_save[adapter].load_state_dict(module.modules_to_save[source].state_dict())


def _refuse_other_values(layers: dict[str, SliceLayer], adapter: str, state_dict: dict[str, Tensor]) -> None:
    """Raise if what is to be saved is not what the layers hold: `save_pretrained(state_dict=...)` with an average, say."""
    for name, layer in layers.items():
        given, held = state_dict.get(f"{name}.slicefine_weight.{adapter}"), layer.slicefine_weight[adapter]
        if given is not None and not same_values(given.to(held), held):
            raise SliceFineError(
                f"{name}: an adapter is saved from the model, whose touched rows and columns are no parameters; the state dict that was given "
                "holds other values. Load it into the model first (`model.load_state_dict`), then save without `state_dict`."
            )


def _refuse_heads(model: nn.Module, tensors: dict[str, Tensor]) -> None:
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


def _refuse_unfinite(model: nn.Module, adapter_names: list[str]) -> None:
    """Raise if a merge would leave NaN or Inf in the model; before the first layer is merged."""
    bad = [name for adapter in adapter_names for name in _unfinite(_layers(model, adapter), adapter)]
    bad += [
        key for a in adapter_names for key, values in _heads(model, a).items() if not bool(torch.isfinite(values).all())
    ]
    if bad:
        raise SliceFineError(
            f"Only finite values are merged; {len(bad)} layers have NaN or Inf in what was trained: {', '.join(bad[:5])}"
            f"{', ...' if len(bad) > 5 else ''}. Nothing was merged. Train again with a lower learning rate or gradient clipping, or "
            "`unload()` to get the base model back."
        )


def _unfinite(layers: dict[str, SliceLayer], adapter: str) -> list[str]:
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
