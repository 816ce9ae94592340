"""The layers that can hold slices, seen alike: a weight of shape `(d_out, d_in)`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from slicefine.kernel import vectors
from slicefine.slicing import Shape

BASE_LAYERS = (nn.Linear, Conv1D)
"""What can hold slices."""


def weight_of(base_layer: nn.Module) -> Tensor:
    """The weight of a base layer as `(d_out, d_in)`. A view: transformers' Conv1D (GPT-2) stores it transposed."""
    weight = base_layer._parameters["weight"]
    assert weight is not None
    return weight.t() if isinstance(base_layer, Conv1D) else weight


def shape_of(base_layer: nn.Module) -> Shape:
    """`(d_out, d_in)` of the weight of a base layer."""
    d_out, d_in = weight_of(base_layer).shape
    return d_out, d_in


def present_values(weight: Tensor, axis: str, indices: tuple[int, ...]) -> Tensor:
    """Rows or columns of `weight` `(d_out, d_in)` as they are now, `(len(indices), length)`, on the CPU."""
    index = torch.tensor(indices, dtype=torch.int64, device=weight.device)
    return vectors(weight.detach(), axis).index_select(0, index).cpu()


def same_values(values: Tensor, others: Tensor) -> bool:
    """Equality of all entries of two tensors of one shape and dtype; NaN equals NaN."""
    return torch.equal(values, others) or bool(torch.isclose(values, others, rtol=0, atol=0, equal_nan=True).all())
