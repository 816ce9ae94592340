"""Which rows or columns of a weight belong to the features that a coupled slice trains on both sides.

A hidden feature is written by rows of some weights and read by columns of another. Within a weight the features need not stand in
order, and one may have several rows or columns: with grouped-query attention a feature of a value head is read by one column for each
query head of its group, and a fused weight has rows for query, key and value.

A layout lists, for the rows (or columns) from the first to the last, which feature each is of, as runs of adjacent features.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from slicefine.errors import SliceFineError

Run = tuple[int, int]
"""First index and number of adjacent ones."""
_TEXT = re.compile(r"(row|column)((?: \d{1,9}\+[1-9]\d{0,8}(?:\*[1-9]\d{0,8})?)+)")


@dataclass(frozen=True, slots=True, order=True)
class Layout:
    """Made by `of` or `parse`, which check it."""

    axis: str
    """`"row"`: the weight writes the features; `"column"`: it reads them."""
    runs: tuple[Run, ...]
    """`(first feature, number)` of adjacent rows or columns that are of adjacent features, in the order of the weight."""

    @classmethod
    def of(cls, axis: str, features: Sequence[int]) -> Layout:
        """The layout of a weight whose row or column number i is of feature `features[i]`.

        Raises `SliceFineError` if the features are not 0, 1, ..., each with as many rows or columns as any other.
        """
        layout = cls(axis, tuple(_runs(features)))
        layout._check()
        return layout

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Read what `str` gives. Raises `SliceFineError` if it has another form."""
        form = _TEXT.fullmatch(text)
        if form is None:
            raise SliceFineError(f"a coupling is written as `row 0+384` or `column 0+64*3 64+64*3`; got {text[:60]!r}.")
        runs: list[Run] = []
        for part in form[2].split():
            first, count, times = re.fullmatch(r"(\d+)\+(\d+)(?:\*(\d+))?", part).groups()  # pyright: ignore[reportOptionalMemberAccess] -- the whole has matched
            runs += [(int(first), int(count))] * int(times or 1)
        layout = cls(form[1], tuple(runs))
        layout._check()
        return layout

    def __str__(self) -> str:
        """`column 0+64*3 64+64*3`: three times 64 columns of features 0 to 63, then of 64 to 127."""
        parts = []
        for (first, count), same in groupby(self.runs):
            times = len(list(same))
            parts.append(f"{first}+{count}" + (f"*{times}" if times > 1 else ""))
        return f"{self.axis} {' '.join(parts)}"

    def _check(self) -> None:
        counts = {self.count(edge, edge + 1) for edge in self._edges()}
        if not self.runs or len(counts) > 1 or 0 in counts:
            raise SliceFineError(f"a coupling names every feature from 0 on equally often; got {str(self)[:60]!r}.")

    def _edges(self) -> set[int]:
        """Features before which the number of rows or columns may change."""
        return {edge for first, count in self.runs for edge in (first, first + count) if edge < self.features} | {0}

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

    def count(self, start: int, stop: int) -> int:
        """Rows or columns of the features from `start` to `stop`, the latter left out."""
        return sum(max(0, min(stop, first + count) - max(start, first)) for first, count in self.runs)

    def pieces(self, start: int, stop: int) -> tuple[Run, ...]:
        """First index and number of adjacent rows or columns of the features from `start` to `stop`, by rising index."""
        return _pieces(self, start, stop)


@lru_cache(maxsize=4096)
def _pieces(layout: Layout, start: int, stop: int) -> tuple[Run, ...]:
    found, at = list[Run](), 0
    for first, count in layout.runs:
        low, high = max(start, first), min(stop, first + count)
        if low < high:
            index = at + low - first
            if found and sum(found[-1]) == index:
                found[-1] = (found[-1][0], found[-1][1] + high - low)
            else:
                found.append((index, high - low))
        at += count
    return tuple(found)


def _runs(features: Iterable[int]) -> list[Run]:
    runs: list[Run] = []
    for feature in features:
        if runs and sum(runs[-1]) == feature:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((feature, 1))
    return runs
