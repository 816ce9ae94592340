"""The other version of the bytes that an adapter has changed.

While an adapter is installed, the weight holds the trained values and this store holds the original bytes of every row and
column the slices have covered; while it is withdrawn it is the other way round. Going from one to the other is an
exchange of exact bytes: nothing is ever added or subtracted, so nothing drifts, in any dtype.

Rows and columns cross. Whatever is taken from a weight that earlier slices have changed already is corrected by what is
known of its original, so every stored row and column is original throughout, and the order of writing cannot matter.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from slicefine.kernel import vectors
from slicefine.slicing import COLUMN, ROW, SLICE_AXES, Slice


class Stored(NamedTuple):
    """Some rows or columns."""

    index: Tensor
    """int64, `(n,)`"""
    values: Tensor
    """`(n, across, *kernel)`, on the CPU, in the dtype of the weight they were taken from."""


class Originals:
    """Rows and columns of one `(d_out, d_in, *kernel)` weight."""

    def __init__(self, stored: dict[str, Stored] | None = None) -> None:
        # A piece is joined with its predecessor when it has grown as large, so that there are few, and a move stays cheap.
        self._pieces: dict[str, list[Stored]] = {axis: [] for axis in SLICE_AXES}
        for axis, piece in (stored or {}).items():
            self._pieces[axis].append(piece)
        self._known = {axis: {i for p in pieces for i in p.index.tolist()} for axis, pieces in self._pieces.items()}

    def keep(self, weight: Tensor, piece: Slice) -> None:
        """Add the original bytes of `piece`; indices that are kept already are passed over.

        `weight` `(d_out, d_in, *kernel)` must be original outside of what is kept already.
        """
        new = sorted(set(piece.indices) - self._known[piece.axis])
        if not new:
            return
        index = torch.tensor(new, dtype=torch.int64)
        taken = to_cpu(_read(weight, piece.axis, index))
        for crossing in self._pieces[COLUMN if piece.axis == ROW else ROW]:
            taken[:, crossing.index] = crossing.values[:, index].transpose(0, 1)
        pieces = self._pieces[piece.axis]
        pieces.append(Stored(index, taken))
        while len(pieces) > 1 and len(pieces[-1].index) >= len(pieces[-2].index):
            pieces[-2:] = [_joined(pieces[-2:])]
        self._known[piece.axis].update(new)

    def exchange(self, weight: Tensor) -> None:
        """Put the stored bytes into `weight` and store what was there.

        The weight's version counter stays as it is: autograd is not to notice, because whoever exchanges does so twice
        around a computation that needs the other version (a disabled reference forward between forward and backward).
        """
        stored = self.stored()
        present = {axis: Stored(index, to_cpu(_read(weight, axis, index))) for axis, (index, _) in stored.items()}
        with torch.no_grad(), unnoticed(weight):
            for axis, (index, values) in stored.items():
                vectors(weight, axis).index_copy_(0, index.to(weight.device), values.to(weight.device, weight.dtype))
        self._pieces = {axis: [present[axis]] if axis in present else [] for axis in SLICE_AXES}

    def stored(self) -> dict[str, Stored]:
        """All that is kept, by axis; an axis along which nothing is kept is left out."""
        for axis, pieces in self._pieces.items():
            if len(pieces) > 1:
                self._pieces[axis] = [_joined(pieces)]
        return {axis: pieces[0] for axis, pieces in self._pieces.items() if pieces}

    def pick(self, axis: str, indices: tuple[int, ...]) -> Tensor:
        """The stored rows or columns `indices`, `(len(indices), across, *kernel)`. All of them must be kept."""
        index, values = self.stored()[axis]
        place = {index: position for position, index in enumerate(index.tolist())}
        return values[torch.tensor([place[index] for index in indices], dtype=torch.int64)]

    @property
    def dtype(self) -> torch.dtype | None:
        """That of what is kept; None if nothing is."""
        return next((piece.values.dtype for pieces in self._pieces.values() for piece in pieces), None)

    def cast(self, dtype: torch.dtype) -> None:
        """Follow the weight to another dtype."""
        self._pieces = {
            axis: [Stored(p.index, p.values.to(dtype)) for p in pieces] for axis, pieces in self._pieces.items()
        }


def unnoticed(tensor: Tensor) -> AbstractContextManager[None]:
    """Within this context autograd does not notice that `tensor` is written into."""
    if tensor.is_inference():  # it has no version
        return nullcontext()
    return torch.autograd._unsafe_preserve_version_counter(tensor)


def _joined(pieces: list[Stored]) -> Stored:
    return Stored(*map(torch.cat, zip(*pieces, strict=True)))


def _read(weight: Tensor, axis: str, index: Tensor) -> Tensor:
    return vectors(weight.detach(), axis).index_select(0, index.to(weight.device))


def to_cpu(tensor: Tensor) -> Tensor:
    """`tensor` on the CPU; on the meta device, where there is nothing to move, itself."""
    return tensor if tensor.is_meta else tensor.cpu()
