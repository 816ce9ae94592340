"""The record of a run, `record.json`: what ran, on what, how long, and how well."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from slicefine.errors import SliceFineError

FILE = "record.json"
PACKAGES = ("slicefine", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "trl")


@dataclass(kw_only=True)
class RunRecord:
    """What is known of a run; written when it begins and when it ends."""

    status: Literal["running", "finished", "interrupted", "failed"] = "running"
    task: str
    model: str
    """Name or folder of the base model."""
    seed: int
    started: str
    """UTC, ISO 8601."""
    ended: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    commit: dict[str, Any] | None = None
    """`hash` of the git commit of the working directory, and whether it was `modified`; None outside of git."""
    hardware: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    """Source, fingerprint and size of each set."""
    error: str | None = None
    """First line of what a failed run ended with."""
    notes: list[str] = field(default_factory=list)
    """What was decided for the user: end and pad tokens, examples that were dropped, what the loss counts."""
    modules_to_save: list[str] = field(default_factory=list)
    """Modules trained in full."""
    parameters: dict[str, int | None] = field(default_factory=dict)
    """`ParameterCounts`, in numbers of parameters."""
    steps: int = 0
    """Optimizer steps made."""
    planned_steps: int = 0
    moves: int = 0
    """Moves of the slices made."""
    resumed_from: list[int] = field(default_factory=list)
    """Optimizer steps at which the run was taken up again."""
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    """Scores of the validation set `before` and `after` training."""
    timings: dict[str, Any] = field(default_factory=dict)
    """`train_seconds` (all sessions, validation and checkpoints included); of the last session `step_seconds_mean`,
    `step_seconds_median` (forward, backward and update alone) and `data_wait_share`, the part of the time of all steps, 0
    to 1, in which they waited for their batches; `frozen_limit_ratio` (see `frozen_limit.py`; None where it was not measured)."""
    peak_bytes: int | None = None
    """Most that was allocated on the GPU in the last session; None on a CPU."""
    artifact_bytes: int | None = None
    """Size of the adapter: weights and configuration, without the tokenizer or processor."""

    def write(self, folder: Path) -> None:
        """Write `record.json` into `folder`, all or nothing."""
        write_atomically(folder / FILE, json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """Read the record in `folder`. Raises `SliceFineError` if there is none or it cannot be one."""
        path = folder / FILE
        if not path.is_file():
            raise SliceFineError(f"A run folder holds {FILE}; there is none in {folder}.")
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise SliceFineError(f"{path} is not the record of a run ({error}).") from error


def now() -> str:
    """The time, UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to a temporary name beside `path` and rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def commit() -> dict[str, Any] | None:
    """The git commit of the working directory."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        return {
            "hash": git("rev-parse", "HEAD"),
            "modified": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware() -> dict[str, Any]:
    """Processor, cores, threads and GPU."""
    import torch

    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
