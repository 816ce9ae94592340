"""Which rows or columns of a weight belong to the features that a coupled slice trains on both sides.

A hidden feature is written by rows of some weights and read by columns of another. Within a weight the features need not stand in
order, and one may have several rows or columns: with grouped-query attention a feature of a value head is read by one column for each
query head of its group, and a fused weight has rows for query, key and value.

A layout lists, for the rows (or columns) from the first to the last, which feature each is of, as runs of adjacent features.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from slicefine.errors import SliceFineError

Run = tuple[int, int]
"""First index and number of adjacent ones."""
MOST_RUNS = 2**20
"""As many as a weight has rows. A text of a few letters may ask for more than there is memory."""
_PART = r"([0-9]{1,9})\+([1-9][0-9]{0,8})(?:\*([1-9][0-9]{0,8}))?"
_TEXT = re.compile(rf"(row|column)((?: {_PART})+)")


@dataclass(frozen=True, slots=True, order=True)
class Layout:
    """Made by `of` or `parse`, which check it."""

    axis: str
    """`"row"`: the weight writes the features; `"column"`: it reads them."""
    runs: tuple[Run, ...]
    """`(first feature, number)` of adjacent rows or columns that are of adjacent features, in the order of the weight; cut so that no two
    overlap unless they are equal."""

    @classmethod
    def of(cls, axis: str, features: Iterable[int]) -> Layout:
        """The layout of a weight whose row or column number i is of feature `features[i]`.

        Raises `SliceFineError` if the features are not 0, 1, ..., each with as many rows or columns as any other.
        """
        return cls._checked(axis, ((feature, 1) for feature in features))

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Read what `str` gives. Raises `SliceFineError` if it has another form, or is of uneven features as in `of`."""
        form = _TEXT.fullmatch(text)
        if form is None:
            raise SliceFineError(f"a coupling is written as `row 0+384` or `column 0+64*3 64+64*3`; got {text[:60]!r}.")
        parts = [(int(first), int(count), int(times or 1)) for first, count, times in re.findall(_PART, form[2])]
        if sum(times for _, _, times in parts) > MOST_RUNS:
            raise SliceFineError(f"a coupling has at most {MOST_RUNS:,d} runs of adjacent features; got {text[:60]!r}.")
        return cls._checked(form[1], (run for first, count, times in parts for run in [(first, count)] * times))

    @classmethod
    def _checked(cls, axis: str, runs: Iterable[Run]) -> Layout:
        longest = _joined(runs)
        changes = Counter[int]()
        """Feature -> how many rows or columns more it has than the one before."""
        for first, count in longest:
            changes[first] += 1
            changes[first + count] -= 1
        if {feature for feature, change in changes.items() if change} != {0, max(changes, default=-1)}:
            raise SliceFineError(
                f"a coupling names every feature from 0 on equally often; got {str(cls(axis, tuple(longest)))[:60]!r}."
            )
        return cls(axis, tuple(_cut(longest, sorted(changes))))

    def __str__(self) -> str:
        """`column 0+64*3 64+64*3`: three times 64 columns of features 0 to 63, then of 64 to 127."""
        parts = []
        for (first, count), same in groupby(self.runs):
            times = len(list(same))
            parts.append(f"{first}+{count}" + (f"*{times}" if times > 1 else ""))
        return f"{self.axis} {' '.join(parts)}"

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits that tell layouts apart."""
        return hashlib.sha256(str(self).encode()).hexdigest()[:8]

    @property
    def features(self) -> int:
        """How many there are."""
        return max((first + count for first, count in self.runs), default=0)

    @property
    def dimension(self) -> int:
        """Rows or columns of the weight."""
        return sum(count for _, count in self.runs)

    @property
    def copies(self) -> int:
        """Rows or columns of one feature."""
        return self.dimension // self.features

    def pieces(self, start: int, stop: int) -> tuple[Run, ...]:
        """First index and number of adjacent rows or columns of the features from `start` to `stop`, by rising index."""
        return _pieces(self, start, stop)


@lru_cache(maxsize=4096)
def _pieces(layout: Layout, start: int, stop: int) -> tuple[Run, ...]:
    found, at = list[Run](), 0
    for first, count in layout.runs:
        low, high = max(start, first), min(stop, first + count)
        if low < high:
            found.append((at + low - first, high - low))
        at += count
    return tuple(_joined(found))


def _joined(runs: Iterable[Run]) -> list[Run]:
    """The same numbers in runs that are as long as they can be."""
    joined: list[Run] = []
    for first, count in runs:
        if joined and sum(joined[-1]) == first:
            joined[-1] = (joined[-1][0], joined[-1][1] + count)
        else:
            joined.append((first, count))
    return joined


def _cut(runs: Iterable[Run], edges: Sequence[int]) -> Iterator[Run]:
    """The same numbers in runs that end wherever any of them begins or ends."""
    for first, count in runs:
        at = bisect_right(edges, first)
        while first + count > edges[at]:
            yield first, edges[at] - first
            first, count = edges[at], first + count - edges[at]
            at += 1
        yield first, count
