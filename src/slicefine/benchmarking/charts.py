"""Charts of a benchmark, as SVG. Without matplotlib there are none: the tables say the same."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

MISSING = "No charts: pip install 'slicefine[report]'"

Bar = tuple[str, float, float | None, float | None]
"""Name, value, least and greatest."""
Lines = Mapping[str, Sequence[tuple[float, float]]]
"""Name -> points."""


def can_draw() -> bool:
    """Whether matplotlib is there."""
    return find_spec("matplotlib") is not None


def bars(groups: Mapping[str, Sequence[Bar]], label: str) -> str:
    """One panel a group, one bar a method, with a whisker from the least to the greatest value."""
    tallest = max(len(group) for group in groups.values())
    figure, axes = _figure(len(groups), width=4.5, height=1.2 + 0.28 * tallest)
    for axis, (title, group) in zip(axes, groups.items(), strict=True):
        names, values = [one[0] for one in group], [one[1] for one in group]
        axis.barh(names, values, color=["tab:orange" if name.startswith("SliceFine") else "0.6" for name in names])
        for place, (_, _, low, high) in enumerate(group):
            if low is not None and high is not None:
                axis.plot([low, high], [place, place], color="black", linewidth=1)
        axis.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
        axis.invert_yaxis()
        axis.set(title=title, xlabel=label)
    return _svg(figure)


def growth(groups: Mapping[str, Lines], over: str, label: str) -> str:
    """One panel a group, one line a method, both axes logarithmic."""
    figure, axes = _figure(len(groups), width=5.5, height=4.5)
    for axis, (title, lines) in zip(axes, groups.items(), strict=True):
        for name, points in lines.items():
            ours = name.startswith("SliceFine")
            axis.plot(
                *zip(*sorted(points), strict=True), label=name, marker="o", markersize=3, linewidth=2 if ours else 1
            )
        ticks = sorted({x for points in lines.values() for x, _ in points})
        axis.set(title=title, xlabel=over, ylabel=label, xscale="log", yscale="log")
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axis.minorticks_off()
        axis.legend(fontsize="x-small")
    return _svg(figure)


def scatter(points: Mapping[str, tuple[float, float]], over: str, label: str) -> str:
    """One named point a method, the lower axis logarithmic."""
    figure, (axis,) = _figure(1, width=8, height=5)
    for name, (x, y) in points.items():
        ours = name.startswith("SliceFine")
        axis.plot([x], [y], marker="o" if ours else "s", color="tab:orange" if ours else "0.5")
        axis.annotate(name, (x, y), xytext=(5, 4), textcoords="offset points", fontsize="x-small")
    axis.set(xlabel=over, ylabel=label, xscale="log")
    axis.margins(x=0.15)
    return _svg(figure)


def curves(groups: Mapping[str, Lines], over: str, label: str) -> str:
    """One panel a group, one line a method."""
    figure, axes = _figure(len(groups), width=4.5, height=4.5)
    names = list(dict.fromkeys(name for lines in groups.values() for name in lines))
    for axis, (title, lines) in zip(axes, groups.items(), strict=True):
        for name, points in lines.items():
            ours = name.startswith("SliceFine")
            axis.plot(
                *zip(*points, strict=True),
                label=name,
                color=f"C{names.index(name) % 10}",
                linestyle="-" if ours else "--",
                linewidth=2 if ours else 1,
            )
        axis.set(title=title, xlabel=over, ylabel=label)
    axes[-1].legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _svg(figure)


def _figure(panels: int, *, width: float, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * panels, height), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _svg(figure: Any) -> str:
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()
