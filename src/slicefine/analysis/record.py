"""The record of an analysis, `analysis.json`: what every stage found, as soon as it has, and the verdicts."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from slicefine.errors import SliceFineError
from slicefine.training.record import write_atomically

FILE = "analysis.json"
VERSION = 1


@dataclass(kw_only=True)
class AnalysisRecord:
    """All that is known of an analysis; docs/analysis.md describes every key."""

    model: dict[str, Any]
    """`name`, `class`, `parameters`, and `fingerprint`, a digest of values from all over its weights."""
    untrained: bool
    task: str | None
    data: dict[str, Any]
    """Source, fingerprint and size of each set; empty where there are no examples."""
    settings: dict[str, Any]
    command: str
    started: str
    status: Literal["running", "finished", "interrupted", "failed"] = "running"
    ended: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    commit: dict[str, Any] | None = None
    hardware: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    """Stage -> how long it took."""
    made: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Stage -> when, with which commit and versions: an analysis may go on later."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """What the recipe says of model and data, where these lie left out."""
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Stage -> what it found."""
    failed: dict[str, str] = field(default_factory=dict)
    """Stage -> why it found nothing."""
    verdicts: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    kind: str = "analysis"
    version: int = VERSION

    def write(self, folder: Path) -> None:
        """Write `analysis.json` into `folder`, all or nothing."""
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / FILE, json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n")

    @classmethod
    def read(cls, folder: Path) -> AnalysisRecord | None:
        """The record in `folder`; None if there is none. Raises `SliceFineError` if it is of another version or damaged."""
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["version"] == VERSION:
                return cls(**content)
        except (ValueError, TypeError, KeyError) as error:
            raise SliceFineError(
                f"{path} is not the record of an analysis ({error}). Remove it, or name another --output."
            ) from error
        raise SliceFineError(
            f"{path} is of version {content['version']}; this slicefine reads version {VERSION}. Remove it, or name another --output."
        )

    def refuse_other(self, other: AnalysisRecord, folder: Path) -> None:
        """Raise `SliceFineError` if `other`, which is to go on with what this one has found in `folder`, is about something else."""
        mine, theirs = self._about(), other._about()
        changed = [
            f"{key} was {mine.get(key)} and is {theirs.get(key)} now"
            for key in {**mine, **theirs}
            if mine.get(key) != theirs.get(key)
        ]
        if changed:
            raise SliceFineError(
                f"{folder} has another analysis: {'; '.join(changed)}. Name another --output, or remove {folder / FILE}."
            )

    def _about(self) -> dict[str, Any]:
        """What decides what is found, beside the versions of packages."""
        data = {
            name: {key: of.get(key) for key in ("fingerprint", "examples")}
            for name, of in self.data.items()
            if isinstance(of, dict)
        }
        known = {key: value for key, value in self.settings.items() if key not in ("stages", "output")}
        return {
            "the model's class": self.model["class"],
            "the model's digest": self.model["fingerprint"],
            "untrained": self.untrained,
            "the task": self.task,
            "the data": data,
            **known,
            **self.recipe,
        }
