"""What ablations change in how slices are trained: moments that survive a move, and updates that grow after it.

Neither is a setting of the library; both work on any optimizer of torch's that keeps its state by parameter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from slicefine.tuner.inspection import tuned


def slices_of(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that hold the active slices of `model`."""
    return [layer.slicefine_weight[adapter] for _, layer, adapter in tuned(model)]


class CarriedMoments(TrainerCallback):
    """After a move, gives each slice the optimizer state that it had at its last position."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters
        self._kept: dict[nn.Parameter, Any] = {}

    def on_train_begin(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Remember the state before the library drops it: hooks of an optimizer run before those of all optimizers."""
        inner(optimizer).register_step_post_hook(self._keep)

    def _keep(self, optimizer: Optimizer, *_: Any) -> None:
        self._kept = {
            parameter: optimizer.state[parameter] for parameter in self._parameters if parameter in optimizer.state
        }

    def on_optimizer_step(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Give it back."""
        for parameter, state in self._kept.items():
            inner(optimizer).state[parameter] = state


class Rewarm(TrainerCallback):
    """In the first `steps` after a move, applies a growing share of what the optimizer does to each slice.

    Scaling the gradient would do nothing: Adam divides by its size.
    """

    def __init__(self, parameters: list[nn.Parameter], *, steps: int, slide_every: int) -> None:
        self._parameters, self._steps, self._every = parameters, steps, slide_every
        self._made = 0
        self._before: list[Tensor] = []

    def on_train_begin(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Both hooks run before the library writes the slice back."""
        inner(optimizer).register_step_pre_hook(self._remember)
        inner(optimizer).register_step_post_hook(self._shrink)

    @property
    def _share(self) -> float:
        moved, since = divmod(self._made, self._every)
        return 1.0 if not moved else min(1.0, (since + 1) / (self._steps + 1))

    def _remember(self, *_: Any) -> None:
        if self._share < 1:
            self._before = [parameter.detach().clone() for parameter in self._parameters]

    def _shrink(self, *_: Any) -> None:
        if self._share < 1:
            with torch.no_grad():
                for parameter, before in zip(self._parameters, self._before, strict=True):
                    parameter.copy_(torch.lerp(before, parameter, self._share))
        self._made += 1


def inner(optimizer: Any) -> Optimizer:
    """The optimizer of torch's that accelerate has wrapped."""
    return getattr(optimizer, "optimizer", optimizer)
