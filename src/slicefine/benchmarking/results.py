"""What a benchmark writes: a JSON file with every digit and where it comes from, the same tables in Markdown, and charts."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slicefine.training.record import commit, hardware, now, versions, write_atomically

VERSION = 1
"""Of the JSON file."""

Row = dict[str, Any]


@dataclass(kw_only=True)
class Table:
    """Rows with the same keys, in the order of the columns."""

    title: str
    rows: list[Row]
    note: str = ""


@dataclass(kw_only=True)
class Report:
    """A result as it grows; written anew whenever something is added, so that what was measured is never lost."""

    theme: str
    """First part of the name of its files."""
    intro: str
    """What was measured, and how."""
    folder: Path
    command: str
    settings: Mapping[str, Any]
    tables: list[Table] = field(default_factory=list)
    raw: list[dict[str, Any]] = field(default_factory=list)
    """Every single measurement."""
    charts: dict[str, str] = field(default_factory=dict)
    """Ending of a file name -> SVG."""
    status: str = "running"
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        threads = self.settings.get("threads")  # of its runs, which may be processes of their own
        self.provenance = {
            "command": self.command,
            "seed": self.settings["seed"],
            "started": now(),
            "commit": commit(),
            "hardware": hardware() | ({"threads": threads} if threads else {}),
            "system": platform.platform(),
            "versions": versions(),
            "settings": dict(self.settings),
        }

    @property
    def name(self) -> str:
        """`<theme>-<hardware>-<date>-<time>`"""
        found = self.provenance["hardware"]
        device = found["gpu"] if self.settings["device"] == "cuda" else f"{found['cpu']} {found['threads']} threads"
        stamp = re.sub(r"[^0-9T]", "", self.provenance["started"][:19]).replace("T", "-")
        return f"{self.theme}-{_slug(device)}-{stamp}"

    @property
    def path(self) -> Path:
        """The Markdown file; the JSON file is beside it, under the same name."""
        return self.folder / f"{self.name}.md"

    def write(self) -> None:
        """Write the files as things stand."""
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {
            "version": VERSION,
            "theme": self.theme,
            "status": self.status,
            "intro": self.intro,
            "provenance": self.provenance,
            "tables": [asdict(table) for table in self.tables],
            "raw": self.raw,
        }
        for ending, drawing in self.charts.items():
            write_atomically(self.folder / f"{self.name}{ending}.svg", drawing)
        write_atomically(self.path.with_suffix(".json"), json.dumps(record, indent=2) + "\n")
        write_atomically(self.path, self.markdown())

    def markdown(self) -> str:
        """The whole page."""
        lines = [f"# {self.theme}", "", self.intro, ""]
        if self.status == "interrupted":
            lines += ["Interrupted: what follows is what was measured until then.", ""]
        lines += [f"![{self.name}{ending}]({self.name}{ending}.svg)\n" for ending in self.charts]
        for table in self.tables:
            lines += [f"## {table.title}", "", *([table.note, ""] if table.note else []), markdown(table.rows), ""]
        lines += ["## Provenance", "", *(f"- {key}: {_flat(value)}" for key, value in self.provenance.items())]
        return "\n".join(lines) + "\n"


def markdown(rows: Sequence[Row]) -> str:
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
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    return str(value)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", text.lower())).strip("-")
