"""How far every weight of a run has moved, and where: `slices.json` in the run folder."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slicefine.slicing import COLUMN, ROW, SLICE_AXES
from slicefine.training.record import write_atomically
from slicefine.tuner.inspection import tuned
from slicefine.tuner.layer import SliceLayer

FILE = "slices.json"
VERSION = 1


def write(model: nn.Module, folder: Path) -> None:
    """Write what `movement` finds into `folder`, all or nothing."""
    write_atomically(folder / FILE, json.dumps({"version": VERSION, **movement(model)}) + "\n")


def movement(model: nn.Module) -> dict[str, Any]:
    """Where the slices of every target are and were, and how far what they touched has moved.

    Returns `step`, the optimizer steps made, and `weights`, of each target: `name`, `shape`, `block` (the first number in its name; None
    if there is none), `axis` and `active` of its slice now, `touched` rows and columns, all as `[first, count]`; `share` of its entries
    that were touched; and `update`, `||now - original|| / ||original||` over these entries (Frobenius norms; None if there are none).

    Raises `SliceFineError` if `model` has no slicefine layer.
    """
    layers = tuned(model)
    weights = []
    for name, layer, adapter in layers:
        state, region = layer.slicefine_state[adapter], layer.region(adapter)
        weights.append(
            {
                "name": name,
                "shape": list(layer.shape),
                "block": next((int(part) for part in name.split(".") if part.isdecimal()), None),
                "axis": state.active.axis,
                "active": [list(run) for run in state.active.runs],
                "touched": {axis: _runs(region.along(axis)) for axis in SLICE_AXES},
                "share": region.size(layer.shape) / layer.matrix.numel(),
                "update": _update(layer, adapter),
            }
        )
    step = max((layer.slicefine_state[adapter].step for _, layer, adapter in layers), default=0)
    return {"step": step, "weights": weights}


def _runs(indices: tuple[int, ...]) -> list[list[int]]:
    """`[first, count]` of the indices that are neighbours."""
    groups = groupby(enumerate(indices), key=lambda pair: pair[1] - pair[0])
    found = [[index for _, index in group] for _, group in groups]
    return [[run[0], len(run)] for run in found]


def _update(layer: SliceLayer, adapter: str) -> float | None:
    region = layer.region(adapter)
    moved = original = 0.0
    for axis in SLICE_AXES:
        indices = region.along(axis)
        if not indices:
            continue
        now, before = layer.trained_values(adapter, axis, indices), layer.original_values(adapter, axis, indices)
        counted = torch.ones(before.shape[1], dtype=torch.bool)
        if axis == COLUMN:  # what a column shares with touched rows is counted with the rows
            counted[list(region.along(ROW))] = False
        now, before = now[:, counted].float(), before[:, counted].float()
        moved += float((now - before).square().sum(dtype=torch.float64))
        original += float(before.square().sum(dtype=torch.float64))
    return (moved / original) ** 0.5 if original else None
