"""The page of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slicefine.reporting import provenance, training_charts
from slicefine.reporting.history import History, history
from slicefine.reporting.model_map import Weight, model_map, weights
from slicefine.reporting.page import (
    BAD,
    FAIR,
    MANY,
    PLAIN,
    Block,
    Cell,
    Code,
    Figure,
    Listing,
    Notice,
    Page,
    Prose,
    Section,
    Table,
)
from slicefine.reporting.records import RECIPE, Record
from slicefine.reporting.text import (
    DASH,
    LOWER_IS_BETTER,
    METRICS,
    base_name,
    brief,
    count,
    device,
    duration,
    finite,
    metric,
    metric_name,
    percent,
    plural,
    shorten,
    size,
)

TASKS = {
    "text-classification": "text classification",
    "image-classification": "image classification",
    "video-classification": "video classification",
    "causal-lm": "language modelling",
}
SHOWN_CLASSES = 20
MOST_WEIGHTS = 1000
"""Rows of the table of weights."""
NO_HISTORY = (
    "There is no `history.json` beside this record, so there are no curves: the run has not logged anything yet, or was "
    "made by a slicefine that did not keep its log."
)


def page(record: Record) -> Page:
    """The page of one run."""
    content, series = record.content, history(record)
    return Page(
        kind="training run",
        title=record.name,
        subtitle=f"{base_name(content['model'])} · {task_name(content)} · {_when(content)}",
        notice=notice(content),
        verdict=verdict(content),
        figures=figures(record),
        sections=[
            _learning(record, series),
            *_moved(record, series),
            *_cost(record),
            _made_of(record),
            provenance.section(_provenance(record), *_recipe(record)),
        ],
        made_from=record.made_from,
    )


def task_name(content: Mapping[str, Any]) -> str:
    """What the model learned, in words."""
    return TASKS.get(str(content["task"]), str(content["task"]))


def _when(content: Mapping[str, Any]) -> str:
    return str(content.get("ended") or content.get("started") or "")[:10]


def notice(content: Mapping[str, Any]) -> Notice | None:
    """What has to be said first of a run that has not come to its end."""
    step, planned = count(content.get("steps")), count(content.get("planned_steps"))
    if content["status"] == "failed":
        why = content.get("error") or "the record does not say why"
        return Notice(tone=BAD, text=f"This run failed after step {step} of {planned}: {why}")
    if content["status"] == "interrupted":
        return Notice(
            tone=FAIR,
            text=f"This run was interrupted after step {step} of {planned}. `slicefine train RUN/recipe.yaml --resume` goes on with it.",
        )
    if content["status"] == "running":
        return Notice(
            tone=PLAIN,
            text="This run is still going on, or was ended from outside: its record has no end. What follows is what was written so far.",
        )
    return None


# ---------------------------------------------------------------- the verdict and the numbers


def main_score(content: Mapping[str, Any]) -> tuple[str, float | None, float | None] | None:
    """Name of the first score of a run, of a language model of its loss; before and after training."""
    scores = content.get("metrics") or {}
    before, after = scores.get("before") or {}, scores.get("after") or {}
    known = [name for name in {**after, **before} if name in METRICS]
    last = ("loss", "perplexity", "token_accuracy")  # in this order
    known.sort(key=lambda name: last.index(name) if name in last else -1)
    name = next(iter(known), None)
    return None if name is None else (name, finite(before.get(name)), finite(after.get(name)))


def verdict(content: Mapping[str, Any]) -> str:
    """What came of the run, in a sentence."""
    counts = content.get("parameters") or {}
    of = f"{base_name(content['model'])}, tuned for {task_name(content)}"
    share = _share(counts.get("active"), counts.get("total"))
    effort = f"{plural(content.get('steps', 0), 'step')} that trained {percent(share)} of its parameters at a time"
    score = main_score(content)
    if score is None:
        return f"{of}, has made {effort}; it has not been scored."
    name, before, after = score
    if after is None:
        return f"{of}, has made {effort}; before them its {metric_name(name)} on the validation set was {metric(name, before)}."
    if before is None:
        return f"{of}, has a {metric_name(name)} of {metric(name, after)} on the validation set after {effort}."
    better = (after < before) == (name in LOWER_IS_BETTER)
    verb = "stayed at" if after == before else "improved from" if better else "got worse, from"
    path = metric(name, after) if after == before else f"{metric(name, before)} to {metric(name, after)}"
    return f"{of}: in {effort}, {metric_name(name)} on the validation set {verb} {path}."


def _share(part: Any, whole: Any) -> float | None:
    number, of = finite(part), finite(whole)
    return None if number is None or not of else number / of


def figures(record: Record) -> list[Figure]:
    """The numbers of a run."""
    content = record.content
    counts, timings = content.get("parameters") or {}, content.get("timings") or {}
    total = counts.get("total")
    found = _scores(content)
    steps, planned, moves = content.get("steps", 0), content.get("planned_steps"), content.get("moves", 0)
    found += [
        Figure(
            name="Trained at a step",
            value=percent(_share(counts.get("active"), total)),
            words=f"{count(counts.get('active'))} of {count(total)} parameters: those in the active slices, one slice a weight.",
        ),
        Figure(
            name="Touched in the end",
            value=percent(_share(counts.get("touched"), total)),
            words=f"{count(counts.get('touched'))} parameters were in an active slice at some step. {count(counts.get('added'))} were added to the model.",
        ),
        Figure(
            name="Steps",
            value=count(steps) if steps == planned else f"{count(steps)} of {count(planned)}",
            words=_of_steps(moves, slices_of(record).get("slide_every")),
        ),
        Figure(
            name="Time",
            value=duration(timings.get("train_seconds")),
            words="On the clock, validation and checkpoints included, over all sessions.",
        ),
    ]
    if heads := counts.get("modules_to_save"):
        names = ", ".join(content.get("modules_to_save") or []) or "new modules"
        words = (
            f"Parameters of modules that are trained in full ({names}): a new head has no pretrained weight to slice."
        )
        found.insert(-2, Figure(name="New head", value=count(heads), words=words))
    step = timings.get("step_seconds_median") or timings.get("step_seconds_mean")
    if step:
        limit = timings.get("frozen_limit_ratio") or {}
        words = "Forward, backward and update of one step, the median."
        if limit:
            words = f"{words} {brief(limit.get('median'))} times the frozen limit: the same step with nothing to train."
        found.append(Figure(name="A step", value=duration(step), words=words))
    if (waited := finite(timings.get("data_wait_share"))) is not None:
        advice = ": raise `training.dataloader_num_workers`." if waited > 0.2 else "."
        found.append(Figure(name="Waiting for data", value=percent(waited), words=f"Of the time of all steps{advice}"))
    memory = record.parts.get("memory.json") or {}
    if memory.get("peak_bytes"):
        found.append(
            Figure(
                name="Peak memory",
                value=size(memory["peak_bytes"]),
                words=f"The most that was allocated at once on {device(memory.get('device'))}.",
            )
        )
    if content.get("artifact_bytes"):
        found.append(
            Figure(
                name="Adapter",
                value=size(content["artifact_bytes"]),
                words="What was saved: weights and settings of the slices.",
            )
        )
    return found


def _of_steps(moves: Any, every: Any) -> str:
    if every is None:
        return f"Optimizer steps, with {plural(moves, 'move')} of the slices."
    if not moves:
        return f"Optimizer steps. The slices did not move: they would have after {count(every)}."
    return f"Optimizer steps, with {plural(moves, 'move')} of the slices: one every {count(every)} steps."


def _scores(content: Mapping[str, Any]) -> list[Figure]:
    scores = content.get("metrics") or {}
    before, after = scores.get("before") or {}, scores.get("after") or {}
    names = sorted((name for name in {**after, **before} if name in METRICS), key=lambda name: name == "loss")
    found = []
    for name in names[:4]:
        now, was = finite(after.get(name)), finite(before.get(name))
        words = (
            "On the validation set, after the last step"
            if now is not None
            else "On the validation set, before training"
        )
        if now is not None and was is not None:
            words += f"; {metric(name, was)} before training"
        title = "Validation loss" if name == "loss" else metric_name(name)
        found.append(
            Figure(
                name=title[:1].upper() + title[1:], value=metric(name, was if now is None else now), words=f"{words}."
            )
        )
    return found


# ---------------------------------------------------------------- sections


def _learning(record: Record, series: History) -> Section:
    blocks: list[Block] = []
    if series.loss or series.validation.get("loss"):
        blocks.append(training_charts.loss(series))
    if chart := training_charts.scores(series):
        blocks.append(chart)
    if "history.json" not in record.parts:
        blocks.append(Prose(text=NO_HISTORY))
    elif not blocks:
        blocks.append(Prose(text="Nothing has been logged yet."))
    if series.validation:
        blocks.append(_validations(series))
    words = "How the loss fell, and what the validation set said meanwhile. Slices move at the thin vertical lines."
    return Section(title="Learning", words=words, blocks=blocks)


def _validations(series: History) -> Table:
    steps = sorted({step for points in series.validation.values() for step, _ in points})
    values = {name: dict(points) for name, points in series.validation.items()}
    rows = [
        [Cell(text=count(step)), *(Cell(text=metric(name, values[name].get(step))) for name in values)]
        for step in steps[-200:]
    ]
    note = f"The last 200 of {count(len(steps))}." if len(steps) > 200 else ""
    return Table(
        title="Every validation", columns=["step", *map(metric_name, values)], rows=rows, note=note, folded=True
    )


def _moved(record: Record, series: History) -> list[Section]:
    every = weights(record.parts.get("slices.json") or {})
    blocks: list[Block] = []
    if every:
        blocks.append(model_map(every))
    if series.update_mean:
        blocks.append(training_charts.updates(series))
    if every:
        blocks.append(_weights(every))
    if not blocks:
        return []
    words = (
        "A slice moves on and leaves behind what it learned. How far its entries are from their pretrained values is told as "
        "the norm of the change over the norm of what was there."
    )
    return [Section(title="What moved", words=words, blocks=blocks)]


def _weights(every: list[Weight]) -> Table:
    most = max((weight.update or 0.0 for weight in every), default=0.0)
    rows = [
        [
            Cell(text=weight.name),
            Cell(text=f"{weight.shape[0]:,} x {weight.shape[1]:,}"),
            Cell(text=f"{weight.axis} {', '.join(_range(*piece) for piece in weight.active[:4])}"),
            Cell(text=count(sum(number for _, number in weight.rows))),
            Cell(text=count(sum(number for _, number in weight.columns))),
            Cell(text=percent(weight.share)),
            Cell(text=brief(weight.update), shade=(weight.update or 0.0) / most if most else 0.0),
        ]
        for weight in every[:MOST_WEIGHTS]
    ]
    columns = [
        "weight",
        "rows x columns",
        "active at the end",
        "touched rows",
        "touched columns",
        "of its entries",
        "moved",
    ]
    note = "" if len(rows) == len(every) else f"The first {len(rows):,}; slices.json has all of them."
    return Table(title=f"All {len(every):,} weights", columns=columns, rows=rows, note=note, folded=len(rows) > MANY)


def _range(first: int, width: int) -> str:
    return f"{first}" if width == 1 else f"{first} to {first + width - 1}"


def _cost(record: Record) -> list[Section]:
    blocks: list[Block] = []
    memory = record.parts.get("memory.json") or {}
    if parts := {name: value for name, value in (memory.get("parts") or {}).items() if finite(value)}:
        blocks.append(training_charts.memory(parts, memory))
    limit = (record.content.get("timings") or {}).get("frozen_limit_ratio")
    if limit and finite(limit.get("median")) is not None:
        blocks.append(training_charts.frozen_limit(limit))
    words = (
        "Memory by part is counted on the graph of the model, for the longest batch that the recipe allows, as `slicefine plan` does it; a "
        "peak that was measured on a GPU is named so. Times were measured."
    )
    return [Section(title="What it cost", words=words, blocks=blocks)] if blocks else []


def _made_of(record: Record) -> Section:
    content = record.content
    blocks: list[Block] = []
    if notes := [str(note) for note in content.get("notes") or []]:
        blocks.append(Prose(text=provenance.DECIDED))
        blocks.append(Listing(items=notes))
    data = content.get("data") or {}
    rows = [
        [
            Cell(text=name),
            Cell(text=count(of.get("examples"))),
            Cell(text=str(of.get("source") or DASH)),
            Cell(text=shorten(str(of.get("fingerprint") or DASH), 24)),
        ]
        for name, of in data.items()
        if isinstance(of, Mapping)
    ]
    if rows:
        blocks.append(Table(title="Examples", columns=["set", "examples", "source", "fingerprint"], rows=rows))
    if classes := data.get("classes"):
        shown = ", ".join(map(str, classes[:SHOWN_CLASSES]))
        more = f" and {len(classes) - SHOWN_CLASSES} more" if len(classes) > SHOWN_CLASSES else ""
        blocks.append(Prose(text=f"{plural(len(classes), 'class').replace('classs', 'classes')}: {shown}{more}."))
    return Section(title="Data and notes", blocks=blocks or [Prose(text="The record has none.")])


def recipe_of(record: Record) -> dict[str, Any]:
    """The recipe of a run; empty if it has none that can be read."""
    import yaml

    try:
        found = yaml.safe_load(record.parts.get(RECIPE, ""))
    except (yaml.YAMLError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def slices_of(record: Record) -> dict[str, Any]:
    """The settings of the slices in the recipe; empty where they are not known."""
    found = recipe_of(record).get("slice")
    return found if isinstance(found, dict) else {}


def _recipe(record: Record) -> list[Block]:
    text = record.parts.get(RECIPE)
    return [Code(title="The recipe in full", text=text)] if text else []


def _provenance(record: Record) -> list[tuple[str, Any]]:
    content = record.content
    return [
        ("made by", "slicefine train recipe.yaml" if RECIPE in record.parts else None),
        ("model", content["model"]),
        ("seed", content.get("seed")),
        *provenance.made_with(content),
        ("resumed at step", content.get("resumed_from")),
    ]
