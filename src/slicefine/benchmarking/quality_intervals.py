"""How far a difference between methods may be chance: over other seeds, and over other examples that judge."""

from __future__ import annotations

import functools
import math
import statistics
import zlib
from collections.abc import Sequence

import numpy as np
from scipy import stats

from slicefine.benchmarking.cells import Outcome
from slicefine.training.metrics import METRICS

Interval = tuple[float, float]
RESAMPLES = 1000


def over_seeds(differences: Sequence[float]) -> Interval | None:
    """95 % interval of Student's t for the mean of differences by seed; None of a single one."""
    if len(differences) < 2:
        return None
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    reach = float(stats.t.ppf(0.975, len(differences) - 1)) * error
    return mean - reach, mean + reach


def resampled(outcomes: Sequence[Outcome], metric: str, positive: int, task: str) -> np.ndarray:
    """Mean score of runs on each of `RESAMPLES` draws, with replacement, of the examples that judge, float64 `(RESAMPLES,)`.

    All runs of a task are given the same draws, whatever the method, and every task its own.
    """
    every = [_draws(tuple(o.labels), tuple(o.predicted), metric, positive, task) for o in outcomes]
    return np.mean(every, axis=0)


@functools.lru_cache(maxsize=4096)  # tables are made anew whenever a run is finished
def _draws(
    labels: tuple[float, ...], predicted: tuple[float, ...], metric: str, positive: int, task: str
) -> np.ndarray:
    known, found, score = np.asarray(labels), np.asarray(predicted), METRICS[metric]
    draws = np.random.default_rng(zlib.crc32(task.encode())).integers(len(known), size=(RESAMPLES, len(known)))
    return np.array([score(known[draw], found[draw], positive) for draw in draws])
