"""Charts of winners: slices that win alone, a few that come near full tuning, and the advice that follows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slicefine.reporting.charts import Dot, Line, chart, lines, logarithmic, name_axes, percents
from slicefine.reporting.page import Chart, Key
from slicefine.reporting.palette import INK, MUTED, SERIES, ramp
from slicefine.reporting.text import count, decimal, finite, interval, percent, plural
from slicefine.reporting.thinning import Point, spaced

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Found = Mapping[str, Any]
MOST_TRIALS = 1500
"""Dots of a cloud."""
CHOICES = {
    "random": "random slices",
    "mask": "masks of single entries",
    "magnitude": "slices by magnitude",
    "gradient": "slices by gradient",
}
OURS, NULL, OTHER = SERIES[0], SERIES[7], SERIES[1]


def winner_shares(rows: Sequence[Found]) -> Chart:
    """Shares of winners with their intervals: pretrained and untrained in the same row."""
    order: dict[tuple[str, str, Any], dict[str, Found]] = {}
    for one in rows:
        order.setdefault((str(one.get("choice")), str(one.get("axis")), one.get("r")), {})[str(one.get("model"))] = one
    models = list(dict.fromkeys(str(one.get("model")) for one in rows))
    colours = {model: OURS if model == "pretrained" else NULL for model in models}
    choices = list(dict.fromkeys(choice for choice, _, _ in order))

    def draw(figure: Figure, narrow: bool) -> None:
        axis = figure.subplots()
        axis.grid(axis="x")
        axis.grid(visible=False, axis="y")
        place, ticks = 0.0, list[tuple[float, str]]()
        for choice in choices:
            axis.annotate(
                CHOICES.get(choice, choice), (0, place), xycoords=("axes fraction", "data"),
                xytext=(0, -1), textcoords="offset points", va="center", fontsize=11.5, fontweight="bold",
            )  # fmt: skip
            place += 1
            for (of, along, rank), found in order.items():
                if of != choice:
                    continue
                for number, model in enumerate(models):
                    if model in found:
                        _share(axis, found[model], place + (number - (len(models) - 1) / 2) * 0.3, colours[model])
                ticks.append((place, f"r = {rank}, {along}"))
                place += 1
        axis.set_yticks([at for at, _ in ticks], [name for _, name in ticks])
        axis.set_ylim(place - 0.4, -0.6)
        axis.set_xlim(-0.02, 1.02)
        percents(axis, "x")
        axis.set_xlabel("share of slices that win", loc="right")

    best = [one for one in rows if one.get("model") == "pretrained" and one.get("choice") == "random"]
    words = "; ".join(
        f"r = {one.get('r')}, {one.get('axis')}: {percent(one.get('share'))} ({interval(one.get('interval'))}) of {one.get('trials')}"
        for one in best[:4]
    )
    words = f"Random slices of the pretrained model: {words}." if words else "Shares of slices that win alone."
    legend = [Key(name=model, colour=colours[model], mark="dot") for model in models]
    height = 60 + 22 * (len(order) + len(choices))
    return chart(
        "winners",
        draw,
        title="Which slices win alone",
        words=f"{words} Whiskers: Wilson's 95 % intervals.",
        height=height,
        legend=legend,
    )


def _share(axis: Axes, one: Found, place: float, colour: str) -> None:
    value, ends = finite(one.get("share")), one.get("interval") or []
    if value is None:
        return
    if len(ends) == 2:
        axis.plot(ends, [place, place], color=colour, linewidth=2, alpha=0.5)
    axis.plot([value], [place], color=colour, marker="o", markersize=5.5)


def choices(found: Mapping[str, Any]) -> Chart:
    """Median drop of the loss by how slices are chosen."""
    rows = [
        Dot(
            name=CHOICES.get(name, name),
            value=value,
            colour=OURS if name == "random" else OTHER,
            words=percent(value),
        )
        for name, one in found.items()
        if (value := finite(one)) is not None
    ]
    words = "Median fall of the held-out loss by one slice alone: " + "; ".join(
        f"{row.name} {row.words}" for row in rows
    )

    def draw(figure: Figure, narrow: bool) -> None:
        axis = figure.subplots()
        axis.grid(axis="x")
        axis.grid(visible=False, axis="y")
        for place, row in enumerate(rows):
            axis.barh(place, row.value, height=0.5, color=row.colour)
            axis.annotate(
                row.words,
                (max(row.value, 0), place),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=11,
                color=INK,
            )
        axis.set_yticks(range(len(rows)), [row.name for row in rows])
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.margins(x=0.2)
        percents(axis, "x")
        axis.axvline(0, color=MUTED, linewidth=1)
        axis.set_xlabel("median fall of the loss", loc="right")

    return chart("choices", draw, title="Does the choice matter?", words=f"{words}.", height=60 + 30 * len(rows))


def gradients(trials: Sequence[Found]) -> Chart | None:
    """Restricted gradient of each slice against what it did to the loss; None without trials."""
    clouds: dict[str, list[tuple[float, float]]] = {}
    for one in trials:
        across, up = finite(one.get("gradient")), finite(one.get("change"))
        if across and across > 0 and up is not None:
            clouds.setdefault(str(one.get("model")), []).append((across, up))
    if not clouds:
        return None
    kept = {model: spaced(points, MOST_TRIALS // len(clouds)) for model, points in clouds.items()}

    def draw(figure: Figure, narrow: bool) -> None:
        axis = figure.subplots()
        for model, points in kept.items():
            colour = OURS if model == "pretrained" else NULL
            axis.plot(
                *zip(*points, strict=True),
                linestyle="none",
                marker="o",
                markersize=3.6,
                color=colour,
                alpha=0.55,
                markeredgewidth=0,
            )
        axis.axhline(0, color=MUTED, linewidth=1)
        logarithmic(axis, "x")
        percents(axis, "y")
        name_axes(axis, "norm of the gradient on the slice", "change of the held-out loss")

    legend = [Key(name=model, colour=OURS if model == "pretrained" else NULL, mark="dot") for model in clouds]
    words = f"Each dot is a slice that was trained alone, {sum(map(len, clouds.values())):,} in all. Below zero the loss fell. By the theory, the larger the gradient, the more there is to win."
    return chart(
        "gradients", draw, title="Gradient of a slice, and what it did", words=words, height=(300, 270), legend=legend
    )


# ---------------------------------------------------------------- a few slices together


def chosen(runs: Sequence[Found]) -> Found | None:
    """The run with the least loss of the examples that choose."""
    known = [one for one in runs if finite(one.get("share_of_full_drop")) is not None]
    return min(
        known,
        key=lambda one: value if (value := finite(one.get("loss_choosing"))) is not None else math.inf,
        default=None,
    )


def together(runs: Sequence[Found]) -> Chart:
    """Share of the loss drop of full tuning over the number of layers, a line a rank and axis, and those that move apart."""
    lines_of: dict[tuple[float, str, bool], list[Point]] = {}
    for one in runs:
        share, layers = finite(one.get("share_of_full_drop")), finite(one.get("layers"))
        if share is not None and layers is not None:
            key = (finite(one.get("r")) or 0.0, str(one.get("axis")), bool(one.get("moves")))
            lines_of.setdefault(key, []).append((layers, share))
    ranks = sorted({rank for rank, _, _ in lines_of})
    kinds = list(dict.fromkeys((axis, moving) for _, axis, moving in lines_of))
    several_axes, some_move = len({axis for axis, _ in kinds}) > 1, len({moving for _, moving in kinds}) > 1
    drawn = [
        Line(
            name=f"r = {rank:g}{', ' + axis if several_axes else ''}{', moving' if some_move and moving else ''}",
            points=sorted(points),
            colour=ramp(ranks.index(rank) + 1, len(ranks) + 1),
            style=("line", "dashed", "dotted", "dashdot")[kinds.index((axis, moving)) % 4],
            dots=True,
        )
        for (rank, axis, moving), points in sorted(lines_of.items())
    ]
    best = chosen(runs)
    words = (
        f"Chosen by examples that do not judge: {percent(best.get('share_of_full_drop'))}, by r = {best.get('r')} in {plural(best.get('layers'), 'layer')} "
        f"({count(best.get('active'))} parameters at a step)."
        if drawn and best
        else "Full tuning hardly lowers the loss in so few steps: there is no drop to have a share of."
    )
    return lines(
        "together",
        {"share of the drop of full tuning": drawn},
        title="How near a few slices come to full tuning",
        words=words,
        over="layers that are trained",
        shares=True,
        counted=True,
        level=("full tuning", 1.0),
    )


def together_curves(stage: Found) -> Chart | None:
    """Loss curves of full tuning, of the head alone, and of the best slices; None where they were not kept."""
    runs = [one for one in stage.get("runs") or [] if points_of(one)]
    best = chosen(runs)
    drawn = [
        Line(name=name, points=points_of(one), colour=colour, style=style)
        for name, one, colour, style in (
            ("head alone", stage.get("head_only"), NULL, "dotted"),
            ("best slices", best, OURS, "line"),
            ("full tuning", stage.get("full"), OTHER, "dashed"),
        )
        if one and points_of(one)
    ]
    if not drawn:
        return None
    words = "Held-out loss at the end: " + "; ".join(f"{line.name} {decimal(line.points[-1][1])}" for line in drawn)
    return lines(
        "together-curves",
        {"held-out loss, nats": drawn},
        title="The runs themselves",
        words=f"{words}.",
        over="optimizer step",
        counted=True,
    )


def points_of(run: Found) -> list[tuple[float, float]]:
    """The curve of a short run."""
    return [(float(step), value) for step, loss in run.get("curve") or [] if (value := finite(loss)) is not None]


def check(runs: Sequence[Found], advised: Any) -> Chart:
    """Loss curves of the advised rank, and of those below and above."""
    order = sorted(runs, key=lambda one: (finite(one.get("r")) or 0.0, str(one.get("axis"))))
    several = len({one.get("axis") for one in order}) > 1
    drawn = [
        Line(
            name=f"r = {one.get('r')}{', ' + str(one.get('axis')) if several else ''}{' (advised)' if one.get('r') == advised else ''}",
            points=points_of(one),
            colour=OURS if one.get("r") == advised else ramp(number + 1, len(order) + 1),
            style="line" if one.get("r") == advised else "dashed",
        )
        for number, one in enumerate(order)
    ]
    words = "Held-out loss at the end: " + "; ".join(
        f"{line.name} {decimal(one.get('loss_after'))}" for line, one in zip(drawn, order, strict=True)
    )
    return lines(
        "check",
        {"held-out loss, nats": [line for line in drawn if line.points]},
        title="The advice, checked by short runs",
        words=f"{words}.",
        over="optimizer step",
        counted=True,
    )
