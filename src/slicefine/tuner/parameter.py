"""Weights that are trained where they are read: parameters that are no layer's weight, such as the matrices of all experts of a
mixture in one, and the weights of layers with a forward of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import Tensor

from slicefine.tuner.base_layers import WEIGHT
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
            return self.watched(self.base_layer(*args, **kwargs))
        if self.place.stored.requires_grad:
            self.refuse_trained_base()
        with self._in_place():
            return self.base_layer(*args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As that of a layer, and of those within: PEFT unwraps all of them with the outermost."""
        super().merge(safe_merge, adapter_names)
        if isinstance(self.base_layer, SliceLayer):
            self.base_layer.merge(safe_merge, adapter_names)

    @property
    def weight(self) -> Any:
        """What the module calls so, whose parameters are asked for from outside as well."""
        return self._read(WEIGHT)

    @property
    def bias(self) -> Any:
        """The same."""
        return self._read("bias")

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        if name == self.__dict__.get("parameter"):
            return self._read(name)
        if isinstance(found, MethodType) and found.__self__ is self.place.module:
            return functools.partial(self._call, found)
        return found

    def _read(self, name: str) -> Any:
        module = self.base_layer
        if name not in (self.parameter, "bias") or (isinstance(module, SliceLayer) and name != self.parameter):
            return getattr(module, name)
        self.begin()
        if name == self.parameter:
            return read_weight(self) if self.trains_now() else self.place.stored
        return read_bias(self) if self.place.is_layer and self.trains_now() else getattr(module, name)

    def _call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A method of the module, which reads the parameter as `forward` does."""
        if not self.trains_now():
            return method(*args, **kwargs)
        with self._in_place():
            return method(*args, **kwargs)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        read: dict[str, Tensor | None] = {self.parameter: read_weight(self)}
        if self.installed in self.slicefine_bias:
            read["bias"] = read_bias(self)
        attributes = vars(self.place.module)  # found before the parameters, which are not attributes in themselves
        before = {name: attributes[name] for name in read if name in attributes}  # a module may be entered again
        attributes |= read
        try:
            yield
        finally:
            for name in read:
                attributes.pop(name, None)
            attributes |= before


class SliceLinearParameter(SliceParameter):
    """Around a linear layer. PEFT's "all-linear" knows such tuner layers by the name of their class."""
