"""A dense convolution whose gradient is computed for one slice of its weight alone.

The same promises as `slice_linear`. A weight `(d_out, d_in, *kernel)` has rows, its output channels, and columns, its input
channels; with groups, `d_in` counts the input channels within a group, and column j is input channel j of every group.

Layouts, by suffix: N batch, O output channels, I input channels of the whole input, J input channels of a group, R channels of
the slice, L the length of one (J for rows, O for columns), S positions of the output (for tensors of one, two or three
dimensions more, so is the input), K taps, that is positions within the kernel.

    forward     y_NOS = conv(x_NIS, w_OJK) + b_O
    backward    dx_NIS, the layer's own
      rows      d_RJK = sum over N, S of g_NRS * x_NIS shifted to each tap
      columns   d_ROK = sum over N, S of x_NRS shifted to each tap * g_NOS

Of both sums one side is the slice, which has few channels. So it is the slice that is copied once for each tap, onto the grid
of the other side, and one matrix product of `(R K, N S)` with `(N S, channels)` does the rest: nothing of the size of the
layer's input or output is copied. Where the copies would be larger than the other side itself (a wide slice of a thin layer,
an image of three channels) and with groups, torch's own weight gradient of the slice is faster.

What is kept for backward: the weight by reference, if the input wants a gradient; for rows the input, with many groups only
the input channels that the rows see; for columns their input channels only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slicefine.kernel.shared import autocast, begin_backward, fitted
from slicefine.slicing import ROW

_CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class _Geometry(NamedTuple):
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)


class _SliceConv(torch.autograd.Function):
    # `forward(ctx, ...)` and not `setup_context`, as in `slice_linear`.
    @staticmethod
    def forward(ctx, x, w_OJK, b_O, master, bias_master, index_R, by_row, check, geometry):
        ctx.by_row, ctx.check, ctx.geometry = by_row, check, geometry
        ctx.input_layout = (x.shape, x.stride())
        ctx.master_like = (master.shape, master.dtype)
        ctx.bias_dtype = None if bias_master is None else bias_master.dtype
        wants_x, wants_master = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        kept = None
        if wants_master:
            channels = _seen_by(index_R, by_row, w_OJK.shape, geometry.groups)
            kept = x if channels is None else _channels(x, channels)
        ctx.save_for_backward(w_OJK if wants_x else None, kept, index_R)
        _, stride, padding, dilation, groups = geometry
        return _CONVOLUTIONS[x.dim()](x, w_OJK, b_O, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx, g):
        begin_backward(ctx.check)
        w_OJK, kept, index_R = ctx.saved_tensors
        geometry = ctx.geometry
        dx = d_master = d_bias = None
        if w_OJK is not None:
            # Of the input only shape and layout count here.
            shape, strides = ctx.input_layout
            whole = kept is not None and kept.shape == shape
            x = kept if whole else torch.empty_strided(shape, strides, dtype=g.dtype, device=g.device)
            dx = _backward(g, x, w_OJK, geometry, (True, False, False))[0]
        if kept is not None:
            gradient = _of_rows if ctx.by_row else _of_columns
            d_master = fitted(gradient(g, kept, index_R, geometry, ctx.input_layout[0][1]), *ctx.master_like)
        if ctx.needs_input_grad[4]:
            d_bias = g.sum([0, *range(2, g.dim())], dtype=ctx.bias_dtype)
        return dx, None, None, d_master, d_bias, None, None, None, None


def _backward(g, x, weight, geometry, wanted):
    _, stride, padding, dilation, groups = geometry
    unused = [0] * len(stride)  # output_padding, of transposed convolutions
    return torch.ops.aten.convolution_backward(
        g, x, weight, None, stride, padding, dilation, False, unused, groups, wanted
    )


def _seen_by(index_R: Tensor, by_row: bool, shape: torch.Size, groups: int) -> Tensor | None:
    """The input channels that the gradient of the slice needs, or None for all of them."""
    d_out, d_in = shape[:2]
    if not by_row:
        return (torch.arange(groups, device=index_R.device)[:, None] * d_in + index_R).flatten()
    if len(index_R) >= groups:
        return None
    group_R = index_R // (d_out // groups)
    return (group_R[:, None] * d_in + torch.arange(d_in, device=index_R.device)).flatten()


def _of_rows(g, kept, index_R, geometry, channels) -> Tensor:
    """`(R, d_in, *kernel)`"""
    d_out, (R,), groups = g.shape[1], index_R.shape, geometry.groups
    g_NRS = _channels(g, index_R)
    if groups > R:
        # Every row with its own input channels: as many groups as rows.
        return _own_gradient(g_NRS, kept, geometry._replace(groups=R))
    if R * geometry.taps <= channels:
        reversed_RIK = _product(_spread(g_NRS, kept.shape[2:], geometry), kept, geometry.kernel)
        d_RIK = reversed_RIK.flatten(2).flip(2).unflatten(2, geometry.kernel)
    else:
        d_RIK = _own_gradient(g_NRS, kept, geometry._replace(groups=1))
    if groups == 1:
        return d_RIK
    # Of all input channels those of the row's own group.
    d_RGJK = d_RIK.unflatten(1, (groups, -1))
    return d_RGJK[torch.arange(R, device=g.device), index_R // (d_out // groups)]


def _of_columns(g, kept, index_R, geometry, channels) -> Tensor:
    """`(R, d_out, *kernel)`"""
    if geometry.groups > 1 or len(index_R) * geometry.taps > g.shape[1]:
        return _own_gradient(g, kept, geometry).transpose(0, 1)
    padded = F.pad(kept, [side for width in reversed(geometry.padding) for side in (width, width)])
    return _product(_taps(padded, geometry.kernel, geometry.stride, geometry.dilation), g, geometry.kernel)


def _own_gradient(g, x, geometry) -> Tensor:
    """torch's weight gradient, `(channels of g, channels of x / groups, *kernel)`."""
    if geometry.groups > 1 and g.dim() in _CHANNELS_LAST:
        # Without channels last the CPU takes four times as long with groups.
        g, x = (t.contiguous(memory_format=_CHANNELS_LAST[t.dim()]) for t in (g, x))
    weight = g.new_empty((g.shape[1], x.shape[1] // geometry.groups, *geometry.kernel))  # its values are not read
    return _backward(g, x, weight, geometry, (False, True, False))[1]


def _channels(x_NIS: Tensor, index_R: Tensor) -> Tensor:
    """The channels `index_R`, `(N, R, *S)`, channels last if `x` is."""
    if _is_channels_last(x_NIS):
        # Flat, and `gather`: `index_select` of this dimension runs on one thread, and far slower if not flat.
        x_NSI = x_NIS.movedim(1, -1)
        picked = x_NSI.flatten(0, -2).gather(1, index_R.expand(x_NSI[..., 0].numel(), -1))
        return picked.reshape(*x_NSI.shape[:-1], -1).movedim(-1, 1)
    return x_NIS.index_select(1, index_R)


def _is_channels_last(x: Tensor) -> bool:
    layout = _CHANNELS_LAST.get(x.dim())
    return layout is not None and not x.is_contiguous() and x.is_contiguous(memory_format=layout)


def _spread(g_NRS: Tensor, size: torch.Size, geometry: _Geometry) -> Tensor:
    """Outputs laid onto the grid of the inputs, one copy for each tap, the taps in reverse order."""
    stride, pads = geometry.stride, []
    if any(step > 1 for step in stride):
        grid = [(n - 1) * step + 1 if n else 0 for n, step in zip(g_NRS.shape[2:], stride, strict=True)]
        stuffed = g_NRS.new_zeros((*g_NRS.shape[:2], *grid))
        stuffed[(..., *(slice(None, None, step) for step in stride))] = g_NRS
        g_NRS = stuffed
    for inputs, outputs, taps, padding, dilation in zip(
        reversed(size),
        reversed(g_NRS.shape[2:]),
        reversed(geometry.kernel),
        reversed(geometry.padding),
        reversed(geometry.dilation),
        strict=True,
    ):
        reach = dilation * (taps - 1)
        before = reach - padding
        pads += [before, inputs + reach - before - outputs]
    padded = F.pad(g_NRS, pads) if any(pads) else g_NRS
    return _taps(padded, geometry.kernel, (1,) * len(stride), geometry.dilation)


def _taps(x: Tensor, kernel, stride, dilation) -> Tensor:
    """A copy of `x` `(N, R, *S)` for each tap of a kernel that slides over it, `(R K, N, positions)`."""
    dims = len(kernel)
    for dim, (taps, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        x = x.unfold(dim, gap * (taps - 1) + 1, step)[..., ::gap]
    x_RKNS = x.permute(1, *range(2 + dims, 2 + 2 * dims), 0, *range(2, 2 + dims))
    return x_RKNS.reshape(x.shape[1] * math.prod(kernel), x.shape[0], math.prod(x.shape[2 : 2 + dims]))


def _product(slice_RKNS: Tensor, other_NCS: Tensor, kernel) -> Tensor:
    """The sum over N and S, `(R, C, *kernel)`."""
    # Which side comes first makes a third of the time or more, and the better one depends on the layout.
    if _is_channels_last(other_NCS):
        d_CRK = (slice_RKNS.flatten(1) @ other_NCS.movedim(1, -1).flatten(0, -2)).t()
    else:
        # One product for every N; their sum is rounded once more, so it is taken in fp32.
        d_NCRK = other_NCS.flatten(2) @ slice_RKNS.permute(1, 2, 0)
        d_CRK = d_NCRK.sum(0, dtype=torch.promote_types(d_NCRK.dtype, torch.float32))
    return d_CRK.unflatten(1, (-1, *kernel)).transpose(0, 1)


def slice_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    master: Tensor,
    index: Tensor,
    axis: str,
    bias_master: Tensor | None = None,
    check: Callable[[], None] | None = None,
    *,
    stride: tuple[int, ...],
    padding: str | tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    padding_mode: str = "zeros",
) -> Tensor:
    """The convolution of nn.Conv1d, Conv2d or Conv3d that trains one slice of `weight`, and the bias if `bias_master` is given.

    Args:
        x: input, `(N, channels, *size)` or `(channels, *size)`; may be empty, non-contiguous or channels last.
        weight: `(d_out, d_in, *kernel)`, `d_in` the input channels of a group; its number of dimensions tells which
            convolution; gets no gradient.
        bias: `(d_out,)` or None; gets no gradient.
        master: `(R, d_in, *kernel)` for rows and `(R, d_out, *kernel)` for columns, or larger in the first two dimensions, fp32
            or fp64; receives the gradient of the slice, in its own dtype, zero where it is larger. Its values are not read.
        index: int64, `(R,)`: the output channels, or input channels of every group, of the slice.
        axis, bias_master, check: As for `slice_linear`.
        stride, padding, dilation, groups, padding_mode: As the layer has them.

    Returns:
        The same bits as the layer gives, also under autocast.
    """
    kernel = tuple(weight.shape[2:])
    batched = x.dim() == weight.dim()
    x = x if batched else x.unsqueeze(0)
    x, whole_padding = _padded(x, kernel, padding, padding_mode, dilation)
    x, weight, bias = autocast(x, weight, bias)  # pyright: ignore[reportAssignmentType] -- what is given is not None
    geometry = _Geometry(kernel, stride, whole_padding, dilation, groups)
    y = _SliceConv.apply(x, weight, bias, master, bias_master, index, axis == ROW, check, geometry)
    return y if batched else y.squeeze(0)  # pyright: ignore[reportAttributeAccessIssue, reportReturnType] -- `apply` is untyped


def _padded(x: Tensor, kernel, padding, padding_mode: str, dilation) -> tuple[Tensor, tuple[int, ...]]:
    """`x` with the padding that a convolution cannot do by itself, and the padding that is left to it."""
    if padding == "valid":
        padding = (0,) * len(kernel)
    if padding == "same":
        total = [gap * (taps - 1) for taps, gap in zip(kernel, dilation, strict=True)]
        before = tuple(width // 2 for width in total)
        after = tuple(width - first for width, first in zip(total, before, strict=True))
    else:
        before = after = tuple(padding)
    if padding_mode != "zeros":
        sides = [side for pair in zip(reversed(before), reversed(after), strict=True) for side in pair]
        return F.pad(x, sides, mode=padding_mode), (0,) * len(kernel)
    if before != after:
        # As torch does it: the same amount on both sides is left to the convolution.
        sides = [
            side for pair in zip(reversed(before), reversed(after), strict=True) for side in (0, pair[1] - pair[0])
        ]
        x = F.pad(x, sides)
    return x, before
