"""A weight that model code reads instead of calling the layer that has it, and still only its slice is trained.

VideoMAE's attention computes `F.linear(x, self.query.weight, bias)`; mixtures of experts keep all their matrices in one parameter.
What such code gets is the weight itself, as a tensor that knows whose it is: the products that models make with a weight are
computed by our kernels. With any other operation autograd gives the gradient of the whole weight, of which the slice takes its part:
right as well, but it costs what a gradient of the whole costs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slicefine.kernel import slice_embedding, slice_experts, slice_linear, vectors
from slicefine.tuner import guards

if TYPE_CHECKING:
    from slicefine.tuner.layer import SliceLayer


class ReadWeight(Tensor):
    """The values of a weight, differentiable, and the layer they are of."""

    layer: SliceLayer
    masters: tuple[Tensor, ...] | None
    """Of a weight of several experts: what trains each of them, once one was picked."""
    turned: bool
    """Whether its last two dimensions are `(d_in, d_out)`, as for `x @ weight`, and not `(d_out, d_in)`, as for `F.linear`."""
    experts: Tensor | int | None
    """Of a weight of several experts: those that were picked, one or a list of them; None = all of them."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            route = _ROUTES.get(func)
            if getattr(func, "__name__", None) == _FALLBACK:
                route = functools.partial(_grouped, func)
            own = route(*args, **named) if route is not None else None
            return func(*args, **named) if own is None else own


class _Follow(torch.autograd.Function):
    """The values of a weight or bias, for autograd: of the gradient of the whole, the parameter that is trained takes its part."""

    @staticmethod
    def forward(ctx, values, master, part, check):
        ctx.part, ctx.check = part, check
        return values.detach()

    @staticmethod
    def backward(ctx, g):
        if ctx.check is not None:
            ctx.check()
        return None, ctx.part(g), None, None


def read_weight(layer: SliceLayer) -> Tensor:
    """The stored weight of a layer that a forward pass made now would train."""
    place = layer.place
    master, index, axis, check = _trained(layer)

    def part(g: Tensor) -> Tensor:
        taken = vectors(place.oriented(g), axis).index_select(0, index).to(master.dtype)
        room = torch.zeros_like(master)
        room[: taken.shape[0], : taken.shape[1]] = taken
        return room

    values: Any = _Follow.apply(place.stored, master, part, check)
    return _known(values, layer, place.turned)


def read_bias(layer: SliceLayer) -> Tensor | None:
    """The bias of such a layer."""
    bias, master = layer.place.bias, layer.slicefine_bias.get(layer.installed or "")
    if bias is None or master is None:
        return bias
    follow: Any = _Follow.apply(bias, master, lambda g: g.to(master.dtype), _check(layer))
    return follow


def _known(
    values: Tensor, layer: SliceLayer, turned: bool, experts: Tensor | int | None = None, masters: Any = None
) -> Tensor:
    known = values.as_subclass(ReadWeight)
    known.layer, known.turned, known.experts, known.masters = layer, turned, experts, masters
    return known


def _check(layer: SliceLayer) -> Callable[[], None] | None:
    return None if torch.compiler.is_compiling() else functools.partial(guards.check_shown, layer, layer.installed)


# ---------------------------------------------------------------------- what models do with a weight that they read


def _turn(weight: Any, *dims: int) -> Tensor | None:
    """`transpose(-2, -1)` and the like."""
    if not isinstance(weight, ReadWeight) or {dim % weight.dim() for dim in dims} != {
        weight.dim() - 2,
        weight.dim() - 1,
    }:
        return None
    return _known(weight.transpose(-2, -1), weight.layer, not weight.turned, weight.experts, weight.masters)


def _turn_all(weight: Any) -> Tensor | None:
    """`.T` and `.t()`"""
    return _turn(weight, 0, 1) if weight.dim() == 2 else None


def _pick(weight: Any, which: Any) -> Tensor | None:
    """`weight[expert]` and `weight[experts]`"""
    numbers = isinstance(which, Tensor) and which.dim() < 2 and which.dtype in (torch.int32, torch.int64)
    if not isinstance(weight, ReadWeight) or weight.dim() != 3 or not (numbers or type(which) is int):
        return None
    if weight.masters is None:
        weight.masters = _trained(weight.layer)[0].unbind(-1)
    return _known(weight[which], weight.layer, weight.turned, which, weight.masters)


def _linear(x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor | None:
    """`F.linear`"""
    if not isinstance(weight, ReadWeight) or weight.turned or weight.dim() != 2:
        return None
    return _product(x, weight, bias)


def _embedding(
    ids: Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    """`F.embedding`"""
    if max_norm or scale_grad_by_freq or sparse:
        return None
    if not isinstance(weight, ReadWeight) or weight.turned or weight.dim() != 2 or weight.experts is not None:
        return None
    master, index, axis, check = _trained(weight.layer)
    return slice_embedding(ids, weight.layer.matrix, master, index, axis, padding_idx, check)


def _matmul(x: Any, weight: Any) -> Tensor | None:
    """`x @ weight`"""
    if not isinstance(weight, ReadWeight) or not weight.turned or weight.dim() != 2 or isinstance(x, ReadWeight):
        return None
    return _product(x, weight, None)


def _product(x: Tensor, weight: ReadWeight, bias: Tensor | None) -> Tensor | None:
    layer = weight.layer
    if len(layer.shape) > 2 and weight.experts is None:  # a convolution
        return None
    bias_master = bias if bias is not None and bias.requires_grad else None
    bias = None if bias is None else bias.detach()
    master, index, axis, check = _trained(layer)
    if weight.experts is None:
        return slice_linear(x, layer.matrix, bias, master, index, axis, bias_master, check)
    assert weight.masters is not None
    expert: Any = weight.experts
    return slice_experts.one_expert(
        x, _experts_first(layer), expert, bias, weight.masters, index, axis, bias_master, check
    )


def _grouped(
    grouped_mm: Callable[..., Tensor], x: Tensor, weight: Any, offs: Tensor | None = None, **others: Any
) -> Tensor | None:
    """`grouped_mm(x, weight, offs=offs)`: rows of `x`, sorted by expert, times the matrices of all of them."""
    if not isinstance(weight, ReadWeight) or not weight.turned or weight.experts is not None or offs is None:
        return None
    if any(other is not None for other in others.values()):
        return None
    return slice_experts.grouped(x, _experts_first(weight.layer), offs, *_trained(weight.layer), grouped_mm=grouped_mm)


def _bmm(a: Any, b: Any) -> Tensor | None:
    """`bmm` of a matrix for every row of `x`, from either side."""
    turned = isinstance(b, ReadWeight)
    weight, x = (b, a) if turned else (a, b)
    if isinstance(x, ReadWeight) or weight.turned is not turned or not isinstance(weight.experts, Tensor):
        return None
    if x.shape[1 if turned else 2] != 1:
        return None
    gathered = weight.detach()
    y = slice_experts.batched(
        x.squeeze(1 if turned else 2),
        gathered.transpose(1, 2) if turned else gathered,
        weight.experts,
        *_trained(weight.layer),
        turned=turned,
    )
    return y.unsqueeze(1 if turned else 2)


def _trained(layer: SliceLayer) -> tuple[Tensor, Tensor, str, Callable[[], None] | None]:
    """Master, index and axis of the slice, and what a backward pass begins with."""
    adapter = layer.installed
    assert adapter is not None
    return (
        layer.slicefine_weight[adapter],
        layer.slicefine_index[adapter],
        layer.state.active.axis,
        _check(layer),
    )


def _experts_first(layer: SliceLayer) -> Tensor:
    """The matrices of all experts, `(experts, d_out, d_in)`; a view."""
    return layer.matrix.movedim(-1, 0)


_FALLBACK = "grouped_mm_fallback"
"""transformers' operator for devices without grouped_mm; it is there once a mixture of experts has been imported."""

_ROUTES: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.mm: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.__getitem__: _pick,
    Tensor.transpose: _turn,
    torch.transpose: _turn,
    Tensor.t: _turn_all,
    torch.t: _turn_all,
    Tensor.T.__get__: _turn_all,  # pyright: ignore[reportAttributeAccessIssue] -- a property
    Tensor.mT.__get__: lambda weight: _turn(weight, -2, -1),  # pyright: ignore[reportAttributeAccessIssue] -- a property
    torch.bmm: _bmm,
    torch._grouped_mm: functools.partial(_grouped, F.grouped_mm),  # what F.grouped_mm calls
}
