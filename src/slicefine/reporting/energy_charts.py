"""Charts of task energy: explained variance of the hidden states, and the lazy neural tangent kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from slicefine.reporting.charts import Line, chart, draw_lines, grid, lines, logarithmic, name_axes, percents
from slicefine.reporting.page import Chart, Key
from slicefine.reporting.palette import INK, MUTED, RAMP, ramp, series
from slicefine.reporting.text import brief, count, finite, median, plural
from slicefine.reporting.thinning import Point, spaced

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Found = Mapping[str, Any]
TAUS = ("0.8", "0.9", "0.95")
LEAST = 1e-8
"""Part of a kernel that is drawn: below it are rounding errors."""
MOST_LINES = 7
"""Lines of one panel."""


def variance(layers: Sequence[Found], untrained: Sequence[Found]) -> Chart:
    """Cumulative explained variance, with the outlier directions and without, and of an untrained twin."""
    forms = {"with": "all directions", "without": "without outlier directions"}
    forms = {form: title for form, title in forms.items() if any(curve(one, form) for one in layers)}
    kept = spaced(range(len(layers)), MOST_LINES)

    def draw(figure: Figure, narrow: bool) -> None:
        panels = grid(figure, len(forms), 1 if narrow else len(forms), sharey=True)
        for panel, (form, title) in zip(panels, forms.items(), strict=True):
            if untrained:
                middle = untrained[len(untrained) // 2]
                draw_lines(
                    panel,
                    [Line(name="", points=curve(middle, form) or curve(middle, "with"), colour=INK, style="dashed")],
                )
            for position, index in enumerate(kept):
                draw_lines(panel, [Line(name="", points=curve(layers[index], form), colour=ramp(position, len(kept)))])
            panel.axhline(0.9, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
            logarithmic(panel, "x")
            percents(panel, "y")
            panel.set_ylim(0, 1.03)
            name_axes(panel, "directions", f"explained variance, {title}")

    legend = [
        Key(name=str(layers[kept[0]].get("name")), colour=RAMP[0]),
        *([Key(name=str(layers[kept[-1]].get("name")), colour=RAMP[-1])] if len(kept) > 1 else []),
        *([Key(name="untrained twin, middle layer", colour=INK, mark="dashed")] if untrained else []),
        Key(name="90 %", colour=MUTED, mark="dotted"),
    ]
    least, most = (pick(layers, key=lambda one: k_of(one, "0.9") or 0) for pick in (min, max))
    words = (
        f"90 % of the variance of the hidden states, outliers left out, are in {count(k_of(least, '0.9'))} ({least.get('name')}) to {count(k_of(most, '0.9'))} ({most.get('name')}) "
        f"of {count(layers[0].get('dimension'))} directions"
    )
    if untrained:
        words += f"; of an untrained twin in {count(k_of(untrained[len(untrained) // 2], '0.9'))}"
    return chart(
        "variance",
        draw,
        title="Explained variance of the hidden states",
        words=f"{words}.",
        height=(290, 235 * len(forms)),
        legend=legend,
    )


def curve(layer: Found, form: str) -> list[tuple[float, float]]:
    found = ((layer.get("variance") or {}).get(form) or {}).get("cumulative") or []
    return [(float(at), float(share)) for at, share in found if at > 0]


def k_of(layer: Found, tau: str) -> int | None:
    """How many directions hold the share `tau` of the variance, the few outlier features left out."""
    return (((layer.get("variance") or {}).get("without") or {}).get("k") or {}).get(tau)


def ranks_of_layers(layers: Sequence[Found], untrained: Sequence[Found]) -> Chart:
    """How many directions hold a share of the variance, layer by layer."""
    drawn = [
        Line(
            name=f"{float(tau):.0%} of the variance".replace("%", " %"),
            points=[(float(number), float(k)) for number, one in enumerate(layers) if (k := k_of(one, tau))],
            colour=RAMP[1 + 2 * position],
            dots=len(layers) <= 40,
        )
        for position, tau in enumerate(TAUS)
    ]
    if untrained:
        points = [(float(number), float(k)) for number, one in enumerate(untrained) if (k := k_of(one, "0.9"))]
        drawn.append(Line(name="untrained twin, 90 %", points=points, colour=INK, style="dashed"))
    values = [k for one in layers if (k := k_of(one, "0.9"))]
    words = (
        f"k(0.9), outliers left out, is {count(median(values))} in the median layer, {count(min(values, default=None))} to {count(max(values, default=None))} over all."
        if values
        else ""
    )
    return lines(
        "ranks",
        {"directions": [line for line in drawn if line.points]},
        title="Directions needed, layer by layer",
        words=words,
        over="layer",
        counted=True,
    )


def kernel(ntk: Found) -> Chart:
    """Eigenvalues of the lazy neural tangent kernel: of the slices, of all weights, and of an untrained twin."""
    spectra = {
        "slices": (_eigenvalues(ntk), series(0), "line"),
        "all weights": (_eigenvalues(ntk.get("full") or {}), series(1), "dashed"),
        "slices of an untrained twin": (_eigenvalues(ntk.get("untrained") or {}), INK, "dotted"),
    }
    spectra = {name: found for name, found in spectra.items() if found[0]}
    sizes = [
        Line(name=name, points=[(x, y) for x, y in points if y > LEAST], colour=colour, style=style)
        for name, (points, colour, style) in spectra.items()
    ]
    sums = [
        Line(name=name, points=_cumulative(points), colour=colour, style=style)
        for name, (points, colour, style) in spectra.items()
    ]

    def draw(figure: Figure, narrow: bool) -> None:
        left, right = grid(figure, 2, 1 if narrow else 2)
        draw_lines(left, sizes)
        logarithmic(left, "y")
        name_axes(left, "eigenvalue, by size", "share of their sum")
        draw_lines(right, sums)
        right.axhline(0.9, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
        right.set_ylim(0, 1.03)
        percents(right, "y")
        name_axes(right, "eigenvalues", "cumulative share")

    words = (
        f"Gradients of {plural(ntk.get('examples'), 'example')} by slices of r = {ntk.get('r')}, axis {ntk.get('axis')}: effective rank "
        f"{brief(ntk.get('effective_rank'))}, 90 % of the kernel in {count((ntk.get('k') or {}).get('0.9'))} directions."
    )
    for name, key in (
        ("the kernel of all weights", "alignment_with_full"),
        ("that of the labels", "alignment_with_labels"),
    ):
        if finite(ntk.get(key)) is not None:
            words += f" Alignment with {name}: {brief(ntk[key])}."
    legend = [line.key for line in sizes] if len(sizes) > 1 else []
    return chart(
        "kernel",
        draw,
        title="Spectrum of the lazy neural tangent kernel",
        words=words,
        height=(270, 440),
        legend=[*legend, Key(name="90 %", colour=MUTED, mark="dotted")],
    )


def _eigenvalues(of: Found) -> list[Point]:
    """Number and share of the sum of each eigenvalue, the largest first."""
    values = [value for one in of.get("eigenvalues") or [] if (value := finite(one)) is not None]
    total = sum(values)
    return [(float(number), value / total) for number, value in enumerate(values, 1)] if total > 0 else []


def _cumulative(points: Sequence[Point]) -> list[Point]:
    return list(zip([x for x, _ in points], accumulate(y for _, y in points), strict=True))
