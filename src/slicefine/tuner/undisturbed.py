"""A forward pass that leaves a model as it is: its mode, its weights, and the random numbers of everybody else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from slicefine.errors import SliceFineError


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Within this context no module is in training mode (no dropout, no statistics), and random numbers leave no trace: some models draw them
    outside of training as well (ViT-MAE).

    An operation that would write into a parameter raises `SliceFineError` instead.
    """
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.random.fork_rng(devices), _NoWrites(model):
            yield
    finally:
        for module in training:
            module.training = True


class _NoWrites(TorchDispatchMode):
    """Within this context an operation that would write into a parameter of `model` raises `SliceFineError` instead (RWKV divides its weights to evaluate)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {parameter.untyped_storage()._cdata: name for name, parameter in model.named_parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                written = argument.alias_info is not None and argument.alias_info.is_write
                if written and isinstance(value, Tensor) and (name := self._names.get(value.untyped_storage()._cdata)):
                    raise SliceFineError(
                        f"axis='coupled' finds partners by a forward pass, and that of this model writes into its weights ({name}, by {func}): it would not stay "
                        "what it is. Use another axis, or take `couplings` from the configuration of an adapter of the same architecture."
                    )
        return func(*args, **(kwargs or {}))
