"""The charts of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from slicefine.reporting.charts import Dot, Line, chart, dots, draw_lines, grid, name_axes, percents, steps
from slicefine.reporting.history import History
from slicefine.reporting.page import Chart, Key
from slicefine.reporting.palette import INK, MUTED, series
from slicefine.reporting.text import HUNDREDTHS, brief, decimal, device, finite, metric, metric_name, plural, size
from slicefine.reporting.thinning import neighbours, smooth, spaced, thin

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_MOVES = 80
"""Moves that are drawn."""


def loss(of: History) -> Chart:
    """Loss over steps, with the learning rate below and the moves through both."""
    window = neighbours(of.loss)
    held_out = of.validation.get("loss", [])
    end = of.last_step
    rough, even = thin(of.loss), thin(smooth(of.loss, window))

    def draw(figure: Figure, narrow: bool) -> None:
        if of.learning_rate:
            above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3.4, 1))
        else:
            above, below = figure.subplots(), None
        for axis in (above, below):
            if axis is not None:
                _moves(axis, of)
        if window:
            above.plot(*zip(*rough, strict=True), color=series(1), linewidth=0.8, alpha=0.35)
        draw_lines(above, [Line(name="", points=even, colour=series(1))])
        if held_out:
            draw_lines(above, [Line(name="", points=held_out, colour=series(0), dots=len(held_out) <= 40)])
        name_axes(above, "" if below is not None else "optimizer step", "loss, nats" if not narrow else "loss")
        if below is not None:
            draw_lines(below, [Line(name="", points=of.learning_rate, colour=series(2))])
            name_axes(below, "optimizer step", "learning rate")
            below.set_ylim(bottom=0)
            below.locator_params(axis="y", nbins=3)
        last = below if below is not None else above
        last.set_xlim(0, end or 1)
        steps(last)

    title = "Loss and learning rate" if of.learning_rate else "Loss"
    legend = [Key(name="training", colour=series(1))] if of.loss else []
    if held_out:
        legend.append(Key(name="validation", colour=series(0)))
    if of.learning_rate:
        legend.append(Key(name="learning rate", colour=series(2)))
    if of.moves:
        legend.append(Key(name="the slices move", colour=MUTED, mark="thin"))
    height = (380, 330) if of.learning_rate else (280, 250)
    return chart("loss", draw, title=title, words=_of_loss(of, window), height=height, legend=legend)


def _of_loss(of: History, window: int) -> str:
    found = []
    if of.loss:
        found.append(
            f"Training loss from {decimal(of.loss[0][1])} to {decimal(of.loss[-1][1])} in {plural(of.last_step, 'step')}"
        )
    if held_out := of.validation.get("loss"):
        best = min(held_out, key=lambda point: point[1])
        found.append(
            f"validation loss from {decimal(held_out[0][1])} to {decimal(held_out[-1][1])}, lowest {decimal(best[1])} at step {best[0]:,.0f}"
        )
    text = "; ".join(found)
    text = f"{text[:1].upper()}{text[1:]}." + (f" {plural(len(of.moves), 'move')} of the slices." if of.moves else "")
    if window:
        text += f" Faint: as it was logged; strong: the mean of {window} neighbours."
    if of.not_finite:
        text += f" Losses that are no finite numbers are left out: {of.not_finite:,}."
    if len(of.moves) > MOST_MOVES:
        text += f" {MOST_MOVES} of the moves are drawn, evenly spaced."
    return text


def _moves(axis: Axes, of: History) -> None:
    for step in spaced(of.moves, MOST_MOVES):
        axis.axvline(step, color=MUTED, linewidth=0.8, alpha=0.5)


def scores(of: History) -> Chart | None:
    """The scores of the validation set over steps; None if there are none but the loss."""
    shown = [name for name in of.validation if name != "loss"][:4]
    if not shown:
        return None

    def draw(figure: Figure, narrow: bool) -> None:
        columns = 1 if narrow or len(shown) == 1 else 2
        for number, (axis, name) in enumerate(zip(grid(figure, len(shown), columns), shown, strict=True)):
            _moves(axis, of)
            points = of.validation[name]
            draw_lines(axis, [Line(name="", points=points, colour=series(number + 1), dots=len(points) <= 40)])
            if name in HUNDREDTHS:
                percents(axis, "y")
            axis.set_xlim(0, of.last_step * 1.01 or 1)
            steps(axis)
            name_axes(axis, "optimizer step", metric_name(name))

    words = "; ".join(
        f"{metric_name(name)} from {metric(name, of.validation[name][0][1])} to {metric(name, of.validation[name][-1][1])}"
        for name in shown
    )
    rows = (len(shown) + 1) // 2
    return chart(
        "scores",
        draw,
        title="Scores of the validation set",
        words=f"{words[:1].upper()}{words[1:]}.",
        height=(250 if len(shown) == 1 else 225 * rows, 215 * len(shown)),
    )


def updates(of: History) -> Chart:
    """How far the active slices are from their pretrained values, over steps."""

    def draw(figure: Figure, narrow: bool) -> None:
        axis = figure.subplots()
        _moves(axis, of)
        draw_lines(
            axis,
            [
                Line(name="", points=of.update_max, colour=series(0)),
                Line(name="", points=of.update_mean, colour=series(1)),
            ],
        )
        axis.set_xlim(0, of.last_step or 1)
        axis.set_ylim(bottom=0)
        steps(axis)
        name_axes(axis, "optimizer step", "norm of the change / norm of the original")

    highest = max((y for _, y in of.update_max or of.update_mean), default=0.0)
    words = (
        f"Of the slice that is active at each step: mean over the weights, and the greatest. Greatest of all: {brief(highest)}; mean at the end: "
        f"{brief(of.update_mean[-1][1])}. It falls back at a move, where a slice begins that has not been trained."
    )
    legend = [Key(name="mean of the weights", colour=series(1)), Key(name="greatest", colour=series(0))]
    return chart(
        "updates", draw, title="How far the active slices have moved", words=words, height=(250, 240), legend=legend
    )


def memory(parts: Mapping[str, Any], of: Mapping[str, Any]) -> Chart:
    """Bytes of a step by part."""
    unit, name = (2**30, "GiB") if sum(parts.values()) >= 2**30 else (2**20, "MiB")
    order = sorted(parts.items(), key=lambda item: -item[1])
    words = f"The largest part: {order[0][0]}, {size(order[0][1])} of {size(sum(parts.values()))} in all."
    if of.get("peak_bytes"):
        words += f" Most allocated at once: {size(of['peak_bytes'])}."
    rows = [
        Dot(name=part, value=value / unit, low=0.0, high=value / unit, colour=series(1), words=size(value))
        for part, value in order
    ]
    return _memory_bars(rows, f"{name} on {device(of.get('device'))}", words)


def _memory_bars(rows: list[Dot], label: str, words: str) -> Chart:
    def draw(figure: Figure, narrow: bool) -> None:
        axis = figure.subplots()
        axis.grid(axis="x")
        axis.grid(visible=False, axis="y")
        for place, row in enumerate(rows):
            axis.barh(place, row.value, height=0.36 if narrow else 0.56, color=row.colour)
            axis.annotate(
                row.words,
                (row.value, place),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=11,
                color=INK,
            )
            if narrow:
                axis.annotate(
                    row.name, (0, place), xycoords=("axes fraction", "data"), xytext=(0, 10), textcoords="offset points",
                    va="bottom", fontsize=11, color=MUTED,
                )  # fmt: skip
        axis.set_yticks(range(len(rows)), ["" if narrow else row.name for row in rows])
        axis.set_ylim(len(rows) - 0.5, -0.8 if narrow else -0.5)
        axis.set_xlim(0, max(row.value for row in rows) * (1.34 if narrow else 1.16))
        axis.set_xlabel(label, loc="right")

    height = (60 + 30 * len(rows), 60 + 46 * len(rows))
    return chart("memory", draw, title="Memory by part", words=words, height=height)


def frozen_limit(of: Mapping[str, Any]) -> Chart:
    """Time of a step over that of a step that trains nothing."""
    low, high = finite(of.get("least")), finite(of.get("greatest"))
    spread = f" ({brief(low)} to {brief(high)} within a round)" if low is not None and high is not None else ""
    words = (
        f"{brief(of['median'])} times the frozen limit{spread}: the same step with nothing trainable, gradients flowing through all layers. No "
        "method that propagates through all layers can be below 1."
    )
    row = Dot(
        name="this run", value=float(of["median"]), low=low, high=high, colour=series(0), words=brief(of["median"])
    )
    return dots(
        "frozen",
        [row],
        title="Time of a step against the frozen limit",
        words=words,
        label="time of a step / frozen limit",
        line=("frozen limit", 1.0),
    )
