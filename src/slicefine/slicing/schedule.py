"""Where the slice of a weight is after a number of optimizer steps.

The position is a pure function of (schedule, shape of the weight, step): no state, so a resumed run needs the step
alone, every process of a distributed run agrees without talking, and weights whose sliced dimension is equal move
together. The paper gives the interval (about 500 steps) and the alternation; start (index 0), stride (one width),
wrap-around after full coverage and the order of positions are our choices.

A dimension of size d is cut into `ceil(d / r)` blocks of width r. If r does not divide d, the last block is moved back
so that it is full; it then overlaps its neighbour.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import lru_cache

from slicefine.errors import did_you_mean
from slicefine.slicing.geometry import COLUMN, ROW, Shape, Slice
from slicefine.slicing.layout import Layout
from slicefine.slicing.window import Window

ALTERNATE = "alternate"
COUPLED = "coupled"
AXES = (ROW, COLUMN, ALTERNATE)
ORDERS = ("sweep", "random")
MOST_CHARACTERS = 72
"""Of the text of a schedule: a seal has no room for more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """The settings that decide every position.

    Fields are not checked here, so that `problems` can list all that is wrong at once.
    """

    r: int
    """Rank: rows or columns in a slice."""
    axis: str
    """`"row"`, `"column"`, `"alternate"` (row, column, row, ...), or `"coupled"`, which each weight makes one of the first two (`along`)."""
    slide_every: int | None
    """Optimizer steps per position; None = the slice never moves (RoCoFT)."""
    order: str
    """`"sweep"` (adjacent blocks) or `"random"` (all blocks once, in a new seeded order on every pass)."""
    seed: int
    """Seed of the random order."""
    layout: Layout | None = None
    """Of a coupled weight: where the features are that move."""
    window: Window | None = None
    """Of a weight in a stack of blocks that are trained in turn: when it is."""

    def along(self, layout: Layout | None) -> Schedule:
        """The schedule of one weight: itself, or of coupled ones that which trains the rows or columns of `layout`.

        A coupled weight without a layout has no partner: its rows are trained.
        """
        if self.axis != COUPLED:
            return self
        return replace(self, axis=ROW if layout is None else layout.axis, layout=layout)

    def problems(self) -> list[str]:
        """Everything that is wrong with the settings, one sentence each; empty if nothing is."""
        found = []
        if not _is_int(self.r) or self.r < 1:
            found.append(
                f"`r` is the number of rows or columns in a slice, a whole number of at least 1; got {self.r!r}."
            )
        choices = (*AXES, COUPLED)
        if self.axis not in choices:
            found.append(f"`axis` is one of {', '.join(choices)}; got {self.axis!r}.{did_you_mean(self.axis, choices)}")
        if self.slide_every is not None and (not _is_int(self.slide_every) or self.slide_every < 1):
            found.append(
                "`slide_every` is a whole number of optimizer steps of at least 1, or None for a slice that never "
                f"moves; got {self.slide_every!r}."
            )
        if self.order not in ORDERS:
            found.append(
                f"`order` is one of {', '.join(ORDERS)}; got {self.order!r}.{did_you_mean(self.order, ORDERS)}"
            )
        if not _is_int(self.seed) or not 0 <= self.seed < 2**63:
            found.append(f"`seed` is a whole number from 0 to 2**63 - 1; got {self.seed!r}.")
        return found

    def moves(self, step: int) -> int:
        """Number of moves made in the first `step` optimizer steps, where the slice is not `confined`."""
        return 0 if self.slide_every is None else self.own(step) // self.slide_every

    def active(self, step: int) -> bool:
        """Whether optimizer step number `step` (counted from 0) trains the weight."""
        return self.window is None or self.window.active(step)

    @property
    def rests(self) -> bool:
        """Whether there are optimizer steps that do not train the weight."""
        return self.window is not None and not all(self.window.turns)

    def own(self, step: int) -> int:
        """How many of the first `step` optimizer steps train the weight."""
        return step if self.window is None else self.window.own(step)

    def begun(self, step: int, shape: Shape) -> bool:
        """Whether any of the first `step` optimizer steps has trained the slice of a weight of `shape` where it is then."""
        own = self.own(step)
        if own == 0 or self.slide_every is None or own % self.slide_every > 0:
            return own > 0
        move = own // self.slide_every
        return self._placement(move, shape) == self._placement(move - 1, shape)

    def confined(self, shape: Shape) -> bool:
        """Whether the slice is as wide as a weight of `shape`, and so has nowhere to move to."""
        return self._positions(shape) == 1

    def __str__(self) -> str:
        """What decides positions, as files and messages give it: the seed only where there is a choice for it to make."""
        seed = f" seed={self.seed}" if self.order == "random" else ""
        layout = f"@{self.layout.digest}" if self.layout else ""
        layout += f"#{_digest(self.window)}" if self.window else ""
        text = f"r={self.r} axis={self.axis}{layout} slide_every={self.slide_every} order={self.order}{seed}"
        if len(text) <= MOST_CHARACTERS:
            return text
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return f"{text[: MOST_CHARACTERS - 17]}~{digest}"

    def slice_at(self, step: int, shape: Shape) -> Slice:
        """The slice that optimizer step number `step` (counted from 0) trains in a weight of `shape`."""
        return self._placement(self.moves(step), shape)

    def touched(self, step: int, shape: Shape) -> list[Slice]:
        """The distinct slices that the first `step` optimizer steps train, in the order of their first training."""
        own = self.own(max(step, 0))
        if not own:
            return []
        placements = 1 if self.slide_every is None else (own - 1) // self.slide_every + 1
        return list(dict.fromkeys(self._placement(k, shape) for k in range(min(placements, self._positions(shape)))))

    def widest(self, shape: Shape) -> Shape:
        """`(width, length, *kernel)` of the smallest matrix that can hold the slice of a weight of `shape` at any step."""
        pieces = [self._placement(move, shape) for move in range(len(self._cycle()))]
        width, length = max(piece.count for piece in pieces), max(shape[1 - piece.dim] for piece in pieces)
        return width, length, *shape[2:]

    def _cycle(self) -> tuple[str, ...]:
        return (ROW, COLUMN) if self.axis == ALTERNATE else (self.axis,)

    def _dimension(self, axis: str, shape: Shape) -> int:
        """How many rows, columns or features there are to move along."""
        return self.layout.features if self.layout else shape[0] if axis == ROW else shape[1]

    def _blocks(self, axis: str, shape: Shape) -> int:
        dimension = self._dimension(axis, shape)
        return -(-dimension // min(self.r, dimension))

    def _positions(self, shape: Shape) -> int:
        """Number of placements after which a weight of `shape` is covered, along all axes in use."""
        return len(self._cycle()) * max(self._blocks(axis, shape) for axis in self._cycle())

    def _placement(self, move: int, shape: Shape) -> Slice:
        cycle = self._cycle()
        axis = cycle[move % len(cycle)]
        visit = move // len(cycle)
        dimension = self._dimension(axis, shape)
        width = min(self.r, dimension)
        blocks = self._blocks(axis, shape)
        turn, position = divmod(visit, blocks)
        block = position if self.order == "sweep" else _shuffled(self.seed, dimension, width, turn)[position]
        return Slice(axis, min(block * width, dimension - width), width, self.layout)


@lru_cache(maxsize=1024)
def _shuffled(seed: int, dimension: int, width: int, turn: int) -> tuple[int, ...]:
    """The order of the blocks on pass number `turn`.

    Sorting by a hash, and not `random.shuffle`, because saved adapters rely on it: Python does not promise that its
    shuffle stays the same from version to version. The axis is left out, so rows of one weight and columns of another
    move together where the dimension is the same.
    """
    blocks = range(-(-dimension // width))
    return tuple(
        sorted(blocks, key=lambda b: hashlib.sha256(f"{seed}/{dimension}/{width}/{turn}/{b}".encode()).digest())
    )


def _digest(window: Window) -> str:
    return hashlib.sha256(f"{window.lowest} {window.every} {window.block}".encode()).hexdigest()[:8]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
