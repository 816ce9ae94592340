"""What the kernels have in common."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from slicefine.errors import SliceFineError


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """`tensors` in the dtype that autocast asks of them, those that are None left out of it; the first one decides.

    To be called before an autograd function and not inside it: backward runs outside of autocast and needs tensors of one
    dtype.
    """
    x = tensors[0]
    assert x is not None
    # The meta device has no autocast to ask.
    if x.is_meta or not torch.is_autocast_enabled(x.device.type) or x.dtype is torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


def begin_backward(check: Callable[[], None] | None) -> None:
    """What every backward pass begins with: no second derivative, and `check`."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # Autograd itself notices only if the gradient that comes in wants a gradient, and is silently wrong otherwise.
        raise SliceFineError(
            "A slice has a first derivative only; this backward pass was asked to build a graph (create_graph=True). "
            "Leave gradient penalties out, or train the layer with another method."
        )
    if check is not None:
        check()


def fitted(gradient: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """`gradient` `(R, L, *kernel)` for a master of this shape and dtype, which may be larger in R and L: zeros there."""
    gradient = gradient.to(dtype).contiguous()
    width, length = gradient.shape[:2]
    if (width, length) == tuple(shape[:2]):
        return gradient
    return F.pad(gradient, (0, 0) * (len(shape) - 2) + (0, shape[1] - length, 0, shape[0] - width))
