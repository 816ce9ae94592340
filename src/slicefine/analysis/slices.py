"""A slice of one weight, or as many single entries of it at random places, trained alone for a few steps; then every bit is put back.

The definitions are the paper's. With M the mask of a slice, the *restricted gradient norm* is `||M . grad L||`; a slice is a *local winner* if
that is not zero and some update on it alone lowers the loss by a margin: `L(theta + M . U) <= L(theta) - delta`.

How an update is looked for is our choice. A trial makes a few steps of Adam, each on a new batch of training examples, once for each of a few
learning rates, the same shares of the root mean square of the weight in every trial. Of the end points the one with the least loss of yet other training examples is chosen, or the start
if none is better; it alone is judged, on held-out batches, which have no part in any choice. All passes are in eval mode, without dropout, and on
the same batches before and after: a trial that changes nothing leaves the loss as it was in every bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slicefine.analysis.losses import Loss, gradients, mean_gradients, mean_value, refuse_not_finite
from slicefine.analysis.subject import Batch
from slicefine.kernel import vectors
from slicefine.slicing import SLICE_AXES, Shape, Slice
from slicefine.tuner.base_layers import Place


@dataclass(frozen=True, eq=False)
class Part:
    """Some entries of a weight: those that a mask M is 1 for."""

    place: Place
    entries: Tensor
    """int64, `(count,)`: positions in the parameter as it is stored, flattened; each once."""

    @classmethod
    def of(cls, place: Place, piece: Slice) -> Part:
        """The entries of a slice. Raises `SliceFineError` if it does not lie within the weight."""
        piece.check(place.shape)
        return cls(place, _positions(place, piece))

    @classmethod
    def at_random(cls, place: Place, count: int, generator: torch.Generator) -> Part:
        """`count` entries at random places; the generator is one of the CPU."""
        return cls(place, _distinct(place.stored.numel(), count, generator).to(place.stored.device))

    def values(self) -> Tensor:
        """Their present values, a copy in the dtype of the weight."""
        return self.place.stored.detach().take(self.entries)

    def put(self, values: Tensor) -> None:
        """Write `values` there, rounded to the dtype of the weight."""
        stored = self.place.stored.detach()
        stored.put_(self.entries, values.to(stored.dtype))

    def norm(self, gradient: Tensor) -> float:
        """`||M . gradient||`, of a gradient in the layout of the stored parameter."""
        return float(torch.linalg.vector_norm(gradient.take(self.entries).double()))


def _positions(place: Place, piece: Slice) -> Tensor:
    d_out, d_in = place.shape[:2]
    of_row, of_column = (1, d_out) if place.turned else (d_in, 1)
    along, across, length = (of_row, of_column, d_in) if piece.dim == 0 else (of_column, of_row, d_out)
    device = place.stored.device
    indices = torch.tensor(piece.indices, device=device)
    return (indices[:, None] * along + torch.arange(length, device=device) * across).flatten()


def _distinct(size: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` different numbers below `size`."""
    if 2 * count >= size:
        return torch.randperm(size, generator=generator)[:count]
    found = torch.empty(0, dtype=torch.int64)
    while len(found) < count:  # of a large weight few entries are wanted: no list of all of them
        found = torch.cat([found, torch.randint(size, (count - len(found),), generator=generator)]).unique()
    return found


def heaviest(matrix: Tensor, axis: str, width: int) -> int:
    """First index of the `width` adjacent rows or columns with the greatest Frobenius norm.

    Args:
        matrix: `(d_out, d_in)`.
    """
    energy = vectors(matrix, axis).double().square().sum(1)
    sums = energy.unfold(0, width, 1).sum(1)
    return int(sums.argmax())


def clamped(shape: Shape, axis: str, r: int) -> int:
    """The width of a slice of rank `r`: a weight may have fewer rows or columns."""
    return min(r, shape[SLICE_AXES.index(axis)])


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What training some entries alone has brought."""

    before: float
    """Mean held-out loss at the start."""
    after: float
    """The same after the steps at the rate that was chosen."""
    rate: float | None
    """None if none lowered the loss of training examples: then nothing was changed."""

    @property
    def change(self) -> float:
        """Of the loss, as a share of what it was; negative if it fell."""
        return (self.after - self.before) / abs(self.before) if self.before else 0.0


class Trials:
    """Trials that start alike: the same model, the same batches.

    Args:
        loss: Of a batch, from the weights as they are; differentiable.
        train: A batch for every step.
        choosing: Other batches, by which a learning rate is chosen.
        held_out: By which trials are judged.
        rates: Learning rates to choose from, as shares of the root mean square of the weight that is trained.
    """

    def __init__(
        self,
        loss: Loss,
        train: Sequence[Batch],
        choosing: Sequence[Batch],
        held_out: Sequence[Batch],
        rates: Sequence[float],
    ) -> None:
        self._loss, self._train, self._choosing, self._held_out = loss, train, choosing, held_out
        self._rates = rates
        self._at_start: dict[int, tuple[Place, Tensor]] = {}
        self._first = mean_value(loss, choosing)
        self.before = mean_value(loss, held_out)
        """Mean held-out loss at the start."""
        refuse_not_finite(self.before)

    def gradients(self, places: Sequence[Place]) -> list[Tensor]:
        """Gradients of the mean loss of the batches that trials train on, at the start; in the layout of the stored parameters, fp32."""
        return mean_gradients(self._loss, [place.stored for place in places], self._train)[1]

    def train_alone(self, part: Part, *, noise: torch.Generator | None = None) -> Outcome:
        """Train `part` and nothing else, and put everything back, whatever happens.

        Args:
            noise: Draw the directions of the steps at random instead of computing gradients: what a trial finds by chance alone.
        """
        original = part.values()
        unit = _root_mean_square(part.place) or 1.0  # of a weight of zeros no share is a length
        rates = [share * unit for share in self._rates]
        chosen, best, values = None, self._first, original
        try:
            for rate in rates:
                self._walk(part, original, rate, noise)
                loss = mean_value(self._loss, self._choosing)
                if loss < best:  # never if it is NaN
                    chosen, best, values = rate, loss, part.values()
            part.put(values)
            after = self.before if chosen is None else mean_value(self._loss, self._held_out)
        finally:
            part.put(original)
        return Outcome(before=self.before, after=after, rate=chosen)

    def _walk(self, part: Part, original: Tensor, rate: float, noise: torch.Generator | None) -> None:
        """Make the steps from the start."""
        # What is trained stays in fp32 and is rounded into the weight, as the kernel's masters are.
        master = original.float().clone()
        optimizer = torch.optim.Adam([master], lr=rate)
        part.put(original)
        for step, batch in enumerate(self._train):
            if noise is not None:
                master.grad = torch.randn(master.shape, generator=noise).to(master.device)
            else:
                gradient = self._gradient(part.place, batch) if step else self._first_gradient(part.place)
                master.grad = gradient.take(part.entries).float()
            optimizer.step()
            part.put(master)

    def _first_gradient(self, place: Place) -> Tensor:
        """Of the first step, the same for all parts of a weight and all rates; everything is as it was at the start."""
        if id(place) not in self._at_start:
            self._at_start[id(place)] = place, self._gradient(place, self._train[0])
        return self._at_start[id(place)][1]

    def _gradient(self, place: Place, batch: Batch) -> Tensor:
        return gradients(self._loss, [place.stored], batch)[1][0]


def _root_mean_square(place: Place) -> float:
    return float(torch.linalg.vector_norm(place.stored.detach(), dtype=torch.float64)) / place.stored.numel() ** 0.5
