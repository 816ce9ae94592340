"""Is any slice a local winner? Many slices, each trained alone from the same start, and judged on held-out examples (see `slices.py`).

The random slices are spread evenly over the kinds of weights (query, key, ...), both axes and all ranks; the layer and the position are drawn.
Beside a random slice stand, in the same weight and of the same size:

mask        as many single entries at random places
magnitude   the slice with the greatest Frobenius norm
gradient    the slice with the greatest restricted gradient norm

and the same random slices in a twin of the model with random weights, for which the hypothesis should fail. The new head of every model is
fitted first (see `tuned_head.py`). The margin is a share of the held-out loss, and above what noise gives: as much as steps in random
directions, in place of gradients, bring in one trial of twenty, in whichever of the two models this is more.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slicefine.analysis.material import Amounts, Material
from slicefine.analysis.resumed import Resumed, block_of, kind_of, stack_of
from slicefine.analysis.settings import AnalysisSettings
from slicefine.analysis.slices import Outcome, Part, Trials, clamped, heaviest
from slicefine.analysis.subject import Subject, places_of
from slicefine.analysis.tuned_head import tune_head
from slicefine.evaluation.scoring import wilson
from slicefine.slicing import SLICE_AXES, Slice
from slicefine.tuner.base_layers import Place

Say = Callable[[int, int, str], None]

PRETRAINED, UNTRAINED = "pretrained", "untrained"
RANDOM, MASK, MAGNITUDE, GRADIENT = "random", "mask", "magnitude", "gradient"
NOISE = "noise"
"""No choice of its own: a random slice whose steps have random directions."""

MARGIN = 0.01
"""Share of the held-out loss by which it has to fall at least. Our choice; the paper gives its delta no value."""
SOLVED = 0.02
"""Share of the loss that a new head leaves, below which a task has too little left to learn."""
CHANCE = 0.95
"""Share of trials in random directions that are no winners."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is tried."""

    amounts: Amounts
    """For heads and trials."""
    iterations: int
    """Of the fit of a head, for each penalty."""
    rates: tuple[float, ...]
    """Learning rates of Adam that every trial chooses from, as shares of the root mean square of the weight: one row alone takes longer steps
    than sixteen columns do."""
    each: int
    """Random slices of every kind of weight, axis and rank."""
    untrained: int
    """Of them, those that are tried in the twin too."""
    compared: int
    """Of them, those beside which other choices are tried."""
    kinds: int | None = None
    """Kinds of weights, drawn anew for every axis and rank; None = all."""


FULL = Effort(
    amounts=Amounts(size=16, fitted=48, watched=16, steps=4, choosing=3, held_out=6), iterations=20, rates=(0.05, 0.5, 5.0),
    each=3, untrained=1, compared=1,
)  # fmt: skip
QUICK = Effort(
    amounts=Amounts(size=8, fitted=24, watched=12, steps=3, choosing=2, held_out=4), iterations=8, rates=(0.2, 2.0),
    each=1, untrained=1, compared=1, kinds=2,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Site:
    """A random slice of one weight."""

    name: str
    """Of the target."""
    piece: Slice
    r: int
    """The rank that was asked for; the slice may be narrower, as wide as its weight."""
    number: int
    """How many there are before it of its kind, axis and rank."""
    index: int
    """Among all sites."""
    seed: int
    """Of the mask of its size, and of random directions."""


def draw_sites(
    places: Mapping[str, Place], ranks: Sequence[int], *, each: int, kinds: int | None, seed: int
) -> list[Site]:
    """`each` random slices of every kind of weight, axis and rank, in different layers as far as there are so many."""
    generator = random.Random(seed)
    names: dict[str, list[str]] = {}
    for name in places:
        names.setdefault(kind_of(name), []).append(name)
    sites = list[Site]()
    for r in ranks:
        for axis in SLICE_AXES:
            chosen = sorted(names) if kinds is None else generator.sample(sorted(names), min(kinds, len(names)))
            for kind in chosen:
                layers = generator.sample(names[kind], len(names[kind]))
                for number in range(each):
                    name = layers[number % len(layers)]
                    shape = places[name].shape
                    width = clamped(shape, axis, r)
                    start = generator.randrange(shape[SLICE_AXES.index(axis)] - width + 1)
                    seeded = generator.randrange(2**63)
                    piece = Slice(axis, start, width)
                    sites.append(Site(name=name, piece=piece, r=r, number=number, index=len(sites), seed=seeded))
    return sites


def run(subject: Subject, settings: AnalysisSettings, say: Say) -> dict[str, Any]:
    """The local winners of `subject.model`, as JSON values (see `docs/analysis.md` for the layout).

    What is analysed goes by the name of `untrained` if it is a twin itself; then there is no other twin beside it.
    """
    effort, seed = QUICK if settings.quick else FULL, settings.seed
    name = UNTRAINED if settings.untrained else PRETRAINED
    sites = draw_sites(subject.places, settings.ranks, each=effort.each, kinds=effort.kinds, seed=seed)
    plans = {name: [(site, _choices(site, effort)) for site in sites]}
    if not settings.untrained:
        plans[UNTRAINED] = [(site, [RANDOM, NOISE]) for site in sites if site.number < effort.untrained]
    progress = _Progress(say, sum(len(choices) for plan in plans.values() for _, choices in plan))
    data = Material.drawn(subject, effort.amounts, seed=seed)
    heads, trials = dict[str, Any](), list[dict[str, Any]]()
    for label, plan in plans.items():
        make = subject.copy if label == name else partial(subject.untrained, seed)
        heads[label], found = _found(subject, make, plan, data, effort, progress)
        trials += [{"model": label, **trial} for trial in found]
    by_chance = [trial for trial in trials if trial["choice"] == NOISE]
    margin = max(
        MARGIN, *(_noise(trial["change"] for trial in by_chance if trial["model"] == label) for label in plans)
    )
    for trial in trials:
        trial["wins"] = trial["gradient"] > 0 and 0.0 - trial["change"] > margin
    trials = [trial for trial in trials if trial["choice"] != NOISE]
    return {
        "margin": margin,
        "steps": effort.amounts.steps,
        "learning_rates": list(effort.rates),
        "baseline": "a new head fitted to the frozen model" if subject.new_modules else "the model as it is",
        "note": " ".join(note for note in (note_of(heads[name]), data.note) if note),
        "examples": data.summary(),
        "heads": heads,
        "trials": trials,
        "rows": _rows(trials),
        "noise": {**_share(by_chance), "greatest_drop": max(0.0 - trial["change"] for trial in by_chance)},
        "summary": _summary(trials, name),
    }


def _choices(site: Site, effort: Effort) -> list[str]:
    return [RANDOM, MASK, MAGNITUDE, GRADIENT, NOISE] if site.number < effort.compared else [RANDOM]


class _Progress:
    def __init__(self, say: Say, total: int) -> None:
        self._say, self._total, self._done = say, total, 0

    def __call__(self, what: str) -> None:
        self._done += 1
        self._say(self._done, self._total, what)


def _found(
    subject: Subject,
    make: Callable[[], PreTrainedModel],
    plan: Iterable[tuple[Site, list[str]]],
    data: Material,
    effort: Effort,
    progress: _Progress,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The fit of the head of a model that `make` gives, and its trials, block by block: what is below is computed once for all of them."""
    model = make()
    head = tune_head(subject, model, data.fitted, data.watched, iterations=effort.iterations)
    places = places_of(model, subject.new_modules)
    stack = stack_of(model, places)
    by_block: dict[int | str, list[tuple[Site, list[str]]]] = {}
    for site, choices in plan:
        block = block_of(site.name)
        by_block.setdefault(site.name if block is None else block, []).append((site, choices))
    found = []
    for block, here in by_block.items():
        names = list(dict.fromkeys(site.name for site, _ in here))
        # Outside of the blocks a weight is above all of them, or it turns out that nothing can be skipped.
        skipped = stack if isinstance(block, str) else stack[:block]
        resumed = Resumed(subject, model, skipped, [places[name].stored for name in names])
        trials = Trials(resumed.loss, data.train, data.choosing, data.held_out, effort.rates)
        gradients = dict(zip(names, trials.gradients([places[name] for name in names]), strict=True))
        for site, choices in here:
            for choice in choices:
                generator = torch.Generator().manual_seed(site.seed)
                part, start = _part(choice, site, places[site.name], gradients[site.name], generator)
                outcome = trials.train_alone(part, noise=generator if choice == NOISE else None)
                found.append(_trial(choice, site, start, part, gradients[site.name], outcome))
                progress(site.name)
    return head, found


def _part(
    choice: str, site: Site, place: Place, gradient: Tensor, generator: torch.Generator
) -> tuple[Part, int | None]:
    """What is trained, and its first row or column; None for a mask."""
    if choice == MASK:
        return Part.at_random(place, site.piece.size(place.shape), generator), None
    start = site.piece.start
    if choice in (MAGNITUDE, GRADIENT):
        judged = place.matrix.detach() if choice == MAGNITUDE else place.oriented(gradient)
        start = heaviest(judged, site.piece.axis, site.piece.width)
    return Part.of(place, Slice(site.piece.axis, start, site.piece.width)), start


def _trial(
    choice: str, site: Site, start: int | None, part: Part, gradient: Tensor, outcome: Outcome
) -> dict[str, Any]:
    norm, whole = part.norm(gradient), float(torch.linalg.vector_norm(gradient.double()))
    return {
        "site": site.index,
        "choice": choice,
        "name": site.name,
        "layer": block_of(site.name),
        "axis": site.piece.axis,
        "r": site.r,
        "start": start,
        "parameters": len(part.entries),
        "gradient": norm,
        "gradient_share": norm / whole if whole else None,
        "loss_before": outcome.before,
        "loss_after": outcome.after,
        "change": outcome.change,
        "learning_rate": outcome.rate,
    }


def note_of(head: dict[str, Any]) -> str:
    """What has to be known of the start to judge the trials; empty if nothing has."""
    before, after = head["before"], head["after"]
    if before is None or after > SOLVED * before:
        return ""
    return (
        f"The new head alone lowers the loss from {before:.3g} to {after:.3g}: the task is as good as solved without any slice, and what is left "
        "to lower is mostly noise. Winners need a harder task."
    )


def _noise(changes: Iterable[float]) -> float:
    """The drop of the loss that trials in random directions of one model exceed hardly ever."""
    return quantile([0.0 - change for change in changes], CHANCE)


def quantile(values: Sequence[float], share: float) -> float:
    """The least of `values` that at least `share` of them do not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def _rows(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Trials of one model, choice, axis and rank together."""
    keys = ("model", "choice", "axis", "r")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for trial in trials:
        groups.setdefault(tuple(trial[key] for key in keys), []).append(trial)
    return [{**dict(zip(keys, group, strict=True)), **_share(of)} for group, of in groups.items()]


def _share(trials: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Winners among `trials`, with Wilson's 95 % interval of their share, and the median drop of the loss, a share of it."""
    winners = sum(trial["wins"] for trial in trials)
    return {
        "trials": len(trials),
        "winners": winners,
        "share": winners / len(trials) if trials else None,
        "interval": list(wilson(winners, len(trials))),
        "median_drop": statistics.median(0.0 - trial["change"] for trial in trials) if trials else None,
    }


def _summary(trials: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """`name`: of the model that is analysed."""
    mine = [trial for trial in trials if trial["model"] == name]
    twin = [trial for trial in trials if trial["model"] == UNTRAINED] if name != UNTRAINED else []
    # Choices are compared where all of them were tried.
    where = {trial["site"] for trial in mine if trial["choice"] == MASK}
    beside = [trial for trial in mine if trial["site"] in where]
    return {
        "share_by_rank": _by_rank(mine),
        "share_untrained": _by_rank(twin),
        "choice_matters": {
            choice: _share([trial for trial in beside if trial["choice"] == choice])["median_drop"]
            for choice in (RANDOM, MASK, MAGNITUDE, GRADIENT)
        },
    }


def _by_rank(trials: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Rank -> share of winners among random slices, and the ends of its interval."""
    chosen = [trial for trial in trials if trial["choice"] == RANDOM]
    shares = {r: _share([trial for trial in chosen if trial["r"] == r]) for r in dict.fromkeys(t["r"] for t in chosen)}
    return {str(r): [share["share"], *share["interval"]] for r, share in shares.items()}
