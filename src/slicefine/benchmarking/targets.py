"""What slices are to reach, and whether a measurement does. Read without torch.

Times are judged as ratios within one run, so a target means the same on every machine of its kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slicefine.benchmarking.methods import FROZEN, METHODS, REFERENCE, SLICEFINE, method
from slicefine.benchmarking.models import SMALL

LARGE = "llama-3.2-3b"
"""The model whose batches of 4 x 768 tokens the targets for a GPU are set for."""
JUDGED = tuple(name for name in METHODS if method(name).kind == SLICEFINE)
"""Methods that the targets are set for."""
MET, MISSED, NOT_MEASURED = "met", "missed", "not measured"
NOTE = "What the project wants its slices to reach. Judged by the medians; min and max are within a round."


@dataclass(frozen=True, kw_only=True)
class Target:
    """A limit for one figure of a method."""

    figure: str
    column: str
    """Column of a table that has the figure; the least and the greatest within a round are in `<column>, min` and `<column>, max`."""
    at_most: float | None = None
    at_least: float | None = None
    """One of both is given."""
    inverted: bool = False
    """Whether the figure is one over what the column has."""

    def judge(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The figure, its limit, and the verdict; `row` is what was measured of one method."""
        result, low, high = (row.get(f"{self.column}{end}") for end in ("", ", min", ", max"))
        if self.inverted:
            result, low, high = (value and 1 / value for value in (result, high, low))
        return {
            "figure": self.figure,
            "target": f"at least {self.at_least:g}" if self.at_most is None else f"at most {self.at_most:g}",
            "result": result,
            "min": low,
            "max": high,
            "verdict": NOT_MEASURED if result is None else MET if self._is_met(result) else MISSED,
        }

    def _is_met(self, result: float) -> bool:
        return result <= self.at_most if self.at_most is not None else result >= (self.at_least or 0)


def _throughput(at_least: float) -> Target:
    return Target(figure=f"throughput / {REFERENCE}", column=f"/ {REFERENCE}", at_least=at_least, inverted=True)


STEP = Target(figure=f"step / {FROZEN}", column=f"/ {FROZEN}", at_most=1.05)
MOVE = Target(figure="a move / step", column="a move / training step", at_most=1.0)
PEAK = Target(figure=f"peak / {REFERENCE}", column=f"peak MiB / {REFERENCE}", at_most=0.80)


def of_speed(model: str, *, gpu: bool, dtype: str, threads: int) -> list[Target]:
    """Targets for times of the architecture `model` at its own size, neither compiled nor checkpointed; none where none are set.

    Args:
        threads: Those of the CPU.
    """
    if gpu:
        return [STEP, _throughput(1.25), MOVE] if (model, dtype) == (LARGE, "bfloat16") else []
    if model not in SMALL or dtype != "float32":
        return []
    if threads == 1:
        return [STEP, MOVE]
    return [STEP, _throughput(1.3 if threads >= 4 else 1.2), MOVE]


def of_memory(model: str, *, gpu: bool, dtype: str) -> list[Target]:
    """The same for memory."""
    return [PEAK] if gpu and (model, dtype) == (LARGE, "bfloat16") else []


def judge(targets: Sequence[Target], *tables: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for every method that the targets are set for and every target; what was measured is in rows of `tables`, by `method`."""
    measured: dict[str, dict[str, Any]] = {}
    for row in (row for table in tables for row in table):
        measured.setdefault(row["method"], {}).update(row)
    return [
        {"method": name, **target.judge(row)} for name, row in measured.items() if name in JUDGED for target in targets
    ]
