"""The examples of a stage that trains for a few steps: those that a head is fitted to, those of the steps, and those that judge."""

from __future__ import annotations

from dataclasses import dataclass

from slicefine.analysis.portions import draw, numbers_in, rows, size_for
from slicefine.analysis.subject import Batch, Subject

NUMBERS = 2**29
"""In all training examples together, about, at most: 2 GiB. Clips are large, and have to do with fewer."""


@dataclass(frozen=True, kw_only=True)
class Amounts:
    """How many batches are wanted."""

    size: int
    """Examples of a batch; fewer where they are long (`size_for`)."""
    fitted: int
    """Batches that the head is fitted to."""
    watched: int
    """Others, by which the fit is chosen."""
    steps: int
    """Steps of a trial or of a run, each on a batch of its own; one more is drawn."""
    held_out: int
    """Batches that judge."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """Batches on the device; no training example is in two of them, as long as there are enough."""

    fitted: list[Batch]
    """Empty, as `watched`, where there is no new head."""
    watched: list[Batch]
    train: list[Batch]
    """One more than there are steps."""
    held_out: list[Batch]

    @classmethod
    def drawn(cls, subject: Subject, amounts: Amounts, *, seed: int) -> Material:
        """Draw them. Raises `SliceFineError` where there are no examples."""
        size, batches = size_for(subject, amounts.size), amounts.steps + 1
        (one,) = subject.batches("train", size=1, count=1, seed=seed)
        for_head = amounts.fitted + amounts.watched if subject.new_modules else 0
        count = max(min(batches + for_head, NUMBERS // (numbers_in(one) * size)), 1)
        pieces = draw(subject, "train", size=size, count=count, seed=seed)
        # Of few examples the steps get no more than half, and get them again and again.
        own = min(batches, max(len(pieces) // 2, 1)) if for_head else len(pieces)
        train, rest = pieces[:own], (pieces[own:] or pieces) if for_head else []
        watched = max(len(rest) * amounts.watched // for_head, 1) if for_head else 0
        return cls(
            fitted=rest[watched:] or rest,
            watched=rest[:watched],
            train=[train[number % len(train)] for number in range(batches)],
            held_out=draw(subject, "validation", size=size, count=amounts.held_out, seed=seed),
        )

    def summary(self) -> dict[str, int]:
        """Examples of a step and held-out ones, as JSON values."""
        return {"step": max(map(rows, self.train)), "held_out": sum(map(rows, self.held_out))}
