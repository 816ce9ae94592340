"""Slices, positions and counts. Pure Python: no torch here."""

from slicefine.slicing.budget import ParameterCounts, active_size, artifact_size, touched_size
from slicefine.slicing.geometry import COLUMN, ROW, SLICE_AXES, Region, Shape, Slice
from slicefine.slicing.layout import Layout
from slicefine.slicing.schedule import ALTERNATE, AXES, COUPLED, ORDERS, Schedule
from slicefine.slicing.window import Window

__all__ = [
    "ALTERNATE",
    "AXES",
    "COLUMN",
    "COUPLED",
    "ORDERS",
    "ROW",
    "SLICE_AXES",
    "Layout",
    "ParameterCounts",
    "Region",
    "Schedule",
    "Shape",
    "Slice",
    "Window",
    "active_size",
    "artifact_size",
    "touched_size",
]
