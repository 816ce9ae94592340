"""The other version of the bytes that an adapter has changed.

While an adapter is installed, the weight holds the trained values and this store holds the original bytes of every row and
column the slices have covered; while it is withdrawn it is the other way round. Going from one to the other is an
exchange of exact bytes: nothing is ever added or subtracted, so nothing drifts, in any dtype.

Rows and columns cross. Whatever is taken from a weight that earlier slices have changed already is corrected by what is
known of its original, so every stored row and column is original throughout, and the order of writing cannot matter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slicefine.kernel import vectors
from slicefine.slicing import COLUMN, ROW, Slice


class Originals:
    """Rows and columns of one `(d_out, d_in)` weight, on the CPU, in the dtype of the weight they were taken from."""

    def __init__(self) -> None:
        self.index: dict[str, Tensor] = {axis: torch.empty(0, dtype=torch.int64) for axis in (ROW, COLUMN)}
        self.values: dict[str, Tensor | None] = {ROW: None, COLUMN: None}

    def keep(self, weight: Tensor, piece: Slice) -> None:
        """Add the original bytes of `piece`; indices that are kept already are passed over.

        `weight` `(d_out, d_in)` must be original outside of what is kept already.
        """
        new = torch.tensor(sorted(set(piece.indices) - set(self.index[piece.axis].tolist())), dtype=torch.int64)
        if not len(new):
            return
        taken = to_cpu(_read(weight, piece.axis, new))
        across = COLUMN if piece.axis == ROW else ROW
        crossing = self.values[across]
        if crossing is not None:
            taken[:, self.index[across]] = crossing[:, new].t().to(taken.dtype)
        kept = self.values[piece.axis]
        self.index[piece.axis] = torch.cat([self.index[piece.axis], new])
        self.values[piece.axis] = taken if kept is None else torch.cat([kept.to(taken.dtype), taken])

    def exchange(self, weight: Tensor) -> None:
        """Put the stored bytes into `weight` and store what was there.

        The weight's version counter stays as it is: autograd is not to notice, because whoever exchanges does so twice
        around a computation that needs the other version (a disabled reference forward between forward and backward).
        """
        present = {axis: to_cpu(_read(weight, axis, self.index[axis])) for axis in self._axes()}
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(weight):
            for axis in self._axes():
                stored = self.values[axis]
                assert stored is not None
                index = self.index[axis].to(weight.device)
                vectors(weight, axis).index_copy_(0, index, stored.to(weight.device, weight.dtype))
        self.values.update(present)

    def pick(self, axis: str, indices: tuple[int, ...]) -> Tensor:
        """The stored rows or columns `indices`, `(len(indices), length)`. All of them must be kept."""
        stored = self.values[axis]
        assert stored is not None
        place = {index: position for position, index in enumerate(self.index[axis].tolist())}
        return stored[torch.tensor([place[index] for index in indices], dtype=torch.int64)]

    def cast(self, dtype: torch.dtype) -> None:
        """Follow the weight to another dtype."""
        self.values = {axis: None if stored is None else stored.to(dtype) for axis, stored in self.values.items()}

    def _axes(self) -> list[str]:
        return [axis for axis in (ROW, COLUMN) if self.values[axis] is not None]


def _read(weight: Tensor, axis: str, index: Tensor) -> Tensor:
    return vectors(weight.detach(), axis).index_select(0, index.to(weight.device))


def to_cpu(tensor: Tensor) -> Tensor:
    """`tensor` on the CPU; on the meta device, where there is nothing to move, itself."""
    return tensor if tensor.is_meta else tensor.cpu()
