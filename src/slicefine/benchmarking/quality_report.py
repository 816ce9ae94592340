"""What `slicefine bench quality` writes: tables, charts, and every run, anew whenever something is found."""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from slicefine.benchmarking import charts, quality_board
from slicefine.benchmarking.quality import Comparison, compare
from slicefine.benchmarking.quality_settings import QualitySettings
from slicefine.benchmarking.quality_tables import Tasks, averages, tables
from slicefine.benchmarking.results import Report
from slicefine.benchmarking.suite import QualityTask

INTRO = """\
Pretrained models are tuned to each task for {steps}{bf16}, by the trainer and the settings of the task's recipe: AdamW, {training}, the \
model's own dropout. All methods train the same matrices (every linear layer but the head), and the new head in full, from the same initial \
values, on the same batches. Each has a grid of learning rates of its own, all of one size{sizes}{extended}, and takes the one with the lowest loss on examples that choose, after a run \
with the first seed, of as many steps as **The examples** says. Final runs have seeds {first} to {last}; the examples that judge were scored once in each, after the last step, and decided nothing. \
SliceFine moves as its name says, by default after each eighth of the run, and trains biases and normalisations \
where its name says so. Active: parameters trained at a step; touched: by the end; neither counts the head."""
TRAINING = {
    "weight_decay": "weight decay {}",
    "lr_scheduler_type": "a {} schedule",
    "warmup_steps": "warm-up of {} (below 1: of the steps)",
    "max_grad_norm": "gradients clipped to {}",
}
"""Settings of recipes -> how the report says them."""
SECONDS_BETWEEN_DRAWINGS = 60.0


def run(settings: QualitySettings, command: str) -> Report:
    """Compare and write; returns the report, whose status is `finished` or `interrupted`.

    Raises `SliceFineError` before the first run for what is wrong with suite, data, models, kept files or folders to write.
    """
    settings.refuse_unwritable()
    if not charts.can_draw():
        print(charts.MISSING, file=sys.stderr)
    report = Report(
        theme="quality",
        intro="",
        folder=Path(settings.output),
        command=command,
        settings=_resolved(settings),
    )
    drawn = -SECONDS_BETWEEN_DRAWINGS

    def changed(found: Comparison, *, last: bool = False) -> None:
        nonlocal drawn
        if not last and time.monotonic() - drawn < SECONDS_BETWEEN_DRAWINGS:
            return  # finished runs are safe in their own files
        fill(report, found)
        report.write()
        drawn = time.monotonic()

    found = compare(settings, changed)
    report.status = "interrupted" if found.interrupted else "finished"
    changed(found, last=True)
    if settings.board is not None:
        quality_board.write(Path(settings.board), found)
    return report


def fill(report: Report, found: Comparison) -> None:
    """Put into `report` what was found."""
    report.intro, report.tables = _intro(found), tables(found)
    report.raw = [
        {"cell": dataclasses.asdict(cell), "outcome": _short(dataclasses.asdict(outcome))}
        for cell, outcome in (found.grid | found.final).items()
    ]
    report.raw += [{"times": name, **dataclasses.asdict(measured)} for name, measured in found.timed.items()]
    commits = {str((outcome.made.get("commit") or {}).get("hash")) for outcome in (found.grid | found.final).values()}
    report.provenance["runs made at"] = ", ".join(sorted(commits))
    if charts.can_draw():
        report.charts = _drawn(found)


def _short(outcome: dict[str, Any]) -> dict[str, Any]:
    """Without what is long: predictions are in the files of the runs."""
    return {key: value for key, value in outcome.items() if key not in ("predicted", "labels")}


def _intro(found: Comparison) -> str:
    settings = found.settings
    sizes = {len(settings.rates(one.method, task)) for task in found.tasks for one in found.variants[task.name]}
    lengths: dict[int, list[str]] = {}
    for task in found.tasks:
        lengths.setdefault(settings.steps_of(task), []).append(task.name)
    steps = [
        f"{length:,} optimizer steps" + (f" ({', '.join(names)})" if len(lengths) > 1 else "")
        for length, names in lengths.items()
    ]
    return INTRO.format(
        steps=" or ".join(steps),
        bf16=_bf16(found.tasks),
        training=", ".join(_of_all(found.tasks, key, words) for key, words in TRAINING.items()),
        sizes=f", {sizes.pop()}" if len(sizes) == 1 else "",
        extended=f" (and by up to {settings.extend} more beyond the end where its best lies)"
        if settings.extend
        else "",
        first=settings.seed,
        last=settings.seed + settings.seeds - 1,
    )


def _bf16(tasks: Sequence[QualityTask]) -> str:
    names = [task.name for task in tasks if task.recipe.training.bf16]
    return " in bfloat16 (autocast)" + (f" on {', '.join(names)}" if len(names) < len(tasks) else "") if names else ""


def _of_all(tasks: Sequence[QualityTask], key: str, words: str) -> str:
    """A setting of training in words, with each value that a task has."""
    values = dict.fromkeys(getattr(task.recipe.training, key) for task in tasks)
    return words.format(" or ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values))


def _resolved(settings: QualitySettings) -> dict[str, Any]:
    gpu = torch.cuda.is_available()
    processes, threads = settings.at_once(gpu=gpu)
    known = dataclasses.asdict(settings)
    resolved = known | {"device": "cuda" if gpu else "cpu", "processes": processes, "threads": threads}
    if hasattr(os, "getloadavg"):
        resolved["load_before"] = round(os.getloadavg()[0], 2)
    return resolved


def _drawn(found: Comparison) -> dict[str, str]:
    """Ending of a file name -> SVG: scores over parameters, scores over time."""
    tasks, made = Tasks(found), {}
    sized: dict[str, tuple[float, float]] = {}
    for name in tasks.names:
        outcomes = [outcome for task in found.tasks for outcome in found.of(task.name, name)]
        means = averages(tasks, name)
        if means and (active := statistics.fmean(outcome.active for outcome in outcomes)):
            sized[name] = (active, statistics.fmean(means.values()))
    if sized:
        made[""] = charts.scatter(sized, "parameters trained at a step (without the head)", "mean score over the tasks")
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    timed = all(tasks.seconds(task, name) for task in found.tasks for name in sized)
    for task in found.tasks:
        lines = panels.setdefault(f"{task.name}, {tasks.metric(task)}", {})
        for name in tasks.names:
            pace = tasks.seconds(task, name) if timed else 1.0
            curve = tasks.curve(task, name)
            if curve and pace:
                lines[name] = [(step * pace, score) for step, score in curve]
    panels = {title: lines for title, lines in panels.items() if lines}
    if panels:
        over = "seconds of training (steps by the time of a step)" if timed else "optimizer steps"
        made["-time"] = charts.curves(panels, over, "score on the examples that choose")
    return made
