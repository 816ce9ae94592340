"""The page of an evaluation: of generated answers, or of a classifier's predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slicefine.reporting import provenance, worst_examples
from slicefine.reporting.charts import Dot, dots
from slicefine.reporting.page import (
    BAD,
    FAIR,
    MANY,
    PLAIN,
    Block,
    Cell,
    Chart,
    Figure,
    Notice,
    Page,
    Prose,
    Section,
    Table,
)
from slicefine.reporting.palette import series
from slicefine.reporting.records import Record
from slicefine.reporting.text import (
    DASH,
    base_name,
    count,
    duration,
    finite,
    interval,
    joined,
    metric,
    metric_name,
    percent,
    plural,
)

SHOWN = 20
"""Examples that are shown."""
MOST_CLASSES = 16
"""Classes from which on no table shows which was taken for which."""
MOST_ROWS = 40
"""Rows of a chart."""
WILSON = "Intervals are Wilson's, of 95 %: the accuracy of the model on all such examples lies in them nineteen times out of twenty."


def page(record: Record) -> Page:
    """The page of one evaluation."""
    content = record.content
    return Page(
        kind="evaluation",
        title=record.name,
        subtitle=f"{base_name(content['model'])} · {content.get('suite') or content.get('data') or 'labelled examples'} · {_when(content)}",
        notice=notice(content),
        verdict=verdict(content),
        figures=_figures(content),
        sections=[_scores(content), *_classes(content), worst_examples.section(record), _provenance(content)],
        made_from=record.made_from,
    )


def _when(content: Mapping[str, Any]) -> str:
    session = _last_session(content)
    return str(session.get("ended") or session.get("started") or "")[:10]


def _last_session(content: Mapping[str, Any]) -> Mapping[str, Any]:
    sessions = content.get("sessions") or [{}]
    return sessions[-1]


def notice(content: Mapping[str, Any]) -> Notice | None:
    """What has to be said first of an evaluation that is not whole, or not clean."""
    words = {
        "failed": (BAD, "This evaluation failed; what follows is what was finished. The same command goes on with it."),
        "interrupted": (
            FAIR,
            "This evaluation was interrupted; what follows is what was finished. The same command goes on with it.",
        ),
        "running": (
            PLAIN,
            "This evaluation is still going on, or was ended from outside; what follows is what was finished.",
        ),
    }
    if content["status"] in words:
        tone, text = words[content["status"]]
        return Notice(tone=tone, text=text)
    dirty = (content.get("contamination") or {}).get("questions") or {}
    if any(dirty.values()):
        counts = ", ".join(f"{task} {number:,}" for task, number in dirty.items())
        return Notice(
            tone=BAD,
            text=f"The model was trained on examples that it is scored on ({counts}): these scores flatter it.",
        )
    return None


# ---------------------------------------------------------------- the verdict and the numbers


def examples_of(scores: Mapping[str, Any]) -> int:
    """How many questions, or examples, a score is of."""
    return scores.get("questions", scores.get("examples", 0))


def title_of(content: Mapping[str, Any], task: str) -> str:
    """What a set is called."""
    return str((content.get("sets") or {}).get(task, {}).get("title") or task)


def scores_of(scores: Mapping[str, Any]) -> dict[str, float]:
    """Metric -> value, the accuracy among them where there is one."""
    found = dict(scores.get("metrics") or {})
    if "accuracy" in scores:
        found.setdefault("accuracy", scores["accuracy"])
    return found


def verdict(content: Mapping[str, Any]) -> str:
    """What came of the evaluation, in a sentence."""
    tasks, model = content["tasks"], base_name(content["model"])
    if not tasks:
        return f"{model} has not been scored yet."
    asked = "questions" if any("questions" in scores for scores in tasks.values()) else "examples"
    total = sum(examples_of(scores) for scores in tasks.values())
    if len(tasks) > 1 and finite(content.get("average")) is not None:
        best = [
            (scores.get("accuracy"), name)
            for name, scores in tasks.items()
            if finite(scores.get("accuracy")) is not None
        ]
        ends = ""
        if len(best) > 1:
            (low, worst), (high, top) = min(best), max(best)
            ends = f", from {percent(low)} ({title_of(content, worst)}) to {percent(high)} ({title_of(content, top)})"
        return f"{model} scores {100 * content['average']:.1f} on average over {len(tasks)} sets and {total:,} {asked}{ends}."
    parts = []
    for name, scores in tasks.items():
        found = scores_of(scores)
        first = next(iter(found), None)
        if first is None:
            continue
        spread = f" ({interval(scores['interval'])})" if first == "accuracy" and "interval" in scores else ""
        parts.append(
            f"{metric_name(first)} {metric(first, found[first])}{spread} on {title_of(content, name)}, {examples_of(scores):,} {asked}"
        )
    return f"{model}: {joined(parts)}."


def _figures(content: Mapping[str, Any]) -> list[Figure]:
    found = []
    if finite(content.get("average")) is not None and len(content["tasks"]) > 1:
        words = "The mean of the sets' scores, whatever their sizes, as in the paper."
        found.append(Figure(name="Average", value=f"{100 * content['average']:.1f}", words=words))
    several = len(content["tasks"]) > 1
    for name, scores in list(content["tasks"].items())[:8]:
        for of, value in list(scores_of(scores).items())[: 1 if several else 4]:
            asked = f"{count(examples_of(scores))} of {count(scores.get('asked') or examples_of(scores))} asked"
            title = metric_name(of)[:1].upper() + metric_name(of)[1:]
            words = f"{title}, {asked}." if several else f"On {title_of(content, name)}, {asked}."
            if of == "accuracy" and "interval" in scores:
                words += f" 95 % interval: {interval(scores['interval'])}."
            found.append(
                Figure(name=title_of(content, name) if several else title, value=metric(of, value), words=words)
            )
    silent = sum(scores.get("unanswered") or 0 for scores in content["tasks"].values())
    if any("unanswered" in scores for scores in content["tasks"].values()):
        cut = sum(scores.get("cut") or 0 for scores in content["tasks"].values())
        words = f"Outputs in which no answer was found; they count as wrong. {plural(cut, 'output')} had not ended at the longest length."
        found.append(Figure(name="Unanswered", value=count(silent), words=words))
    session = _last_session(content)
    if session.get("seconds"):
        speed = next(
            (
                f"{value:,.0f} {key.replace('_per_', ' per ')}"
                for key, value in session.items()
                if key.endswith("_per_second")
            ),
            "",
        )
        words = f"The last of {plural(len(content['sessions']), 'session')}{', ' + speed if speed else ''}."
        found.append(Figure(name="Time", value=duration(session["seconds"]), words=words))
    return found


# ---------------------------------------------------------------- scores


def _scores(content: Mapping[str, Any]) -> Section:
    tasks = content["tasks"]
    metrics = list(dict.fromkeys(name for scores in tasks.values() for name in scores_of(scores)))
    intervals = any("interval" in scores for scores in tasks.values())
    counted = [name for name in ("unanswered", "empty", "cut") if any(name in scores for scores in tasks.values())]
    harness = any("acc_norm" in scores for scores in tasks.values())
    columns = [
        "set",
        *(metric_name(name) for name in metrics),
        *(["95 % interval"] if intervals else []),
        "right",
        "examples",
        *counted,
    ]
    rows = []
    for name, scores in tasks.items():
        found, asked, of = scores_of(scores), scores.get("asked"), examples_of(scores)
        rows.append(
            [
                Cell(text=title_of(content, name)),
                *(Cell(text=metric(one, found.get(one)), strong=one == "accuracy") for one in metrics),
                *([Cell(text=interval(scores.get("interval")))] if intervals else []),
                Cell(text=count(scores.get("right"))),
                Cell(text=count(of) if asked in (None, of) else f"{count(of)} of {count(asked)}"),
                *(Cell(text=count(scores.get(one))) for one in counted),
            ]
        )
    if harness:
        columns.append("acc_norm")
        for row, scores in zip(rows, tasks.values(), strict=True):
            row.append(Cell(text=percent(scores.get("acc_norm"))))
    if len(tasks) > 1 and finite(content.get("average")) is not None:
        rows.append(
            [
                Cell(text="average"),
                Cell(text=f"{100 * content['average']:.1f}", strong=True),
                *[Cell(text="")] * (len(columns) - 2),
            ]
        )
    blocks: list[Block] = []
    if chart := intervals_chart({title_of(content, name): scores for name, scores in tasks.items()}):
        blocks.append(chart)
    if rows:
        blocks.append(Table(title="Every set", columns=columns, rows=rows))
    return Section(
        title="Scores", words=WILSON if intervals else "", blocks=blocks or [Prose(text="Nothing has been scored yet.")]
    )


def intervals_chart(tasks: Mapping[str, Mapping[str, Any]]) -> Chart | None:
    """Accuracies with their intervals; None where there are none."""
    rows = [
        Dot(
            name=name,
            value=scores["accuracy"],
            low=scores["interval"][0],
            high=scores["interval"][1],
            colour=series(1),
            words=percent(scores["accuracy"]),
        )
        for name, scores in tasks.items()
        if finite(scores.get("accuracy")) is not None and interval(scores.get("interval")) != DASH
    ][:MOST_ROWS]
    if not rows:
        return None
    words = "; ".join(f"{row.name} {percent(row.value)} ({interval([row.low, row.high])})" for row in rows[:6])
    return dots(
        "accuracy",
        rows,
        title="Accuracy with its interval",
        words=f"{words}{' and more in the table' if len(rows) > 6 else ''}.",
        label="accuracy",
        shares=True,
    )


def _classes(content: Mapping[str, Any]) -> list[Section]:
    blocks: list[Block] = []
    for name, scores in content["tasks"].items():
        classes = scores.get("classes") or {}
        if not classes:
            continue
        several = f"{title_of(content, name)}: " if len(content["tasks"]) > 1 else ""
        rows = [
            [
                Cell(text=label),
                Cell(text=percent(of["accuracy"])),
                Cell(text=count(of["right"])),
                Cell(text=count(of["examples"])),
            ]
            for label, of in sorted(classes.items(), key=lambda item: item[1]["accuracy"])
        ]
        columns = ["class", "accuracy", "right", "examples"]
        title = f"{several}{len(rows)} classes, the hardest first"
        blocks.append(Table(title=title, columns=columns, rows=rows, folded=len(rows) > 2 * MANY))
        confusion = scores.get("confusion") or {}
        blocks += _matrix(several, classes, confusion) if len(classes) <= MOST_CLASSES else _pairs(several, confusion)
    words = "Which classes are hard, and what they are taken for."
    return [Section(title="Class by class", words=words, blocks=blocks)] if blocks else []


def _matrix(several: str, classes: Mapping[str, Any], confusion: Mapping[str, Mapping[str, int]]) -> list[Block]:
    labels = list(dict.fromkeys([*classes, *(given for row in confusion.values() for given in row)]))
    wrong = {
        (label, given): number / (sum(row.values()) or 1)
        for label, row in confusion.items()
        for given, number in row.items()
        if given != label
    }
    most = max(wrong.values(), default=0.0) or 1.0
    rows = [
        [
            Cell(text=label),
            *(
                Cell(
                    text=count(confusion.get(label, {}).get(given, 0) or None).replace(DASH, ""),
                    shade=wrong.get((label, given), 0.0) / most,
                    strong=given == label,
                )
                for given in labels
            ),
        ]
        for label in classes
    ]
    note = "Each row is a class, each column what was predicted for it. Right ones stand on the diagonal; the more colour, the more of a class was taken for another."
    return [Table(title=f"{several}What was taken for what", columns=["class", *labels], rows=rows, note=note)]


def _pairs(several: str, confusion: Mapping[str, Mapping[str, int]]) -> list[Block]:
    found = sorted(
        ((number, label, given) for label, row in confusion.items() for given, number in row.items() if given != label),
        key=lambda item: (-item[0], item[1], item[2]),
    )[:SHOWN]
    rows = [[Cell(text=label), Cell(text=given), Cell(text=count(number))] for number, label, given in found]
    return (
        [Table(title=f"{several}What is taken for what most often", columns=["class", "predicted", "times"], rows=rows)]
        if rows
        else []
    )


def _provenance(content: Mapping[str, Any]) -> Section:
    session = _last_session(content)
    checked = content.get("contamination")
    found = (
        "not checked"
        if checked is None
        else f"training examples searched: {', '.join(map(str, checked.get('sources') or [])) or 'none'}"
    )
    rows = [
        ("model", content["model"]),
        ("base", content.get("base")),
        ("fingerprint of the weights", content.get("weights")),
        ("number format", content.get("dtype")),
        ("suite", content.get("suite")),
        ("test sets", content.get("data") or "the hub"),
        ("engine", content.get("engine")),
        ("most tokens of an answer", content.get("max_new_tokens")),
        ("beams", content.get("num_beams")),
        ("at most of each set", content.get("limit")),
        ("contamination", found),
        ("batch size", session.get("batch_size")),
        *provenance.made_with(session),
    ]
    return provenance.section(rows)
