"""A saved adapter that comes in through a loader which knows nothing of tuners.

PEFT hands a file to the tuner as a whole. transformers' own loader assigns the tensors of a file by their names, and calls nobody.
So a layer that is made from a saved configuration has room for the parts of the file that are no parameters, and what
has come is taken in when one of the layers is first used: by all of them, or, if something is wrong with it, by none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from slicefine.errors import SliceFineError
from slicefine.slicing import SLICE_AXES, Region
from slicefine.tuner import artifact
from slicefine.tuner.seal import Seal

if TYPE_CHECKING:
    from slicefine.tuner.layer import SliceLayer
    from slicefine.tuner.model import SliceFineModel

ROOM = tuple(f"{artifact.PREFIX}{name}" for name in (*SLICE_AXES, "seal"))
"""The parts of a saved layer that are no parameters."""


class Arrival:
    """The layers that wait for the values of one adapter."""

    def __init__(self, tuner: SliceFineModel, adapter: str) -> None:
        """Call it before `tuner` attaches the adapter: it remembers how the model was."""
        self.adapter = adapter
        self._tuner = tuner
        self._layers: dict[str, SliceLayer] = {}
        modules = tuner.model.modules()
        self._active_before = next((m.active_adapters for m in modules if isinstance(m, BaseTunerLayer)), [])
        self._trainable_before = {_base_name(n) for n, p in tuner.model.named_parameters() if p.requires_grad}

    def expect(self, name: str, layer: SliceLayer, seal: Seal) -> None:
        """Make room in a layer to which the adapter has just been added."""
        layer.await_arrival(self)
        self._layers[name] = layer
        region = Region.of(layer.slicefine_state[self.adapter].schedule.touched(seal.step, layer.shape))
        d_out, d_in, *kernel = layer.shape
        for part, axis, across in zip(ROOM, SLICE_AXES, (d_in, d_out), strict=False):
            _make_room(
                layer, part, self.adapter, torch.zeros(len(region.along(axis)), across, *kernel, dtype=layer.dtype)
            )
        _make_room(layer, artifact.SEAL, self.adapter, torch.zeros_like(seal.tensor()))

    def has_come(self, layer: SliceLayer) -> bool:
        """Whether a loader has brought something for this layer."""
        return bool(getattr(layer, artifact.SEAL)[self.adapter].any())

    def complete(self, *, last: bool = False) -> None:
        """Take in what has come, if anything has; if it is the `last` chance, wait no longer for what has not.

        Raises `SliceFineError` if it is not what it must be; then the adapter is gone.
        """
        came = {name for name, layer in self._layers.items() if self.has_come(layer)}
        if not came:
            if last:
                self.end()
            return
        held = {f"{name}.{part}": tensor for name in came for part, tensor in self._parts(self._layers[name]).items()}
        self.end()
        try:
            parsed = artifact.parse(held, {name: layer.target(self.adapter) for name, layer in self._layers.items()})
        except SliceFineError:
            self.refuse()
            raise
        for name, values in parsed.items():
            self._layers[name].load(
                self.adapter, step=values.seal.step, master=values.master, values=values.values, bias=values.bias
            )

    def refuse(self) -> None:
        """Undo attaching the adapter, down to what was active and trainable before."""
        self._tuner.leave_nothing_behind(self.adapter, self._active_before)
        for name, parameter in self._tuner.model.named_parameters():
            parameter.requires_grad = _base_name(name) in self._trainable_before

    def end(self) -> None:
        """Wait no longer: what has not come yet is not going to."""
        for layer in self._layers.values():
            for part in ROOM:
                delattr(layer, part)
            layer.await_arrival(None)

    def _parts(self, layer: SliceLayer) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {part: getattr(layer, part)[self.adapter] for part in ROOM}
        for parameters, part in ((layer.slicefine_weight, "weight"), (layer.slicefine_bias, "bias")):
            if self.adapter in parameters:
                parts[artifact.PREFIX + part] = parameters[self.adapter].detach().clone()
        return parts


def _base_name(name: str) -> str:
    """Name of a parameter without the tuner layers around its module."""
    return name.replace(".base_layer.", ".")


def _make_room(layer: SliceLayer, part: str, adapter: str, room: Tensor) -> None:
    holder = BufferDict(persistent=True)
    holder[adapter] = room
    layer.add_module(part, holder)
