"""Which labelled sets a classifier is scored on, and where each is: on the hub, in a file, or in a folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slicefine.errors import SliceFineError, did_you_mean, raise_all
from slicefine.evaluation.settings import Settings
from slicefine.evaluation.suites import LABELLED
from slicefine.training.data import SPLITS, SUFFIXES, read_table
from slicefine.training.named import NAMED, NamedSet
from slicefine.training.recipe import DataSettings

TEST = ("test", "validation")


@dataclass(frozen=True, kw_only=True)
class LabelledSet:
    """One set to be scored on."""

    name: str
    """In the results."""
    title: str
    """Column of the table."""
    data: DataSettings
    """`train` and `train_split` are where it is."""
    own: bool
    """Whether labels that are numbers can be numbers of the model's classes: it is no set of another name than that of the run."""
    notes: tuple[str, ...] = ()


def choose(settings: Settings, trained: DataSettings | None) -> list[LabelledSet]:
    """The sets that are asked for.

    `trained` is the data of the run; None if the model is of no run that is known.

    Raises `SliceFineError` for sets that are not there, and for a suite that does not say which set fits the model.
    """
    base = trained or DataSettings()
    if settings.suite is None:
        assert settings.data is not None
        path = Path(settings.data)
        if not path.exists():
            near = [other.name for other in path.parent.glob("*")]
            raise SliceFineError(f"`--data`: {path} does not exist.{did_you_mean(path.name, near)}")
        found = _splits(path, TEST)[:1] or [("", path)] if path.is_dir() else [("", path)]
        name = path.resolve().stem
        named = NAMED[base.name] if base.name else None
        return [LabelledSet(name=name, title=name, data=local(place, base, named), own=True) for _, place in found]
    return [
        part
        for name in _names(settings, trained)
        for part in _named(settings, NAMED[name], base, own=trained is None or trained.name in (None, name))
    ]


def _names(settings: Settings, trained: DataSettings | None) -> tuple[str, ...]:
    assert settings.suite is not None
    if settings.chosen_sets:
        return settings.chosen_sets
    own = trained.name if trained else None
    if own is None:
        raise SliceFineError(
            f"A classifier has the classes of one data set, and {settings.model} does not say of which. Name it with --tasks: "
            f"{', '.join(LABELLED[settings.suite])}."
        )
    return (own,)


def _named(settings: Settings, named: NamedSet, base: DataSettings, *, own: bool) -> list[LabelledSet]:
    # The splits for validation are scored where the labels of the test split are not public, as GLUE's.
    wanted = ("test",) if "test" in named.evaluation_splits else named.evaluation_splits
    if settings.data is None:
        if named.hub is None:
            raise SliceFineError(
                f"{named.name} is not on the hub in a form that can be read. Give its folder with --data."
            )
        columns = named.settings | {"train": named.hub}
        found = []
        for split in wanted:
            where = columns | {"train_split": split, "validation": 0.5}
            data = dataclasses.replace(base, name=named.name, label_kind=named.label_kind, **where)
            found.append(LabelledSet(data=data, own=own, **_called(named, split, several=len(wanted) > 1)))
        return found
    root = Path(settings.data)
    if not root.is_dir():
        raise SliceFineError(
            f"`--data` of a suite is a folder with a folder for each task; {root} {'is a file' if root.exists() else 'does not exist'}. "
            "Without --suite, it can be a labelled file."
        )
    folders = {path.name.lower(): path for path in sorted(root.iterdir()) if path.is_dir()}
    if named.name not in folders:
        raise SliceFineError(f"There is no folder {root / named.name}.{did_you_mean(named.name, folders)}")
    folder = folders[named.name]
    places = _splits(folder, wanted) or _splits(folder, TEST)[:1]
    if not places and named.task != "text-classification":
        places = [("", folder)]
    if not places:
        others = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        names = " or ".join(f"{split}{suffix}" for split in dict.fromkeys((*wanted, *TEST)) for suffix in SUFFIXES[:1])
        raise SliceFineError(f"A labelled set is {names} (or {', '.join(SUFFIXES[1:])}); {folder} has {others}.")
    return [
        LabelledSet(data=local(place, base, named), own=own, **_called(named, split, several=len(places) > 1))
        for split, place in places
    ]


def under_its_own_name(one: LabelledSet, classes: int) -> LabelledSet:
    """`one`, called as its file or folder if it is a local one and the model has not the classes of the published set."""
    name, place = one.data.name, Path(one.data.train or "")
    known = NAMED[name].classes if name else None
    if name is None or known is None or classes == known or not place.exists():
        return one
    published = NAMED[name].title.partition(":")[0]
    said = (
        f"This is not {published}, which has {known} classes: the model has {classes}. The scores are those of {place} alone, and do "
        "not compare with published ones."
    )
    return dataclasses.replace(one, title=str(place), notes=(said,))


def _called(named: NamedSet, split: str, *, several: bool) -> dict[str, Any]:
    """Name and title of a split: MNLI has two that are scored."""
    end = split.removeprefix("validation_") if several else ""
    title = named.title.partition(":")[0]
    return {"name": f"{named.name}-{end}" if end else named.name, "title": f"{title} {end}".rstrip()}


def _splits(folder: Path, wanted: Sequence[str]) -> list[tuple[str, Path]]:
    """The `wanted` splits that are in the folder, as a file or as a folder of class folders."""
    there = {
        path.stem.lower(): path
        for path in sorted(folder.iterdir(), reverse=True)  # of files that differ in their suffix, the first
        if (path.suffix.lower() in SUFFIXES if path.is_file() else any(inner.is_dir() for inner in path.iterdir()))
    }
    found = []
    for split in wanted:
        names = SPLITS.get(split, (split,))
        found += [(split, there[name]) for name in names if name in there][:1]
    return found


def local(place: Path, base: DataSettings, named: NamedSet | None) -> DataSettings:
    """The labelled examples in a file or folder: the settings of a run, with another source."""
    data = dataclasses.replace(base, train=str(place), train_split="train", subset=None, validation=0.5)
    if named is None:
        return data
    return _with_columns(dataclasses.replace(data, name=named.name, label_kind=named.label_kind), place, named)


def _with_columns(data: DataSettings, place: Path, named: NamedSet) -> DataSettings:
    """A file has the columns of the run, or those that the set has on the hub."""
    if not place.is_file():
        return data
    rows = read_table(str(place), None).rows
    raise_all([] if rows else [f"{place} has no examples."], "Test sets")
    single = {"text_pair": None} if "text" in named.columns else {}
    on_hub = {**single, **named.columns}
    known = [{name: getattr(data, name) for name in on_hub}, on_hub, {name: on_hub[name] and name for name in on_hub}]
    shaped = [columns for columns in known if all((columns[name] is None) == (on_hub[name] is None) for name in on_hub)]
    fitting = [columns for columns in shaped if {column for column in columns.values() if column} <= rows[0].keys()]
    return dataclasses.replace(data, **[*fitting, *shaped][0])
