"""Which weights write the hidden features that another weight reads: found by probing, not by tables of architectures.

Coupled slices train a hidden feature on both sides at once: rows of the layers that write it (value; up and gate; fc1) and columns of the
layer that reads it (attention output; down; fc2), sliding together. Coupling both sides of a feature is S2FT's idea; that it slides, and
how partners are found, are ours.

One forward pass is made on a tiny batch of random inputs, in which the output of every target is replaced by random numbers that
are leaves of the graph: so the input of a target depends on just those outputs that reach it without passing through another target. Then
the gradient of some features of that input shows where they come from. Three kinds of writers are told apart:

- direct: a feature comes from one row alone (value, up, gate, fc1; a convolution before a norm per channel). With grouped-query attention
  several features come from one row.
- blocks: the features of a head come from a block of rows, all from all (query and key, which softmax mixes). Paired by order: the same feature of
  the same head, and of the key head that serves it.
- everything from everything (a norm between, a residual stream with several readers): no partner.

Rows of the batch are independent of each other, so each row carries a question of its own: a row asks for all features with a certain digit, or of
one head, and a few backward passes through a piece of the graph decide all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slicefine.errors import SliceFineError, did_you_mean, listed
from slicefine.slicing import COLUMN, COUPLED, ROW, SLICE_AXES, Layout
from slicefine.tuner.base_layers import CONVOLUTIONS, LINEAR_LAYERS, Place
from slicefine.tuner.config import SliceFineConfig
from slicefine.tuner.layer import SliceLayer
from slicefine.tuner.targets import base_place, find_targets

TOKENS = 8
ROWS = {"input_ids": 8, "pixel_values": 4}
"""Main input of a model -> rows of the batch. Clips are made of many tokens: two rows."""
SIDE = 64
"""Of an image where the configuration does not say: a convolutional network takes any."""


def couplings(model: nn.Module, config: SliceFineConfig, batch: Mapping[str, Any]) -> dict[str, str]:
    """What `config.couplings` is to be for a model whose inputs cannot be guessed from its configuration.

    Args:
        model: The base model, with values. It is not changed.
        config: Its targets are those that are coupled.
        batch: What the model is called with, on its device; two rows at least. `labels` are left out.

    Raises `SliceFineError` if the forward pass fails, or the model has no values.
    """
    return find_couplings(model, find_targets(model, config), batch)


def find_couplings(
    model: nn.Module, places: Mapping[str, Place], batch: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Name of a target -> its layout in text (see `Layout`), for all that have a partner among the others.

    The model is not changed. Random numbers are drawn from a generator of its own.

    Args:
        model: The base model, with values, on any device.
        places: Targets by name.
        batch: What the model is called with; two rows at least. None = random inputs, made from its configuration.

    Raises `SliceFineError` if the model has no values, or is called with something that its configuration does not tell.
    """
    layers = {
        name: place.module for name, place in places.items() if place.is_layer or isinstance(place.module, SliceLayer)
    }
    layers = {name: module for name, module in layers.items() if _may_couple(module)}
    if any(parameter.is_meta for parameter in model.parameters()):
        raise SliceFineError(
            "axis='coupled' finds partners by a forward pass, and a model on the meta device has no values to compute with. Load the model first, or "
            "take `couplings` from the configuration of an adapter of the same architecture."
        )
    probe = _Probe(model, layers)
    probe.run(batch if batch is not None else random_inputs(model))
    return {name: str(layout) for name, layout in probe.layouts().items()}


def _may_couple(module: nn.Module) -> bool:
    base = module.get_base_layer() if isinstance(module, SliceLayer) else module
    if isinstance(base, CONVOLUTIONS):
        return (
            base.groups == 1
        )  # the channels of groups are features of other channels: a depthwise layer lies between partners
    return isinstance(base, LINEAR_LAYERS)


def random_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Inputs for the model, from its configuration.

    Raises `SliceFineError` if that does not say what they are.
    """
    config: Any = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    generator = torch.Generator().manual_seed(0)
    parameter = next(model.parameters())
    if config is None or main not in ROWS:
        raise SliceFineError(
            f"axis='coupled' finds partners by a forward pass, and the inputs of {type(model).__name__} are not known"
            f"{f' (its main input is {main!r})' if main else ''}. Find them with a batch of yours: "
            "`config.couplings = slicefine.couplings(model, config, batch)`."
        )
    rows = ROWS[main]
    if main == "input_ids":
        vocabulary = config.get_text_config().vocab_size
        tokens = torch.randint(vocabulary, (rows, TOKENS), generator=generator)
        inputs = {"input_ids": tokens.to(parameter.device)}
        return inputs | ({"decoder_input_ids": inputs["input_ids"]} if config.is_encoder_decoder else {})
    side = getattr(config, "image_size", None) or SIDE
    height, width = side if isinstance(side, list | tuple) else (side, side)
    frames = getattr(config, "num_frames", None)
    rows, more = (2, (frames,)) if frames else (rows, ())
    shape = (rows, *more, getattr(config, "num_channels", 3), height, width)
    return {"pixel_values": torch.randn(shape, generator=generator).to(parameter)}


@dataclass
class _Reader:
    """A target, and what its input depends on directly."""

    name: str
    x: Tensor
    """Its input, `(rows, ..., features)`."""
    reached: dict[str, Tensor] = field(default_factory=dict)
    """Writer -> bool, `(features of the writer,)`: those that the first feature comes from."""


class _Probe:
    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self._model, self._layers = model, layers
        self._leaves: dict[str, Tensor] = {}
        self._inputs: dict[str, Tensor] = {}
        self._twice: set[str] = set()
        self._outputs: list[Tensor] = []
        self._generator = torch.Generator().manual_seed(0)

    # ------------------------------------------------------------------ the forward pass

    def run(self, batch: Mapping[str, Any]) -> None:
        """Make the forward pass. Raises `SliceFineError` if the model refuses the batch."""
        backbone: Any = getattr(
            self._model, "base_model", self._model
        )  # the head of a classifier may want labels, or a pad token
        with ExitStack() as stack:
            for name, module in self._layers.items():
                handle = module.register_forward_pre_hook(self._before(name))
                stack.callback(handle.remove)
                handle = module.register_forward_hook(self._after(name))
                stack.callback(handle.remove)
            stack.enter_context(_evaluating(self._model))
            stack.enter_context(torch.enable_grad())
            try:
                output = backbone(**{key: value for key, value in batch.items() if key != "labels"})
            except SliceFineError:
                raise
            except Exception as error:
                raise SliceFineError(
                    f"axis='coupled' finds partners by a forward pass, which failed: {type(error).__name__}: "
                    f"{(str(error).splitlines() or [''])[0]} Find them with a batch of yours: `config.couplings = slicefine.couplings(model, config, batch)`."
                ) from error

        parts = (
            output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else [output]
        )
        self._outputs = [part for part in parts if isinstance(part, Tensor) and part.requires_grad]

    def _before(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if name in self._inputs:
                self._twice.add(name)
            self._inputs[name] = args[0]

        return hook

    def _after(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            # Positive, so that no ReLU hides a feature; of its own at every place, so that nothing cancels.
            values = torch.rand(output.shape, generator=self._generator) + 0.1
            leaf = values.to(output).requires_grad_()
            self._leaves[name] = leaf
            return leaf

        return hook

    # ------------------------------------------------------------------ what comes from where

    def layouts(self) -> dict[str, Layout]:
        """The layouts of all that have partners."""
        readers = [
            _Reader(name, x)
            for name, x in self._inputs.items()
            if name not in self._twice and x.requires_grad and len(x) > 1
        ]
        of_writer: dict[str, list[str]] = defaultdict(list)
        for reader in readers:
            width = _feature_dim(self._layers[reader.name], reader.x)
            features = torch.zeros(len(reader.x), reader.x.shape[width], dtype=torch.bool)
            features[:, 0] = True
            reader.reached = {
                name: found.any(0) for name, found in self._sources(reader, features).items() if bool(found.any())
            }
            for name in reader.reached:
                of_writer[name].append(reader.name)
        for name in self._shown():
            of_writer[name].append("the output")
        found: dict[str, Layout] = {}
        for reader in readers:  # in the order of the forward pass: in a chain of three, the first two are a pair
            # A feature that others read as well, as those of a residual stream, is not hidden.
            hidden = all(of_writer[name] == [reader.name] and name not in self._twice for name in reader.reached)
            if reader.reached and hidden and not found.keys() & {reader.name, *reader.reached}:
                found |= self._couple(reader, reader.reached)
        return found

    def _shown(self) -> list[str]:
        """The targets whose outputs reach an output of the model without passing through another target."""
        if not self._outputs:
            return []
        gradients = torch.autograd.grad(
            [part.sum() for part in self._outputs], list(self._leaves.values()), retain_graph=True, allow_unused=True
        )
        return [name for name, gradient in zip(self._leaves, gradients, strict=True) if gradient is not None]

    def _sources(self, reader: _Reader, features: Tensor) -> dict[str, Tensor]:
        """Writer -> bool `(rows, its features)`: those from which any of `features`, bool `(rows, features)`, comes."""
        x = reader.x
        width = _feature_dim(self._layers[reader.name], x)
        shape = [1] * x.dim()
        shape[0], shape[width] = features.shape
        noise = torch.rand(x.shape, generator=self._generator) + 0.5
        weights = (features.view(shape) * noise).to(x)
        names = [name for name in self._leaves if name != reader.name]
        gradients = torch.autograd.grad(
            x, [self._leaves[name] for name in names], weights, retain_graph=True, allow_unused=True
        )
        found = {}
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is None or len(gradient) != len(x):
                continue
            dim = _feature_dim(self._layers[name], gradient)
            others = [other for other in range(1, gradient.dim()) if other != dim % gradient.dim()]
            seen = (gradient != 0).any(dim=others[0]) if len(others) == 1 else gradient.ne(0)
            for other in reversed(others) if len(others) != 1 else ():
                seen = seen.any(dim=other)
            found[name] = seen.cpu()
        return found

    def _couple(self, reader: _Reader, writers: Mapping[str, Tensor]) -> dict[str, Layout]:
        """Layouts of a reader and its writers; empty if they cannot be paired feature by feature."""
        size = reader.x.shape[_feature_dim(self._layers[reader.name], reader.x)]
        blocks = {int(first.sum()) for first in writers.values()} - {1}
        # Where a leaf holds query, key and value at once, its first feature comes from a block of each, and one row more.
        head = _head_size(blocks, size)
        if head is None:
            return {}
        digits = self._digits(reader, size, head)
        heads = self._heads(reader, size, head)
        units: dict[tuple[int, ...], int] = {}
        """Features of the reader that come from one row -> number of the hidden feature."""
        features: dict[str, list[int | None]] = {}
        for name in writers:
            features[name] = []
            for offset, of in zip(digits[name], heads[name], strict=True):
                if offset is None:
                    features[name].append(None)
                    continue
                unit = tuple(h * head + offset for h in of)
                features[name].append(units.setdefault(unit, len(units)))
        return self._layouts(reader, size, head, units, features, heads)

    def _layouts(
        self,
        reader: _Reader,
        size: int,
        head: int,
        units: Mapping[tuple[int, ...], int],
        features: Mapping[str, list[int | None]],
        heads: Mapping[str, list[tuple[int, ...]]],
    ) -> dict[str, Layout]:
        unit_of = {index: unit for indices, unit in units.items() for index in indices}
        if sorted(unit_of) != list(range(size)) or sum(map(len, units)) != size:
            return {}
        found = {}
        try:
            found[reader.name] = Layout.of(COLUMN, [unit_of[index] for index in range(size)])
            for name, own in features.items():
                seen: dict[tuple[int, ...], int] = defaultdict(int)
                complete = []
                for unit, of in zip(own, heads[name], strict=True):
                    if unit is None:  # in a block: by its order there
                        unit = unit_of[of[0] * head + seen[of] % head] if of else -1
                        seen[of] += 1
                    complete.append(unit)
                found[name] = Layout.of(ROW, complete)
        except SliceFineError:
            return {}
        return found if len({layout.features for layout in found.values()}) == 1 else {}

    def _digits(self, reader: _Reader, size: int, head: int) -> dict[str, list[int | None]]:
        """Writer -> for each of its rows, the place within a head of the features that come from it; None if there are several such places."""
        base = len(reader.x)
        offsets = torch.arange(size) % head
        place: dict[str, Tensor] = {}
        scale = 1
        while scale < head:
            asked = torch.stack([offsets // scale % base == digit for digit in range(base)])
            for name, seen in self._sources(reader, asked).items():
                digit = torch.where(seen.sum(0) == 1, seen.int().argmax(0), torch.tensor(-size * base))
                place[name] = place.get(name, torch.zeros(seen.shape[1], dtype=torch.int64)) + digit * scale
            scale *= base
        if not place:  # heads of one feature
            place = {
                name: torch.zeros(leaf.shape[_feature_dim(self._layers[name], leaf)])
                for name, leaf in self._leaves.items()
            }
        return {
            name: [int(offset) if offset >= 0 else None for offset in found.tolist()] for name, found in place.items()
        }

    def _heads(self, reader: _Reader, size: int, head: int) -> dict[str, list[tuple[int, ...]]]:
        """Writer -> for each of its rows, the heads whose features come from it."""
        base, count = len(reader.x), size // head
        of = torch.arange(size) // head
        seen: dict[str, list[Tensor]] = defaultdict(list)
        for first in range(0, count, base):
            asked = torch.stack([of == first + row for row in range(base)])
            for name, found in self._sources(reader, asked).items():
                seen[name].append(found)
        return {
            name: [tuple(row.nonzero().flatten().tolist()) for row in torch.cat(found)[:count].t()]
            for name, found in seen.items()
        }


def _head_size(blocks: set[int], size: int) -> int | None:
    """Features of a head, from the numbers of rows that the first feature comes from; the whole input if each comes from one row."""
    if not blocks:
        return size
    # A fused weight has a block for query, one for key, and one row: 2 h + 1.
    sizes = {block if size % block == 0 else (block - 1) // 2 for block in blocks}
    if len(sizes) != 1:
        return None
    (head,) = sizes
    return head if head and size % head == 0 else None


def _feature_dim(module: nn.Module, x: Tensor) -> int:
    base = module.get_base_layer() if isinstance(module, SliceLayer) else module
    return 1 if isinstance(base, CONVOLUTIONS) else x.dim() - 1


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Within this context no module is in training mode: no dropout, no statistics."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


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
    found = []
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
            found.append(
                f"{name}: r={config.r} is more than its {layout.features} hidden features. Lower `r`, or leave the layer out."
            )
    return found
