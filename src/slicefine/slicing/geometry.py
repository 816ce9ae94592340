"""What a slice is: `width` adjacent rows or columns of one weight matrix.

A weight has shape `(d_out, d_in)`, as `torch.nn.Linear` stores it. A row is one output feature (dimension 0), a column
one input feature (dimension 1). The definition is the paper's: a contiguous set of rows or columns, its width the rank.

Where there are more dimensions, `(d_out, d_in, *kernel)`, an entry of the matrix is a whole kernel: of a convolution, or
the numbers that all experts of a mixture have in one place. That is our choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from slicefine.errors import SliceFineError, did_you_mean
from slicefine.slicing.layout import Layout

ROW = "row"
COLUMN = "column"
SLICE_AXES = (ROW, COLUMN)

Shape = tuple[int, ...]
"""`(d_out, d_in, *kernel)`"""


@dataclass(frozen=True, slots=True, order=True)
class Slice:
    """`width` adjacent rows (`axis="row"`) or columns (`axis="column"`) that begin at index `start`.

    Of a coupled weight, the rows or columns of `width` adjacent features, of which `start` is the first: `layout` says where they are.

    Raises `SliceFineError` for an unknown axis, a negative start or a width below 1.
    """

    axis: str
    start: int
    width: int
    layout: Layout | None = None

    def __post_init__(self) -> None:
        if self.axis not in SLICE_AXES:
            raise SliceFineError(
                f"A slice lies along 'row' or 'column'; got axis={self.axis!r}.{did_you_mean(self.axis, SLICE_AXES)}"
            )
        if self.start < 0:
            raise SliceFineError(f"A slice starts at index 0 or later; got start={self.start}.")
        if self.width < 1:
            raise SliceFineError(f"A slice is at least one row or column wide; got width={self.width}.")

    @property
    def stop(self) -> int:
        """One past the last index, or feature, as in `range(start, stop)`."""
        return self.start + self.width

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """First index and number of rows or columns that lie side by side, by rising index."""
        return ((self.start, self.width),) if self.layout is None else self.layout.pieces(self.start, self.stop)

    @property
    def indices(self) -> Sequence[int]:
        """The rows or columns of the slice, by rising index."""
        if self.layout is None:
            return range(self.start, self.stop)
        return tuple(index for first, count in self.runs for index in range(first, first + count))

    @property
    def count(self) -> int:
        """Number of rows or columns."""
        return self.width if self.layout is None else self.width * self.layout.copies

    @property
    def dim(self) -> int:
        """The dimension of the weight that the slice cuts: 0 for rows, 1 for columns."""
        return SLICE_AXES.index(self.axis)

    def check(self, shape: Shape) -> Slice:
        """Return the slice itself if it lies within a weight of `shape`; raise `SliceFineError` if it does not."""
        if self.layout is not None and (self.layout.dimension != shape[self.dim] or self.stop > self.layout.features):
            raise SliceFineError(
                f"A slice lies within its weight: features {self.start} to {self.stop - 1} of {self.layout.features} with "
                f"{self.layout.dimension} {self.axis}s, and a weight of shape {tuple(shape)}, which has {shape[self.dim]}."
            )
        if self.layout is None and self.stop > shape[self.dim]:
            raise SliceFineError(
                f"A slice lies within its weight: {self.axis}s {self.start} to {self.stop - 1} do not exist in a "
                f"weight of shape {tuple(shape)}, which has {shape[self.dim]} {self.axis}s."
            )
        return self

    def size(self, shape: Shape) -> int:
        """Number of entries of the slice in a weight of `shape`."""
        return self.count * shape[1 - self.dim] * prod(shape[2:])


@dataclass(frozen=True, slots=True)
class Region:
    """The union of some slices of one weight: sorted row indices and sorted column indices, each without repeats."""

    rows: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()

    @classmethod
    def of(cls, slices: Iterable[Slice]) -> Region:
        """The union of `slices`."""
        rows: set[int] = set()
        columns: set[int] = set()
        for piece in slices:
            (rows if piece.axis == ROW else columns).update(piece.indices)
        return cls(tuple(sorted(rows)), tuple(sorted(columns)))

    def along(self, axis: str) -> tuple[int, ...]:
        """The indices along `axis`, `"row"` or `"column"`."""
        return self.rows if axis == ROW else self.columns

    def size(self, shape: Shape) -> int:
        """Number of entries of a weight of `shape` in the region; where a row crosses a column it is counted once."""
        d_out, d_in, *kernel = shape
        crossings = len(self.rows) * len(self.columns)
        return (len(self.rows) * d_in + len(self.columns) * d_out - crossings) * prod(kernel)
