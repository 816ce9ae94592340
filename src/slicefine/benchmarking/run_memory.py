"""Where the memory of a finished run went, by part: `memory.json` in the run folder."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from slicefine.benchmarking.planned_config import read_config, whole
from slicefine.benchmarking.planned_cost import SLICEFINE, cost
from slicefine.benchmarking.planned_model import subject
from slicefine.benchmarking.planning import CPU, GPU
from slicefine.errors import SliceFineWarning
from slicefine.training.recipe import Recipe
from slicefine.training.record import RunRecord, write_atomically

FILE = "memory.json"
VERSION = 1


def write(recipe: Recipe, record: RunRecord) -> None:
    """Write the parts as the plan counts them (exact but for what depends on the texts of a batch), and the peak that was measured.

    Raises `SliceFineError` for a run that cannot be planned.
    """
    gpu = record.hardware.get("gpu") is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SliceFineWarning)  # said when the run began
        found = cost(
            subject(recipe, whole(recipe, read_config(recipe.model.name))), SLICEFINE, gpu=gpu, steps=record.steps
        )
    assert found.step is not None
    parts = {
        "weights": found.weights,
        "masters": found.masters,
        "moments": found.moments,
        "gradients": found.step.gradients,
        "saved for backward": found.step.saved - found.step.saved_logits,
        "logits": found.step.logits,
        "originals, on the CPU": found.originals,
    }
    content = {"version": VERSION, "parts": parts, "peak_bytes": record.peak_bytes, "device": GPU if gpu else CPU}
    write_atomically(Path(recipe.output) / FILE, json.dumps(content, indent=1) + "\n")
