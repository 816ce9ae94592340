"""Values for a model that has none, for as long as it is probed: what depends on what does not depend on them, and they take no memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface

from slicefine.tuner.base_layers import LINEAR_LAYERS, Place
from slicefine.tuner.layer import SliceLayer

_LOCK = threading.RLock()
"""Experts are looked up in one place of the process."""
SMALL = 2**20
"""Entries of a tensor that may take its own memory."""


@contextmanager
def stand_ins(model: nn.Module, layers: Iterable[nn.Module]) -> Iterator[None]:
    """Within this context the model, which is on the meta device, computes on the CPU, with random values.

    Args:
        layers: Those whose outputs nobody looks at. Of linear ones they have a shape alone: they would take most of the time.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    made: dict[int, Tensor] = {}  # weights that are tied stay tied
    with _LOCK, ExitStack() as stack:
        for module in model.modules():
            for held in (module._parameters, module._buffers, vars(module)):
                stack.callback(_put_back, held, dict(held))
                for name, tensor in [*held.items()]:
                    if isinstance(tensor, Tensor) and tensor.is_meta:
                        if id(tensor) not in made:
                            made[id(tensor)] = _random(tensor, generator)
                        held[name] = made[id(tensor)]  # pyright: ignore[reportArgumentType] -- of a parameter a parameter is made
        for layer in layers:
            base = layer.get_base_layer() if isinstance(layer, SliceLayer) else layer
            if type(base) in LINEAR_LAYERS:  # a class of one's own may give something else than a tensor
                stack.enter_context(patch.object(layer, "forward", _of_width(Place(base).shape[0])))
        stack.enter_context(patch.object(ExpertsInterface, "get_interface", _mixing({id(m) for m in model.modules()})))
        yield


def _put_back(held: dict[str, Any], before: dict[str, Any]) -> None:
    """Tensors alone, in their order, without those that the forward pass has made."""
    for name in [name for name, x in held.items() if isinstance(x, Tensor) and name not in before]:
        del held[name]
    held.update({name: x for name, x in before.items() if isinstance(x, Tensor) or isinstance(held.get(name), Tensor)})


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    """A tensor of the same shape and dtype, on the CPU.

    Entry (i, j) of a large matrix is number i + j of a few random ones: it has full rank, and takes the memory of a vector.
    """
    if like.is_complex():
        made = torch.randn(like.shape, generator=generator, device="cpu", dtype=like.dtype)
    elif like.dtype is torch.bool:  # masks, of which half is seen in every row and column, whatever true means
        indices = [torch.arange(size, device="cpu") for size in like.shape]
        made = sum(torch.meshgrid(*indices, indexing="ij"), torch.zeros((), dtype=torch.int64, device="cpu")) % 2 == 0
    elif not like.is_floating_point():  # positions, say
        made = torch.zeros(like.shape, dtype=like.dtype, device="cpu")
    else:
        dense = like.numel() <= SMALL  # a model may look at it in another shape
        numbers = like.numel() if dense else sum(like.shape) - like.dim() + 1
        if like.dim() < 2:  # factors of norms, variances: not 0
            values = torch.rand(numbers, generator=generator, device="cpu") + 0.5
        else:
            values = torch.randn(numbers, generator=generator, device="cpu") * (len(like) / like.numel()) ** 0.5
        values = values.to(like.dtype)
        made = values.view(like.shape) if dense else values.as_strided(like.shape, [1] * like.dim())
    return nn.Parameter(made, requires_grad=False) if isinstance(like, nn.Parameter) else made


def _mixing(own: set[int]) -> Callable[..., Any]:
    """In place of `ExpertsInterface.get_interface`: what experts with these identities compute, and all others as ever."""
    usual = ExpertsInterface.get_interface

    def get_interface(self: ExpertsInterface, *given: Any, **named: Any) -> Callable[..., Tensor]:
        theirs = usual(self, *given, **named)

        def forward(experts: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
            return (_mixed if id(experts) in own else theirs)(experts, *args, **kwargs)

        return forward

    return get_interface


def _mixed(experts: nn.Module, x: Tensor, chosen: Tensor, weights: Tensor, *_: Any, **__: Any) -> Tensor:
    """What experts make of tokens `x` `(tokens, features)`: of all features of a token all, and more of an expert with a larger weight.

    Their own matrices would be copied, gigabytes of them.
    """
    dense = _random(x.new_empty(x.shape[-1], x.shape[-1], device="meta"), torch.Generator("cpu").manual_seed(0))
    scale = (weights * torch.arange(1, weights.shape[-1] + 1, device="cpu")).sum(-1, keepdim=True)
    return (x @ dense) * scale.to(x.dtype)


def _of_width(width: int) -> Callable[..., Tensor]:
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        x: Tensor = [*args, *kwargs.values()][0]
        return x.new_empty(*x.shape[:-1], width)

    return forward
