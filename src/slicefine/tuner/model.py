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
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.other import ModulesToSaveWrapper, _get_submodules
from torch import Tensor, nn

from slicefine.errors import SliceFineError, SliceFineWarning, listed, raise_all
from slicefine.slicing import COUPLED, SLICE_AXES
from slicefine.tuner import artifact, checks, coupling, depth, notices, targets
from slicefine.tuner.arrival import Arrival
from slicefine.tuner.base_layers import LINEAR_LAYERS, Place
from slicefine.tuner.config import SliceFineConfig
from slicefine.tuner.depth_order import FirstPass
from slicefine.tuner.full_modules import full_parameters, show_full_modules
from slicefine.tuner.layer import SliceLayer, SliceLinear, layers_around, slice_layers
from slicefine.tuner.parameter import SliceLinearParameter, SliceParameter
from slicefine.tuner.seal import Seal


class SliceFineModel(BaseTuner):
    """A base model whose targeted weights train one sliding slice each.

    Args:
        model: The base model, changed in place.
        config: A `SliceFineConfig`, or a dictionary from adapter name to config, as PEFT passes it.
        adapter_name: Name of the adapter.
    """

    prefix: str = artifact.PREFIX
    tuner_layer_cls = SliceLayer
    _first_passes: tuple[FirstPass, ...] = ()

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
        problems = targets.find_problems(model, config, found) + checks.name_problems(model, adapter_name)
        if not problems and config.axis == COUPLED:
            if config.couplings is None:
                config.couplings = coupling.find_couplings(model, found)
            problems = coupling.problems(config, found) + targets.narrow_problems(model, config, found)
        if not problems and config.depth_window is not None:
            if config.depth_stack is None:
                config.depth_stack, problems = depth.find_stack(model, found)
            problems = problems or depth.problems(model, config, found)
        if not problems and config.seals is not None:
            problems = checks.base_problems(found, config)
        of = (
            f", trained on {config.base_model_name_or_path!r},"
            if config.seals and config.base_model_name_or_path
            else ""
        )
        raise_all(problems, f"Adapter {adapter_name!r}{of} cannot be attached")
        if targets.names_all_linear(config) and (config.layers_to_transform is not None or config.modules_to_save):
            # PEFT heeds the blocks only for layers that are given by suffix, and would slice what it is to train in full.
            config.target_modules = sorted(name for name, place in found.items() if targets.base_place(place).is_layer)
        if config.seals is None:  # what is loaded was said when it was made
            notices.warn_of_adjustments(config, found)
            notices.warn_of_experts(model, config)
        self.peft_config[adapter_name] = config
        self._arrival = Arrival(self, adapter_name) if config.seals is not None else None
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._arrival = None
        config.step, config.seals, config.heads = 0, None, None
        if config.depth_window is not None and not config.inference_mode:
            self._first_passes += (FirstPass(model, config, adapter_name),)
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
        for layer in slice_layers(model).values():
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
        for layer in slice_layers(self.model).values():
            layer.check_written()

    # ------------------------------------------------------------------ merging

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        checks.check_finite(self.model, adapter_names or self.active_adapters)
        self._check_written()
        super().merge_adapter(adapter_names, safe_merge=safe_merge)
        show_full_modules(self.model, adapter_names or self.active_adapters)

    def unmerge_adapter(self) -> None:
        super().unmerge_adapter()
        show_full_modules(self.model, self.active_adapters)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            checks.check_finite(self.model, adapter_names or self.active_adapters)
            self._check_written()
        else:
            for layer in slice_layers(self.model).values():
                layer.withdraw()
        show_full_modules(self.model, (adapter_names or self.active_adapters) if merge else [])
        for first in self._first_passes:
            first.end()
        layers = slice_layers(self.model).values()
        unloaded = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        for layer in layers:
            layer.let_go()
        return unloaded

    def leave_nothing_behind(self, adapter_name: str, active_before: list[str]) -> None:
        """Undo attaching an adapter."""
        for layer in slice_layers(self.model, adapter_name).values():
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
        layers = slice_layers(model, adapter_name)
        for layer in layers.values():
            layer.check_written()
        checks.check_state_dict(layers, adapter_name, state_dict)
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
        if bad := checks.unfinite(layers, adapter_name):
            warnings.warn(
                f"The adapter is saved with NaN or Inf in {len(bad)} layers ({listed(bad)}), and will be refused when it is "
                "loaded or merged. Go back to an earlier checkpoint, and lower the learning rate or clip gradients.",
                SliceFineWarning,
                stacklevel=2,
            )
        config.describe(
            step=max((layer.slicefine_state[adapter_name].step for layer in layers.values()), default=0),
            seals=seals,
            heads=artifact.head_digests(full_parameters(model, adapter_name)),
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
        layers = {artifact.bare(name): layer for name, layer in slice_layers(model, adapter_name).items()}
        awaited = (layer.arrival for layer in layers.values())
        arrival = next((a for a in awaited if a is not None and a.adapter == adapter_name), None)
        if arrival is not None:
            arrival.end()
        ours = {key: tensor for key, tensor in state_dict.items() if artifact.is_ours(key)}
        rest = {key: tensor for key, tensor in state_dict.items() if not artifact.is_ours(key)}
        try:
            checks.check_heads(model, rest)
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
        for name, layer in slice_layers(model, adapter_name).items():
            rest |= {f"{name}.{key}": tensor for key, tensor in layer.state_tensors(adapter_name).items()}
            rest[f"{name}.slicefine_weight.{adapter_name}"] = layer.slicefine_weight[adapter_name].detach()
            if adapter_name in layer.slicefine_bias:
                rest[f"{name}.slicefine_bias.{adapter_name}"] = layer.slicefine_bias[adapter_name].detach()
        return rest


def _layer_class(base_layer: nn.Module) -> type[SliceLayer]:
    if isinstance(base_layer, LINEAR_LAYERS):
        return SliceLinearParameter if Place(base_layer).is_read else SliceLinear
    return SliceParameter if Place(base_layer).is_read else SliceLayer


def _copy_adapter(model: nn.Module, source: str, adapter: str) -> None:
    """Make a new adapter what a trained one is now, down to its heads."""
    layers = slice_layers(model, source)
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
