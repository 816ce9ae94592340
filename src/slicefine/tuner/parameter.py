"""Weights that are trained where they are read: parameters that are no layer's weight, such as the matrices of all experts of a
mixture in one, and the weights of layers with a forward of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from slicefine.tuner.layer import SliceLayer
from slicefine.tuner.reading import read_bias, read_weight


class SliceParameter(SliceLayer):
    """Stands around the module that has the parameter; where several of one module are trained, one around the other.

    While the module computes, it finds in the place of its parameter what trains the slice, see `reading.py`.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives for these arguments."""
        self.begin()
        if not self.trains_now():
            y = self.base_layer(*args, **kwargs)
            return self.watched(y) if isinstance(y, Tensor) else y
        if self.place.stored.requires_grad:
            self.refuse_call(0, [])
        with self._in_place():
            return self.base_layer(*args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As that of a layer, and of those within: PEFT unwraps all of them with the outermost."""
        super().merge(safe_merge, adapter_names)
        if isinstance(self.base_layer, SliceLayer):
            self.base_layer.merge(safe_merge, adapter_names)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        read: dict[str, Tensor | None] = {self.parameter: read_weight(self)}
        if self.installed in self.slicefine_bias:
            read["bias"] = read_bias(self)
        attributes = vars(self.place.module)  # found before the parameters, which are not attributes in themselves
        attributes |= read
        try:
            yield
        finally:
            for name in read:
                del attributes[name]


class SliceLinearParameter(SliceParameter):
    """Around a linear layer. PEFT's "all-linear" knows such tuner layers by the name of their class."""
