"""A weight that model code reads instead of calling the layer that has it, and still only its slice is trained.

Mamba computes `self.dt_proj.weight @ x`, Falcon's layers `x @ self.weight.T`; mixtures of experts keep all their matrices in one parameter.
What such code gets is the weight itself, as a tensor that knows whose it is: the products that models make with a weight are
computed by our kernels. With any other operation autograd gives the gradient of the whole weight, of which the slice takes its part:
right as well, but it costs what a gradient of the whole costs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from slicefine.kernel import slice_conv, slice_embedding, slice_experts, slice_linear, vectors
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
            route = _route(func, named)
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
#
# Arguments have torch's own names. A route that returns None leaves the operation to torch, and the gradient to `_Follow`.


def _is_matrix(weight: Any, *, turned: bool) -> bool:
    """Whether it is one matrix, of a layer or of one expert, that a product with `x` may be made with from this side."""
    return (
        isinstance(weight, ReadWeight)
        and weight.layer.installed is not None
        and weight.dim() == 2
        and weight.turned is turned
        and (weight.experts is not None or len(weight.layer.shape) == 2)
    )


def _is_experts(weight: Any, *, picked: bool) -> bool:
    """Whether it has the matrices of all experts, or of a list of them if `picked`."""
    return (
        isinstance(weight, ReadWeight)
        and weight.layer.installed is not None
        and not weight.layer.place.is_layer  # not a convolution over a signal, which has three dimensions too
        and weight.dim() == 3
        and (weight.experts is not None) is picked
    )


def _transpose(input: Any, dim0: int, dim1: int) -> Tensor | None:
    if not isinstance(input, ReadWeight):
        return None
    last = {input.dim() - 2, input.dim() - 1}
    if {dim0 % input.dim(), dim1 % input.dim()} != last or (input.dim() == 3 and input.layer.place.is_layer):
        return None
    return _known(input.transpose(dim0, dim1), input.layer, not input.turned, input.experts, input.masters)


def _t(input: Any) -> Tensor | None:
    """`.t()` and `.T`"""
    return _transpose(input, 0, 1) if input.dim() == 2 else None


def _mt(input: Any) -> Tensor | None:
    """`.mT`"""
    return _transpose(input, -2, -1)


def _getitem(input: Any, which: Any) -> Tensor | None:
    """`weight[expert]` and `weight[experts]`"""
    numbers = isinstance(which, Tensor) and which.dim() < 2 and which.dtype in (torch.int32, torch.int64)
    if not _is_experts(input, picked=False) or not (numbers or type(which) is int):
        return None
    if input.masters is None:
        input.masters = _trained(input.layer)[0].unbind(-1)
    return _known(input[which], input.layer, input.turned, which, input.masters)


def _linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor | None:
    return _product(input, weight, bias) if _is_matrix(weight, turned=False) else None


def _matmul(input: Any, other: Any) -> Tensor | None:
    """`x @ weight`"""
    if not _is_matrix(other, turned=True) or isinstance(input, ReadWeight) or input.dim() < 2:
        return None
    return _product(input, other, None)


def _mm(input: Any, mat2: Any) -> Tensor | None:
    return _matmul(input, mat2)


def _product(x: Tensor, weight: ReadWeight, bias: Tensor | None) -> Tensor:
    bias_master = bias if bias is not None and bias.requires_grad else None
    bias = None if bias is None else bias.detach()
    master, index, axis, check = _trained(weight.layer)
    if weight.experts is None:
        return slice_linear(x, weight.layer.matrix, bias, master, index, axis, bias_master, check)
    assert weight.masters is not None
    expert: Any = weight.experts
    return slice_experts.one_expert(
        x, _experts_first(weight.layer), expert, bias, weight.masters, index, axis, bias_master, check
    )


def _embedding(
    input: Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    if not _is_matrix(weight, turned=False) or weight.experts is not None or max_norm or scale_grad_by_freq or sparse:
        return None
    master, index, axis, check = _trained(weight.layer)
    return slice_embedding(input, weight.layer.matrix, master, index, axis, padding_idx, check)


def _conv(
    input: Tensor,
    weight: Any,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    if not isinstance(weight, ReadWeight) or weight.layer.installed is None or not weight.layer.place.is_layer:
        return None
    bias_master = bias if bias is not None and bias.requires_grad else None
    bias = None if bias is None else bias.detach()
    master, index, axis, check = _trained(weight.layer)
    each = [(n,) * (weight.dim() - 2) if isinstance(n, int) else n for n in (stride, padding, dilation)]
    return slice_conv(
        input,
        weight.layer.matrix,
        bias,
        master,
        index,
        axis,
        bias_master,
        check,
        stride=each[0],
        padding=each[1],
        dilation=each[2],
        groups=groups,
    )


def _grouped(
    grouped_mm: Callable[..., Tensor], input: Tensor, mat2: Any, offs: Tensor | None = None, **others: Any
) -> Tensor | None:
    """Rows of `x`, sorted by expert, times the matrices of all of them."""
    if not _is_experts(mat2, picked=False) or not mat2.turned or offs is None:
        return None
    if any(other is not None for other in others.values()):
        return None
    return slice_experts.grouped(input, _experts_first(mat2.layer), offs, *_trained(mat2.layer), grouped_mm=grouped_mm)


def _bmm(input: Any, mat2: Any) -> Tensor | None:
    """A matrix for every row of `x`, from either side."""
    turned = isinstance(mat2, ReadWeight)
    weight, x = (mat2, input) if turned else (input, mat2)
    if not _is_experts(weight, picked=True) or isinstance(x, ReadWeight) or weight.turned is not turned:
        return None
    if x.shape[1 if turned else 2] != 1:
        return None
    gathered, experts = weight.detach(), cast(Tensor, weight.experts)
    y = slice_experts.batched(
        x.squeeze(1 if turned else 2),
        gathered.transpose(1, 2) if turned else gathered,
        experts % weight.layer.shape[-1],  # a negative number counts from the end
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


Route = Callable[..., Tensor | None]
_FALLBACK = "grouped_mm_fallback"
"""transformers' operator for devices without grouped_mm; it is there once a mixture of experts has been imported."""
_ROUTES: dict[Callable[..., Any], Route] = {
    F.linear: _linear,
    F.embedding: _embedding,
    torch.conv1d: _conv,
    torch.conv2d: _conv,
    torch.conv3d: _conv,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.mm: _mm,
    Tensor.mm: _mm,
    torch.bmm: _bmm,
    Tensor.bmm: _bmm,
    torch._grouped_mm: functools.partial(_grouped, F.grouped_mm),  # what F.grouped_mm calls
    Tensor.__getitem__: _getitem,
    Tensor.transpose: _transpose,
    torch.transpose: _transpose,
    Tensor.t: _t,
    torch.t: _t,
    Tensor.T.__get__: _t,  # pyright: ignore[reportAttributeAccessIssue] -- a property
    Tensor.mT.__get__: _mt,  # pyright: ignore[reportAttributeAccessIssue] -- a property
}


def _route(func: Callable[..., Any], named: dict[str, Any]) -> Route | None:
    """What computes `func` for a weight that is read; None if torch does."""
    route = functools.partial(_grouped, func) if getattr(func, "__name__", "") == _FALLBACK else _ROUTES.get(func)
    if route is None or not named or isinstance(route, functools.partial):
        return route
    # `out`, and names that torch takes besides those of its documentation
    return route if named.keys() <= inspect.signature(route).parameters.keys() else None
