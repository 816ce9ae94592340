"""What every benchmark shares: provenance, spread, targets, and the two files a result is written to."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PACKAGES = ("torch", "transformers", "peft", "slicefine")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number that a target may be set for. `low` and `high`: its least and greatest value over the rounds."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    unit: str = ""
    at_most: float | None = None
    at_least: float | None = None

    def row(self) -> dict[str, Any]:
        """The figure as a row of the table of targets, with the verdict."""
        target, verdict = "", ""
        if self.at_most is not None:
            target, verdict = f"at most {self.at_most:g}", _verdict(self.value <= self.at_most)
        elif self.at_least is not None:
            target, verdict = f"at least {self.at_least:g}", _verdict(self.value >= self.at_least)
        return {
            "figure": self.name,
            "value": self.value,
            "min": self.low,
            "max": self.high,
            "unit": self.unit,
            "target": target,
            "verdict": verdict,
        }


def _verdict(met: bool) -> str:
    return "met" if met else "**missed**"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A titled table: rows with the same keys, in the order of the columns."""

    title: str
    rows: Sequence[dict[str, Any]]


def parser(description: str) -> argparse.ArgumentParser:
    """A parser that shows defaults in `--help`, with the options of every benchmark: `--seed` and `--output`."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--seed", type=int, default=0, help="seed of weights, data and order")
    made.add_argument("--output", type=Path, default=HERE, help="folder for the result, a .json and a .md of one name")
    return made


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1 is needed; got {text}")
    return number


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """Name of the CPU, as the system gives it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def provenance(command: Sequence[str], *, threads: int, seed: int, **more: Any) -> dict[str, Any]:
    """Everything needed to read a figure again: command, commit, seed, hardware, versions, date.

    `dirty`: whether the working tree differs from the commit. Results of benchmarks do not count, since each benchmark
    would make the next one look dirty.
    """
    ours = ["--", ".", ":(exclude,glob)benchmarks/*.json", ":(exclude,glob)benchmarks/*.md"]
    return {
        "command": shlex.join(["python", *command]),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", *ours)),
        "seed": seed,
        "cpu": cpu_model(),
        "cores": cores(),
        "threads": threads,
        "load_before": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
        **more,
    }


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], cwd=HERE.parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and greatest of `values`."""
    return statistics.median(values), min(values), max(values)


def say(text: str) -> None:
    """Progress, on stderr: stdout is for the result."""
    print(text, file=sys.stderr, flush=True)


def write(
    folder: Path,
    *,
    theme: str,
    hardware: str,
    intro: str,
    figures: Sequence[Figure],
    tables: Sequence[Table],
    made_by: dict[str, Any],
) -> Path:
    """Write `<theme>-<hardware>-<date>.json` and `.md` into `folder`, print the latter, and return its path.

    `intro` says what was measured and how. The JSON file holds the same tables with all digits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = "-".join([theme, _slug(hardware), made_by["date"][:10]])
    targets = Table(title="Figures", rows=[figure.row() for figure in figures])
    everything = [targets, *tables]
    record = {
        "theme": theme,
        "provenance": made_by,
        "intro": intro,
        "tables": [{"title": table.title, "rows": list(table.rows)} for table in everything],
    }
    lines = [f"# {theme}", "", intro, ""]
    for table in everything:
        lines += [f"## {table.title}", "", markdown(table.rows), ""]
    lines += ["## Provenance", "", *(f"- {key}: {value}" for key, value in made_by.items())]
    text = "\n".join(lines) + "\n"
    _replace(folder / f"{name}.json", json.dumps(record, indent=2) + "\n")
    _replace(folder / f"{name}.md", text)
    print(text)
    return folder / f"{name}.md"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", text.lower())).strip("-")


def _replace(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table in Markdown; columns that no row fills are left out."""
    columns = [key for key in rows[0] if any(row[key] not in (None, "") for row in rows)]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row[key]) for key in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 0.1 else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)
