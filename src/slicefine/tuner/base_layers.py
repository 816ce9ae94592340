"""What can hold slices, seen alike: a weight of shape `(d_out, d_in, *kernel)`, in a layer or as a parameter of any module.

nn.Linear, Conv1D of transformers    (d_out, d_in)
nn.Conv1d, nn.Conv2d, nn.Conv3d      (d_out, d_in / groups, *kernel): output channels, input channels (of each group)
nn.Embedding                         (tokens, features)
a parameter of two dimensions        (d_out, d_in)
a parameter of three, (experts, d_out, d_in)    (d_out, d_in, experts): every expert has a slice, all at the same place
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from slicefine.errors import SliceFineError
from slicefine.kernel import slice_conv, slice_embedding, slice_linear, vectors
from slicefine.slicing import Shape

LINEAR_LAYERS = (nn.Linear, Conv1D)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BASE_LAYERS = (*LINEAR_LAYERS, *CONVOLUTIONS, nn.Embedding)
"""Layers that can hold slices."""
BASE_LAYERS_IN_WORDS = "torch.nn.Linear, Conv1d, Conv2d, Conv3d and Embedding, and transformers' Conv1D"
WEIGHT = "weight"


class Place(NamedTuple):
    """A weight of a base model: the module that has it, and its name there."""

    module: nn.Module
    parameter: str = WEIGHT

    @property
    def stored(self) -> Tensor:
        """The parameter as it is."""
        weight = self.module._parameters[self.parameter]
        assert weight is not None
        return weight

    @property
    def matrix(self) -> Tensor:
        """The weight as `(d_out, d_in, *kernel)`; a view."""
        return self.oriented(self.stored)

    @property
    def shape(self) -> Shape:
        """`(d_out, d_in, *kernel)`"""
        return tuple(self.matrix.shape)

    @property
    def bias(self) -> Tensor | None:
        """The bias of the layer, `(d_out,)`; a parameter that is no layer's weight has none."""
        return self.module._parameters.get("bias") if self.is_layer else None

    @property
    def is_layer(self) -> bool:
        """Whether it is the weight of a layer."""
        return isinstance(self.module, BASE_LAYERS) and self.parameter == WEIGHT

    @property
    def is_read(self) -> bool:
        """Whether the module may compute with the weight in a way of its own: it is trained where the module reads it."""
        return not self.is_layer or type(self.module) not in BASE_LAYERS

    @property
    def turned(self) -> bool:
        """Whether the matrix is stored as `(d_in, d_out)`, for `x @ weight`."""
        # transformers says so of experts (GPT-OSS).
        return isinstance(self.module, Conv1D) if self.is_layer else bool(getattr(self.module, "is_transposed", False))

    def oriented(self, stored: Tensor) -> Tensor:
        """`stored`, which has the layout of the parameter, as `(d_out, d_in, *kernel)`; a view."""
        matrix = stored.movedim(0, -1) if not self.is_layer and stored.dim() == 3 else stored
        return matrix.transpose(0, 1) if self.turned else matrix


def compute(
    layer: nn.Module,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    master: Tensor,
    index: Tensor,
    axis: str,
    bias_master: Tensor | None,
    check: Callable[[], None] | None,
) -> Tensor:
    """The output of a layer for `x`, which trains its slice; the arguments are those of `slice_linear`."""
    if isinstance(layer, LINEAR_LAYERS):
        return slice_linear(x, weight, bias, master, index, axis, bias_master, check)
    if isinstance(layer, nn.Embedding):
        return slice_embedding(x, weight, master, index, axis, layer.padding_idx, check)
    assert isinstance(layer, CONVOLUTIONS)
    return slice_conv(
        x,
        weight,
        bias,
        master,
        index,
        axis,
        bias_master,
        check,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
        padding_mode=layer.padding_mode,
    )


def present_values(weight: Tensor, axis: str, indices: tuple[int, ...]) -> Tensor:
    """Rows or columns of `weight` `(d_out, d_in, *kernel)` as they are now, `(len(indices), across, *kernel)`, on the CPU.

    Raises `SliceFineError` for a weight on the meta device.
    """
    if weight.is_meta:
        raise SliceFineError(
            "an adapter replaces values of its base, and this weight has a shape alone: it is on the meta device. Load the base's values "
            "first, then the adapter."
        )
    index = torch.tensor(indices, dtype=torch.int64, device=weight.device)
    return vectors(weight.detach(), axis).index_select(0, index).cpu()


def same_values(values: Tensor, others: Tensor) -> bool:
    """Equality of all entries of two tensors of one shape and dtype; NaN equals NaN."""
    return torch.equal(values, others) or bool(torch.isclose(values, others, rtol=0, atol=0, equal_nan=True).all())
