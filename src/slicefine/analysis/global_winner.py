"""Do a few slices across layers come close to full tuning? Short runs from one start, with as many steps for all (see `short_runs.py`).

Slices of rows stay where they are (the paper's global winning ticket is a set of slices), in one block, in half of them and in all; in all
of them slices are also trained as SliceFine does, rows and columns in turn, with moves. A share counts from the run that trains the new
head alone, as the head learns along in every run; where there is no new head, from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from slicefine.analysis.material import Amounts, Material
from slicefine.analysis.resumed import stack_of
from slicefine.analysis.settings import AnalysisSettings
from slicefine.analysis.short_runs import ShortRuns, everything, head_alone, slices
from slicefine.analysis.subject import Subject
from slicefine.analysis.tuned_head import tune_head
from slicefine.slicing import ALTERNATE, ROW

Say = Callable[[int, int, str], None]

LEAST_DROP = 0.01
"""Share of the loss, or of that with the head as it was drawn, by which full tuning has to lower it: of less no shares are given."""
CLOSE = 0.9
"""Share of the drop of full tuning that is within 10 percent of it."""
MOVES = 8
"""Positions in a run that moves slices: the paper says 5 to 10 moves."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is tried."""

    amounts: Amounts
    """For the head and the runs."""
    iterations: int
    """Of the fit of the head, for each penalty."""
    points: int
    """Of a curve, beside its start."""
    full: tuple[float, ...]
    """Learning rates of full tuning."""
    head: tuple[float, ...]
    """Of the head alone."""
    slices: tuple[float, ...]
    """Of slices that stay where they are."""
    moving: tuple[float, ...]
    """Of slices that move: lower, since new rows and columns take steps as long as the first ones did."""
    parts: bool
    """Whether fewer layers than all are tried, and slices that move."""


FULL = Effort(
    amounts=Amounts(size=16, fitted=48, watched=16, steps=32, choosing=6, held_out=12), iterations=20, points=2,
    full=(3e-5, 1e-4, 3e-4), head=(1e-3, 1e-2), slices=(3e-3, 1e-2, 3e-2), moving=(1e-3, 3e-3, 1e-2), parts=True,
)  # fmt: skip
QUICK = Effort(
    amounts=Amounts(size=8, fitted=24, watched=12, steps=6, choosing=2, held_out=6), iterations=10, points=1,
    full=(1e-4, 3e-4), head=(1e-2,), slices=(1e-2, 3e-2), moving=(3e-3, 1e-2), parts=False,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which slices a run trains."""

    r: int
    axis: str
    blocks: tuple[int, ...] | None
    """Indices of blocks; None = every weight, those outside of the blocks too."""


def plans_for(count: int, ranks: Sequence[int], *, parts: bool) -> list[Plan]:
    """Runs of slices in a model of `count` blocks, from the fewest layers to all, each with all ranks.

    Args:
        parts: Whether fewer layers than all are tried, and slices that move.
    """
    numbers = sorted({1, count // 2}) if parts and count > 1 else []
    plans = [
        Plan(r=r, axis=ROW, blocks=tuple(spread(count, number)) if number < count else None)
        for number in [*numbers, count]
        for r in ranks
    ]
    return plans + [Plan(r=r, axis=ALTERNATE, blocks=None) for r in ranks if parts]


def spread(count: int, number: int) -> list[int]:
    """`number` indices below `count`, evenly spread, the last one among them."""
    return [(index + 1) * count // number - 1 for index in range(number)]


def run(subject: Subject, settings: AnalysisSettings, say: Say) -> dict[str, Any]:
    """The share of the loss drop of full tuning that slices reach, as JSON values (see `docs/analysis.md` for the layout)."""
    effort = QUICK if settings.quick else FULL
    count = len(stack_of(subject.model, subject.places))
    plans = plans_for(count, settings.ranks, parts=effort.parts)
    head_rates = effort.head if subject.new_modules else ()
    rates = {one: effort.slices if one.axis == ROW else effort.moving for one in plans}
    total, done = len(effort.full) + len(head_rates) + sum(map(len, rates.values())), 0

    def tell() -> None:
        nonlocal done
        done += 1
        say(done, total, "short runs")

    data = Material.drawn(subject, effort.amounts, seed=settings.seed)
    start = subject.copy()
    head = tune_head(subject, start, data.fitted, data.watched, iterations=effort.iterations)
    runs = ShortRuns(subject, start, data, points=effort.points, tell=tell)
    full = runs.best(everything, effort.full)
    head_only = runs.best(head_alone(subject), head_rates) if head_rates else None
    reference = runs.before if head_only is None else head_only.loss_after
    least = LEAST_DROP * max(abs(reference), head["before"] or 0)
    found = []
    for one in plans:
        every = max(runs.steps // MOVES, 1) if one.axis == ALTERNATE else None
        course = runs.best(slices(subject, r=one.r, axis=one.axis, slide_every=every, blocks=one.blocks), rates[one])
        indices = list(range(count)) if one.blocks is None else list(one.blocks)
        found.append(
            {
                "layers": len(indices),
                "layer_indices": indices,
                "r": one.r,
                "axis": one.axis,
                "moves": 0 if every is None else (runs.steps - 1) // every,
                "active": course.active,
                "learning_rate": course.rate,
                "loss_choosing": course.choosing,
                "loss_after": course.loss_after,
                "share_of_full_drop": share(course.loss_after, reference, full.loss_after, least),
                "curve": course.curve,
            }
        )
    return {
        "steps": runs.steps,
        "learning_rate": {
            "full": list(effort.full),
            "head_only": list(head_rates),
            "slices": list(effort.slices),
            "moving": list(effort.moving),
        },
        "baseline": "the run of the new head alone" if head_only else "the start",
        "note": data.note,
        "examples": data.summary(),
        "head": head,
        "full": full.summary(),
        "head_only": None if head_only is None else head_only.summary(),
        "runs": found,
        "summary": summary(found, count),
    }


def share(after: float, reference: float, full: float, least: float) -> float | None:
    """Of the drop from `reference` to `full`, the one to `after`; None if full tuning does not lower the loss by `least`."""
    drop = reference - full
    return (reference - after) / drop if drop >= least and drop > 0 else None


def summary(runs: Sequence[dict[str, Any]], count: int) -> dict[str, Any]:
    """The share of the best run, that of r = 1 in all `count` layers, and the smallest rank that comes close there.

    Best is the run with the lowest loss of the examples that choose: those that judge have no part in it.
    """
    known = [run for run in runs if run["share_of_full_drop"] is not None]
    best = min(known, key=lambda run: run["loss_choosing"], default=None)
    ones = [run for run in known if run["r"] == 1 and run["layers"] == count]
    one = min(ones, key=lambda run: run["loss_choosing"], default=None)
    everywhere = [run for run in known if run["layers"] == count]
    return {
        "best_share": best and best["share_of_full_drop"],
        "best": best and {key: best[key] for key in ("r", "axis", "layers", "active", "loss_after")},
        "r1_all_layers_share": one and one["share_of_full_drop"],
        "smallest_r_within_10_percent": min(
            (run["r"] for run in everywhere if run["share_of_full_drop"] >= CLOSE), default=None
        ),
    }
