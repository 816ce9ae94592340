"""All random numbers that training draws: Python's, NumPy's, and torch's on the CPU and on CUDA devices."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class RandomState:
    """The state of all generators at one time."""

    python: Any
    numpy: Any
    cpu: torch.Tensor
    devices: list[torch.Tensor]

    @classmethod
    def now(cls) -> RandomState:
        """The present state. No device is waited for."""
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), torch.cuda.get_rng_state_all())

    def restore(self) -> None:
        """Make this the present state again."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        torch.cuda.set_rng_state_all(self.devices)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Within this context it is the present state; after it, what was the present state before."""
        before = RandomState.now()
        self.restore()
        try:
            yield
        finally:
            before.restore()
