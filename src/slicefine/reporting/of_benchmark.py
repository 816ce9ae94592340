"""The page of a benchmark: its own words and tables, every row of them, and charts of what has a reference."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from slicefine.reporting import provenance
from slicefine.reporting.charts import Dot, Line, dots, lines
from slicefine.reporting.page import FAIR, MANY, PLAIN, Block, Chart, Code, Key, Notice, Page, Prose, Section, table
from slicefine.reporting.palette import SERIES, series
from slicefine.reporting.records import Record
from slicefine.reporting.text import decimal, finite, joined, plural

OVER = " / frozen-limit"
AVERAGE = "Avg."
OURS = ("SliceFine", "RoCoFT")
REFERENCES = ("LoRA-r8", "full")
SPREAD = re.compile(r"(-?\d+(?:\.\d+)?)(?: ± (\d+(?:\.\d+)?))?")
LONG = 30
"""Rows from which on a table is folded."""
MOST = 40
"""Rows of a chart."""


def page(record: Record) -> Page:
    """The page of one benchmark."""
    content = record.content
    made = content["provenance"]
    return Page(
        kind="benchmark",
        title=record.name,
        subtitle=" · ".join(
            part for part in (str(content["theme"]), str(made.get("started") or made.get("date") or "")[:10]) if part
        ),
        notice=notice(content),
        verdict=verdict(content),
        sections=[_how(content), *_tables(content["tables"]), *_growth(content), _provenance(content)],
        made_from=record.made_from,
    )


def notice(content: Mapping[str, Any]) -> Notice | None:
    """What has to be said first of a benchmark that is not whole."""
    status = content.get("status", "finished")
    words = {
        "interrupted": (FAIR, "This benchmark was interrupted; what follows is what was measured until then."),
        "running": (
            PLAIN,
            "This benchmark is still going on, or was ended from outside; what follows is what was measured so far.",
        ),
    }
    return Notice(tone=words[status][0], text=words[status][1]) if status in words else None


# ---------------------------------------------------------------- the verdict


def verdict(content: Mapping[str, Any]) -> str:
    """What the benchmark came to, in a sentence: of its targets, its ratios or its scores, whichever it has."""
    tables = content["tables"]
    found = [part for part in (_targets(tables), _ratios(tables), _scores(tables)) if part]
    if found:
        return " ".join(found)
    return f"{plural(len(tables), 'table')} of {content['theme']}, in full below."


def _targets(tables: Sequence[Mapping[str, Any]]) -> str:
    verdicts = [
        str(row["verdict"]).strip("*")
        for one in tables
        for row in one["rows"]
        if "target" in row and row.get("verdict")
    ]
    if not verdicts:
        return ""
    missed = sum(found == "missed" for found in verdicts)
    met = sum(found == "met" for found in verdicts)
    rest = len(verdicts) - met - missed
    return f"Of {plural(len(verdicts), 'target')}, {met} {'is' if met == 1 else 'are'} met and {missed} missed{f'; {rest} not measured' if rest else ''}."


def _ratios(tables: Sequence[Mapping[str, Any]]) -> str:
    for one in tables:
        column = ratio_column(one["rows"])
        if column is None:
            continue
        found = {row.get("method"): row[column] for row in one["rows"] if finite(row.get(column)) is not None}
        ours = sorted((value, name) for name, value in found.items() if str(name).startswith(OURS))
        names = [*(name for _, name in ours[:1]), *(name for name in REFERENCES if name in found)]
        if names:
            said = joined([f"{name} is at {decimal(found[name])}" for name in names])
            return f"{str(one['title']).replace(': ', ', ')}: over the frozen limit, {said}."
    return ""


def _scores(tables: Sequence[Mapping[str, Any]]) -> str:
    for one in tables:
        found = {
            row["method"]: mean
            for row in one["rows"]
            if "method" in row and (mean := score(row.get(AVERAGE))[0]) is not None
        }
        if not found:
            continue
        order = sorted(found, key=lambda name: found[name], reverse=not lower_is_better(one["rows"]))
        ours = [name for name in order if str(name).startswith(OURS)]
        shown = {order[0], *ours[:1], *REFERENCES[:1]}
        return f"Mean scores, the best first: {joined([f'{name} {decimal(found[name])}' for name in order if name in shown])}."
    return ""


def score(text: Any) -> tuple[float | None, float | None]:
    """Mean and standard deviation of `85.3 ± 0.6`."""
    found = SPREAD.fullmatch(text.strip()) if isinstance(text, str) else None
    if found is None:
        return finite(text), None
    return float(found[1]), float(found[2]) if found[2] else None


def lower_is_better(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the scores of a table are losses."""
    return any(key.endswith((", loss", ", mse")) for row in rows[:1] for key in row)


def ratio_column(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The column that is over the frozen limit, if there is one with anything in it."""
    names = [key for row in rows[:1] for key in row if key == OVER.strip() or key.endswith(OVER)]
    return next((name for name in names if any(finite(row.get(name)) is not None for row in rows)), None)


# ---------------------------------------------------------------- tables and charts


def _how(content: Mapping[str, Any]) -> Section:
    return Section(title="What was measured", blocks=[Prose(text=str(content["intro"]))])


def _tables(tables: Sequence[Mapping[str, Any]]) -> list[Section]:
    found: list[Section] = []
    for number, one in enumerate(tables):
        rows = one["rows"]
        if not rows:
            continue
        blocks: list[Block] = []
        if chart := ratios(f"table-{number}", rows) or averages(f"table-{number}", rows):
            blocks.append(chart)
        title = f"All {len(rows)} rows" if len(rows) > LONG else ""
        blocks.append(table(title, rows, folded=len(rows) > LONG))
        found.append(Section(title=str(one["title"]), words=str(one.get("note") or ""), blocks=blocks))
    return found


def _colour(name: Any) -> str:
    return SERIES[0] if str(name).startswith(OURS) else SERIES[1] if str(name) in REFERENCES else SERIES[7]


LEGEND = [
    Key(name="SliceFine", colour=SERIES[0], mark="dot"),
    Key(name="LoRA-r8 and full tuning", colour=SERIES[1], mark="dot"),
    Key(name="others", colour=SERIES[7], mark="dot"),
]


def ratios(key: str, rows: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Ratios to the frozen limit; None where there is no such column."""
    column = ratio_column(rows)
    named = next((name for name in ("method", "model") if rows and name in rows[0]), None)
    if column is None or named is None:
        return None
    drawn = [
        Dot(
            name=str(row[named]),
            value=value,
            low=finite(row.get(f"{column}, min")),
            high=finite(row.get(f"{column}, max")),
            colour=_colour(row[named]),
            words=decimal(value),
        )
        for row in rows
        if (value := finite(row.get(column))) is not None
    ][:MOST]
    what = (
        "saved for backward" if column.startswith("saved") else "peak memory" if column.startswith("peak") else "time"
    )
    words = "; ".join(f"{row.name} {decimal(row.value)}" for row in sorted(drawn, key=lambda row: row.value)[:6])
    whiskers = (
        " Whiskers: the least and the greatest ratio within a round."
        if any(row.low is not None for row in drawn)
        else ""
    )
    return dots(
        key,
        drawn,
        title=f"{what[:1].upper()}{what[1:]} over the frozen limit",
        words=f"The lowest: {words}.{whiskers} The frozen limit trains nothing; gradients flow through all layers.",
        label=f"{what} / frozen limit",
        line=("frozen limit", 1.0),
        legend=LEGEND,
    )


def averages(key: str, rows: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Mean scores of methods; None where there is no such column."""
    if not rows or AVERAGE not in rows[0] or "method" not in rows[0]:
        return None
    drawn = []
    for row in rows:
        mean, deviation = score(row[AVERAGE])
        if mean is not None:
            low, high = (None, None) if deviation is None else (mean - deviation, mean + deviation)
            drawn.append(
                Dot(
                    name=str(row["method"]),
                    value=mean,
                    low=low,
                    high=high,
                    colour=_colour(row["method"]),
                    words=str(row[AVERAGE]),
                )
            )
    if not drawn:
        return None
    lower = lower_is_better(rows)
    drawn = sorted(drawn, key=lambda row: row.value, reverse=not lower)[:MOST]
    words = "; ".join(f"{row.name} {row.words}" for row in drawn[:6])
    whiskers = (
        " Whiskers: one standard deviation over the seeds, to either side."
        if any(row.low is not None for row in drawn)
        else ""
    )
    return dots(
        key,
        drawn,
        title="Mean score over the tasks",
        words=f"The best: {words}.{whiskers}",
        label="mean loss" if lower else "mean score, in hundredths",
        legend=LEGEND,
    )


def _growth(content: Mapping[str, Any]) -> list[Section]:
    """What a sweep grows with: the ratio to the frozen limit by method, of each model."""
    found = re.fullmatch(r"\w+-sweep-(\w+)", str(content["theme"]))
    if not found or found[1] == "r":
        return []
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for one in content["tables"]:
        title = re.fullmatch(rf"(.+), {found[1]} (\d+): .+", str(one["title"]))
        column = ratio_column(one["rows"])
        if title and column:
            methods = panels.setdefault(title[1], {})
            for row in one["rows"]:
                if (value := finite(row.get(column))) is not None and "method" in row:
                    methods.setdefault(str(row["method"]), []).append((float(title[2]), value))
    drawn = {
        model: [
            Line(name=name, points=sorted(points), colour=series(number), dots=True)
            for number, (name, points) in enumerate(methods.items())
        ]
        for model, methods in panels.items()
    }
    if not drawn:
        return []
    words = f"Ratio to the frozen limit at each {found[1]}, one line a method, one panel a model."
    chart = lines(
        "growth",
        drawn,
        title=f"Growth with {found[1]}",
        words=words,
        over=found[1],
        log_x=True,
        level=("frozen limit", 1.0),
    )
    return [Section(title="Growth", blocks=[chart])]


def _provenance(content: Mapping[str, Any]) -> Section:
    made = dict(content["provenance"])
    settings = made.pop("settings", None)
    rows = [
        (key.replace("_", " "), provenance.commit(value) if key == "commit" else value) for key, value in made.items()
    ]
    more: list[Block] = []
    if isinstance(settings, Mapping):
        text = "\n".join(
            f"{key}: {provenance.flat(value) if value is not None else 'null'}" for key, value in settings.items()
        )
        more.append(Code(title="All settings", text=text, folded=len(settings) > MANY))
    return provenance.section(rows, *more)
