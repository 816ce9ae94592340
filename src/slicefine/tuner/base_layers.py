"""What can hold slices, seen alike: a weight of shape `(d_out, d_in, *kernel)`, in a layer or as a parameter of any module.

nn.Linear, Conv1D of transformers    (d_out, d_in)
nn.Conv1d, nn.Conv2d, nn.Conv3d      (d_out, d_in / groups, *kernel): output channels, input channels (of each group)
nn.Embedding                         (tokens, features)
a parameter of two dimensions        (d_out, d_in)
a parameter of three, (experts, d_out, d_in)    (d_out, d_in, experts): every expert has a slice, all at the same place
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

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
        """Whether the module computes with the weight in a way of its own: it is trained where the module reads it."""
        return not self.is_layer or all(type(self.module).forward is not base.forward for base in BASE_LAYERS)

    @property
    def turned(self) -> bool:
        """Whether the matrix is stored as `(d_in, d_out)`, for `x @ weight`."""
        # transformers says so of experts (GPT-OSS).
        return isinstance(self.module, Conv1D) if self.is_layer else bool(getattr(self.module, "is_transposed", False))

    def oriented(self, stored: Tensor) -> Tensor:
        """`stored`, which has the layout of the parameter, as `(d_out, d_in, *kernel)`; a view."""
        matrix = stored.movedim(0, -1) if not self.is_layer and stored.dim() == 3 else stored
        return matrix.transpose(0, 1) if self.turned else matrix


def kernel_of(layer: nn.Module) -> Callable[..., Tensor]:
    """What computes the output of a layer and trains its slice; the arguments are those of `slice_linear`."""
    if isinstance(layer, CONVOLUTIONS):
        return functools.partial(
            slice_conv,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            padding_mode=layer.padding_mode,
        )
    if isinstance(layer, nn.Embedding):
        return functools.partial(_embed, layer.padding_idx)
    return slice_linear


def _embed(
    padding_idx: int | None,
    ids: Tensor,
    weight: Tensor,
    _no_bias: None,
    master: Tensor,
    index: Tensor,
    axis: str,
    _no_bias_master: None,
    check: Callable[[], None] | None,
) -> Tensor:
    return slice_embedding(ids, weight, master, index, axis, padding_idx, check)


def present_values(weight: Tensor, axis: str, indices: tuple[int, ...]) -> Tensor:
    """Rows or columns of `weight` `(d_out, d_in, *kernel)` as they are now, `(len(indices), across, *kernel)`, on the CPU."""
    index = torch.tensor(indices, dtype=torch.int64, device=weight.device)
    return vectors(weight.detach(), axis).index_select(0, index).cpu()


def same_values(values: Tensor, others: Tensor) -> bool:
    """Equality of all entries of two tensors of one shape and dtype; NaN equals NaN."""
    return torch.equal(values, others) or bool(torch.isclose(values, others, rtol=0, atol=0, equal_nan=True).all())
