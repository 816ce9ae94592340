"""Analyses side by side: a model and its untrained twin, or several models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slicefine.reporting import of_analysis, provenance
from slicefine.reporting.charts import Dot, Line, dots, lines
from slicefine.reporting.energy_charts import curve
from slicefine.reporting.page import Block, Cell, Chart, Key, Page, Section, Table
from slicefine.reporting.palette import series
from slicefine.reporting.records import Record
from slicefine.reporting.text import DASH, base_name, brief, count, finite, joined, percent, plural

Named = Mapping[str, Record]
STYLES = ("line", "dashed", "dashdot", "dotted")
FIGURES: tuple[tuple[str, tuple[str, ...], Any], ...] = (
    ("dispersion \u03c1, rows, median", ("balance", "summary", "row", "rho_median"), brief),
    ("the same, entries shuffled", ("balance", "summary", "row", "rho_shuffled_median"), brief),
    ("the same, rows permuted", ("balance", "summary", "row", "rho_permuted_median"), brief),
    ("dispersion \u03c1, columns, median", ("balance", "summary", "column", "rho_median"), brief),
    ("dispersion \u03c1, heads, median", ("balance", "summary", "head", "rho_median"), brief),
    ("k(0.9) of the hidden states, median", ("energy", "summary", "k90_median"), count),
    ("the same, share of the dimension", ("energy", "summary", "share"), percent),
    ("effective rank of the NTK", ("energy", "summary", "ntk_effective_rank"), brief),
    ("best share of the drop of full tuning", ("global", "summary", "best_share"), percent),
    ("the same, r = 1 in all layers", ("global", "summary", "r1_all_layers_share"), percent),
    ("advised rank", ("advice", "r"), count),
    ("advised axis", ("advice", "axis"), lambda value: str(value or DASH)),
)
"""Name, where it is in the stages, and how it is shown."""


def page(named: Named) -> Page:
    """The page of several analyses."""
    return Page(
        kind="analyses",
        title=f"{plural(len(named), 'analysis').replace('analysiss', 'analyses')} side by side",
        subtitle=joined(list(dict.fromkeys(of_analysis.name_of(record.content) for record in named.values()))),
        verdict=_verdict(named),
        sections=[_verdicts(named), _figures(named), _charts(named), _provenance(named)],
        made_from=provenance.files(list(named.values())),
    )


def _verdict(named: Named) -> str:
    said = [
        f"{name}: {of_analysis.tally(record.content) or 'nothing was judged yet'}" for name, record in named.items()
    ]
    return f"Of the properties of the winning-slice hypothesis, {'; '.join(said)}."


def _verdicts(named: Named) -> Section:
    found = {
        name: {str(one.get("property")): one for one in record.content["verdicts"]} for name, record in named.items()
    }
    properties = list(dict.fromkeys(key for of in found.values() for key in of))
    rows = []
    for key in properties:
        row = [Cell(text=key)]
        for of in found.values():
            verdict = str(of[key].get("verdict")) if key in of else "not measured"
            row += [
                Cell(text=verdict, tone=of_analysis.TONES.get(verdict, "plain")),
                Cell(text=brief(of.get(key, {}).get("figure"))),
            ]
        rows.append(row)
    columns = ["property", *(title for name in named for title in (name, f"{name}: figure"))]
    return Section(title="Verdicts", words=of_analysis.ABOUT, blocks=[Table(title="", columns=columns, rows=rows)])


def _figures(named: Named) -> Section:
    rows = []
    for title, path, shown in FIGURES:
        values = [_at(record.content["stages"], path) for record in named.values()]
        if any(value is not None for value in values):
            rows.append([Cell(text=title), *(Cell(text=DASH if value is None else shown(value)) for value in values)])
    return Section(title="Figures", blocks=[Table(title="", columns=["", *named], rows=rows)])


def _at(found: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _charts(named: Named) -> Section:
    blocks: list[Block] = [one for one in (_dispersion(named), _variance(named), _winners(named)) if one]
    return Section(title="Charts", words="All analyses on the same axes.", blocks=blocks)


def _dispersion(named: Named) -> Chart | None:
    rows = []
    for axis in ("row", "column", "head"):
        for number, (name, record) in enumerate(named.items()):
            of = _at(record.content["stages"], ("balance", "summary", axis))
            value = finite((of or {}).get("rho_median"))
            if of and value and value > 0:
                high = finite(of.get("rho_greatest"))
                rows.append(
                    Dot(
                        name=name,
                        value=value,
                        low=value if high else None,
                        high=high,
                        colour=series(number),
                        group=f"groups of {axis}s",
                        words=brief(value),
                    )
                )
    if not rows:
        return None
    words = "Dots: the median weight. Lines reach to the greatest. " + "; ".join(
        f"{row.name}, {row.group}: {row.words}" for row in rows[:6]
    )
    return dots(
        "dispersion", rows, title="Dispersion \u03c1 between groups", words=f"{words}.", label="\u03c1", log=True
    )


def _variance(named: Named) -> Chart | None:
    drawn = []
    for number, (name, record) in enumerate(named.items()):
        layers = _at(record.content["stages"], ("energy", "layers")) or []
        if layers:
            drawn.append(
                Line(
                    name=name,
                    points=curve(layers[len(layers) // 2], "with"),
                    colour=series(number),
                    style=STYLES[number % 4],
                )
            )
    drawn = [line for line in drawn if line.points]
    if not drawn:
        return None
    words = "Share of the variance of the hidden states in their first directions, in the middle layer of each model."
    return lines(
        "variance",
        {"explained variance": drawn},
        title="Explained variance, middle layer",
        words=words,
        over="directions",
        log_x=True,
        shares=True,
    )


def _winners(named: Named) -> Chart | None:
    rows = []
    for number, (name, record) in enumerate(named.items()):
        for one in _at(record.content["stages"], ("winners", "rows")) or []:
            share, ends = finite(one.get("share")), one.get("interval") or [None, None]
            if one.get("choice") == "random" and share is not None:
                group = f"r = {one.get('r')}, {one.get('axis')}"
                title = f"{name}, {one.get('model')}"
                rows.append(
                    Dot(
                        name=title,
                        value=share,
                        low=finite(ends[0]),
                        high=finite(ends[1]),
                        colour=series(number),
                        group=group,
                        words=percent(share),
                    )
                )
    if not rows:
        return None
    rows.sort(key=lambda row: row.group)
    words = "Shares of random slices that win alone, with Wilson's 95 % intervals."
    return dots(
        "winners",
        rows[:48],
        title="Local winners",
        words=words,
        label="share of slices that win",
        shares=True,
        legend=_legend(named),
    )


def _legend(named: Named) -> list[Key]:
    return [Key(name=name, colour=series(number), mark="dot") for number, name in enumerate(named)]


def _provenance(named: Named) -> Section:
    keys = ["model", "fingerprint", "command", "seed", "started", "commit", "hardware", "versions"]
    made = [
        {
            "model": base_name(str(record.content["model"].get("name"))),
            "fingerprint": record.content["model"].get("fingerprint"),
            "command": record.content.get("command"),
            "seed": (record.content.get("settings") or {}).get("seed"),
            **dict(provenance.made_with(record.content)),
        }
        for record in named.values()
    ]
    return provenance.columns(keys, dict(zip(named, made, strict=True)))
