"""An embedding whose gradient is computed for one slice of its table alone.

The same promises as `slice_linear`. A table `(tokens, features)` has rows, its tokens, and columns, its features.

Layouts, by suffix: T positions (all dimensions of the ids flattened), V tokens of the table, F features, R the rows or columns
of the slice.

    forward     y_TF = w_VF[ids_T]
    backward    the ids have no gradient
      rows      d_RF = (ids_T == rows_R).T @ g_TF        a product that reads the gradient once
      columns   d_RV = sum of g_TF[:, columns] over the positions of every token

Kept for backward: the ids, by reference.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from slicefine.kernel.shared import begin_backward, fitted
from slicefine.slicing import ROW


class _SliceEmbedding(torch.autograd.Function):
    # `forward(ctx, ...)` and not `setup_context`, as in `slice_linear`.
    @staticmethod
    def forward(ctx, ids, w_VF, master, index_R, by_row, padding_idx, check):
        ctx.by_row, ctx.padding_idx, ctx.check = by_row, padding_idx, check
        ctx.tokens = w_VF.shape[0]
        ctx.master_like = (master.shape, master.dtype)
        ctx.save_for_backward(ids, index_R)
        return F.embedding(ids, w_VF, padding_idx)

    @staticmethod
    def backward(ctx, g):
        begin_backward(ctx.check)
        ids, index_R = ctx.saved_tensors
        ids_T, g_TF = ids.reshape(-1), g.reshape(-1, g.shape[-1])
        shape, dtype = ctx.master_like
        if ctx.by_row:
            d = (ids_T == index_R[:, None]).to(g.dtype) @ g_TF
            if ctx.padding_idx is not None:
                d = d.masked_fill((index_R == ctx.padding_idx % ctx.tokens)[:, None], 0)
        else:
            # Sums in the dtype of the master: a token may stand at many positions.
            g_RT = g_TF.index_select(1, index_R).t().to(dtype)
            d = g_RT.new_zeros((len(index_R), ctx.tokens)).index_add(1, ids_T, g_RT)
            if ctx.padding_idx is not None:
                d[:, ctx.padding_idx] = 0
        return None, None, fitted(d, shape, dtype), None, None, None, None


def slice_embedding(
    ids: Tensor,
    weight: Tensor,
    master: Tensor,
    index: Tensor,
    axis: str,
    padding_idx: int | None = None,
    check: Callable[[], None] | None = None,
) -> Tensor:
    """`F.embedding(ids, weight, padding_idx)` that trains one slice of `weight`.

    Args:
        ids: int64 or int32, any shape; may be empty.
        weight: `(tokens, features)`; holds the current values of the slice; gets no gradient.
        master: `(R, features)` for rows, `(R, tokens)` for columns, or larger, fp32 or fp64; receives the gradient of the slice,
            in its own dtype, zero where it is larger. Its values are not read.
        index: int64, `(R,)`: the tokens or features of the slice.
        axis: `"row"` or `"column"`.
        padding_idx: A token that gets no gradient.
        check: As for `slice_linear`.

    Returns:
        `(*ids.shape, features)`, the same bits as `F.embedding` gives.
    """
    return _SliceEmbedding.apply(ids, weight, master, index, axis == ROW, padding_idx, check)  # pyright: ignore[reportReturnType] -- `apply` is untyped in torch
