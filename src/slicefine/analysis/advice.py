"""Which rank, axis and number of moves does the analysis suggest, and does a check by short runs bear it out?

The rules are ours; the paper says that a sufficiently wide slice wins, that r = 1 often suffices, and that a run has 5 to 10 moves.

rank     the smallest of those tried at which random slices were winners nearly always, but wide enough for the positions of a run to take in
         as many rows or columns as there are directions that hold 90 % of the variance of the hidden states
axis     the one whose slices lowered the loss clearly more, where there is one; otherwise both in turn, as in the paper's RC
moves    as many as these directions need at that rank, within the paper's 5 to 10

The check trains slices at the advised rank, at a smaller and at a greater one (see `short_runs.py`). The advice holds if the greater rank
lowers the held-out loss hardly more, and the smaller one clearly less: then the advised one is enough, and no wider than it has to be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slicefine.analysis.material import Amounts, Material
from slicefine.analysis.settings import ENERGY, WINNERS, AnalysisSettings
from slicefine.analysis.short_runs import ShortRuns, slices
from slicefine.analysis.subject import Subject
from slicefine.analysis.tuned_head import tune_head
from slicefine.analysis.winners import MARGIN
from slicefine.slicing import ALTERNATE, COLUMN, ROW, SLICE_AXES

Say = Callable[[int, int, str], None]

NEARLY_ALWAYS = 0.9
"""Share of winners from which on a rank is wide enough."""
CLEARLY = 1.5
"""Ratio of median drops from which on one axis is better."""
FEWEST, MOST = 5, 10
"""Moves in a run."""
ENOUGH = 0.9
"""Share of the drop of a greater rank from which on a rank is enough."""
LEAST_DROP = 0.01
"""Share of the loss, or of that with the head as it was drawn, by which the advised slices have to lower it."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is tried."""

    amounts: Amounts
    """For the head and the runs."""
    iterations: int
    """Of the fit of the head, for each penalty."""
    points: int
    """Of a curve, beside its start."""
    rates: tuple[float, ...]
    """Learning rates."""


FULL = Effort(
    amounts=Amounts(size=16, fitted=48, watched=16, steps=40, choosing=6, held_out=10), iterations=20, points=4, rates=(1e-3, 3e-3, 1e-2)
)  # fmt: skip
QUICK = Effort(
    amounts=Amounts(size=8, fitted=24, watched=12, steps=8, choosing=2, held_out=6), iterations=10, points=2, rates=(3e-3, 1e-2)
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What to set, and why."""

    r: int
    axis: str
    moves: int
    reasons: list[str]


def run(
    subject: Subject, settings: AnalysisSettings, say: Say, earlier: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """The advice and its check, as JSON values (see `docs/analysis.md` for the layout).

    Args:
        earlier: Stage -> what it found; without `winners` or `energy` the advice has less to go by, and says so.
    """
    effort = QUICK if settings.quick else FULL
    advised = advise(earlier.get(WINNERS), earlier.get(ENERGY), settings.ranks)
    widest = max(max(place.shape[:2]) for place in subject.places.values())
    ranks = beside(advised.r, settings.ranks, widest)
    total, done = len(ranks) * len(effort.rates), 0

    def tell() -> None:
        nonlocal done
        done += 1
        say(done, total, "short runs")

    # Drawn anew: mostly not the examples that the advice comes from.
    data = Material.drawn(subject, effort.amounts, seed=settings.seed + 1)
    start = subject.copy()
    head = tune_head(subject, start, data.fitted, data.watched, iterations=effort.iterations)
    runs = ShortRuns(subject, start, data, points=effort.points, tell=tell)
    # Few steps have no room for exactly as many moves.
    every = min(range(1, runs.steps + 1), key=lambda each: abs((runs.steps - 1) // each - advised.moves))
    check = []
    for r in ranks:
        course = runs.best(slices(subject, r=r, axis=advised.axis, slide_every=every), effort.rates)
        check.append({"r": r, "axis": advised.axis, "active": course.active, **course.summary()})
    least = LEAST_DROP * max(abs(runs.before), head["before"] or 0)
    favoured, words = judged(advised.r, runs.before, {entry["r"]: entry["loss_after"] for entry in check}, least)
    return {
        "r": advised.r,
        "axis": advised.axis,
        "moves": advised.moves,
        "slide_every": f"1/{advised.moves + 1} of the run",
        "reasons": advised.reasons,
        "steps": runs.steps,
        "check_moves": (runs.steps - 1) // every,
        "note": data.note,
        "examples": data.summary(),
        "head": head,
        "check": check,
        "confirmed": favoured == advised.r,
        "favoured": favoured,
        "words": words,
    }


def advise(winners: Mapping[str, Any] | None, energy: Mapping[str, Any] | None, ranks: Sequence[int]) -> Advice:
    """What the earlier stages suggest, of the `ranks` that were tried; either may be missing."""
    ranks = sorted(ranks)
    r, reasons = _enough_to_win(winners, ranks)
    needed = None if energy is None else energy["summary"].get("k90_median")
    moves = FEWEST
    if needed is None:
        reasons.append(
            f"Task energy was not measured, so the number of moves is the least of the paper's {FEWEST} to {MOST}."
        )
    else:
        needed = math.ceil(needed)
        wide = next((rank for rank in ranks if rank * (MOST + 1) >= needed), ranks[-1])
        if wide > r:
            reasons.append(
                f"90 % of the variance of the hidden states lies in {needed} directions in the median layer; r = {r} visits "
                f"{r * (MOST + 1)} rows or columns in a run of {MOST} moves, which is less, r = {wide} up to {wide * (MOST + 1)}."
            )
            r = wide
        moves = min(max(math.ceil(needed / r) - 1, FEWEST), MOST)
        reasons.append(
            f"{moves} moves visit {r * (moves + 1)} rows or columns of every weight, for {needed} directions that hold 90 % of the variance; "
            f"the paper makes {FEWEST} to {MOST}."
        )
    axis, reason = _better_axis(winners, r)
    return Advice(r=r, axis=axis, moves=moves, reasons=[*reasons, reason])


def _enough_to_win(winners: Mapping[str, Any] | None, ranks: Sequence[int]) -> tuple[int, list[str]]:
    shares = {} if winners is None else {int(r): share for r, share in winners["summary"]["share_by_rank"].items()}
    if not shares:
        return ranks[0], [
            f"Local winners were not measured, so the rank begins with the least that was to be tried, {ranks[0]}."
        ]
    for r, (share, low, high) in sorted(shares.items()):
        if share >= NEARLY_ALWAYS:
            first = f"At r = {r}, {share:.0%} of random slices ({low:.0%} to {high:.0%}) lowered the held-out loss when trained alone"
            if r == min(shares):
                return r, [f"{first}: the narrowest that were tried suffice."]
            before = max(rank for rank in shares if rank < r)
            return r, [f"{first}; at r = {before} it was {shares[before][0]:.0%}, less than {NEARLY_ALWAYS:.0%}."]
    r = max(shares)
    return r, [
        f"At no rank that was tried did {NEARLY_ALWAYS:.0%} of random slices lower the held-out loss when trained alone; at the greatest, r = {r}, "
        f"{shares[r][0]:.0%} did. A single slice here is no sure winner."
    ]


def _better_axis(winners: Mapping[str, Any] | None, r: int) -> tuple[str, str]:
    drops = {} if winners is None else _drops(winners, r)
    if len(drops) < len(SLICE_AXES):
        return ALTERNATE, "Rows and columns were not compared, so they take turns."
    words = f"Median drop of the loss at r = {r}: rows {drops[ROW]:.2%}, columns {drops[COLUMN]:.2%}"
    better, other = (ROW, COLUMN) if drops[ROW] >= drops[COLUMN] else (COLUMN, ROW)
    if drops[better] >= MARGIN and drops[better] >= CLEARLY * drops[other]:
        return better, f"{words}: {better}s are clearly better."
    return ALTERNATE, f"{words}: neither is clearly better, so they take turns, as in the paper's RC."


def _drops(winners: Mapping[str, Any], r: int) -> dict[str, float]:
    """Axis -> median drop of random slices in the model that is analysed, whose rows come first."""
    rows = [row for row in winners["rows"] if row["choice"] == "random"]
    return {row["axis"]: row["median_drop"] for row in rows if row["model"] == rows[0]["model"] and row["r"] == r}


def beside(r: int, ranks: Sequence[int], widest: int) -> list[int]:
    """Ranks for the check: the next smaller one than `r` that was tried, `r`, and the next greater one.

    Where none was tried, half of it and twice it, as far as weights have so many rows or columns.
    """
    below = max((rank for rank in ranks if rank < r), default=r // 2)
    above = min((rank for rank in ranks if rank > r), default=2 * r)
    return [rank for rank in (below, r, above) if rank == r or 0 < rank <= widest]


def judged(r: int, before: float, after: Mapping[int, float], least: float) -> tuple[int | None, str]:
    """The rank that the check speaks for, None if for none, and what it showed.

    Args:
        before: Held-out loss at the start of all runs.
        after: Rank -> held-out loss at the end of its run.
        least: By how much it has to fall at the advised rank.
    """
    drops = {rank: before - loss for rank, loss in after.items()}
    shown = ", ".join(f"{loss:.3f} at r = {rank}" for rank, loss in sorted(after.items()))
    begin = f"From {before:.3f}, the held-out loss came to {shown}."
    below = max((rank for rank in drops if rank < r), default=None)
    above = min((rank for rank in drops if rank > r), default=None)
    if above is not None and drops[above] >= least and drops[r] < ENOUGH * drops[above]:
        return above, f"{begin} A wider slice does clearly better: r = {r} is too narrow here, try r = {above}."
    if drops[r] < least:
        return None, f"{begin} At the advised rank it hardly fell: the check does not bear out the advice."
    if below is not None and drops[below] >= ENOUGH * drops[r]:
        return (
            below,
            f"{begin} A narrower slice does as well: r = {r} is wider than it has to be here, try r = {below}.",
        )
    if above is None:
        return r, f"{begin} A narrower slice does clearly worse."
    return r, f"{begin} A wider slice hardly does better" + (
        "." if below is None else ", a narrower one clearly worse."
    )
