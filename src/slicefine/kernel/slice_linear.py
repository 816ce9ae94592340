"""A dense linear layer whose gradient is computed for one slice of its weight alone.

The weight always holds its current values, so the forward pass is the layer's own GEMM: no mask, no clone, no split. What
is trained is the *master*, a small parameter that holds the slice in fp32. It takes no part in the forward arithmetic (its
values are in the weight already); the autograd function hands it the gradient that the slice would have got.

Layouts, by suffix: T tokens (all leading dimensions flattened), I input features, O output features, R the rows or columns of
the slice, L the length of one of them (I for rows, O for columns).

    forward     y_TO  = x_TI @ w_OI.T + b_O
    backward    dx_TI = g_TO @ w_OI                                  the layer's own, if the input wants it
      rows      d_RL  = g_TO[:, rows].T @ x_TI                       cost 2 T R I, a share R/O of the dense gradient
      columns   d_RL  = x_TI[:, columns].T @ g_TO                    cost 2 T R O, a share R/I of the dense gradient
      bias      d_O   = sum of g_TO over T

The master keeps a slice as R vectors of length L for both axes, so a column slice is held transposed. It may be larger than
the slice, in width and in length: `alternate` uses one parameter for both axes. The part that is not in use gets zeros.

What is kept for backward: the weight by reference, if the input wants a gradient; for rows the whole input; for columns
its R sliced features only, which is why a column slice needs less memory than any method that keeps the input.

The position is an int64 tensor and not a Python number, so a compiled graph survives every move.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from slicefine.kernel.shared import autocast, begin_backward, fitted
from slicefine.slicing import ROW


class _SliceLinear(torch.autograd.Function):
    # `forward(ctx, ...)` and not the newer `setup_context`, which inspects signatures on every call: 30 us against 8.
    @staticmethod
    def forward(ctx, x, w_OI, b_O, master, bias_master, index_R, by_row, check):
        ctx.by_row = by_row
        ctx.check = check
        ctx.input_shape = x.shape
        ctx.master_like = (master.shape, master.dtype)
        ctx.bias_dtype = None if bias_master is None else bias_master.dtype
        wants_x, wants_master = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        kept = None
        if wants_master:
            # Flat first: picking along the last of three dimensions is several times slower.
            kept = x if by_row else x.reshape(-1, x.shape[-1]).index_select(1, index_R)
        ctx.save_for_backward(w_OI if wants_x else None, kept, index_R)
        y = F.linear(x, w_OI, b_O)
        # The same memory, but no view: autograd forbids writing (`y += 1`, ReLU in place) into one that is made in here.
        return torch.ops.aten._unsafe_view(y, y.shape) if torch.compiler.is_compiling() or y._is_view() else y

    @staticmethod
    def backward(ctx, g):
        begin_backward(ctx.check)
        w_OI, kept, index_R = ctx.saved_tensors
        g_TO = g.reshape(-1, g.shape[-1])
        dx = d_master = d_bias = None
        if w_OI is not None:
            dx = (g_TO @ w_OI).reshape(ctx.input_shape)
        if kept is not None:
            kept_T = kept.reshape(-1, kept.shape[-1])
            d_RL = g_TO.index_select(1, index_R).t() @ kept_T if ctx.by_row else kept_T.t() @ g_TO
            d_master = fitted(d_RL, *ctx.master_like)
        if ctx.needs_input_grad[4]:
            d_bias = g_TO.sum(0, dtype=ctx.bias_dtype)
        return dx, None, None, d_master, d_bias, None, None, None


def slice_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    master: Tensor,
    index: Tensor,
    axis: str,
    bias_master: Tensor | None = None,
    check: Callable[[], None] | None = None,
) -> Tensor:
    """`F.linear(x, weight, bias)` that trains one slice of `weight`, and the bias if `bias_master` is given.

    Args:
        x: input, any number of leading dimensions, last dimension `d_in`; may be empty or non-contiguous.
        weight: `(d_out, d_in)`, fp32, bf16 or fp16; holds the current values of the slice; gets no gradient.
        bias: `(d_out,)` or None; holds the current values; gets no gradient.
        master: `(R, L)` or larger, fp32 or fp64; receives the gradient of the slice, in its own dtype, zero where it is
            larger than the slice. Its values are not read.
        index: int64, `(R,)`: the rows or columns of the slice.
        axis: `"row"` or `"column"`.
        bias_master: `(d_out,)`, fp32 or fp64, or None: receives the gradient of the bias. Its values are not read.
        check: Called when the backward pass begins; raises if the weight holds other values than it did in this pass.

    Returns:
        `(..., d_out)`, the same bits as `F.linear` gives, also under autocast.
    """
    x, weight, bias = autocast(x, weight, bias)  # pyright: ignore[reportAssignmentType] -- what is given is not None
    return _SliceLinear.apply(x, weight, bias, master, bias_master, index, axis == ROW, check)  # pyright: ignore[reportReturnType] -- `apply` is untyped in torch


def vectors(weight: Tensor, axis: str) -> Tensor:
    """`weight` `(d_out, d_in, *kernel)` with what slices along `axis` consist of in dimension 0: itself for rows,
    `(d_in, d_out, *kernel)` for columns. A view."""
    return weight if axis == ROW else weight.transpose(0, 1)
