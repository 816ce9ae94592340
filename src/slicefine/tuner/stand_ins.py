"""Values for a model that has none, for as long as it is probed: what depends on what does not depend on them, and they take no memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface

from slicefine.tuner.base_layers import LINEAR_LAYERS, Place
from slicefine.tuner.layer import SliceLayer


@contextmanager
def stand_ins(model: nn.Module, layers: Iterable[nn.Module]) -> Iterator[None]:
    """Within this context the model, which is on the meta device, computes on the CPU, with random values.

    Args:
        layers: Those whose outputs nobody looks at. Of linear ones they have a shape alone: they would take most of the time.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    made: dict[int, Tensor] = {}  # weights that are tied stay tied
    with ExitStack() as stack:
        for module in model.modules():
            for held in (module._parameters, module._buffers, vars(module)):
                present = {name: x for name, x in held.items() if isinstance(x, Tensor) and x.is_meta}
                stack.callback(held.update, present)
                for name, tensor in present.items():
                    if id(tensor) not in made:
                        made[id(tensor)] = _random(tensor, generator)
                    held[name] = made[id(tensor)]  # pyright: ignore[reportArgumentType] -- of a parameter a parameter is made
        for layer in layers:
            base = layer.get_base_layer() if isinstance(layer, SliceLayer) else layer
            if type(base) in LINEAR_LAYERS:  # a class of one's own may give something else than a tensor
                stack.enter_context(patch.object(layer, "forward", _of_width(Place(base).shape[0])))
        stack.enter_context(patch.object(ExpertsInterface, "get_interface", lambda *_: _mixed))
        yield


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    """A tensor of the same shape and dtype, on the CPU.

    Entry (i, j) of a matrix is number i + j of a few random ones: it has full rank, and takes the memory of a vector.
    """
    if not like.is_floating_point():  # positions, say, and masks in which everything is seen
        made = torch.full(like.shape, like.dtype is torch.bool, dtype=like.dtype, device="cpu")
    else:
        numbers = sum(like.shape) - like.dim() + 1
        if like.dim() < 2:  # factors of norms, variances: not 0
            values = torch.rand(numbers, generator=generator, device="cpu") + 0.5
        else:
            values = torch.randn(numbers, generator=generator, device="cpu") * (len(like) / like.numel()) ** 0.5
        made = values.to(like.dtype).as_strided(like.shape, [1] * like.dim())
    return nn.Parameter(made, requires_grad=False) if isinstance(like, nn.Parameter) else made


def _mixed(experts: nn.Module, x: Tensor, chosen: Tensor, weights: Tensor, *_: Any, **__: Any) -> Tensor:
    """What experts make of tokens `x` `(tokens, features)`: of all features of a token all, and more of an expert with a larger weight.

    Their own matrices would be copied, gigabytes of them.
    """
    dense = _random(x.new_empty(x.shape[-1], x.shape[-1], device="meta"), torch.Generator("cpu").manual_seed(0))
    scale = (weights * torch.arange(1, weights.shape[-1] + 1, device="cpu")).sum(-1, keepdim=True)
    return (x @ dense) * scale.to(x.dtype)


def _of_width(width: int) -> Callable[..., Tensor]:
    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x.new_empty(*x.shape[:-1], width)

    return forward
