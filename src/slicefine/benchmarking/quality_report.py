"""What `slicefine bench quality` writes: the poster's table, each task, time to a score, the grid, every run, and charts."""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
from pathlib import Path

import torch

from slicefine.benchmarking import charts
from slicefine.benchmarking.cells import Outcome
from slicefine.benchmarking.quality import Comparison, compare
from slicefine.benchmarking.quality_settings import QualitySettings
from slicefine.benchmarking.results import Report, Row, Table

INTRO = "Scores."


def run(settings: QualitySettings, command: str) -> Report:
    """Compare and write; returns the report, whose status is `finished` or `interrupted`.

    Raises `SliceFineError` before the first run for what is wrong with suite, data, models or kept files.
    """
    if not charts.can_draw():
        print(charts.MISSING, file=sys.stderr)
    resolved = dataclasses.asdict(settings) | {"device": "cuda" if torch.cuda.is_available() else "cpu"}
    if hasattr(os, "getloadavg"):
        resolved["load_before"] = round(os.getloadavg()[0], 2)
    report = Report(theme="quality", intro=INTRO, folder=Path(settings.output), command=command, settings=resolved)

    def changed(found: Comparison) -> None:
        report.tables = tables(found)
        report.write()

    found = compare(settings, changed)
    report.status = "interrupted" if found.interrupted else "finished"
    changed(found)
    return report


def tables(found: Comparison) -> list[Table]:
    rows: list[Row] = []
    names = list(dict.fromkeys(one.name for variants in found.variants.values() for one in variants))
    for name in names:
        row: Row = {"method": name}
        for task in found.tasks:
            scores = [main_score(outcome) for outcome in found.of(task.name, name)]
            row[task.name] = statistics.fmean(scores) if scores else None
        rows.append(row)
    return [Table(title="scores", rows=rows)] if rows else []


def main_score(outcome: Outcome) -> float:
    return next(iter(outcome.scores.values()))
