"""Which weights write the hidden features that another weight reads: found by probing, not by tables of architectures.

Coupled slices train a hidden feature on both sides at once: rows of the layers that write it (value; up and gate; fc1) and columns of the
layer that reads it (attention output; down; fc2), sliding together. Coupling both sides of a feature is S2FT's idea; that it slides, and
how partners are found (`probe.py`), are ours.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import Tensor, nn

from slicefine.errors import SliceFineError, by_text, did_you_mean, listed
from slicefine.slicing import COUPLED, SLICE_AXES, Layout
from slicefine.tuner.base_layers import CONVOLUTIONS, LINEAR_LAYERS, Place
from slicefine.tuner.config import SliceFineConfig
from slicefine.tuner.layer import SliceLayer
from slicefine.tuner.pixels import pixel_shape
from slicefine.tuner.probe import Probe
from slicefine.tuner.stand_ins import stand_ins
from slicefine.tuner.targets import base_place, find_targets

ROWS, IMAGES, CLIPS = 8, 4, 2
"""Of the batch: a question each."""
TOKENS = 8
SIDE = 64
"""Of an image where the configuration does not say."""


def couplings(model: nn.Module, config: SliceFineConfig, batch: Mapping[str, Any]) -> dict[str, str]:
    """What `config.couplings` is to be for a model whose inputs cannot be guessed from its configuration.

    Args:
        model: The base model. It is not changed.
        config: Its targets are those that are coupled.
        batch: What the model is called with, on its device, or on the CPU if that is the meta device; two rows at least.

    Raises `SliceFineError` if the forward pass fails, or a part of the model has no values.
    """
    if not isinstance(batch, Mapping):
        raise SliceFineError(
            f"`batch` maps the names of the model's arguments to their values, as in {{'input_ids': ...}}; got {type(batch).__name__}."
        )
    if config.task_type == "SEQ_CLS":  # PEFT says so itself, but not before the adapter is attached
        config = copy.deepcopy(config)
        config.modules_to_save = [*(config.modules_to_save or ()), *SEQ_CLS_HEAD_NAMES]
    return find_couplings(model, find_targets(model, config), batch)


def find_couplings(
    model: nn.Module, places: Mapping[str, Place], batch: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Name of a target -> its layout in text (see `Layout`), for all that have a partner among the others.

    The model is not changed. Random numbers are drawn from a generator of its own.

    Args:
        model: The base model, on any device. On the meta device, where it has no values, others stand in for them on the CPU.
        places: Targets by name.
        batch: What the model is called with; two rows at least. None = random inputs, made from its configuration.

    Raises `SliceFineError` if only a part of the model has values, or it is called with something that its configuration does not tell.
    """
    layers = {
        name: place.module for name, place in places.items() if place.is_layer or isinstance(place.module, SliceLayer)
    }
    layers = {name: module for name, module in layers.items() if _may_couple(module)}
    on_meta = {parameter.is_meta for parameter in model.parameters()}
    if len(on_meta) > 1:
        raise SliceFineError(
            "axis='coupled' finds partners by a forward pass, and a part of this model is on the meta device and has no values to compute with. Load "
            "all of it, or take `couplings` from the configuration of an adapter of the same architecture."
        )
    with stand_ins(model, layers.values()) if True in on_meta else nullcontext():
        probe = Probe(model, layers)
        if batch is not None:
            probe.run(model, batch)
        else:
            probe.run(*_guessed_call(model))
        return {name: str(layout) for name, layout in probe.layouts().items()}


def _guessed_call(model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """The model or its base, and what to call it with: the head of a classifier may want labels, or a pad token."""
    inputs: dict[str, Any] = random_inputs(model)
    base = getattr(model, "base_model", model)
    called = base if {*inputs} <= {*inspect.signature(base.forward).parameters} else model
    if "use_cache" in inspect.signature(called.forward).parameters:
        inputs["use_cache"] = False  # what is kept for the next token is written in place
    return called, inputs


def _may_couple(module: nn.Module) -> bool:
    base = module.get_base_layer() if isinstance(module, SliceLayer) else module
    # The channels of groups are features of other channels: a depthwise layer lies between partners, and is none.
    return isinstance(base, LINEAR_LAYERS) or (isinstance(base, CONVOLUTIONS) and base.groups == 1)


def random_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Inputs for the model, from its configuration.

    Raises `SliceFineError` if that does not say what they are.
    """
    config: Any = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    generator = torch.Generator("cpu").manual_seed(0)
    parameter = next(model.parameters())
    text: Any = getattr(config, "get_text_config", lambda: config)()
    if main == "input_ids" and (vocabulary := getattr(text, "vocab_size", None)):
        tokens = torch.randint(vocabulary, (ROWS, TOKENS), generator=generator, device="cpu").to(parameter.device)
        return {"input_ids": tokens} | (
            {"decoder_input_ids": tokens} if getattr(config, "is_encoder_decoder", False) else {}
        )
    if main == "pixel_values":
        shape = pixel_shape(config, SIDE)
        count = CLIPS if len(shape) > 3 else IMAGES
        return {"pixel_values": torch.randn(count, *shape, generator=generator, device="cpu").to(parameter)}
    raise SliceFineError(
        f"axis='coupled' finds partners by a forward pass, and the inputs of {type(model).__name__} are not known"
        f"{f' (its main input is {main!r})' if main else ''}. Find them with a batch of yours: "
        "`config.couplings = slicefine.couplings(model, config, batch)`."
    )


def uncoupled(names: Sequence[str], config: SliceFineConfig) -> list[str]:
    """Targets without a partner: their rows are trained. None if nothing is to be coupled."""
    return [name for name in names if name not in (config.couplings or {})] if config.axis == COUPLED else []


def problems(config: SliceFineConfig, places: Mapping[str, Place]) -> list[str]:
    """What keeps the couplings of `config` from being trained in `places`, one sentence each."""
    if not config.couplings:
        return [
            f"axis='coupled': none of the {len(places)} targets ({listed(places)}) writes what another one reads, feature by feature. Add the layers on the other "
            "side (v_proj with o_proj, up_proj with down_proj), or use another axis."
        ]
    found, narrow = [], {}
    for name, text in config.couplings.items():
        layout = Layout.parse(text)
        if name not in places:
            found.append(f"`couplings`: there is no target {name!r}.{did_you_mean(name, places)}")
            continue
        place = base_place(places[name])
        size = place.shape[SLICE_AXES.index(layout.axis)]
        if layout.dimension != size:
            found.append(
                f"`couplings`: {name}: {layout.dimension} {layout.axis}s are said to be of features, its weight of shape {place.shape} has {size}. "
                "They are of another model: leave them out, and they are found again."
            )
        elif config.r > layout.features:
            narrow[name] = (
                f"r={config.r} is more than the {layout.features} hidden features. Lower `r`, or leave the layer out."
            )
    return found + by_text(narrow)
