"""`slicefine report RUN... [--output FILE]`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

NAME = "report"
HELP = "Make the page of a run from its records alone, or put several runs side by side in one."


def add(parser: ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.usage = "slicefine report RUN ... [--output FILE]"
    parser.add_argument(
        "run",
        type=str,
        nargs="+",
        metavar="RUN",
        help="Folder of a training run, an evaluation, an analysis or a plan, or the JSON file of a benchmark",
    )
    parser.add_argument(
        "--output",
        type=str,
        metavar="FILE",
        help="HTML file to write; null = report.html in the folder of the run (of a benchmark: beside its file, under its name), or for "
        "several in the working directory",
    )


def run(given: Any) -> int:
    """Write the page and print where it is; returns 0."""
    from slicefine.reporting.run import write

    output = given.get("output")
    print(write([Path(name) for name in given.run], None if output is None else Path(output)))
    return 0
