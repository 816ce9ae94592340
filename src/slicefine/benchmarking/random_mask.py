"""The poster's control: as many single weights as a slice has, at random places, trained by masking the gradient.

The whole weight wants a gradient and has moments, so this costs what full training costs. What it trains is exact: Adam leaves
a weight alone whose gradient has always been zero, as long as nothing decays it.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn


def train_at_random(weight: nn.Parameter, count: int, *, seed: int) -> Tensor:
    """Train `count` entries of `weight` at places that `seed` decides; returns the mask, bool, in the shape of the weight."""
    places = torch.tensor(random.Random(seed).sample(range(weight.numel()), count), dtype=torch.int64)
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[places] = True
    mask = mask.view(weight.shape)
    weight.requires_grad_(True)

    def keep_masked(parameter: Tensor) -> None:
        nonlocal mask
        assert parameter.grad is not None
        mask = mask.to(parameter.grad.device)  # Trainer moves the model when it is made
        parameter.grad.mul_(mask)

    weight.register_post_accumulate_grad_hook(keep_masked)
    return mask
