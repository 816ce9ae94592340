"""Controls: weights at places that a mask gives, trained by masking the gradient.

At random places, as many as a slice has, they are the poster's control. In blocks along the diagonal they are as dense as a slice, and reach
every row and every column as random places do: what tells whether it is density or reach that makes the difference is ours.

The whole weight wants a gradient and has moments, so this costs what full training costs. What it trains is exact: Adam leaves
a weight alone whose gradient has always been zero, as long as nothing decays it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def random_places(shape: Sequence[int], count: int, *, seed: int) -> Tensor:
    """A mask `(rows, columns)`, bool, of `count` entries at places that `seed` decides."""
    size = math.prod(shape)
    mask = torch.zeros(size, dtype=torch.bool)
    mask[torch.tensor(random.Random(seed).sample(range(size), count), dtype=torch.int64)] = True
    return mask.view(*shape)


def diagonal_blocks(shape: Sequence[int], r: int) -> Tensor:
    """A mask `(rows, columns)`, bool, of blocks along the diagonal, `r` wide along the shorter side, and some wider where `r` does not divide it."""
    row, column = _block_of(shape, r)
    return row[:, None] == column[None, :]


def diagonal_size(shape: Sequence[int], r: int) -> int:
    """Entries of `diagonal_blocks`."""
    row, column = _block_of(shape, r)
    return int((row.bincount() * column.bincount()).sum())


def _block_of(shape: Sequence[int], r: int) -> tuple[Tensor, Tensor]:
    """The number of the block of every row, and of every column."""
    rows, columns = shape
    blocks = min(shape) // r
    return torch.arange(rows) * blocks // rows, torch.arange(columns) * blocks // columns


def train_masked(weight: nn.Parameter, mask: Tensor) -> None:
    """Train the entries of `weight` that `mask`, bool, in the shape of the weight, has."""
    weight.requires_grad_(True)

    def keep_masked(parameter: Tensor) -> None:
        nonlocal mask
        assert parameter.grad is not None
        mask = mask.to(parameter.grad.device)  # Trainer moves the model when it is made
        parameter.grad.mul_(mask)

    weight.register_post_accumulate_grad_hook(keep_masked)
