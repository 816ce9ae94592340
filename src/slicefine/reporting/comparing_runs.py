"""Training runs side by side, with analyses of their model if there are any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slicefine.reporting import of_analysis, of_training, provenance
from slicefine.reporting.charts import Line, lines
from slicefine.reporting.history import history
from slicefine.reporting.page import BAD, FAIR, GOOD, PLAIN, Block, Cell, Notice, Page, Prose, Section, Table
from slicefine.reporting.palette import series
from slicefine.reporting.records import ANALYSIS, TRAINING, Record
from slicefine.reporting.text import (
    HUNDREDTHS,
    LOWER_IS_BETTER,
    METRICS,
    base_name,
    brief,
    count,
    decimal,
    duration,
    finite,
    joined,
    metric,
    metric_name,
    percent,
    plural,
    size,
)
from slicefine.reporting.thinning import ROUGH, neighbours, smooth

STATUS = {"finished": GOOD, "failed": BAD, "interrupted": FAIR, "running": PLAIN}
FREE = {"output", "training.report_to"}
"""Settings that make no difference to a run."""
Named = Mapping[str, Record]


def page(named: Named) -> Page:
    """The page of several training runs."""
    runs = {name: record for name, record in named.items() if record.kind == TRAINING}
    analyses = {name: record for name, record in named.items() if record.kind == ANALYSIS}
    unfinished = {
        name: record.content["status"] for name, record in runs.items() if record.content["status"] != "finished"
    }
    words = ", ".join(f"{name} ({status})" for name, status in unfinished.items())
    return Page(
        kind="training runs" if len(runs) > 1 else "training run and analysis",
        title=f"{plural(len(runs), 'run')} side by side" if len(runs) > 1 else f"{next(iter(runs))} and its model",
        subtitle=joined(list(dict.fromkeys(base_name(record.content["model"]) for record in runs.values()))),
        notice=Notice(tone=FAIR, text=f"Not finished: {words}.") if unfinished else None,
        verdict=verdict(runs),
        sections=[
            Section(title="Side by side", words="One column a run.", blocks=[_table(runs), *_settings(runs)]),
            _curves(runs),
            *_analyses(analyses),
            _provenance(named),
        ],
        made_from=provenance.files(list(named.values())),
    )


def verdict(runs: Named) -> str:
    """Which run came out ahead, in a sentence."""
    scores = {name: score for name, record in runs.items() if (score := of_training.main_score(record.content))}
    kinds = {name for name, _, _ in scores.values()}
    done = {name: after for name, (_, _, after) in scores.items() if after is not None}
    if len(runs) == 1:
        return of_training.verdict(next(iter(runs.values())).content)
    if len(kinds) != 1 or not done:
        return f"{plural(len(runs), 'run')} without a score in common: compare their curves, and read each score for itself."
    kind = kinds.pop()
    order = sorted(done, key=lambda name: done[name], reverse=kind not in LOWER_IS_BETTER)
    best = [name for name in order if done[name] == done[order[0]]]
    text = f"{joined(best)} {'have' if len(best) > 1 else 'has'} the best {metric_name(kind)} on the validation set, {metric(kind, done[order[0]])}"
    rest = [f"{name} {metric(kind, done[name])}" for name in order[len(best) :]]
    sources = {
        str([(record.content.get("data") or {}).get("validation", {}).get(key) for key in ("fingerprint", "examples")])
        for record in runs.values()
    }
    warned = "" if len(sources) == 1 else " Their validation sets are not the same examples, so scores do not compare."
    return f"{text}{'; then ' + joined(rest) if rest else ''}.{warned}"


def _table(runs: Named) -> Table:
    contents = {name: record.content for name, record in runs.items()}
    scores = list(
        dict.fromkeys(
            score
            for one in contents.values()
            for score in ((one.get("metrics") or {}).get("after") or {})
            if score in METRICS
        )
    )
    scores.sort(key=lambda name: name == "loss")
    rows: list[list[Cell]] = [
        [
            Cell(text="status"),
            *(Cell(text=one["status"], tone=STATUS.get(one["status"], PLAIN)) for one in contents.values()),
        ],
        [Cell(text="model"), *(Cell(text=base_name(one["model"])) for one in contents.values())],
        [Cell(text="task"), *(Cell(text=of_training.task_name(one)) for one in contents.values())],
        [Cell(text="slices"), *(Cell(text=_slices(record)) for record in runs.values())],
        [
            Cell(text="trained at a step"),
            *(Cell(text=count((one.get("parameters") or {}).get("active"))) for one in contents.values()),
        ],
        [Cell(text="share of the model"), *(Cell(text=_share(one)) for one in contents.values())],
        [
            Cell(text="touched"),
            *(Cell(text=count((one.get("parameters") or {}).get("touched"))) for one in contents.values()),
        ],
    ]
    for score in scores:
        values = [finite(((one.get("metrics") or {}).get("after") or {}).get(score)) for one in contents.values()]
        known = [value for value in values if value is not None]
        best = (min if score in LOWER_IS_BETTER else max)(known)
        rows.append(
            [
                Cell(text=f"{metric_name(score)}, after"),
                *(Cell(text=metric(score, value), strong=value == best) for value in values),
            ]
        )
        before = [((one.get("metrics") or {}).get("before") or {}).get(score) for one in contents.values()]
        rows.append(
            [Cell(text=f"{metric_name(score)}, before"), *(Cell(text=metric(score, value)) for value in before)]
        )
    timings = [one.get("timings") or {} for one in contents.values()]
    rows += [
        [Cell(text="steps"), *(Cell(text=count(one.get("steps"))) for one in contents.values())],
        [Cell(text="moves"), *(Cell(text=count(one.get("moves"))) for one in contents.values())],
        [Cell(text="time"), *(Cell(text=duration(one.get("train_seconds"))) for one in timings)],
        [
            Cell(text="a step"),
            *(Cell(text=duration(one.get("step_seconds_median") or one.get("step_seconds_mean"))) for one in timings),
        ],
    ]
    if any(one.get("frozen_limit_ratio") for one in timings):
        rows.append(
            [
                Cell(text="a step / frozen limit"),
                *(Cell(text=brief((one.get("frozen_limit_ratio") or {}).get("median"))) for one in timings),
            ]
        )
    peaks = [(record.parts.get("memory.json") or {}).get("peak_bytes") for record in runs.values()]
    if any(peaks):
        rows.append([Cell(text="peak memory"), *(Cell(text=size(peak)) for peak in peaks)])
    rows.append([Cell(text="adapter"), *(Cell(text=size(one.get("artifact_bytes"))) for one in contents.values())])
    return Table(title="", columns=["", *runs], rows=rows)


def _share(content: Mapping[str, Any]) -> str:
    counts = content.get("parameters") or {}
    active, total = finite(counts.get("active")), finite(counts.get("total"))
    return percent(active / total) if active is not None and total else percent(None)


def _slices(record: Record) -> str:
    of = of_training.slices_of(record)
    if not of:
        return "not known"
    every = of.get("slide_every")
    return f"r {of.get('r')}, {of.get('axis')}, {'fixed' if every is None else f'every {every}'}, {of.get('order')}"


def _settings(runs: Named) -> list[Block]:
    """The settings of the recipes that differ."""
    flat = {name: _flat(of_training.recipe_of(record)) for name, record in runs.items()}
    flat = {name: settings for name, settings in flat.items() if settings}
    if len(flat) < 2:
        return []
    keys = list(dict.fromkeys(key for settings in flat.values() for key in settings))
    rows = []
    for key in keys:
        values = [settings.get(key, "") for settings in flat.values()]
        if len({str(value) for value in values}) > 1 and key not in FREE:
            rows.append(
                [
                    Cell(text=key),
                    *(Cell(text=provenance.flat(value) if value is not None else "null") for value in values),
                ]
            )
    if not rows:
        return [Prose(text="Their recipes are the same, but for where they write to.")]
    return [Table(title="What differs in their recipes", columns=["setting", *flat], rows=rows)]


def _flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for key, value in recipe.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            found[key] = value
    return found


def _curves(runs: Named) -> Section:
    logs = {name: history(record) for name, record in runs.items()}
    blocks: list[Block] = []
    training = _lines({name: smooth(log.loss, neighbours(log.loss)) for name, log in logs.items()})
    if training:
        words = "Training loss at the end: " + "; ".join(
            f"{line.name} {decimal(line.points[-1][1])}" for line in training
        )
        if any(neighbours(log.loss) for log in logs.values()):
            words += f". Of {ROUGH} and more logged losses, means of neighbours are drawn"
        blocks.append(
            lines(
                "loss",
                {"training loss, nats": training},
                title="Training loss",
                words=f"{words}.",
                over="optimizer step",
                counted=True,
            )
        )
    names = list(dict.fromkeys(name for log in logs.values() for name in log.validation))
    names.sort(key=lambda name: name == "loss")
    for number, name in enumerate(names[:4]):
        drawn = _lines({run: log.validation.get(name, []) for run, log in logs.items()}, dots=True)
        words = f"{metric_name(name)} at the end: " + "; ".join(
            f"{line.name} {metric(name, line.points[-1][1])}" for line in drawn
        )
        blocks.append(
            lines(
                f"validation-{number}",
                {metric_name(name): drawn},
                title=f"{metric_name(name)[:1].upper()}{metric_name(name)[1:]} of the validation set",
                words=f"{words[:1].upper()}{words[1:]}.",
                over="optimizer step",
                shares=name in HUNDREDTHS,
                counted=True,
            )
        )
    without = [name for name, log in logs.items() if not log.loss and not log.validation]
    if without:
        blocks.append(Prose(text=f"Nothing was logged, or the log was not kept: {joined(without)}."))
    return Section(title="Curves", words="All runs on the same axes.", blocks=blocks)


def _lines(found: Mapping[str, Sequence[tuple[float, float]]], *, dots: bool = False) -> list[Line]:
    """A line a run; colours, and then dashes, tell them apart."""
    styles = ("line", "dashed", "dashdot", "dotted")
    return [
        Line(
            name=name,
            points=points,
            colour=series(number),
            style=styles[number % len(styles)],
            dots=dots and len(points) <= 40,
        )
        for number, (name, points) in enumerate(found.items())
        if points
    ]


def _analyses(analyses: Named) -> list[Section]:
    return [
        Section(
            title="The hypothesis on this model" + (f": {name}" if len(analyses) > 1 else ""),
            words=of_analysis.verdict(record.content),
            blocks=of_analysis.verdicts(record.content),
        )
        for name, record in analyses.items()
    ]


def _provenance(named: Named) -> Section:
    keys = ["seed", "started", "ended", "commit", "hardware", "versions"]
    made = [
        {"seed": record.content.get("seed"), **dict(provenance.made_with(record.content))} for record in named.values()
    ]
    return provenance.columns(keys, dict(zip(named, made, strict=True)))
