"""The runs of a comparison, each kept in a file of its own as soon as it is finished, so that none is ever made twice."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slicefine.errors import SliceFineError
from slicefine.training.record import write_atomically

VERSION = 1
"""Of the files."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: of a method on a task."""

    task: str
    method: str
    """Name of the variant."""
    learning_rate: float
    seed: int
    steps: int
    """Optimizer steps."""
    final: bool
    """Whether it is judged by the examples that nothing was chosen on; else by those that choose the learning rate."""

    @property
    def words(self) -> str:
        """For progress and messages."""
        return f"{self.task}, {self.method}, learning rate {self.learning_rate:g}, seed {self.seed}, {self.steps} steps"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run gave."""

    active: int
    """Parameters trained at a step, heads left out."""
    touched: int
    """Parameters trained by the end of such a run, heads left out."""
    head: int
    added: int
    total: int
    steps: int
    """Optimizer steps made; fewer than planned if it diverged."""
    loss: float | None
    """Mean loss of the judging examples; None if it diverged."""
    scores: dict[str, float]
    """Name -> score of the judging examples; empty for a task without scores, and if it diverged."""
    curve: list[dict[str, float]]
    """`step`, `loss` and scores of the examples that choose, as the run went on."""
    predicted: list[float] = field(default_factory=list)
    """Class, or number, of each judging example in a final run."""
    labels: list[float] = field(default_factory=list)
    seconds: float = 0.0
    """Time in training steps, on a machine that may have had other work."""
    peak_bytes: int | None = None
    """Most that torch allocated on the GPU."""
    reserved_bytes: int | None = None
    """Most that torch reserved on the GPU."""
    peft_config: dict[str, Any] | None = None
    """The adapter's settings; None where PEFT has no part in it."""
    diverged: str | None = None
    """What was not finite, where that ended the run."""
    made: dict[str, Any] = field(default_factory=dict)
    """Time, commit and machine."""


class Cells:
    """The finished runs in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, cell: Cell, settings: Mapping[str, Any]) -> Path:
        """Where the run `cell` is kept; `settings` are all that decides it beside the cell itself, as JSON values."""
        return self.folder / file_of(cell.task, [dataclasses.asdict(cell), settings])

    def read(self, cell: Cell, settings: Mapping[str, Any]) -> Outcome | None:
        """What the run gave; None if it was not made. Raises `SliceFineError` if its file is of another version or is damaged."""
        path = self.path(cell, settings)
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content["version"]
            if version == VERSION:
                return Outcome(**content["outcome"])
        except (ValueError, TypeError, KeyError) as error:
            raise SliceFineError(
                f"{path} is not the file of a finished run ({error}). Remove it, and the run is made again."
            ) from error
        raise SliceFineError(
            f"{path} is of version {version}; this slicefine reads version {VERSION}. Use another `--cells` folder, or remove the file, and the "
            "run is made again."
        )

    def keep(self, cell: Cell, settings: Mapping[str, Any], outcome: Outcome) -> None:
        """Write what a run gave, all or nothing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {
            "version": VERSION,
            "cell": dataclasses.asdict(cell),
            "settings": dict(settings),
            "outcome": dataclasses.asdict(outcome),
        }
        write_atomically(self.path(cell, settings), json.dumps(content, default=str) + "\n")


def file_of(task: str, decisive: Any) -> str:
    """Name of a file for what `decisive`, JSON values, stands for; the name of the task begins it, as far as file systems take it."""
    text = json.dumps(decisive, sort_keys=True, default=str)
    plain = re.sub(r"[^\w.-]+", "-", task)
    return f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
