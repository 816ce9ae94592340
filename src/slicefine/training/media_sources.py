"""Images or clips and their labels: from folders, from tables with a column of paths, and from the hub.

No file is opened here, and of a hub data set nothing but labels is kept in memory.

| source                | labels                                                       |
|-----------------------|--------------------------------------------------------------|
| `ROOT/<class>/<file>` | names of the class folders                                   |
| `ROOT/<split>/<class>/<file>` | the same; splits are told by the folder of the training split |
| a table               | `data.label`; paths are relative to the table's folder       |
| a data set of the hub | `data.label`, as the data set declares it                    |
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slicefine.errors import SliceFineError, did_you_mean, listed, raise_all
from slicefine.training.data import SPLITS, SUFFIXES, Table, hub_table, load_hub, names_a_split, read_table, shorten

if TYPE_CHECKING:
    from datasets import Dataset

    from slicefine.training.recipe import DataSettings

Item = Path | bytes
"""An image or a clip: its file, or the content of one."""


@dataclass(frozen=True)
class Kind:
    """What the files are."""

    noun: str
    """For messages: image, clip."""
    feature: str
    """The name of the type of such a column in `datasets`."""
    suffixes: tuple[str, ...]
    """Of files, in lower case."""


@dataclass(frozen=True, kw_only=True)
class MediaTable:
    """Images or clips of one source and their labels, row by row."""

    items: Sequence[Item]
    labels: Table
    """The one column `data.label`; source, fingerprint and places are those of the files.

    The fingerprint of files is a hash of their names and sizes, and of the table if there is one: it changes when files are
    added, removed, renamed, put into another class or edited, but for edits that keep the size. Reading every byte of a large
    set would take as long as a part of the training.
    """
    problems: dict[int, str] = field(default_factory=dict)
    """What is wrong with the item of a row, as far as it can be told without opening it."""
    notes: list[str] = field(default_factory=list)
    has_columns: bool = True
    """False for a folder of class folders."""


class HubItems(Sequence[Item]):
    """The items of a column of a hub data set, read when they are asked for."""

    def __init__(self, dataset: Dataset, column: str) -> None:
        self._dataset, self._column = dataset.select_columns([column]), column

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, row: Any) -> Any:
        cell: dict[str, Any] = self._dataset[row][self._column] or {}
        if cell.get("bytes") is not None:
            return cell["bytes"]
        return Path(cell["path"]) if cell.get("path") else b""  # nothing at all: the check of the task says so


def read_sources(data: DataSettings, column: str, kind: Kind) -> dict[str, MediaTable]:
    """`"train"`, and `"validation"` unless it is a fraction of train.

    Args:
        data: `train`, `validation`, `subset`, `train_split` and `label` are read.
        column: Of the paths in a table, or of the images or clips of a hub data set.
        kind: What the files are.

    Raises `SliceFineError` with every problem of a source: folders without classes, empty ones, nested ones, missing columns.
    """
    assert data.train is not None
    root = Path(data.train)
    if not root.is_dir():
        tables = {"train": _table_or_hub(data.train, data, column, data.train_split, kind)}
        if isinstance(data.validation, str):
            tables["validation"] = _other(data, column, kind)
        return tables
    splits = _split_folders(root, data, kind)
    tables = {"train": _folder(splits.get(data.train_split, root), data, kind)}
    if isinstance(data.validation, str):
        same = [name for name in SPLITS.get(data.validation, (data.validation,)) if name in splits]
        if same:
            tables["validation"] = _folder(splits[same[0]], data, kind)
        elif Path(data.validation).exists() or Path(data.validation).suffix.lower() in SUFFIXES:
            tables["validation"] = _other(data, column, kind)
        else:
            others = ", ".join(name for name in splits if splits[name] != splits[data.train_split]) or "none"
            raise SliceFineError(
                f"Data: `data.validation` is a folder, a table, a split below {root} (there are: {others}), or a fraction; got "
                f"{data.validation!r}.{did_you_mean(data.validation, splits)}"
            )
    elif unused := [name for name in (*SPLITS["validation"], "test") if name in splits and name != data.train_split]:
        tables["train"].notes.append(
            f"{splits[unused[0]]} is not used: `data.validation` is a fraction of the training examples. To validate on it: "
            f"--data.validation {unused[0]}"
        )
    if not any(table.has_columns for table in tables.values()):
        given = {kind.feature.lower(): column, "label": data.label}
        tables["train"].notes.extend(
            f"`data.{name}` ({value!r}) is the column of a table, and is not used: {root} is a folder."
            for name, value in given.items()
            if value != name
        )
    return tables


def _other(data: DataSettings, column: str, kind: Kind) -> MediaTable:
    """The validation examples where they are no split of the training folder."""
    assert isinstance(data.validation, str)
    assert data.train is not None
    place, is_split = Path(data.validation), names_a_split(data.validation, data.train)
    if place.is_dir() and not is_split:
        return _folder(place, data, kind)
    return _table_or_hub(data.train if is_split else data.validation, data, column, data.validation, kind)


# ---------------------------------------------------------------- folders


def _split_folders(root: Path, data: DataSettings, kind: Kind) -> dict[str, Path]:
    """The splits below `root` by name; none if its folders are classes."""
    inner = {path.name: path for path in _visible(root) if path.is_dir()}
    split = next((name for name in SPLITS.get(data.train_split, (data.train_split,)) if name in inner), None)
    if split is None:
        if data.train_split != "train":
            raise SliceFineError(
                f"Data: there is no folder of the split {data.train_split!r} in {root}.{did_you_mean(data.train_split, inner)}"
            )
        return {}
    within = _visible(inner[split])
    if any(_is_media(path, kind) for path in within) and not any(path.is_dir() for path in within):
        return {}  # a class of this name: a train is also a thing to take pictures of
    return inner | {data.train_split: inner[split]}


def _folder(root: Path, data: DataSettings, kind: Kind) -> MediaTable:
    """The files of `root`, a folder of class folders."""
    inside = _visible(root)
    classes = [path for path in inside if path.is_dir()]
    loose = [path.name for path in inside if not path.is_dir()]
    wanted = f"{kind.noun}s of a class go into a folder of its name: {root / '<class>' / '<file>'}"
    if not inside:
        raise SliceFineError(f"Data: {root} is empty. The {wanted}.")
    if not classes:
        near = [name for name in loose if Path(name).suffix.lower() in SUFFIXES]
        table = f" If {near[0]} names the {kind.noun}s and their labels, set `data.train` to it." if near else ""
        raise SliceFineError(f"Data: {root} has files ({listed(loose)}) and no class folder. The {wanted}.{table}")
    problems = [
        f"{root} has {kind.noun}s beside the class folders, of no class: {listed(stray)}. Move them into one, or away."
        for stray in [[name for name in loose if Path(name).suffix.lower() in kind.suffixes]]
        if stray
    ]
    files: list[Path] = []
    for folder in classes:
        within = _visible(folder)
        if deeper := [path.name for path in within if path.is_dir()]:
            problems.append(
                f"the class folder {folder} has folders in it ({listed(deeper)}); a class has files alone. If {root.name} holds "
                "splits, name the one to train on with `data.train_split`."
            )
        elif not any(_is_media(path, kind) for path in within):
            what = "is empty" if not within else f"has no {kind.noun} ({listed([path.name for path in within])})"
            problems.append(f"the class folder {folder} {what}. Fill it, or remove it.")
        files += within
    raise_all(shorten(problems), "Data")
    known = ", ".join(kind.suffixes)
    others = [name for name in loose if Path(name).suffix.lower() not in kind.suffixes]
    return MediaTable(
        items=files,
        labels=Table(
            source=str(root),
            fingerprint=_fingerprint([f"{path.parent.name}/{path.name}" for path in files], files),
            rows=[{data.label: path.parent.name} for path in files],
            places=[str(path) for path in files],
            typed=False,  # folders called 0 to 10 are classes in the order of their numbers
        ),
        problems={
            row: f"the suffix {path.suffix or '(none)'} is not that of a known {kind.noun} file ({known})."
            for row, path in enumerate(files)
            if not _is_media(path, kind)
        },
        notes=[f"{root}: files beside the class folders are not used: {listed(others)}."] if others else [],
        has_columns=False,
    )


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _is_media(path: Path, kind: Kind) -> bool:
    return path.suffix.lower() in kind.suffixes


def _fingerprint(names: list[str], files: Sequence[Path | None], start: str = "") -> str:
    made = hashlib.sha256(start.encode())
    for name, file in zip(names, files, strict=True):
        size = file.stat().st_size if file is not None and file.is_file() else None
        made.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
    return f"sha256:{made.hexdigest()}"


# ---------------------------------------------------------------- tables and the hub


def _table_or_hub(source: str, data: DataSettings, column: str, split: str, kind: Kind) -> MediaTable:
    path = Path(source)
    if path.suffix.lower() in SUFFIXES or path.exists():
        return _table(path, data, column, kind)
    return _hub(source, data, column, split, kind)


def _table(path: Path, data: DataSettings, column: str, kind: Kind) -> MediaTable:
    """A table with a column of paths, relative to the folder it is in."""
    table = read_table(str(path), {column: f"--data.{kind.feature.lower()}", data.label: "--data.label"})
    files: list[Path | None] = []
    problems = {}
    for row, given in enumerate(table.rows):
        name = given[column]
        if not isinstance(name, str) or not name.strip():
            shown = "null" if name is None else "nothing" if name == "" else repr(name)[:40]
            problems[row] = f"{column!r} is the path of a file; got {shown}."
            files.append(None)
            continue
        files.append(path.parent / name)
        if not (path.parent / name).is_file():
            problems[row] = f"there is no file {path.parent / name}."
    names = [str(row[column]) for row in table.rows]
    return MediaTable(
        items=[file or Path() for file in files],
        labels=Table(
            source=table.source,
            fingerprint=_fingerprint(names, files, table.fingerprint),
            rows=[{data.label: row[data.label]} for row in table.rows],
            places=[f"{place} ({name})" for place, name in zip(table.places, names, strict=True)],
            typed=table.typed,
        ),
        problems=problems,
    )


def _hub(source: str, data: DataSettings, column: str, split: str, kind: Kind) -> MediaTable:
    import datasets

    dataset = load_hub(source, [column, data.label], data.subset, split)
    feature = getattr(datasets, kind.feature)
    if not isinstance(dataset.features[column], feature):
        fitting = [name for name, found in dataset.features.items() if isinstance(found, feature)]
        raise SliceFineError(
            f"Data: the column {column!r} of {source}, split {split}, holds no {kind.noun}s but {dataset.features[column]}. Columns of "
            f"{kind.noun}s: {', '.join(fitting) or 'none'}."
        )
    undecoded = dataset.cast_column(column, feature(decode=False))
    return MediaTable(
        items=HubItems(undecoded, column),
        labels=hub_table(dataset.select_columns([data.label]), source, data.subset, split, dataset._fingerprint),
    )
