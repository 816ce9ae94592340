"""The page that a command writes when it is done."""

from __future__ import annotations

import sys
from pathlib import Path


def write_page(place: str | Path) -> None:
    """Write the report of the run record in `place`, and say where it is; what keeps it from being made is said and is no failure."""
    from slicefine.reporting.run import write_beside

    made = write_beside(Path(place), say)
    if made is not None:
        say(f"report: {made}")


def say(line: str) -> None:
    """For people, beside what a command prints."""
    print(line, file=sys.stderr)
