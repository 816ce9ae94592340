"""The charts that several pages have: lines, dots with intervals, stacked bars. Each is drawn for a screen and for a phone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slicefine.reporting.page import Chart, Key
from slicefine.reporting.palette import INK, MUTED, series
from slicefine.reporting.svg import NARROW, WIDE, drawing
from slicefine.reporting.text import shorten
from slicefine.reporting.thinning import Point, thin

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Draw = Callable[["Figure", bool], None]
"""Puts a chart into a figure; the second argument: whether it is the narrow one."""
STYLES = {"line": "-", "dashed": "--", "dotted": ":", "dashdot": "-."}
ROW, NAMED_ROW = 24, 40
"""Heights of a row of dots or bars, in pixels: its name beside it, and above."""
KEY = re.compile(r"[a-z0-9-]+")
LONG = 26
"""Longest name of a row that stands beside it."""
NAME = 46
"""Longest name that is drawn at all."""


@dataclass(frozen=True, kw_only=True)
class Dot:
    """A value with its interval, in a row of its own."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    colour: str = series(1)
    group: str = ""
    """Rows of a group stand together, under its name."""
    words: str = ""
    """Written at the right."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A named line."""

    name: str
    points: Sequence[Point]
    colour: str = series(1)
    style: str = "line"
    """A key of `STYLES`."""
    dots: bool = False

    @property
    def key(self) -> Key:
        return Key(name=self.name, colour=self.colour, mark=self.style)


def chart(
    key: str,
    draw: Draw,
    *,
    title: str,
    words: str,
    height: int | tuple[int, int],
    legend: Sequence[Key] = (),
) -> Chart:
    """What `draw` draws, twice: wide and narrow. `height`: in pixels, of both."""
    assert KEY.fullmatch(key), f"a key is made of small letters, digits and dashes; got {key!r}"
    wide, narrow = (height, height) if isinstance(height, int) else height
    made = {
        form: drawing(
            f"{key}-{form}", _bound(draw, form == "narrow"), width=width, height=tall, title=title, words=words
        )
        for form, width, tall in (("wide", WIDE, wide), ("narrow", NARROW, narrow))
    }
    return Chart(key=key, title=title, words=words, legend=legend, **made)


def _bound(draw: Draw, narrow: bool) -> Callable[[Figure], None]:
    return lambda figure: draw(figure, narrow)


def grid(figure: Figure, panels: int, columns: int, **settings: Any) -> list[Axes]:
    """Axes of `panels` panels, so many side by side; those that are left over are not drawn."""
    rows = math.ceil(panels / columns)
    axes = list(figure.subplots(rows, columns, squeeze=False, **settings).flat)
    for axis in axes[panels:]:
        axis.set_axis_off()
    return axes[:panels]


def name_axes(axis: Axes, over: str, label: str) -> None:
    """Name what is drawn: below at the right, and above at the left, where it can be read without turning one's head."""
    from matplotlib.ticker import MaxNLocator

    axis.set_title(label, fontsize=11, color=MUTED)
    if isinstance(axis.yaxis.get_major_locator(), MaxNLocator):
        axis.locator_params(axis="y", nbins=5)
    if over:
        axis.set_xlabel(over, loc="right")


def logarithmic(axis: Axes, which: str) -> None:
    """A logarithmic axis, `x` or `y`, with plain numbers and no more of them than are read."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    (axis.set_xscale if which == "x" else axis.set_yscale)("log")
    ruler = axis.xaxis if which == "x" else axis.yaxis
    low, high = sorted(axis.get_xlim() if which == "x" else axis.get_ylim())
    wide = low > 0 and high / low > 30
    ruler.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=7))
    ruler.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10g}" if value >= 1e-4 else f"{value:.0e}"))
    ruler.set_minor_formatter(NullFormatter())


def percents(axis: Axes, which: str) -> None:
    """An axis, `x` or `y`, of shares 0 to 1, in hundredths."""
    from matplotlib.ticker import FuncFormatter

    ruler = axis.xaxis if which == "x" else axis.yaxis
    ruler.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.10g} %"))


def steps(axis: Axes) -> None:
    """The lower axis counts: whole numbers, with commas."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def draw_lines(axis: Axes, lines: Sequence[Line]) -> None:
    """Draw lines, thinned to what can be seen."""
    for line in lines:
        points = thin(line.points)
        alone = len(points) == 1
        axis.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=line.colour,
            linestyle=STYLES[line.style],
            marker="o" if line.dots or alone else None,
            markersize=4.5,
        )


def lines(
    key: str,
    panels: Mapping[str, Sequence[Line]],
    *,
    title: str,
    words: str,
    over: str,
    log_x: bool = False,
    shares: bool = False,
    counted: bool = False,
    level: tuple[str, float] | None = None,
) -> Chart:
    """One panel of lines under each name, which says what is drawn upwards.

    Args:
        over: What is drawn to the right.
        shares: Upwards are shares 0 to 1.
        counted: To the right are whole numbers.
        level: A line straight across, and its name.
    """

    def draw(figure: Figure, narrow: bool) -> None:
        columns = 1 if narrow or len(panels) == 1 else 2
        for axis, (label, drawn) in zip(grid(figure, len(panels), columns), panels.items(), strict=True):
            draw_lines(axis, drawn)
            if level:
                axis.axhline(level[1], color=INK, linewidth=1, linestyle=(0, (4, 3)))
            if log_x:
                logarithmic(axis, "x")
            if shares:
                percents(axis, "y")
            if counted and not log_x:
                steps(axis)
            name_axes(axis, over, label)

    keys = {line.key.name: line.key for drawn in panels.values() for line in drawn}
    legend = [*keys.values(), *([Key(name=level[0], colour=INK, mark="dashed")] if level else [])]
    rows = math.ceil(len(panels) / 2)
    return chart(
        key,
        draw,
        title=title,
        words=words,
        height=(280 if len(panels) == 1 else 230 * rows, 230 * len(panels)),
        legend=legend if len(legend) > 1 else (),
    )


def dots(
    key: str,
    rows: Sequence[Dot],
    *,
    title: str,
    words: str,
    label: str,
    line: tuple[str, float] | None = None,
    log: bool = False,
    shares: bool = False,
    legend: Sequence[Key] = (),
) -> Chart:
    """A dot with its interval in each row.

    Args:
        label: What is drawn to the right.
        line: A line straight down, and its name.
    """
    groups = len({row.group for row in rows if row.group})
    long = max((len(row.name) for row in rows), default=0) > LONG

    def draw(figure: Figure, narrow: bool) -> None:
        axis = figure.subplots()
        above = narrow or long
        axis.grid(axis="x")
        axis.grid(visible=False, axis="y")
        place, ticks, group = 0.0, [], ""
        for row in rows:
            if row.group != group:
                group = row.group
                place += 0.15
                axis.annotate(
                    shorten(group, NAME), (0, place), xycoords=("axes fraction", "data"), xytext=(0 if above else -4, 0),
                    textcoords="offset points", ha="left" if above else "right", va="center", fontsize=11.5, fontweight="bold",
                )  # fmt: skip
                place += 0.9
            _draw_dot(axis, row, place)
            if above:
                axis.annotate(
                    shorten(row.name, NAME), (0, place), xycoords=("axes fraction", "data"), xytext=(0, 8),
                    textcoords="offset points", va="bottom", fontsize=11, color=MUTED,
                )  # fmt: skip
            ticks.append((place, row.name))
            place += 1
        axis.set_ylim(place - 0.5, -0.85 if above else -0.7)
        axis.set_yticks([at for at, _ in ticks], ["" if above else shorten(name, NAME) for _, name in ticks])
        if line:
            axis.axvline(line[1], color=INK, linewidth=1, linestyle=(0, (4, 3)))
        if log:
            logarithmic(axis, "x")
        if shares:
            percents(axis, "x")
            axis.set_xlim(-0.02, 1.02)
        axis.margins(x=0.1)
        axis.set_xlabel(label, loc="right")

    def tall(each: int) -> int:
        return 56 + each * (len(rows) + groups)

    keys = [*legend, *([Key(name=line[0], colour=INK, mark="dashed")] if line else [])]
    height = (tall(NAMED_ROW if long else ROW), tall(NAMED_ROW))
    return chart(key, draw, title=title, words=words, height=height, legend=keys)


def _draw_dot(axis: Axes, row: Dot, place: float) -> None:
    if row.low is not None and row.high is not None:
        axis.plot([row.low, row.high], [place, place], color=row.colour, linewidth=2.2, alpha=0.55)
    axis.plot([row.value], [place], color=row.colour, marker="o", markersize=6.5)
    if row.words:
        axis.annotate(
            row.words, (max(row.value, row.high or row.value), place), xytext=(8, 0), textcoords="offset points",
            va="center", fontsize=10.5, color=MUTED,
        )  # fmt: skip


def stacked(
    key: str,
    bars: Mapping[str, Sequence[tuple[str, float]]],
    *,
    title: str,
    words: str,
    label: str,
    line: tuple[str, float] | None = None,
    totals: Callable[[float], str] | None = None,
) -> Chart:
    """A bar a name, of parts one after the other.

    Args:
        totals: What is written at the end of a bar, of the sum of its parts.
    """
    parts = list(dict.fromkeys(part for bar in bars.values() for part, _ in bar))
    colours = {part: series(number + 1) for number, part in enumerate(parts)}

    def draw(figure: Figure, narrow: bool) -> None:
        axis = figure.subplots()
        axis.grid(axis="x")
        axis.grid(visible=False, axis="y")
        for place, (name, bar) in enumerate(bars.items()):
            end = 0.0
            for part, value in bar:
                axis.barh(place, value, left=end, height=0.42 if narrow else 0.6, color=colours[part])
                end += value
            if totals:
                axis.annotate(
                    totals(end),
                    (end, place),
                    xytext=(6, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=11,
                    color=INK,
                )
            if narrow:
                axis.annotate(
                    shorten(name, NAME), (0, place), xycoords=("axes fraction", "data"), xytext=(0, 13),
                    textcoords="offset points", va="bottom", fontsize=11, color=MUTED,
                )  # fmt: skip
        axis.set_yticks(range(len(bars)), ["" if narrow else shorten(name, NAME) for name in bars])
        axis.set_ylim(len(bars) - 0.5, -0.9 if narrow else -0.5)
        if line:
            axis.axvline(line[1], color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        longest = max([sum(value for _, value in bar) for bar in bars.values()] + ([line[1]] if line else []))
        axis.set_xlim(0, longest * (1.3 if totals and narrow else 1.16 if totals else 1.04) or 1.0)
        axis.set_xlabel(label, loc="right")

    legend = [Key(name=part, colour=colours[part], mark="bar") for part in parts]
    if line:
        legend.append(Key(name=line[0], colour=INK, mark="dashed"))
    height = (60 + 38 * len(bars), 60 + 58 * len(bars))
    return chart(key, draw, title=title, words=words, height=height, legend=legend if len(legend) > 1 else ())
