"""Tables of examples from .jsonl, .json, .csv and .parquet files and from the hub.

Text files are read here line by line and not by `datasets`, so that a mistake is reported with its line, and nothing is
guessed: pandas would turn the word "None" into a missing value, and a column of digits into numbers.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slicefine.errors import SliceFineError, did_you_mean, first_line, listed

if TYPE_CHECKING:
    from datasets import Dataset

    from slicefine.training.recipe import DataSettings

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
SPLITS = {name: names for names in (("validation", "val", "valid", "dev"), ("train", "training")) for name in names}
"""Name of a split -> names that its folder may have."""
SHOWN_PROBLEMS = 10
_GAP = re.compile(r"[\s,]*")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of one source, with the columns that were asked for, or with all of them."""

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


Columns = Collection[str] | None
"""Those to read, None for all that there are; as a mapping, to the flag that says what each is called, for messages."""


def read_table(source: str, columns: Columns, *, subset: str | None = None, split: str = "train") -> Table:
    """Read `columns` of a file, or of a hub data set (`subset`, `split`); all that there are if `columns` is None.

    Raises `SliceFineError` with every problem found: a missing file or column, a line that is not JSON, not UTF-8 or not
    as long as the header.
    """
    path = Path(source)
    if path.suffix.lower() in SUFFIXES or path.exists():
        return _read_file(path, columns)
    dataset = load_hub(source, columns, subset, split)
    return hub_table(dataset, source, subset, split, dataset._fingerprint)


def read_tables(data: DataSettings, columns: Columns) -> dict[str, Table]:
    """`"train"`, and `"validation"` unless it is a fraction of train. Raises as `read_table`."""
    if data.train is None:
        raise SliceFineError(
            "`data.train` says where the examples are; it is null. A data set by name needs a resolved recipe."
        )
    if columns is not None:
        flags = {getattr(data, name): f"--data.{name}" for name in ("text", "text_pair", "label")}
        columns = {column: flags.get(column, "") for column in columns}
    tables = {"train": read_table(data.train, columns, subset=data.subset, split=data.train_split)}
    if isinstance(data.validation, str):
        is_split = names_a_split(data.validation, data.train)
        tables["validation"] = read_table(
            data.train if is_split else data.validation, columns, subset=data.subset, split=data.validation
        )
    return tables


def names_a_split(validation: str, train: str) -> bool:
    """Whether `validation` is a split of `train`: of a data set of the hub, or a folder in that of the training examples; else it is a path."""
    path, root = Path(validation), Path(train)
    if path.name != validation or path.suffix.lower() in SUFFIXES:
        return False
    if root.is_dir():
        return any((root / name).is_dir() for name in SPLITS.get(validation, (validation,)))
    return not root.exists()


def shorten(problems: list[str]) -> list[str]:
    """The first problems, and how many there are more."""
    more = len(problems) - SHOWN_PROBLEMS
    return problems if more <= 0 else [*problems[:SHOWN_PROBLEMS], f"and {more} more like these."]


def _read_file(path: Path, columns: Columns) -> Table:
    if path.is_dir():
        raise SliceFineError(
            f"{path} is a folder; a task of texts reads files ({', '.join(SUFFIXES)}). For folders of images or clips, use a recipe of "
            "image-classification or video-classification."
        )
    if not path.is_file():
        near = [file.name for file in path.parent.glob("*")] if path.parent.is_dir() else []
        raise SliceFineError(f"The data file {path} does not exist.{did_you_mean(path.name, near)}")
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
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


def _jsonl(path: Path, columns: Columns, problems: list[str]) -> Rows:
    count, lacking = 0, defaultdict[str, list[str]](list)
    for number, line in _lines(path, problems):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(f"{place}: not valid JSON at character {error.pos + 1} ({error.msg}).")
            continue
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand brackets
            problems.append(f"{place}: JSON that cannot be read ({error}).")
            continue
        count += 1
        if not isinstance(row, dict):
            problems.append(f"{place}: each line is a JSON object; got {line.strip()[:40]!r}.")
        elif problem := _half_character(row):
            problems.append(f"{place}: {problem}")
        elif missing := _missing(columns, list(row)):
            lacking[missing].append(place)
        else:
            yield place, _picked(row, columns)
    problems[:0] = _once(path, lacking, count)


def _json(path: Path, columns: Columns, problems: list[str]) -> Rows:
    text = "".join(line for _, line in _lines(path, problems))
    if problems:
        return
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        lines = " It looks like one object a line: name it .jsonl." if error.msg == "Extra data" else ""
        problems.append(f"{path}:{error.lineno}: not valid JSON at character {error.colno} ({error.msg}).{lines}")
        return
    except (ValueError, RecursionError) as error:
        problems.append(f"{path}: JSON that cannot be read ({error}).")
        return
    if not isinstance(content, list):
        problems.append(f"{path}: a .json file is a list of objects; got {text.strip()[:40]!r}.")
        return
    lacking = defaultdict[str, list[str]](list)
    for number, (line, row) in enumerate(zip(_first_lines(text), content, strict=True), 1):
        place = f"{path}:{line} (row {number})"  # many rows may stand in one line
        if not isinstance(row, dict):
            problems.append(f"{place}: each element of the list is a JSON object; got {str(row)[:40]!r}.")
        elif problem := _half_character(row):
            problems.append(f"{place}: {problem}")
        elif missing := _missing(columns, list(row)):
            lacking[missing].append(place)
        else:
            yield place, _picked(row, columns)
    problems[:0] = _once(path, lacking, len(content))


def _first_lines(text: str) -> Iterator[int]:
    """The line in which each element of a JSON list begins. The text must be valid."""
    decoder = json.JSONDecoder()
    line, counted, at = 1, 0, _end(re.match(r"\s*\[\s*", text))
    while at < len(text) and text[at] != "]":
        line, counted = line + text.count("\n", counted, at), at
        yield line
        _, at = decoder.raw_decode(text, at)
        at = _end(_GAP.match(text, at))


def _end(found: re.Match[str] | None) -> int:
    assert found is not None  # the pattern matches nothing as well
    return found.end()


def _half_character(row: dict[str, Any]) -> str | None:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"{error.object[error.start]!a} is half of a surrogate pair, which is no character."
    return None


def _once(path: Path, lacking: dict[str, list[str]], count: int) -> list[str]:
    """Problems and the places of the rows that have each -> one sentence for each; of `count` rows in all."""
    said = []
    for problem, places in lacking.items():
        if 1 < len(places) == count:
            said.append(f"{path}: in all {count} rows, {problem}")
        else:
            more = f" So in {len(places) - 1} more rows." if len(places) > 1 else ""
            said.append(f"{places[0]}: {problem}{more}")
    return said


def _picked(row: dict[str, Any], columns: Columns) -> dict[str, Any]:
    return row if columns is None else {column: row[column] for column in columns}


def _csv(path: Path, columns: Columns, problems: list[str]) -> Rows:
    csv.field_size_limit(2**31 - 1)  # of a text; Python's own limit is 131,072 characters
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
                twice = [name for name in columns or header if header.count(name) > 1]
                if twice:
                    problems.append(f"{path}:1: the header has {listed(map(repr, twice))} more than once. Rename one.")
                    return
                continue
            if len(fields) != len(header):
                problems.append(
                    f"{path}:{reader.line_num}: {len(fields)} fields where the header has {len(header)}. A text with a "
                    'comma in it goes between double quotes ("...").'
                )
                continue
            yield f"{path}:{reader.line_num}", _picked(dict(zip(header, fields, strict=True)), columns)
    except csv.Error as error:
        problems.append(f"{path}:{reader.line_num}: not valid CSV ({error}).")


def _other_separator(header: list[str]) -> str | None:
    """Say so if something else than a comma separates the columns."""
    found = next((mark for mark in ";\t|" if mark in header[0]), None)
    if len(header) > 1 or found is None:
        return None
    return f"the columns of a CSV file are separated by commas, these by {found!r}. Save the file with commas."


def _parquet(path: Path, columns: Columns, problems: list[str]) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if missing := _missing(columns, file.schema_arrow.names):
            problems.append(f"{path}: {missing}")
            return
        number = 0
        for batch in file.iter_batches(columns=None if columns is None else list(columns)):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        problems.append(f"{path}: not a complete Parquet file ({first_line(error)}).")


def load_hub(source: str, columns: Columns, subset: str | None, split: str) -> Dataset:
    """A split of a hub data set with `columns`, or with all that there are. Raises `SliceFineError` if there is none such."""
    import datasets

    from slicefine.training.hub import dataset_problem, near

    if problem := dataset_problem(source):
        raise SliceFineError(problem)
    try:
        dataset = datasets.load_dataset(source, subset, split=split)
    except Exception as error:  # an unreachable hub, unknown names, scripts: of many classes
        part = f"split {split!r}" if subset is None else f"subset {subset!r}, split {split!r}"
        raise SliceFineError(
            f"{source!r} is no file here (a data file ends in {', '.join(SUFFIXES)}) and no folder, and as a data set of the "
            f"hub ({part}) it did not load: {first_line(error)}.{near(source)}"
        ) from error
    assert isinstance(dataset, datasets.Dataset)
    if missing := _missing(columns, dataset.column_names):
        raise SliceFineError(f"{source}, split {split}: {missing}")
    return dataset if columns is None else dataset.select_columns(list(columns))


def hub_table(dataset: Dataset, source: str, subset: str | None, split: str, fingerprint: str) -> Table:
    """All of a hub data set as rows."""
    from datasets import ClassLabel

    return Table(
        source=source if subset is None else f"{source} ({subset})",
        fingerprint=fingerprint,
        rows=dataset.to_list(),
        places=[f"{source}, split {split}, row {number}" for number in range(1, len(dataset) + 1)],
        typed=True,
        class_names={name: kind.names for name, kind in dataset.features.items() if isinstance(kind, ClassLabel)},
    )


def _missing(columns: Columns, present: Collection[str]) -> str | None:
    missing = [column for column in columns or [] if column not in present]
    if not missing:
        return None
    named = ", ".join(repr(column) for column in missing)
    flags = [columns[column] for column in missing] if isinstance(columns, Mapping) else []
    set_by = f" Name the right one with {' and '.join(flags)}." if all(flags) and flags else ""
    there = ", ".join(map(repr, present)) or "none"
    return f"no column {named}; there are {there}.{did_you_mean(missing[0], present)}{set_by}"
