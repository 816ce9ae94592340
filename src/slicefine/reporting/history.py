"""The log of a training run as series: what `history.json` holds, without what is no finite number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slicefine.reporting.records import Record
from slicefine.reporting.text import finite
from slicefine.reporting.thinning import Point

SPEEDS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "num_tokens")
EVAL = "eval_"


@dataclass(frozen=True, kw_only=True)
class History:
    """Series of a run, each by rising step."""

    loss: list[Point] = field(default_factory=list)
    """Of training, as it was logged."""
    learning_rate: list[Point] = field(default_factory=list)
    validation: dict[str, list[Point]] = field(default_factory=dict)
    """Score -> values, the one before training at step 0."""
    update_mean: list[Point] = field(default_factory=list)
    """Mean over the weights of how far the active slice is from where it was."""
    update_max: list[Point] = field(default_factory=list)
    moves: list[float] = field(default_factory=list)
    """Steps at which slices moved."""
    not_finite: int = 0
    """Losses that were logged and are no numbers."""

    @property
    def last_step(self) -> float:
        """Of everything that is in it."""
        every = [self.loss, *self.validation.values()]
        return max([points[-1][0] for points in every if points] + self.moves, default=0.0)


def history(record: Record) -> History:
    """The series of a training run; empty ones where nothing was logged."""
    content = record.parts.get("history.json", {})
    log = [entry for entry in _list(content.get("log")) if isinstance(entry, Mapping)]
    validation = {
        name.removeprefix(EVAL): _series(log, name)
        for name in dict.fromkeys(key for entry in log for key in entry if key.startswith(EVAL))
        if name.removeprefix(EVAL) not in SPEEDS
    }
    before = record.content.get("metrics", {}).get("before", {})
    for name, points in validation.items():
        start = finite(before.get(name))
        if start is not None and points and points[0][0] > 0:
            points.insert(0, (0.0, start))
    logged = [entry for entry in log if "loss" in entry]
    loss = _series(log, "loss")
    return History(
        loss=loss,
        learning_rate=_series(log, "learning_rate"),
        validation={name: points for name, points in validation.items() if points},
        update_mean=_series(log, "slicefine/update_norm_mean"),
        update_max=_series(log, "slicefine/update_norm_max"),
        moves=sorted(step for value in _list(content.get("moves")) if (step := finite(value)) is not None),
        not_finite=len(logged) - len(loss),
    )


def _series(log: Sequence[Mapping[str, Any]], name: str) -> list[Point]:
    """The last value of each step."""
    found = {}
    for entry in log:
        step, value = finite(entry.get("step")), finite(entry.get(name))
        if step is not None and value is not None:
            found[step] = value
    return sorted(found.items())


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
