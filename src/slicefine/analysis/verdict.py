"""What the stages say of the hypothesis, property by property, in a figure, a threshold and a sentence.

The paper gives no thresholds. Ours are in the text of every verdict. They were set before anything was measured, but for those of "task energy
is due to pretraining" and "slices overlap the task subspace", which were asked for by what MiniLM showed, and that of local winners, 0.9 at
first, which no interval of fewer than 35 trials can reach. That of "winners are due to pretraining" was one of the shares themselves at first, and
that of "which slice you pick barely matters" one of the ratio of median drops, which is beyond all bounds where the median random slice lowers
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from slicefine.analysis.settings import BALANCE, ENERGY, GLOBAL, WINNERS

HOLDS, PARTLY, FAILS, NOT_MEASURED = "holds", "holds partly", "fails", "not measured"
Stages = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """On one property."""

    property: str
    verdict: str
    """`holds`, `holds partly`, `fails` or `not measured`."""
    figure: float | None
    threshold: str
    """From where on it holds, and holds partly."""
    words: str
    poster: str
    """What the paper's poster says of it."""


def verdicts(stages: Stages, failed: Mapping[str, str]) -> list[dict[str, Any]]:
    """A verdict for every property, as JSON values.

    Args:
        stages: Stage -> what it found.
        failed: Stage -> why it found nothing.
    """
    return [asdict(_judged(one, stages, failed)) for one in PROPERTIES]


@dataclass(frozen=True, kw_only=True)
class _Property:
    title: str
    stage: str
    figure: Callable[[Mapping[str, Any]], float | None]
    """From what the stage found."""
    holds: float
    partly: float
    """Limits of the figure."""
    least: bool
    """Whether they are the least that it may be, or the most."""
    what: str
    """What the figure is."""
    words: Callable[[Mapping[str, Any]], str]
    poster: str
    why_not: Callable[[Mapping[str, Any]], str] = lambda found: "The stage has no figure for it."
    """Why there is no figure in what the stage found."""

    @property
    def threshold(self) -> str:
        limit = "at least" if self.least else "at most"
        return f"{self.what}: holds if {limit} {self.holds:g}, partly if {limit} {self.partly:g}"


def _judged(one: _Property, stages: Stages, failed: Mapping[str, str]) -> Verdict:
    found = stages.get(one.stage)
    figure = None if found is None else one.figure(found)
    if found is None or figure is None:
        verdict = NOT_MEASURED
        words = failed.get(one.stage) or (
            f"The stage {one.stage} was not run." if found is None else one.why_not(found)
        )
    else:
        sign = 1 if one.least else -1
        verdict = (
            HOLDS if sign * figure >= sign * one.holds else PARTLY if sign * figure >= sign * one.partly else FAILS
        )
        words = one.words(found)
    return Verdict(
        property=one.title,
        verdict=verdict,
        figure=figure,
        threshold=one.threshold,
        words=words,
        poster=one.poster,
    )


# ---------------------------------------------------------------- spectral balance


def _balance(axes: tuple[str, ...]) -> Callable[[Mapping[str, Any]], float | None]:
    def figure(found: Mapping[str, Any]) -> float | None:
        values = [of["rho_median"] for axis in axes if (of := found["summary"].get(axis)) is not None]
        return max((value for value in values if value is not None), default=None)

    return figure


def _balance_words(axes: tuple[str, ...]) -> Callable[[Mapping[str, Any]], str]:
    def words(found: Mapping[str, Any]) -> str:
        parts = []
        for axis in axes:
            of = found["summary"].get(axis)
            if of is None or of["rho_median"] is None:
                continue
            chance = of["rho_shuffled_median"]
            times = f", {of['rho_median'] / chance:.0f} times what shuffled entries have" if chance else ""
            parts.append(
                f"groups of {axis}s: rho {of['rho_median']:.2g} in the median{times}, {of['rho_greatest']:.2g} at most"
            )
        weights = len({weight["name"] for weight in found["weights"] if weight["axis"] in axes})
        return f"Over {weights} weights, {'; '.join(parts)}."

    return words


# ---------------------------------------------------------------- task energy


def _energy(found: Mapping[str, Any]) -> float | None:
    return None if found["summary"].get("truncated") else found["summary"]["share"]


def _no_energy(found: Mapping[str, Any]) -> str:
    if found["summary"].get("truncated"):
        return "There are fewer tokens than dimensions, so the spectrum is cut short: give more examples."
    return "No layer has hidden states that vary and are finite."


def _energy_words(found: Mapping[str, Any]) -> str:
    summary = found["summary"]
    untrained = summary.get("untrained_share")
    beside = "" if untrained is None else f" With random weights it is {untrained:.0%}."
    return (
        f"90 % of the variance of hidden states lies in {summary['k90_median']:g} of {summary['dimension']} directions in the median layer "
        f"({summary['share']:.0%}).{beside}"
    )


def _steeper(found: Mapping[str, Any]) -> float | None:
    share, untrained = _energy(found), found["summary"].get("untrained_share")
    return None if share is None or untrained is None else untrained - share


def _steeper_words(found: Mapping[str, Any]) -> str:
    summary = found["summary"]
    return (
        f"90 % of the variance lies in {summary['share']:.0%} of the directions, and in {summary['untrained_share']:.0%} of those of a model with random "
        "weights, on the same examples."
    )


def _overlap_words(found: Mapping[str, Any]) -> str:
    summary, kernel = found["summary"], found["ntk"]
    untrained = summary.get("ntk_alignment_per_weight_untrained")
    chance = "" if untrained is None else f"; with random weights {untrained:.2f}"
    whole = summary.get("ntk_alignment_without_dominant")
    beside = (
        ""
        if whole is None
        else f" All slices together: {whole:.2f}, without the weight whose gradients outweigh all others."
    )
    return (
        f"Slices of r = {kernel['r']} ({kernel['axis']}s) see the examples as their weight does with an alignment of "
        f"{summary['ntk_alignment_per_weight']:.2f}, the median over weights, {kernel['examples']} examples (1: alike up to a factor, 0: by chance){chance}.{beside}"
    )


# ---------------------------------------------------------------- winners


def _widest(found: Mapping[str, Any]) -> list[float] | None:
    shares = found["summary"]["share_by_rank"]
    return shares[max(shares, key=int)] if shares else None


def _least_share(found: Mapping[str, Any]) -> float | None:
    widest = _widest(found)
    return None if widest is None else widest[1]


def _winner_words(found: Mapping[str, Any]) -> str:
    shares = found["summary"]["share_by_rank"]
    parts = [f"{share:.0%} ({low:.0%} to {high:.0%}) at r = {r}" for r, (share, low, high) in shares.items()]
    return f"Random slices that lower the held-out loss by {found['margin']:.1%} or more when trained alone: {', '.join(parts)}."


def _lead(found: Mapping[str, Any]) -> float | None:
    pretrained, twin = found["summary"]["share_by_rank"], found["summary"].get("share_untrained") or {}
    both = [r for r in pretrained if r in twin]
    if not both:
        return None
    widest = max(both, key=int)
    (share, low, _), (other, _, high) = pretrained[widest], twin[widest]
    # Newcombe's interval of a difference, from Wilson's of its sides.
    return share - other - math.hypot(share - low, high - other)


def _lead_words(found: Mapping[str, Any]) -> str:
    pretrained, twin = found["summary"]["share_by_rank"], found["summary"]["share_untrained"]
    parts = [
        f"r = {r}: {pretrained[r][0]:.0%} against {twin[r][0]:.0%} ({twin[r][1]:.0%} to {twin[r][2]:.0%})"
        for r in pretrained
        if r in twin
    ]
    return f"Winners in the pretrained model against one with random weights: {'; '.join(parts)}."


def _wins_by_choice(found: Mapping[str, Any]) -> dict[str, float]:
    """Share of winners by how a slice was chosen, in the weights, and of the sizes, where every way was tried."""
    mine = [trial for trial in found["trials"] if trial["model"] == found["trials"][0]["model"]]
    where = {trial["site"] for trial in mine if trial["choice"] == "mask"}
    wins: dict[str, list[bool]] = {}
    for trial in mine:
        if trial["site"] in where:
            wins.setdefault(trial["choice"], []).append(trial["wins"])
    return {choice: sum(each) / len(each) for choice, each in wins.items()}


def _choice(found: Mapping[str, Any]) -> float | None:
    shares = _wins_by_choice(found)
    if not any(shares.values()):
        return None
    chosen = [shares[name] for name in ("magnitude", "gradient") if name in shares]
    return max(chosen) - shares["random"] if chosen and "random" in shares else None


def _percent(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2%}"


def _choice_words(found: Mapping[str, Any]) -> str:
    shares, drops = _wins_by_choice(found), found["summary"]["choice_matters"]
    parts = [f"{name} {share:.0%} (median drop {_percent(drops[name])})" for name, share in shares.items()]
    return f"Winners by how a slice was chosen, in the same weights: {', '.join(parts)}."


# ---------------------------------------------------------------- global winner


def _global_words(found: Mapping[str, Any]) -> str:
    best, share = found["summary"]["best"], found["summary"]["best_share"]
    return (
        f"Full tuning lowers the held-out loss to {found['full']['loss_after']:.3f} in {found['steps']} steps; the best slices (r = {best['r']}, "
        f"{best['axis']}, {best['layers']} layers, {best['active']:,} parameters), chosen by other examples, reach {share:.0%} of that drop."
    )


def _no_global(found: Mapping[str, Any]) -> str:
    if found["summary"]["best_share"] is None:
        return f"Full tuning hardly lowers the held-out loss in {found['steps']} steps: there is no drop to have a share of."
    return "No run has r = 1 in all layers, or none lowers the loss."


def _rank_one(found: Mapping[str, Any]) -> float | None:
    one, best = found["summary"]["r1_all_layers_share"], found["summary"]["best_share"]
    return None if one is None or not best or best <= 0 else one / best


def _rank_one_words(found: Mapping[str, Any]) -> str:
    summary = found["summary"]
    return f"r = 1 in all layers reaches {summary['r1_all_layers_share']:.0%} of the drop of full tuning, the best rank {summary['best_share']:.0%}."


PROPERTIES = (
    _Property(
        title="spectral balance",
        stage=BALANCE,
        figure=_balance(("row", "column")),
        holds=0.01,
        partly=0.1,
        least=False,
        what="rho, the median over weights of the worse axis",
        words=_balance_words(("row", "column")),
        poster="rho is about 0.001: no slice is weak",
    ),
    _Property(
        title="spectral balance of attention heads",
        stage=BALANCE,
        figure=_balance(("head",)),
        holds=0.01,
        partly=0.1,
        least=False,
        what="rho between heads, the median over weights",
        words=_balance_words(("head",)),
        poster="no figure; heads compute different things, so this is the hard test",
    ),
    _Property(
        title="high task energy",
        stage=ENERGY,
        figure=_energy,
        why_not=_no_energy,
        holds=0.1,
        partly=0.3,
        least=False,
        what="share of the directions that hold 90 % of the variance",
        words=_energy_words,
        poster="task-relevant variance lies in a few directions",
    ),
    _Property(
        title="task energy is due to pretraining",
        stage=ENERGY,
        figure=_steeper,
        why_not=_no_energy,
        holds=0.05,
        partly=0.01,
        least=True,
        what="share of the directions with random weights less that of the model",
        words=_steeper_words,
        poster="the frozen backbone already concentrates task-relevant variance",
    ),
    _Property(
        title="slices overlap the task subspace",
        stage=ENERGY,
        figure=lambda found: found["summary"].get("ntk_alignment_per_weight"),
        why_not=lambda found: found["ntk"].get("why_no_full") or "The gradients of the examples do not differ.",
        holds=0.9,
        partly=0.5,
        least=True,
        what="alignment of the kernel of a slice with that of its weight, the median over weights",
        words=_overlap_words,
        poster="any wide slice overlaps the task subspace",
    ),
    _Property(
        title="any wide slice is a local winner",
        stage=WINNERS,
        figure=_least_share,
        holds=0.8,
        partly=0.5,
        least=True,
        what="share of winners at the greatest rank, lower end of its interval (16 trials that all win have 0.81)",
        words=_winner_words,
        poster="any sufficiently wide slice can be trained to lower the loss",
    ),
    _Property(
        title="winners are due to pretraining",
        stage=WINNERS,
        figure=_lead,
        holds=0.1,
        partly=0.0,
        least=True,
        what="share of winners less that of a model with random weights, at the greatest rank, lower end of its interval",
        words=_lead_words,
        poster="said of dense, pretrained networks",
    ),
    _Property(
        title="which slice you pick barely matters",
        stage=WINNERS,
        figure=_choice,
        why_not=lambda found: "No slice won, however it was chosen.",
        holds=0.1,
        partly=0.25,
        least=False,
        what="share of winners with the best way to choose less that of random slices in the same weights",
        words=_choice_words,
        poster="which slice you pick barely matters",
    ),
    _Property(
        title="slices across layers are a global winner",
        stage=GLOBAL,
        why_not=_no_global,
        figure=lambda found: found["summary"]["best_share"],
        holds=0.95,
        partly=0.75,
        least=True,
        what="share of the loss drop of full tuning",
        words=_global_words,
        poster="a few slices across layers match full fine-tuning",
    ),
    _Property(
        title="r = 1 suffices",
        stage=GLOBAL,
        figure=_rank_one,
        why_not=_no_global,
        holds=0.95,
        partly=0.75,
        least=True,
        what="what r = 1 reaches over what the best rank does",
        words=_rank_one_words,
        poster="r = 1 often suffices",
    ),
)
"""In the order of the page."""
