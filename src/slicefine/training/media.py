"""Examples that are files, images or clips: checked before training, opened one by one while it runs.

A task says what its files are (`Kind`), how one is checked (`check`) and how one becomes an input of the model (`transform`);
all else is the same for images and clips. Pixels are never kept: each example is opened anew whenever it is needed, in the
processes that prepare batches (`training.dataloader_num_workers`).
"""

from __future__ import annotations

import io
import random
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset
from tqdm import tqdm

from slicefine.errors import SliceFineError, raise_all
from slicefine.training.data import Table, shorten
from slicefine.training.labels import not_validated, number, split
from slicefine.training.media_sources import HubItems, Item, Kind, MediaTable, read_sources
from slicefine.training.named import other_classes

if TYPE_CHECKING:
    from slicefine.training.recipe import DataSettings

SECONDS_BEFORE_BAR = 3.0
Check = Callable[[Item], str | None]
"""What is wrong with an image or clip, as the rest of a sentence that begins with its place; None if nothing is."""
Transform = Callable[[Item, random.Random], dict[str, Any]]
"""Makes inputs of the model. The generator is that of the example and epoch: see `MediaDataset`."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """The examples of a set: rows of the items of a source."""

    items: Sequence[Item]
    rows: list[int]
    labels: list[int]
    """Of each row, an index of `Examples.classes`."""
    places: list[str]
    """Where each is, for messages: the path of a file, or the row of a table or hub data set."""

    def __len__(self) -> int:
        return len(self.rows)

    def item(self, number: int) -> Item:
        """The item of example `number`."""
        return self.items[self.rows[number]]

    def take(self, numbers: Sequence[int]) -> Part:
        """The examples of these numbers."""
        return Part(
            items=self.items,
            rows=[self.rows[n] for n in numbers],
            labels=[self.labels[n] for n in numbers],
            places=[self.places[n] for n in numbers],
        )


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Checked examples."""

    classes: list[str]
    train: Part
    validation: Part
    sources: dict[str, dict[str, Any]]
    notes: list[str]

    def summary(self) -> dict[str, Any]:
        """Sources, sizes, skipped files and classes, for the run record."""
        return {**self.sources, "classes": self.classes}


class MediaDataset(Dataset[dict[str, Any]]):
    """Examples opened and transformed when they are asked for: what `transform` returns, and `labels`, an integer.

    The generator of an example is seeded with the seed of the run, the epoch and the number of the example. So what is drawn
    for it depends neither on how many processes prepare batches nor on where a run was stopped and resumed.
    """

    def __init__(self, part: Part, transform: Transform, seed: int) -> None:
        self.part, self._transform, self._seed = part, transform, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which pass over the examples begins."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, number: int) -> dict[str, Any]:
        draw = random.Random(f"{self._seed} {self._epoch} {number}")
        try:
            made = self._transform(self.part.item(number), draw)
        except (OSError, ValueError) as error:
            raise SliceFineError(
                f"{self.part.places[number]}: it was readable when it was checked, and is not any more: {error}"
            ) from error
        return {**made, "labels": self.part.labels[number]}


def read(data: DataSettings, *, column: str, kind: Kind, check: Check) -> Examples:
    """Read the sources, number the classes and check every file.

    A fraction for validation is split off class by class, always in the same way for the same examples.

    Args:
        data: `train`, `validation`, `subset`, `train_split`, `label` and `on_error` are read.
        column: Of the paths in a table, or of the images or clips of a hub data set.
        kind: What the files are.
        check: Says what is wrong with a file; called in threads.

    Raises `SliceFineError` with every problem of sources and labels, or of files if `data.on_error` is fail; and if a set or class
    has no file that can be read.
    """
    tables = read_sources(data, column, kind)
    labels = number({name: table.labels for name, table in tables.items()}, data.label, where="Data")
    notes = [note for table in tables.values() for note in table.notes]
    if others := other_classes(data.name, labels.classes):
        notes.append(others)  # no mistake: a few classes of a large set are a good beginning
    bad = {name: file_problems(table, kind, check) for name, table in tables.items()}
    if data.on_error == "fail":
        _refuse(tables, bad, kind)
    parts, sources = {}, {}
    for name, table in tables.items():
        rows = [row for row in range(len(table.items)) if row not in bad[name]]
        if not rows:
            shown = "\n".join(shorten(placed(table.labels, bad[name])))
            raise SliceFineError(
                f"Data: no {kind.noun} of the {name} set, {table.labels.source}, can be read.\n{shown}"
            )
        parts[name] = Part(
            items=table.items,
            rows=rows,
            labels=[labels.numbers[name][row] for row in rows],
            places=[table.labels.places[row] for row in rows],
        )
        sources[name] = {"source": table.labels.source, "fingerprint": table.labels.fingerprint}
        if bad[name]:
            sources[name]["skipped"] = len(bad[name])
            what = f"{kind.noun}s of the {name} set"
            notes.append(left_out(placed(table.labels, bad[name]), len(table.items), what, "they cannot be used"))
    _refuse_lost_classes(labels.classes, labels.numbers["train"], parts["train"], kind)
    if isinstance(data.validation, float):
        kept, split_off = split(parts["train"].labels, data.validation)
        if not split_off:
            raise SliceFineError(
                f"Data: the validation set is empty: a fraction of {data.validation} of the {len(kept)} examples of {data.train} is less "
                "than one example of each class. Set `data.validation` to a larger fraction, or to a folder, a table or a split."
            )
        parts = {"train": parts["train"].take(kept), "validation": parts["train"].take(split_off)}
        sources["validation"] = {
            "source": f"{data.validation} of train",
            "fingerprint": sources["train"]["fingerprint"],
        }
        notes += not_validated(labels.classes, parts["train"].labels, parts["validation"].labels)
    notes += shared(parts["train"], parts["validation"])
    for name, part in parts.items():
        sources[name]["examples"] = len(part)
    return Examples(classes=labels.classes, **parts, sources=sources, notes=[*labels.notes, *notes])


def file_problems(table: MediaTable, kind: Kind, check: Check, chosen: Sequence[int] | None = None) -> dict[int, str]:
    """What is wrong with the items of a table in the rows `chosen`, all if None, by row, in the order of rows."""
    asked = range(len(table.items)) if chosen is None else chosen
    rows = [row for row in asked if row not in table.problems]
    found = {row: table.problems[row] for row in asked if row in table.problems}
    bar = tqdm(total=len(rows), desc=f"checking {kind.noun}s", unit=f" {kind.noun}s", delay=SECONDS_BEFORE_BAR)
    pool = ThreadPoolExecutor()
    # What a library has to say of files that it reads in the end is noise; what it cannot read is reported below.
    with bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for row, problem in zip(rows, pool.map(lambda row: check(table.items[row]), rows), strict=True):
                bar.update()
                if problem:
                    found[row] = problem
        finally:
            pool.shutdown(cancel_futures=True)
    return dict(sorted(found.items()))


def placed(labels: Table, problems: dict[int, str]) -> list[str]:
    """Problems by row -> the same, each with the place of its row."""
    return [f"{labels.places[row]}: {problem}" for row, problem in problems.items()]


def _refuse(tables: dict[str, MediaTable], bad: dict[str, dict[int, str]], kind: Kind) -> None:
    problems = [problem for name, table in tables.items() for problem in shorten(placed(table.labels, bad[name]))]
    count, asked = sum(map(len, bad.values())), sum(len(table.items) for table in tables.values())
    if problems:
        raise SliceFineError(refused(problems, count, asked, kind.noun))


def refused(problems: list[str], count: int, asked: int, noun: str) -> str:
    """What to say of `count` bad files of the `asked` ones; the `problems` may be shortened."""
    return "\n".join(
        [
            f"Data: {count} of {asked} {noun}s cannot be used. To leave out such files, counted and named: --data.on_error skip",
            *(f"  {problem}" for problem in problems),
        ]
    )


def left_out(problems: list[str], asked: int, what: str, why: str) -> str:
    """The note of files that are left out, a line for each of the first."""
    return "\n  ".join([f"{len(problems)} of {asked} {what} are left out, because {why}:", *shorten(problems)])


def shared(train: Part, validation: Part) -> list[str]:
    """A note of the validation files that are training files, byte by byte; none for a data set of the hub.

    Only files of the same size are read.
    """
    if isinstance(train.items, HubItems) or isinstance(validation.items, HubItems):
        return []
    by_size: dict[int, list[Path]] = defaultdict(list)
    for path in _files(train):
        by_size[path.stat().st_size].append(path)
    digest = lru_cache(maxsize=None)(lambda path: blake2b(path.read_bytes()).digest())
    twins = [
        (path, twin)
        for path in _files(validation)
        for twin in [next((one for one in by_size[path.stat().st_size] if digest(one) == digest(path)), None)]
        if twin
    ]
    if not twins:
        return []
    return [
        f"{len(twins)} of {len(validation)} validation files are training files too, byte by byte, the first: {twins[0][0]} is "
        f"{twins[0][1]}. Scores are too good by them: take them out of one of the sets."
    ]


def _files(part: Part) -> list[Path]:
    found = (part.item(number) for number in range(len(part)))
    return [item for item in found if isinstance(item, Path) and item.is_file()]


def _refuse_lost_classes(classes: list[str], before: list[int], train: Part, kind: Kind) -> None:
    lost = [classes[n] for n in sorted(set(before) - set(train.labels))]
    raise_all(
        [
            f"of the class {name!r}, no {kind.noun} can be used for training. Mend one, or remove the class."
            for name in lost
        ],
        "Data",
    )


def opened(item: Item) -> Any:
    """What libraries take to open an item: a path as a string, or a file in memory."""
    return io.BytesIO(item) if isinstance(item, bytes) else str(item)
