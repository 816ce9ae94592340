"""The examples of a stage that trains for a few steps: those that a head is fitted to, those of the steps, and those that judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slicefine.analysis.portions import draw, numbers_in, rows, size_for
from slicefine.analysis.subject import Batch, Subject
from slicefine.errors import listed

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
    """Batches of steps, one for each."""
    choosing: int
    """Others, by which a learning rate is chosen."""
    held_out: int
    """Batches that judge."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """Batches on the device; no training example is in two of them, as long as there are enough (`note`)."""

    fitted: list[Batch]
    """Empty, as `watched`, where there is no new head."""
    watched: list[Batch]
    train: list[Batch]
    """Of the steps."""
    choosing: list[Batch]
    held_out: list[Batch]

    @classmethod
    def drawn(cls, subject: Subject, amounts: Amounts, *, seed: int) -> Material:
        """Draw them. Raises `SliceFineError` where there are no examples."""
        size = size_for(subject, amounts.size)
        (one,) = subject.batches("train", size=1, count=1, seed=seed)
        for_head = (amounts.fitted, amounts.watched) if subject.new_modules else (0, 0)
        parts = (*for_head, amounts.choosing, amounts.steps)
        count = max(min(sum(parts), NUMBERS // (numbers_in(one) * size)), 1)
        fitted, watched, choosing, train = dealt(draw(subject, "train", size=size, count=count, seed=seed), parts)
        return cls(
            fitted=fitted,
            watched=watched,
            train=[train[number % len(train)] for number in range(amounts.steps)],
            choosing=choosing,
            held_out=draw(subject, "validation", size=size, count=amounts.held_out, seed=seed),
        )

    @property
    def note(self) -> str:
        """What has to be known if there were too few examples; empty if there were enough."""
        parts = {
            "the fit of the head": self.fitted,
            "its choice": self.watched,
            "the steps": self.train,
            "the choice of a learning rate": self.choosing,
        }
        uses = [(name, {id(batch) for batch in batches}) for name, batches in parts.items()]
        shared = [name for name, own in uses if any(own & other for of, other in uses if of != name)]
        notes = list[str]()
        if (own := len(uses[2][1])) < len(self.train):
            notes.append(
                f"There are too few training examples for {len(self.train)} steps: they are made on {own} batches, again and again."
            )
        if not shared:
            return " ".join(notes)
        notes.append(
            f"There are too few training examples to keep them apart: {listed(shared)} share some, and what they find is better than it would be "
            "on others. Held-out examples are in none of them."
        )
        return " ".join(notes)

    def summary(self) -> dict[str, int]:
        """Examples of a step and held-out ones, as JSON values."""
        return {"step": max(map(rows, self.train)), "held_out": sum(map(rows, self.held_out))}


def dealt(batches: Sequence[Batch], parts: Sequence[int]) -> list[list[Batch]]:
    """`batches` cut into as many parts, of these sizes, or in about these proportions if there are fewer.

    Each part that is wanted has at least one; where there are fewer batches than that, parts share them.
    """
    share = min(len(batches) / sum(parts), 1.0)
    dealt, at = list[list[Batch]](), 0
    for part in parts:
        end = at + max(int(part * share), 1) if part else at
        dealt.append([batches[number % len(batches)] for number in range(at, end)])
        at = end
    return dealt
