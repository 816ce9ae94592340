"""The split-weight form of slices: what public SliceFine codes compute, to be timed beside the dense form.

The weight of a layer is cut in three, what is before the slice, the slice, and what is after; one GEMM for each.

x_TI: inputs, y_TO: outputs, w_OI: weight; T tokens, I inputs, O outputs, R rank

rows       w_OI = [a_AI; s_RI; b_BI]    y_TO = [x a^T, x s^T, x b^T] concatenated
columns    w_OI = [a_OA, s_OR, b_OB]    y_TO = x[:, :A] a^T + x[:, A:A+R] s^T + x[:, A+R:] b^T
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slicefine.slicing import COLUMN, ROW


class SplitLinear(nn.Module):
    """An `nn.Linear` whose weight is cut in three along `axis`; the middle part, `r` rows or columns wide, is trained.

    The slice stands in the middle of the weight, where all three parts have rows: at the first and the last position of a sweep there
    are two. Its parts are copies.
    """

    def __init__(self, linear: nn.Linear, axis: str, r: int) -> None:
        super().__init__()
        self.axis, self.dim = axis, (ROW, COLUMN).index(axis)
        size = linear.weight.shape[self.dim]
        start = (size - r) // 2
        self.sizes = (start, r, size - r - start)
        parts = (part.detach().clone() for part in linear.weight.split(self.sizes, self.dim))
        self.before, self.slice, self.after = (
            nn.Parameter(part, requires_grad=number == 1) for number, part in enumerate(parts)
        )
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in_features)` to `(..., out_features)`"""
        parts = (self.before, self.slice, self.after)
        if self.axis == ROW:
            biases = (None,) * 3 if self.bias is None else self.bias.split(self.sizes)
            return torch.cat([F.linear(x, *pair) for pair in zip(parts, biases, strict=True)], dim=-1)
        first, second, third = (
            F.linear(piece, part) for piece, part in zip(x.split(self.sizes, -1), parts, strict=True)
        )
        y = first + second + third
        return y if self.bias is None else y + self.bias
