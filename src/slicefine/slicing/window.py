"""Depth windows: the lowest block of a stack that is trained changes from time to time, and backpropagation ends there.

Below it nothing is trained, so nothing is kept for a backward pass, and none is made. A slice below the window rests: its own steps
are not counted, and its schedule goes on where it was. Blocks that take turns are LISA's and BAdam's idea; that all above the lowest one
are trained, since gradients have to pass through them anyway, is ours.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Window:
    """The window as one block sees it."""

    lowest: tuple[int, ...]
    """Index of the lowest block that is trained, in turn."""
    every: int
    """Optimizer steps of each."""
    block: int
    """Index of the block."""

    @property
    def turns(self) -> tuple[bool, ...]:
        """Which turns train the block."""
        return tuple(self.block >= lowest for lowest in self.lowest)

    def active(self, step: int) -> bool:
        """Whether optimizer step number `step` (counted from 0) trains the block."""
        return self.block >= self.lowest[step // self.every % len(self.lowest)]

    def own(self, step: int) -> int:
        """How many of the first `step` optimizer steps train the block."""
        turns = self.turns
        whole, rest = divmod(step, self.every)
        rounds, done = divmod(whole, len(turns))
        return self.every * (rounds * sum(turns) + sum(turns[:done])) + rest * turns[done]
