"""What a run logged, step by step, and where its slices moved: `history.json` in the run folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from transformers import TrainerState

from slicefine.slicing import Schedule
from slicefine.training.record import write_atomically

FILE = "history.json"
VERSION = 1


def write(state: TrainerState, schedule: Schedule, folder: Path) -> None:
    """Write the log of Trainer into `folder`, all or nothing; of a run that was resumed, that of all sessions.

    `log`: Trainer's entries, in order, numbers that are not finite as null. `moves`: optimizer steps after which the slices moved,
    as the schedule of the recipe has it; a weight that rests below a depth window moves later.
    """
    moves = [step for step in range(1, state.global_step) if schedule.moves(step) > schedule.moves(step - 1)]
    content = {"version": VERSION, "log": [_plain(entry) for entry in state.log_history], "moves": moves}
    write_atomically(folder / FILE, json.dumps(content) + "\n")


def _plain(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in entry.items()
    }
