"""Charts of spectral balance: dispersion with its nulls, and the spectra themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slicefine.reporting.charts import chart, grid, logarithmic, name_axes, percents
from slicefine.reporting.model_map import short_kinds
from slicefine.reporting.page import Chart, Key
from slicefine.reporting.palette import INK, RAMP, SERIES, ramp
from slicefine.reporting.text import brief, finite, median, shorten
from slicefine.reporting.thinning import spaced

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Found = Mapping[str, Any]
AXES = {"row": "rows", "column": "columns", "head": "heads"}
MOST_NAMED = 48
"""Weights from which on a chart does not name each."""
MOST_LINES = 7
"""Lines of one panel."""
MOST_PANELS = 8
MOST_DOTS = 150
"""Weights of one panel that are drawn."""
OURS, NULL, OTHER = SERIES[0], SERIES[7], SERIES[1]


def dispersion(weights: Sequence[Found], claimed: float | None) -> Chart:
    """Dispersion between the groups of each weight, with both nulls: a panel an axis, weights sorted by the first."""
    by_axis = {axis: {str(one["name"]): one for one in weights if one.get("axis") == axis} for axis in AXES}
    by_axis = {axis: found for axis, found in by_axis.items() if found}
    kinds = _kinds(weights)
    first = next(iter(by_axis.values()))
    names = _sorted(first)
    names += sorted({name for found in by_axis.values() for name in found} - set(names))
    called = {name: _called(name, kinds) for name in names}

    def draw(figure: Figure, narrow: bool) -> None:
        named = not narrow and len(names) <= MOST_NAMED
        if named:
            panels = list(figure.subplots(1, len(by_axis), sharey=True, squeeze=False)[0])
        else:
            panels = grid(figure, len(by_axis), 1 if narrow else len(by_axis))
        for axis, (of, found) in zip(panels, by_axis.items(), strict=True):
            order = names if named else spaced(_sorted(found), MOST_DOTS)
            for null, colour, mark in ((None, OURS, "o"), ("null_permuted", OTHER, "d"), ("null_shuffled", NULL, "s")):
                points = [
                    (place, value) for place, name in enumerate(order) if (value := _of(found.get(name, {}), null))
                ]
                across, up = [value for _, value in points], [place for place, _ in points]
                if not named:
                    across, up = up, across
                filled = null is None
                axis.plot(
                    across, up, linestyle="none", marker=mark, markersize=5 if filled else 4.2, color=colour,
                    markerfacecolor=colour if filled else "none", markeredgewidth=1.2, zorder=3 if filled else 2,
                )  # fmt: skip
            _frame_dispersion(axis, AXES[of], claimed, [called[name] for name in order] if named else None)
        if named:
            panels[0].set_ylim(len(names) - 0.4, -0.6)

    groups = "; ".join(f"{AXES[axis]} {_medians(found)}" for axis, found in by_axis.items())
    words = f"Median \u03c1 of groups of {groups}." + (f" The poster has about {brief(claimed)}." if claimed else "")
    legend = [
        Key(name="this model", colour=OURS, mark="dot"),
        Key(name="null: permuted", colour=OTHER, mark="open"),
        Key(name="null: entries shuffled", colour=NULL, mark="open"),
        *([Key(name=f"poster, {brief(claimed)}", colour=INK, mark="dashed")] if claimed else []),
    ]
    wide = 64 + 15 * len(names) if len(names) <= MOST_NAMED else 300
    return chart(
        "dispersion",
        draw,
        title="Dispersion \u03c1 of each weight",
        words=words,
        height=(wide, 40 + 190 * len(by_axis)),
        legend=legend,
    )


def _sorted(found: Mapping[str, Found]) -> list[str]:
    return sorted(found, key=lambda name: (_of(found[name], None) or 0.0, name))


def _frame_dispersion(axis: Axes, what: str, claimed: float | None, called: list[str] | None) -> None:
    if called is not None:
        axis.grid(axis="x")
        axis.grid(visible=False, axis="y")
        axis.set_yticks(range(len(called)), called, fontsize=10)
        if claimed:
            axis.axvline(claimed, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        logarithmic(axis, "x")
        name_axes(axis, "\u03c1", f"groups of {what}")
        return
    if claimed:
        axis.axhline(claimed, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    logarithmic(axis, "y")
    axis.set_xticks([])
    name_axes(axis, "weights, sorted", f"\u03c1, groups of {what}")


def _of(one: Found, null: str | None) -> float | None:
    """A dispersion that a logarithmic axis can show."""
    value = finite((one if null is None else one.get(null) or {}).get("rho"))
    return value if value and value > 0 else None


def _medians(found: Mapping[str, Found]) -> str:
    values = [
        [value for one in found.values() if (value := _of(one, null))]
        for null in (None, "null_permuted", "null_shuffled")
    ]
    own, permuted, shuffled = (brief(median(each)) for each in values)
    return f"{own} (permuted {permuted}, shuffled {shuffled})"


def _called(name: str, kinds: Mapping[str, str]) -> str:
    block, kind = place_of(name)
    return shorten(kinds[kind] if block is None else f"{block} {kinds[kind]}", 26)


def spectra(weights: Sequence[Found]) -> list[Chart]:
    """Cumulative spectra of the groups: a chart an axis, a panel a kind of weight, a line a block."""
    found = []
    for axis, what in AXES.items():
        chosen = [one for one in weights if one.get("axis") == axis and (one.get("profiles") or {}).get("x")]
        if chosen:
            found.append(_spectra(axis, what, chosen, _kinds(weights)))
    return found


def _spectra(axis: str, what: str, weights: Sequence[Found], kinds: Mapping[str, str]) -> Chart:
    by_kind: dict[str, list[tuple[int, Found]]] = {}
    for one in weights:
        block, kind = place_of(str(one["name"]))
        by_kind.setdefault(kinds[kind], []).append((block or 0, one))
    shown = dict(list(by_kind.items())[:MOST_PANELS])

    def draw(figure: Figure, narrow: bool) -> None:
        columns = 1 if len(shown) == 1 else 2 if narrow else min(4, len(shown))
        panels = grid(figure, len(shown), columns, sharex=True, sharey=True)
        for number, (panel, (kind, every)) in enumerate(zip(panels, shown.items(), strict=True)):
            kept = spaced(range(len(every)), MOST_LINES)
            for position, index in enumerate(kept):
                _spectrum(panel, every[index][1], ramp(position, len(kept)))
            middle = every[len(every) // 2][1]["profiles"]
            if middle.get("shuffled"):
                panel.plot(middle["x"], middle["shuffled"], color=INK, linewidth=1, linestyle=(0, (3, 2)))
            panel.set_title(shorten(kind, 20 if narrow else 24), fontsize=11)
            panel.set_xlim(0, 1)
            panel.set_ylim(0, 1.03)
            panel.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
            percents(panel, "y")
            panel.locator_params(axis="y", nbins=4)
            if number >= len(shown) - columns:
                panel.set_xlabel("share of the directions", fontsize=10)
                panel.tick_params(labelbottom=True)
                first, *_, last = panel.get_xticklabels()
                first.set(horizontalalignment="left")
                last.set(horizontalalignment="right")

    widest = max((_width(one) for one in weights), default=0.0)
    words = (
        f"Share of the energy of a group of {what} in its first directions, the strongest first. Each line is a block, the mean over its groups; the band "
        f"reaches from the lowest group to the highest, {brief(100 * widest)} points wide at most: where spectra are the same, it is no wider than the line."
    )
    if len(by_kind) > len(shown):
        words += f" {len(shown)} of {len(by_kind)} kinds of weights are drawn."
    rows, narrow_rows = (
        math.ceil(len(shown) / min(4, len(shown))),
        math.ceil(len(shown) / (1 if len(shown) == 1 else 2)),
    )
    legend = [
        Key(name="first block", colour=RAMP[0]),
        Key(name="last block", colour=RAMP[-1]),
        Key(name="entries shuffled", colour=INK, mark="dashed"),
    ]
    return chart(
        f"spectra-{axis}",
        draw,
        title=f"Spectra of groups of {what}",
        words=words,
        height=(40 + 175 * rows, 40 + 150 * narrow_rows),
        legend=legend,
    )


def _spectrum(panel: Axes, one: Found, colour: str) -> None:
    profiles = one["profiles"]
    across = profiles["x"]
    if profiles.get("low") and profiles.get("high"):
        panel.fill_between(across, profiles["low"], profiles["high"], color=colour, alpha=0.3, linewidth=0)
    panel.plot(across, profiles["mean"], color=colour, linewidth=1.4)


def _width(one: Found) -> float:
    profiles = one["profiles"]
    pairs = zip(profiles.get("low") or [], profiles.get("high") or [], strict=False)
    return max((high - low for low, high in pairs), default=0.0)


def place_of(name: str) -> tuple[int | None, str]:
    """Index of the block of a weight, and its name within a block."""
    parts = name.split(".")
    at = next((number for number, part in enumerate(parts) if part.isdigit()), None)
    return (None, name) if at is None else (int(parts[at]), ".".join(parts[at + 1 :]))


def _kinds(weights: Sequence[Found]) -> dict[str, str]:
    return short_kinds(list(dict.fromkeys(place_of(str(one["name"]))[1] for one in weights)))
