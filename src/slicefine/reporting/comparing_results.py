"""Evaluations, benchmarks and plans side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from slicefine.reporting import of_benchmark, of_evaluation, of_plan, provenance
from slicefine.reporting.charts import Dot, dots
from slicefine.reporting.page import (
    BAD,
    FAIR,
    GOOD,
    Block,
    Cell,
    Chart,
    Key,
    Notice,
    Page,
    Prose,
    Section,
    Table,
    table,
)
from slicefine.reporting.palette import series
from slicefine.reporting.records import Record
from slicefine.reporting.text import (
    base_name,
    count,
    decimal,
    finite,
    interval,
    joined,
    metric,
    metric_name,
    percent,
    plural,
    size,
)

Named = Mapping[str, Record]
MOST = 48
"""Rows of a chart."""


# ---------------------------------------------------------------- evaluations


def evaluations(named: Named) -> Page:
    """The page of several evaluations."""
    contents = {name: record.content for name, record in named.items()}
    unfinished = [f"{name} ({one['status']})" for name, one in contents.items() if one["status"] != "finished"]
    return Page(
        kind="evaluations",
        title=f"{plural(len(named), 'evaluation')} side by side",
        subtitle=joined(list(dict.fromkeys(base_name(one["model"]) for one in contents.values()))),
        notice=Notice(tone=FAIR, text=f"Not finished: {', '.join(unfinished)}.") if unfinished else None,
        verdict=_best(contents),
        sections=[_scores(contents), _made_with(named)],
        made_from=provenance.files(list(named.values())),
    )


def _best(contents: Mapping[str, Mapping[str, Any]]) -> str:
    tasks = [_tests(one) for one in contents.values()]
    averages = {name: value for name, one in contents.items() if (value := finite(one.get("average"))) is not None}
    shared = set.intersection(*map(set, tasks))
    if any(of != tasks[0] for of in tasks) or len(averages) < len(contents):
        return f"They share {plural(len(shared), 'set')}; averages are over different sets, or not whole, and do not compare: read the sets one by one."
    order = sorted(averages, key=lambda name: -averages[name])
    said = [f"{name} {100 * averages[name]:.1f}" for name in order]
    return f"Over {plural(len(shared), 'set')}, the best first: {joined(said)}."


def _tests(content: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Which examples each set is, as far as the file says it."""
    sets = content.get("sets") or {}
    return {name: ((sets.get(name) or {}).get("fingerprint"), of.get("asked")) for name, of in content["tasks"].items()}


def _scores(contents: Mapping[str, Mapping[str, Any]]) -> Section:
    pairs = list(
        dict.fromkeys(
            (task, name)
            for one in contents.values()
            for task, scores in one["tasks"].items()
            for name in of_evaluation.scores_of(scores)
        )
    )
    titles = {task: of_evaluation.title_of(one, task) for one in contents.values() for task in one["tasks"]}
    rows = []
    for task, name in pairs:
        values = [finite(of_evaluation.scores_of(one["tasks"].get(task, {})).get(name)) for one in contents.values()]
        known = [value for value in values if value is not None]
        best = (min if name == "mse" else max)(known, default=None)
        cells = [Cell(text=metric(name, value), strong=value is not None and value == best) for value in values]
        rows.append([Cell(text=f"{titles[task]}, {metric_name(name)}"), *cells])
        if name == "accuracy":
            spread = [interval(one["tasks"].get(task, {}).get("interval")) for one in contents.values()]
            rows.append([Cell(text=f"{titles[task]}, 95 % interval"), *(Cell(text=text) for text in spread)])
            asked = [count(of_evaluation.examples_of(one["tasks"].get(task, {})) or None) for one in contents.values()]
            rows.append([Cell(text=f"{titles[task]}, examples"), *(Cell(text=text) for text in asked)])
    averages = [finite(one.get("average")) for one in contents.values()]
    if any(value is not None for value in averages):
        rows.append(
            [
                Cell(text="average"),
                *(Cell(text=f"{100 * value:.1f}" if value is not None else "", strong=True) for value in averages),
            ]
        )
    blocks: list[Block] = [Table(title="", columns=["score", *contents], rows=rows)]
    if chart := _intervals(contents, titles):
        blocks.insert(0, chart)
    return Section(title="Scores", words=of_evaluation.WILSON, blocks=blocks)


def _intervals(contents: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str]) -> Chart | None:
    rows = []
    for task, title in titles.items():
        for number, (name, one) in enumerate(contents.items()):
            scores = one["tasks"].get(task, {})
            value, ends = finite(scores.get("accuracy")), scores.get("interval") or [None, None]
            if value is not None:
                rows.append(
                    Dot(
                        name=name,
                        value=value,
                        low=finite(ends[0]),
                        high=finite(ends[1]),
                        colour=series(number),
                        group=title,
                        words=percent(value),
                    )
                )
    if not rows:
        return None
    words = (
        "Accuracy of each run on each set. Where intervals do not overlap, chance alone hardly explains the difference."
    )
    legend = [Key(name=name, colour=series(number), mark="dot") for number, name in enumerate(contents)]
    return dots(
        "accuracy",
        rows[:MOST],
        title="Accuracy with its interval",
        words=words,
        label="accuracy",
        shares=True,
        legend=legend,
    )


def _made_with(named: Named) -> Section:
    made = {
        name: {
            "model": record.content["model"],
            "fingerprint": record.content.get("weights"),
            "suite": record.content.get("suite"),
            "test sets": record.content.get("data") or "the hub",
            "engine": record.content.get("engine"),
            **dict(provenance.made_with((record.content.get("sessions") or [{}])[-1])),
        }
        for name, record in named.items()
    }
    return provenance.columns(
        ["model", "fingerprint", "suite", "test sets", "engine", "ended", "commit", "hardware", "versions"], made
    )


# ---------------------------------------------------------------- benchmarks


def benchmarks(named: Named) -> Page:
    """The page of several benchmarks of one theme."""
    contents = {name: record.content for name, record in named.items()}
    theme = str(next(iter(contents.values()))["theme"])
    unfinished = [name for name, one in contents.items() if one.get("status", "finished") != "finished"]
    sections = [_of_title(number, title, contents) for number, title in enumerate(_titles(contents))]
    made = {
        name: {
            **{
                key.replace("_", " "): value
                for key, value in one["provenance"].items()
                if key not in ("settings", "commit")
            },
            "commit": provenance.commit(one["provenance"].get("commit")),
        }
        for name, one in contents.items()
    }
    keys = list(dict.fromkeys(key for of in made.values() for key in of))
    return Page(
        kind="benchmarks",
        title=f"{theme}: {plural(len(named), 'benchmark')} side by side",
        notice=Notice(tone=FAIR, text=f"Not finished: {', '.join(unfinished)}.") if unfinished else None,
        verdict=" ".join(f"{name}: {of_benchmark.verdict(one)}" for name, one in contents.items()),
        sections=[*sections, provenance.columns(keys, made)],
        made_from=provenance.files(list(named.values())),
    )


def _titles(contents: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(str(one["title"]) for of in contents.values() for one in of["tables"] if one["rows"]))


def _of_title(number: int, title: str, contents: Mapping[str, Mapping[str, Any]]) -> Section:
    """The tables of one title, one after the other as one: what is named alike stands together."""
    found = {
        name: one["rows"]
        for name, of in contents.items()
        for one in of["tables"]
        if str(one["title"]) == title and one["rows"]
    }
    rows = [{"run": name, **row} for name, of in found.items() for row in of]
    first = next((key for key in rows[0] if key != "run"), "run")
    order = {value: place for place, value in enumerate(dict.fromkeys(str(row.get(first)) for row in rows))}
    rows.sort(key=lambda row: order[str(row.get(first))])
    rows = [
        {
            first: row.get(first),
            "run": row["run"],
            **{key: value for key, value in row.items() if key not in (first, "run")},
        }
        for row in rows
    ]
    blocks: list[Block] = []
    if len(found) > 1 and (chart := _ratios(f"title-{number}", title, found)):
        blocks.append(chart)
    missing = [name for name in contents if name not in found]
    if missing:
        blocks.append(Prose(text=f"Not in {joined(missing)}."))
    blocks.append(table("", rows))
    return Section(title=title, blocks=blocks)


def _ratios(key: str, title: str, found: Mapping[str, list[dict[str, Any]]]) -> Chart | None:
    rows = []
    for number, (name, of) in enumerate(found.items()):
        column = of_benchmark.ratio_column(of) or (of_benchmark.AVERAGE if of_benchmark.AVERAGE in of[0] else None)
        named = next((each for each in ("method", "model") if each in of[0]), None)
        if column is None or named is None:
            return None
        for row in of:
            value, deviation = of_benchmark.score(row.get(column))
            if value is None:
                continue
            low, high = finite(row.get(f"{column}, min")), finite(row.get(f"{column}, max"))
            if deviation is not None:
                low, high = value - deviation, value + deviation
            rows.append(
                Dot(
                    name=name,
                    value=value,
                    low=low,
                    high=high,
                    colour=series(number),
                    group=str(row[named]),
                    words=decimal(value),
                )
            )
    if not rows:
        return None
    order = {group: place for place, group in enumerate(dict.fromkeys(row.group for row in rows))}
    rows.sort(key=lambda row: order[row.group])
    score = of_benchmark.AVERAGE in next(iter(found.values()))[0]
    label = "mean score, in hundredths" if score else "over the frozen limit"
    legend = [Key(name=name, colour=series(number), mark="dot") for number, name in enumerate(found)]
    words = f"{title}: {label}, each method in each benchmark." + (
        f" The first {MOST} are drawn." if len(rows) > MOST else ""
    )
    line = None if score else ("frozen limit", 1.0)
    return dots(
        key, rows[:MOST], title=label[:1].upper() + label[1:], words=words, label=label, line=line, legend=legend
    )


# ---------------------------------------------------------------- plans


def plans(named: Named) -> Page:
    """The page of several plans."""
    contents = {name: record.content for name, record in named.items()}
    methods = {f"{name}: {one['method']}": one for name, of in contents.items() for one in of["methods"]}
    memories = {of.get("memory") for of in contents.values()}
    memory = memories.pop() if len(memories) == 1 else None
    aside = next(iter(contents.values())).get("set_aside") if memory else None
    order = sorted(contents, key=lambda name: contents[name]["methods"][0]["device"] or math.inf)
    said = [f"{name} {size(contents[name]['methods'][0]['device'])}" for name in order]
    shown_methods = {name: one for name, one in methods.items() if one["device"] is not None}
    blocks: list[Block] = []
    if shown_methods:
        blocks.append(of_plan.memory_chart(dict(list(shown_methods.items())[:MOST]), memory, aside))
    rows = [
        [
            Cell(text=name),
            *(Cell(text=shown(one.get(key))) for _, key, shown in of_plan.ROWS),
            _fits(of_plan.needed(one)),
        ]
        for name, one in methods.items()
    ]
    blocks.append(
        Table(title="Part by part", columns=["plan", *(title for title, _, _ in of_plan.ROWS), "fits"], rows=rows)
    )
    made = {
        name: {key: value for key, value in of["recipe"].items() if key not in ("output",)}
        | {"counted for": of.get("device")}
        for name, of in contents.items()
    }
    keys = [
        key
        for key in dict.fromkeys(key for of in made.values() for key in of)
        if len({str(of.get(key)) for of in made.values()}) > 1
    ]
    return Page(
        kind="plans",
        title=f"{plural(len(named), 'plan')} side by side",
        subtitle=joined(
            list(dict.fromkeys(base_name(str(of["recipe"].get("model.name"))) for of in contents.values()))
        ),
        verdict=f"At the peak of a step, the least first: {joined(said)}.",
        sections=[
            Section(title="Memory", blocks=blocks),
            provenance.columns(keys, made, title="What differs in their settings"),
        ],
        made_from=provenance.files(list(named.values())),
    )


def _fits(fits: bool | None) -> Cell:
    return Cell(text="") if fits is None else Cell(text="fits" if fits else "does not fit", tone=GOOD if fits else BAD)
