"""What slices cost: exact counts from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from slicefine.slicing.geometry import Region, Shape
from slicefine.slicing.schedule import Schedule

MASTER_BYTES = 4
SEAL_BYTES = 192


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCounts:
    """How many entries of the model are trained, in numbers of parameters."""

    active: int
    """Trained at this step: the active slices, and the trained biases."""
    touched: int
    """Trained so far: every slice that an optimizer step has trained, each entry once, and the trained biases."""
    planned: int | None
    """Touched by the end of the run; None where the length of the run is not known."""
    added: int
    """Parameters that the exported model has and the base model has not."""
    total: int
    """Parameters of the base model."""
    modules_to_save: int
    """Parameters of the modules that are trained in full (a classifier head, say); in none of the counts above but
    `total`."""


def active_size(schedule: Schedule, shape: Shape, step: int) -> int:
    """Entries that optimizer step number `step` trains in a weight of `shape`."""
    if not schedule.active(step):
        return 0
    return schedule.slice_at(step, shape).size(shape)


def touched_size(schedule: Schedule, shape: Shape, step: int) -> int:
    """Entries that the first `step` optimizer steps train in a weight of `shape`, each counted once."""
    return Region.of(schedule.touched(step, shape)).size(shape)


def artifact_size(schedule: Schedule, shape: Shape, step: int, *, itemsize: int, bias: bool = False) -> int:
    """Bytes of tensor data that the saved adapter holds for a weight of `shape` after `step` optimizer steps.

    Touched rows and columns in the base dtype (`itemsize` bytes an entry; where they cross, both hold the entry), the
    fp32 master (as long as the longer side of the weight for `alternate`), the fp32 bias if it is trained, and the seal.
    """
    region = Region.of(schedule.touched(step, shape))
    values = (len(region.rows) * shape[1] + len(region.columns) * shape[0]) * prod(shape[2:])
    master = prod(schedule.widest(shape)) + (shape[0] if bias else 0)
    return values * itemsize + master * MASTER_BYTES + SEAL_BYTES
