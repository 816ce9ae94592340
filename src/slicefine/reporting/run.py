"""From the names of runs to one page."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from slicefine.errors import SliceFineError, raise_all
from slicefine.reporting import (
    comparing,
    of_analysis,
    of_benchmark,
    of_evaluation,
    of_plan,
    of_training,
)
from slicefine.reporting import records as reading
from slicefine.reporting.extras import missing, require_report
from slicefine.reporting.page import Page, html
from slicefine.reporting.records import ANALYSIS, BENCHMARK, EVALUATION, PLAN, TRAINING, Record

FILE = "report.html"
SUFFIXES = (".html", ".htm")
PAGES: dict[str, Callable[[Record], Page]] = {
    TRAINING: of_training.page,
    EVALUATION: of_evaluation.page,
    ANALYSIS: of_analysis.page,
    BENCHMARK: of_benchmark.page,
    PLAN: of_plan.page,
}


def write(paths: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page of one run, or of several side by side; returns the file.

    Args:
        paths: Run folders, or the files that tell of runs.
        output: The file; None = `report.html` in the folder of the one run (beside the file of a benchmark, a page of its name), or in
            the working directory for several.

    Raises `SliceFineError` for what is missing, damaged or cannot be compared, all of it at once, and for an output that cannot be
    written. Nothing is half-written: a page that was there before stays until the new one is whole.
    """
    require_report()
    if not paths:
        raise SliceFineError("A report is of at least one RUN: slicefine report RUN.")
    problems = [] if output is None else output_problems(output)
    records = reading.read(paths, problems)
    raise_all(problems, "slicefine report")
    place = output or (_own_place(records[0]) if len(records) == 1 else Path(FILE))
    _write_whole(place, html(_page(records)))
    return place


def write_beside(path: Path, say: Callable[[str], None]) -> Path | None:
    """The page at the end of another command: what keeps it from being written is said and nothing fails; None then."""
    if sentence := missing():
        say(f"No report.html. {sentence}")
        return None
    try:
        return write([path])
    except SliceFineError as error:
        say(f"No report.html. {error}")
    except Exception as error:
        # What the command was for is done, and its record is whole: a page is not worth its exit code.
        say(f"No report.html. {type(error).__name__}: {error}")
    return None


def _own_place(record: Record) -> Path:
    """Where the page of a run is: a folder may have several benchmarks."""
    return record.file.with_suffix(SUFFIXES[0]) if record.kind == BENCHMARK else record.folder / FILE


def _page(records: Sequence[Record]) -> Page:
    try:
        return PAGES[records[0].kind](records[0]) if len(records) == 1 else comparing.page(records)
    except SliceFineError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        named = "; ".join(f"{record.folder} ({', '.join(record.made_from)})" for record in records)
        raise SliceFineError(
            f"{named}: a file is not as slicefine writes it ({type(error).__name__}: {error}). Was it changed by hand, or cut off? Run the "
            "command again."
        ) from error


def output_problems(output: Path) -> list[str]:
    """What is wrong with `--output`."""
    if output.is_dir():
        return [f"`--output` is a file; {output} is a folder. Name a file in it: {output / FILE}."]
    if output.suffix.lower() not in SUFFIXES:
        return [f"`--output` is an HTML file, whose name ends in .html; got {output}."]
    if not output.parent.is_dir():
        return [f"`--output` is a file in a folder that exists; there is no folder {output.parent}."]
    return []


def _write_whole(place: Path, text: str) -> None:
    temporary = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, place)
    except OSError as error:
        raise SliceFineError(
            f"{place} cannot be written ({error.strerror}). Name another file with --output."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
