"""Products with the matrices of several experts, whose gradient is computed for one slice of every matrix alone.

The same promises as `slice_linear`. The weight of all experts is one tensor `(experts, d_out, d_in)`; stored the other way round it
is given as a transposed view. A slice is at the same rows or columns of every expert. The master has the experts last:
`(R, d_in, experts)` for rows, `(R, d_out, experts)` for columns.

Mixtures of experts compute in one of three ways, and so there are three functions: expert by expert (`one_expert`), all of them
on tokens sorted by expert (`grouped`), and a gathered matrix for every token (`batched`).

Layouts, by suffix: S pairs of a token and an expert, E experts, O outputs, I inputs, R the rows or columns of the slice, L the
length of one (I for rows, O for columns).

    forward     y_SO = x_SI @ w_EOI[expert of s].T
    backward    dx_SI, the layer's own
      rows      d_ERL = sum over the pairs s of expert e of g_SO[s, rows] x_SI[s]
      columns   d_ERL = sum over the pairs s of expert e of x_SI[s, columns] g_SO[s]

Kept for backward: the weight by reference; for rows the input, for columns its R sliced features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slicefine.kernel.shared import autocast, begin_backward, fitted
from slicefine.kernel.slice_linear import slice_linear
from slicefine.slicing import ROW

_ALIGNMENT = 8
"""`grouped_mm` wants rows of a multiple of 16 bytes."""


def one_expert(
    x: Tensor,
    weight: Tensor,
    expert: int | Tensor,
    bias: Tensor | None,
    masters: Sequence[Tensor],
    index: Tensor,
    axis: str,
    bias_master: Tensor | None = None,
    check: Callable[[], None] | None = None,
) -> Tensor:
    """`F.linear(x, weight[expert], bias)` that trains one slice of `weight`.

    Args:
        x: `(..., d_in)`.
        weight: `(experts, d_out, d_in)`; gets no gradient.
        expert: Its number, also as an integer tensor without dimensions.
        bias: `(d_out,)` or None: that of this expert.
        masters: `master.unbind(-1)`, taken once for all experts of a forward pass: then the gradient of the master is written
            once, and not once for every expert.
        index, axis, bias_master, check: As for `slice_linear`.

    Returns:
        `(..., d_out)`, the same bits as `F.linear` gives.
    """
    return slice_linear(x, weight[expert], bias, masters[int(expert)], index, axis, bias_master, check)


class _Way(NamedTuple):
    """How the pairs are laid out, as told by a tensor `places`, and so what computes with them."""

    forward: Callable[[Tensor, Tensor, Tensor], Tensor]
    """x_SI, w, places -> y_SO"""
    input_gradient: Callable[[Tensor, Tensor, Tensor], Tensor]
    """g_SO, w, places -> dx_SI"""
    sums: Callable[[Tensor, Tensor, Tensor, torch.Size, torch.dtype], Tensor]
    """narrow_SR, wide_SL, places, shape and dtype of the master -> d_ERL"""


class _SliceExperts(torch.autograd.Function):
    # `forward(ctx, ...)` and not `setup_context`, as in `slice_linear`.
    @staticmethod
    def forward(ctx, x_SI, w, places, master, index_R, by_row, check, way):
        ctx.by_row, ctx.check, ctx.way = by_row, check, way
        ctx.master_like = (master.shape, master.dtype)
        wants_x, wants_master = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        kept = None
        if wants_master:
            kept = x_SI if by_row else x_SI.index_select(1, index_R)
        ctx.save_for_backward(w if wants_x else None, kept, places, index_R)
        return way.forward(x_SI, w, places)

    @staticmethod
    def backward(ctx, g_SO):
        begin_backward(ctx.check)
        w, kept, places, index_R = ctx.saved_tensors
        dx = d_master = None
        if w is not None:
            dx = ctx.way.input_gradient(g_SO, w, places)
        if kept is not None:
            narrow, wide = (g_SO.index_select(1, index_R), kept) if ctx.by_row else (kept, g_SO)
            d_ERL = ctx.way.sums(narrow, wide, places, *ctx.master_like)
            d_master = fitted(d_ERL.permute(1, 2, 0), *ctx.master_like)
        return dx, None, None, d_master, None, None, None, None


def _sums_of_groups(narrow_SR, wide_SL, offs, shape, dtype):
    width = narrow_SR.shape[1]
    narrow_SR = F.pad(narrow_SR, (0, -width % _ALIGNMENT))
    return F.grouped_mm(narrow_SR.t(), wide_SL.contiguous(), offs=offs)[:, :width]


def _sums_by_expert(narrow_SR, wide_SL, offs, shape, dtype):
    if torch.compiler.is_compiling():
        # A graph cannot hold the loop, whose ends are values. Rows behind the last end are of no expert.
        experts_S = torch.searchsorted(offs, torch.arange(len(wide_SL), device=offs.device), right=True)
        one_more = (*shape[:2], shape[2] + 1)
        return _sums_of_outer_products(narrow_SR, wide_SL, experts_S, one_more, dtype)[:-1]
    d_ERL = wide_SL.new_zeros((shape[2], narrow_SR.shape[1], wide_SL.shape[1]))
    start = 0
    for expert, end in enumerate(offs.tolist()):
        torch.mm(narrow_SR[start:end].t(), wide_SL[start:end], out=d_ERL[expert])
        start = end
    return d_ERL


def _sums_of_outer_products(narrow_SR, wide_SL, experts_S, shape, dtype):
    # One after the other: all of them at once would be as large as R inputs.
    sums = wide_SL.new_zeros((shape[2], wide_SL.shape[1]), dtype=dtype)
    columns = narrow_SR.to(dtype).unsqueeze(2).unbind(1)
    return torch.stack([sums.index_add(0, experts_S, column_S1 * wide_SL) for column_S1 in columns], 1)


def _grouped_by(grouped_mm: Callable[..., Any]) -> _Way:
    return _Way(
        forward=lambda x_SI, w_EOI, offs: grouped_mm(x_SI, w_EOI.transpose(-2, -1), offs=offs),
        input_gradient=lambda g_SO, w_EOI, offs: grouped_mm(g_SO, w_EOI, offs=offs),
        sums=_sums_of_groups if grouped_mm is F.grouped_mm else _sums_by_expert,
    )


def _multiplied(a: Tensor, b: Tensor, one: int) -> Tensor:
    """`bmm(a, b)` without its dimension `one`, of size one. Not a view, which models could not add a bias to in place."""
    y = a.new_empty([size for dim, size in enumerate((a.shape[0], a.shape[1], b.shape[2])) if dim != one])
    torch.bmm(a, b, out=y.unsqueeze(one))
    return y


_GATHERED = _Way(
    forward=lambda x_SI, w_SOI, _: _multiplied(w_SOI, x_SI.unsqueeze(2), 2),
    input_gradient=lambda g_SO, w_SOI, _: torch.bmm(w_SOI.transpose(1, 2), g_SO.unsqueeze(2)).squeeze(2),
    sums=_sums_of_outer_products,
)
_GATHERED_TURNED = _Way(
    forward=lambda x_SI, w_SOI, _: _multiplied(x_SI.unsqueeze(1), w_SOI.transpose(1, 2), 1),
    input_gradient=lambda g_SO, w_SOI, _: torch.bmm(g_SO.unsqueeze(1), w_SOI).squeeze(1),
    sums=_sums_of_outer_products,
)


def grouped(
    x: Tensor,
    weight: Tensor,
    offs: Tensor,
    master: Tensor,
    index: Tensor,
    axis: str,
    check: Callable[[], None] | None = None,
    *,
    grouped_mm: Callable[..., Any] = F.grouped_mm,
) -> Tensor:
    """`grouped_mm(x, weight.transpose(-2, -1), offs=offs)` that trains one slice of `weight`.

    Args:
        x: `(S, d_in)`, sorted by expert.
        weight: `(experts, d_out, d_in)`; gets no gradient.
        offs: int32, `(experts,)`: where the rows of each expert end in `x`.
        master: `(R, L, experts)`, or larger in R and L, fp32 or fp64; receives the gradient of the slice, in its own dtype, zero
            where it is larger. Its values are not read.
        index, axis, check: As for `slice_linear`.
        grouped_mm: What multiplies; anything other than torch's own stands where that is not available, so the gradient of the
            slice is computed expert by expert then.

    Returns:
        `(S, d_out)`, the same bits as `grouped_mm` gives.
    """
    return _SliceExperts.apply(x, weight, offs, master, index, axis == ROW, check, _grouped_by(grouped_mm))  # pyright: ignore[reportReturnType] -- `apply` is untyped in torch


def batched(
    x: Tensor,
    gathered: Tensor,
    experts: Tensor,
    master: Tensor,
    index: Tensor,
    axis: str,
    check: Callable[[], None] | None = None,
    *,
    turned: bool = False,
) -> Tensor:
    """The product of every row of `x` with a matrix of its own, that trains one slice of the matrices of all experts.

    Args:
        x: `(S, d_in)`.
        gathered: `(S, d_out, d_in)`: `weight[experts]`; gets no gradient.
        experts: int64, `(S,)`: the expert of every row.
        master: `(R, L, experts)`, as for `grouped`.
        index, axis, check: As for `slice_linear`.
        turned: Compute `bmm(x[:, None], gathered.transpose(1, 2))`, as models that store `(experts, d_in, d_out)` do, and not
            `bmm(gathered, x[:, :, None])`. The same but for rounding.

    Returns:
        `(S, d_out)`, the same bits as `bmm` gives.
    """
    way = _GATHERED_TURNED if turned else _GATHERED
    x, gathered = autocast(x, gathered)  # pyright: ignore[reportAssignmentType] -- what is given is not None
    return _SliceExperts.apply(x, gathered, experts, master, index, axis == ROW, check, way)  # pyright: ignore[reportReturnType] -- `apply` is untyped in torch
