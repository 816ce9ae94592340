"""What benchmarks of scores share: runs that are kept, the choice of a learning rate, intervals."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Cell:
    """One run: judged on examples held out of the training examples, or, once, on the test examples (`final`)."""

    data: str
    method: str
    lr: float
    seed: int
    final: bool


@dataclass(frozen=True)
class Outcome:
    """What a run gave."""

    active: int
    touched: int
    loss: float
    predicted: list[int]
    """Classes of the examples it is judged on, in their order."""
    labels: list[int]
    minutes: float
    commit: str | None = None
    """Of the code that made the run; set by `kept`."""

    def score(self, metric: Callable[..., Any]) -> float:
        return float(metric(self.labels, self.predicted))


def kept(folder: Path, cell: Cell, settings: Any, commit: str | None, make: Callable[[], Outcome]) -> Outcome:
    """What `make` gives, or gave an earlier time, at whatever commit, for the same cell and settings (JSON values)."""
    digest = hashlib.sha256(json.dumps([dataclasses.asdict(cell), settings]).encode()).hexdigest()
    path = folder / f"{cell.data}-{digest[:16]}.json"
    if path.exists():
        return Outcome(**json.loads(path.read_text(encoding="utf-8")))
    outcome = dataclasses.replace(make(), commit=commit)
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(dataclasses.asdict(outcome)), encoding="utf-8")
    os.replace(part, path)
    return outcome


def commit_of(made_by: dict[str, Any]) -> str:
    """The commit of `provenance`, marked if the working tree differed."""
    return f"{made_by['commit']}{' and changes' if made_by['dirty'] else ''}"


def commits(*runs: dict[Cell, Outcome]) -> dict[str, Any]:
    """Which commits the runs were made at: more than one if a benchmark was stopped, changed and continued."""
    return {"runs_made_at": ", ".join(sorted({str(outcome.commit) for made in runs for outcome in made.values()}))}


def chosen(grid: dict[Cell, Outcome]) -> dict[tuple[str, str], float]:
    """The learning rate of each set and method: the one with the lowest loss."""
    best: dict[tuple[str, str], tuple[float, float]] = {}
    for cell, outcome in grid.items():
        loss = outcome.loss if math.isfinite(outcome.loss) else math.inf
        key = (cell.data, cell.method)
        best[key] = min(best.get(key, (math.inf, cell.lr)), (loss, cell.lr))
    return {key: lr for key, (_, lr) in best.items()}


def resampled(outcomes: Sequence[Outcome], metric: Callable[..., Any], resamples: int) -> np.ndarray:
    """Scores, the mean of the seeds, on test sets drawn with replacement; the draws are the same for all methods."""
    labels = np.array(outcomes[0].labels)
    draws = np.random.default_rng(0).integers(len(labels), size=(resamples, len(labels)))
    predicted = [np.array(outcome.predicted) for outcome in outcomes]
    return np.array([statistics.fmean(metric(labels[draw], p[draw]) for p in predicted) for draw in draws])


def interval(values: np.ndarray) -> tuple[float, float]:
    """The ends of the middle 95 %."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
