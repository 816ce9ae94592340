"""Tables of examples from .jsonl, .csv and .parquet files and from the hub.

Text files are read here line by line and not by `datasets`, so that a mistake is reported with its line, and nothing is
guessed: pandas would turn the word "None" into a missing value, and a column of digits into numbers.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slicefine.errors import SliceFineError, did_you_mean

SUFFIXES = (".jsonl", ".csv", ".parquet")
SHOWN_PROBLEMS = 10


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of one source, with the columns that were asked for."""

    source: str
    """File or hub name."""
    fingerprint: str
    """Changes with the content: `sha256:...` of a file, the fingerprint that `datasets` gives otherwise."""
    rows: list[dict[str, Any]]
    places: list[str]
    """Where each row is, for messages: `train.jsonl:3`."""
    typed: bool
    """False where every value is a string by nature (CSV)."""
    class_names: dict[str, list[str]] = field(default_factory=dict)
    """Names of the classes of a column, where the source declares them (hub)."""


def read_table(source: str, columns: list[str], *, subset: str | None = None, split: str = "train") -> Table:
    """Read `columns` of a file, or of a hub data set (`subset`, `split`).

    Raises `SliceFineError` with every problem found: a missing file or column, a line that is not JSON, not UTF-8 or not
    as long as the header.
    """
    path = Path(source)
    if path.suffix.lower() in SUFFIXES or path.exists():
        return _read_file(path, columns)
    return _read_hub(source, columns, subset, split)


def shorten(problems: list[str]) -> list[str]:
    """The first problems, and how many there are more."""
    more = len(problems) - SHOWN_PROBLEMS
    return problems if more <= 0 else [*problems[:SHOWN_PROBLEMS], f"and {more} more like these."]


def _read_file(path: Path, columns: list[str]) -> Table:
    if not path.is_file():
        near = [file.name for file in path.parent.glob("*")] if path.parent.is_dir() else []
        found = "is a folder" if path.is_dir() else "does not exist"
        raise SliceFineError(f"The data file {path} {found}.{did_you_mean(path.name, near)}")
    readers = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise SliceFineError(
            f"A data file is {', '.join(SUFFIXES)}; got {path}. Write it as one JSON object per line (.jsonl), say."
        )
    problems: list[str] = []
    rows, places = [], []
    for place, row in readers[suffix](path, columns, problems):
        places.append(place)
        rows.append(row)
    if problems:
        raise SliceFineError("\n".join(shorten(problems)))
    with path.open("rb") as file:
        fingerprint = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    return Table(source=str(path), fingerprint=fingerprint, rows=rows, places=places, typed=suffix != ".csv")


Rows = Iterator[tuple[str, dict[str, Any]]]


def _lines(path: Path, problems: list[str]) -> Iterator[tuple[int, str]]:
    """Number and text of each line; a line that is not UTF-8 becomes a problem."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                problems.append(
                    f"{path}:{number}: byte {error.start + 1} of the line, 0x{line[error.start]:02x}, is not UTF-8. Save "
                    "the file as UTF-8."
                )


def _jsonl(path: Path, columns: list[str], problems: list[str]) -> Rows:
    for number, line in _lines(path, problems):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()
        except json.JSONDecodeError as error:
            problems.append(f"{path}:{number}: not valid JSON at character {error.pos + 1} ({error.msg}).")
            continue
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            problems.append(f"{path}:{number}: {half} is half of a surrogate pair, which is no character.")
            continue
        if not isinstance(row, dict):
            problems.append(f"{path}:{number}: each line is a JSON object; got {line.strip()[:40]!r}.")
            continue
        if missing := _missing(columns, list(row)):
            problems.append(f"{path}:{number}: {missing}")
            continue
        yield f"{path}:{number}", {column: row[column] for column in columns}


def _csv(path: Path, columns: list[str], problems: list[str]) -> Rows:
    reader = csv.reader((line for _, line in _lines(path, problems)), strict=True)
    header: list[str] | None = None
    try:
        for fields in reader:
            if not fields:
                continue
            if header is None:
                header = fields
                if missing := _missing(columns, header):
                    problems.append(f"{path}:1: {_other_separator(header) or missing}")
                    return
                continue
            if len(fields) != len(header):
                problems.append(
                    f"{path}:{reader.line_num}: {len(fields)} fields where the header has {len(header)}. A text with a "
                    'comma in it goes between double quotes ("...").'
                )
                continue
            row = dict(zip(header, fields, strict=True))
            yield f"{path}:{reader.line_num}", {column: row[column] for column in columns}
    except csv.Error as error:
        problems.append(f"{path}:{reader.line_num}: not valid CSV ({error}).")


def _other_separator(header: list[str]) -> str | None:
    """Say so if something else than a comma separates the columns."""
    found = next((mark for mark in ";\t|" if mark in header[0]), None)
    if len(header) > 1 or found is None:
        return None
    return f"the columns of a CSV file are separated by commas, these by {found!r}. Save the file with commas."


def _parquet(path: Path, columns: list[str], problems: list[str]) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if missing := _missing(columns, file.schema_arrow.names):
            problems.append(f"{path}: {missing}")
            return
        number = 0
        for batch in file.iter_batches(columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        problems.append(f"{path}: not a complete Parquet file ({str(error).splitlines()[0]}).")


def _read_hub(source: str, columns: list[str], subset: str | None, split: str) -> Table:
    import datasets

    try:
        dataset = datasets.load_dataset(source, subset, split=split)
    except (OSError, ValueError) as error:  # unreachable hub, unknown name, subset or split
        raise SliceFineError(
            f"{source!r} is no file here (a data file ends in {', '.join(SUFFIXES)}), and as a data set of the hub "
            f"(subset {subset!r}, split {split!r}) it did not load: {str(error).splitlines()[0]}"
        ) from error
    assert isinstance(dataset, datasets.Dataset)
    if missing := _missing(columns, dataset.column_names):
        raise SliceFineError(f"{source}, split {split}: {missing}")
    dataset = dataset.select_columns(columns)
    return Table(
        source=source if subset is None else f"{source} ({subset})",
        fingerprint=dataset._fingerprint,
        rows=dataset.to_list(),
        places=[f"{source}, split {split}, row {number}" for number in range(1, len(dataset) + 1)],
        typed=True,
        class_names={
            name: kind.names for name, kind in dataset.features.items() if isinstance(kind, datasets.ClassLabel)
        },
    )


def _missing(columns: list[str], present: list[str]) -> str | None:
    missing = [column for column in columns if column not in present]
    if not missing:
        return None
    named = ", ".join(repr(column) for column in missing)
    return f"no column {named}; there are {', '.join(map(repr, present)) or 'none'}.{did_you_mean(missing[0], present)}"
