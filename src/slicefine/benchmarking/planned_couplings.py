"""The partners of coupled slices in a model that is planned: found in few of its layers, in their full width, and the same in the others."""

from __future__ import annotations

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Mapping

from torch import nn

from slicefine.benchmarking.planned_config import tubelet_frames
from slicefine.benchmarking.planned_model import Subject
from slicefine.errors import SliceFineError
from slicefine.slicing import Shape
from slicefine.tuner import SliceFineConfig
from slicefine.tuner.base_layers import Place
from slicefine.tuner.config import block_of
from slicefine.tuner.coupling import find_couplings
from slicefine.tuner.targets import find_targets

EACH = 2
"""Layers of each kind that are probed, and have to agree."""
LEAD = 3
"""Layers at the beginning that are probed whatever their kind: a configuration may say that the first few are dense, and all others have experts."""
PATCHES, FRAMES = 4, 2
"""In a row of an image, and in a clip: more take time, and tell nothing of features."""

Couplings = dict[str, str]
_found: dict[str, Couplings] = {}
"""A plan asks many times: for the model, for shorter ones, and for each change that would make it fit."""


def planned_couplings(of: Subject, model: nn.Module, config: SliceFineConfig) -> Couplings:
    """What `couplings` of `config` are to be for `model`, which is `of` on the meta device.

    Raises `SliceFineError` if its configuration does not tell what the model is called with, and says what to do then.
    """
    places = {name: place for name, place in find_targets(model, config).items() if place.is_layer}
    key = repr((of.recipe.task, [*places], of.config.to_json_string(use_diff=False)))
    if key not in _found:
        few = _of_few_layers(of, model, {name: place.shape for name, place in places.items()})
        try:
            _found[key] = find_couplings(model, places) if few is None else few
        except SliceFineError as error:
            raise SliceFineError(
                f"{error} A plan has no batch: load the model, attach the slices to it and count them there (`slicefine.parameter_counts`), or plan "
                "another `slice.axis`."
            ) from error
    return _found[key]


def _of_few_layers(of: Subject, model: nn.Module, targets: Mapping[str, Shape]) -> Couplings | None:
    """The couplings of `targets` in `model`; None where a shorter model has other layers, or layers of one kind do not agree."""
    layers = _Layers(of, model, targets)
    chosen = layers.samples()
    if not chosen:
        return None
    try:
        quick = _with_few_tokens(of) if layers.all_alike else of
        small = quick.with_layers([of.kinds[number] for number in chosen]).build()
        if not layers.are_in(small, chosen):
            return None
        short = {name: layers.renumbered(name, chosen) for name in targets if layers.number(name) in (None, *chosen)}
        places = {name: Place(small.get_submodule(other)) for name, other in short.items()}
        if any(place.shape != targets[name] for name, place in places.items()):
            return None
        found = find_couplings(small, {short[name]: place for name, place in places.items()})
    except (
        Exception
    ):  # of the model's own code, which may raise anything; what is wrong with the whole model is said of that
        return None
    learned: dict[_Kind, str | None] = {}
    for name, other in short.items():
        if learned.setdefault(layers.kind(name), found.get(other)) != found.get(other):
            return None
    return {name: text for name in targets if (text := learned[layers.kind(name)]) is not None}


_Kind = tuple[int | None, str]
"""First of the layers that are like that of a weight, None where it is in no layer; and its name in a layer."""


class _Layers:
    """The layers of `model`, each of which is in one list of modules or in several, and which of them are alike."""

    def __init__(self, of: Subject, model: nn.Module, targets: Mapping[str, Shape]) -> None:
        lists = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList)]
        self._stacks = [name for name, part in lists if len(part) == of.layers]
        self._parameters = self._by_layer(model)
        within: dict[int | None, list[tuple[str, Shape]]] = defaultdict(list)
        for name, shape in targets.items():
            number, below = self._split(name)
            within[number].append((below, shape))
        kinds = [(said, self._parameters[number], within[number]) for number, said in enumerate(of.kinds)]
        self._like = [kinds.index(kind) for kind in kinds]
        """For each layer the first one like it: that the configuration says the same of, with the same parameters and targets."""

    @property
    def all_alike(self) -> bool:
        """Whether they are all of one kind."""
        return len({*self._like}) == 1

    def samples(self) -> list[int]:
        """Layers that stand for all."""
        if not self._stacks:
            return []
        return [n for n, like in enumerate(self._like) if n < LEAD or self._like[:n].count(like) < EACH]

    def are_in(self, small: nn.Module, chosen: list[int]) -> bool:
        """Whether `small` has the layers `chosen`, no others, and the same beside them."""
        expected = {None: self._parameters[None]} | {at: self._parameters[number] for at, number in enumerate(chosen)}
        return self._by_layer(small) == expected

    def number(self, name: str) -> int | None:
        """That of the layer that `name` is in; None if it is in none."""
        return self._split(name)[0]

    def renumbered(self, name: str, chosen: list[int]) -> str:
        """The name in a model of the layers `chosen`."""
        number, below = self._split(name)
        return name if number is None else below.replace("*", str(chosen.index(number)), 1)

    def kind(self, name: str) -> _Kind:
        """What has the same partners everywhere."""
        number, below = self._split(name)
        return None if number is None else self._like[number], below

    def _by_layer(self, model: nn.Module) -> dict[int | None, list[str]]:
        found: dict[int | None, list[str]] = defaultdict(list)
        for name, _ in model.named_parameters():
            number, below = self._split(name)
            found[number].append(below)
        return found

    def _split(self, name: str) -> tuple[int | None, str]:
        """Number of the layer, and the name with a star for it."""
        for stack in self._stacks:
            if (number := block_of(name, stack)) is not None:
                return number, name.replace(f"{stack}.{number}.", f"{stack}.*.", 1)
        return None, name


def _with_few_tokens(of: Subject) -> Subject:
    """The same model for small images and short clips. Not for one whose layers differ: it may merge all tokens into one, which looks at no other."""
    config = copy.deepcopy(of.config)
    seeing = getattr(config, "vision_config", config)
    side, patch = getattr(seeing, "image_size", None), getattr(seeing, "patch_size", None)
    if isinstance(side, int) and isinstance(patch, int):
        seeing.image_size = min(side, PATCHES * patch)
    if getattr(config, "num_frames", None):
        config.num_frames = min(config.num_frames, FRAMES * tubelet_frames(config))
    return dataclasses.replace(of, config=config)
