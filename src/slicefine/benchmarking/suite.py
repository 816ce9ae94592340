"""A suite: the tasks on which methods are compared, each a recipe with a split that chooses and a split that judges.

A folder holds one folder a task, with `train` and `test` or `validation` (files of texts, or folders of images or clips). A
YAML file names tasks, each with a recipe, and may change any of its settings. Read without torch.
"""

from __future__ import annotations

import json
import math
import mimetypes
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slicefine.errors import SliceFineError, did_you_mean, listed, raise_all
from slicefine.training import schema
from slicefine.training.data import SUFFIXES, read_table
from slicefine.training.named import NAMED
from slicefine.training.recipe import Recipe
from slicefine.training.shipped import find, shipped

TRAIN, TEST, VALIDATION = "train", "test", "validation"
MODELS = {
    "text-classification": "minilm-text-classification",
    "image-classification": "vit-base-image-classification",
    "video-classification": "videomae-base-video-classification",
}
"""Task -> the recipe that ships whose model and settings a folder of examples gets."""
DECIDED = frozenset(
    {"task", "output", "data.validation", "data.train", "data.name"}
    | {f"training.{name}" for name in ("learning_rate", "max_steps", "num_train_epochs", "seed", "report_to")}
    | {f"training.{name}" for name in ("eval_steps", "save_steps", "save_total_limit", "logging_steps")}
)
"""Settings of a recipe that the benchmark or the suite decides, beside those of the slice."""
LEAST_STEPS = 8
"""Of a final run."""
OWN = ("steps", "grid_steps", "rate_scale")
"""Settings of the comparison that a task may have of its own."""
_KEYS = ("recipe", TEST, *OWN)
SPLITS = (TRAIN, VALIDATION, TEST)
MEDIA = ("image", "video")


@dataclass(frozen=True, kw_only=True)
class QualityTask:
    """A task of a suite."""

    name: str
    recipe: Recipe
    """Resolved. `data.train` is trained on; `data.validation`, a part of it or a split of its own, chooses."""
    steps: int | None = None
    """Optimizer steps of a final run; None = as many as on the others."""
    grid_steps: int | None = None
    """Optimizer steps of a run that chooses a learning rate; None = as large a share of a final run as on the others."""
    rate_scale: float = 1.0
    """Factor of every learning rate of the grids; below 1 for a task that is not learned at usual rates."""
    test: str
    """What `data.validation` would be to read the examples that judge: a file, a folder, or a split of the hub."""

    @property
    def judging(self) -> Recipe:
        """The recipe by which the examples that judge are read, as its validation examples."""
        return Recipe.from_flat({**self.recipe.flat(), "data.validation": self.test})


def settable() -> list[str]:
    """Settings of a recipe that may be given for all tasks at once."""
    return [key for key in schema.settings(Recipe) if key not in DECIDED and not key.startswith("slice.")]


def load_suite(
    path: str | Path, overrides: Mapping[str, Any] | None = None, *, held_out: float = 0.1
) -> list[QualityTask]:
    """The tasks of the suite at `path`, a folder or a YAML file.

    Where a task has one split beside its training examples, that split judges, and `held_out`, a share of the training examples,
    chooses: what judges never chooses. `overrides` are settings of all recipes by dotted key.

    Raises `SliceFineError` with every problem of every task.
    """
    path, overrides = Path(path), dict(overrides or {})
    raise_all(place_problems(path), "slicefine bench quality")
    found = _of_folder(path) if path.is_dir() else _of_file(path)
    tasks, problems = [], []
    for name, content in found:
        try:
            tasks.append(_task(name, content, overrides, held_out))
        except SliceFineError as error:
            problems.append(str(error))
    raise_all(problems, f"Suite {path}")
    return tasks


def place_problems(path: Path) -> list[str]:
    """What is wrong with the place of a suite."""
    if path.is_dir() or (_is_yaml(path) and path.is_file()):
        return []
    there = "neither a folder nor a YAML file" if path.exists() else "nothing there"
    beside = [one.name for one in path.parent.glob("*") if one.is_dir() or _is_yaml(one)]
    near = did_you_mean(path.name, beside)
    return [f"`--suite` is a folder of data sets or a YAML file; {path} is {there}.{near}"]


def _is_yaml(path: Path) -> bool:
    return path.suffix in (".yaml", ".yml")


def _task(
    name: str, content: SliceFineError | dict[str, Any], overrides: dict[str, Any], held_out: float
) -> QualityTask:
    if isinstance(content, SliceFineError):
        raise content
    test = content.pop(TEST, None)
    own = {key: content.pop(key) for key in OWN if key in content}
    recipe = Recipe.of(content | {"output": "."}, overrides, f"Task {name}").resolved()
    validation = recipe.data.validation
    if content.get("data.validation") is None and isinstance(validation, float):
        validation = None  # the recipe's own default
    if isinstance(test, str) and Path(test).exists():
        test = str(Path(test).resolve())
    if test is None:
        test, validation = validation, None
    if not isinstance(test, str):
        raise SliceFineError(
            f"Task {name}: no split to judge by. A score on examples that chose the learning rate is no measurement: name a file, a folder, "
            f"or a split of the hub as `test`."
        )
    if test == validation:
        raise SliceFineError(
            f"Task {name}: `test` and `data.validation` are the same, {test}. What judges may not choose."
        )
    values = recipe.flat() | {"data.validation": held_out if validation is None else validation}
    return QualityTask(name=name, recipe=Recipe.from_flat(values), test=test, **own)


# ---------------------------------------------------------------- folders

Found = Iterator[tuple[str, "SliceFineError | dict[str, Any]"]]
"""Name of a task -> its settings by dotted key with `test`, or what is wrong."""


def _of_folder(path: Path) -> Found:
    folders = sorted(one for one in path.iterdir() if one.is_dir() and (_has_split(one) or _has_data(one)))
    if not folders:
        within = [one.name for one in sorted(path.iterdir())]
        raise SliceFineError(
            f"Suite {path}: no folder in it has {', '.join(SPLITS)} as files ({', '.join(SUFFIXES)}) or folders; there are "
            f"{listed(within, 8) if within else 'no files'}. Make one folder for each task, e.g. {path}/sst2/train.jsonl and "
            f"{path}/sst2/test.jsonl."
        )
    for folder in folders:
        try:
            yield folder.name, _of_examples(folder)
        except SliceFineError as error:
            yield folder.name, error


def _of_examples(folder: Path) -> dict[str, Any]:
    if not _has_split(folder):
        there = listed(sorted(one.name for one in folder.iterdir()), 8)
        raise SliceFineError(
            f"Task {folder.name}: {folder} has data, and nothing in it is called {', '.join(SPLITS)}; there are {there}. Rename them, or move "
            "what is no task out of the suite."
        )
    train, validation, test = (_split(folder, name) for name in SPLITS)
    if train is None:
        raise SliceFineError(
            f"Task {folder.name}: {folder} has no training examples: {TRAIN} with {', '.join(SUFFIXES)}, or a folder."
        )
    if test is None and validation is None:
        raise SliceFineError(
            f"Task {folder.name}: {folder} has no split beside {train.name}. Put the examples that judge into {folder / TEST}{train.suffix}; "
            "those that choose the learning rate are split off train."
        )
    task = _kind(train)
    content = _flat(shipped()[MODELS[task]]) | {"data.train": str(train), TEST: str(test or validation)}
    content.pop("data.validation", None)
    if test and validation:
        content["data.validation"] = str(validation)
    named = NAMED.get(folder.name)
    if named is not None and named.task == task:
        content["data.name"] = named.name
    if task == "text-classification" and any("text_pair" in row for row in read_table(str(train), None).rows[:1]):
        content["data.text_pair"] = "text_pair"
    return content


def _split(folder: Path, name: str) -> Path | None:
    return next(
        (one for one in (*(folder / f"{name}{suffix}" for suffix in SUFFIXES), folder / name) if one.exists()), None
    )


def _has_split(folder: Path) -> bool:
    return any(_split(folder, name) for name in SPLITS)


def _has_data(folder: Path) -> bool:
    """Whether there are examples in it, whatever they are called; tools keep theirs in folders that begin with a dot."""
    if folder.name.startswith("."):
        return False
    return any(one.suffix in SUFFIXES for one in folder.iterdir()) or any(kind in MEDIA for kind in _kinds(folder))


def _kinds(folder: Path) -> Iterator[str]:
    """Of all files below `folder`: `image`, `video`, ...; drawings, as benchmarks make them, are none."""
    types = (str(mimetypes.guess_type(one.name)[0]) for one in folder.rglob("*") if one.is_file())
    return (one.partition("/")[0] for one in types if one != "image/svg+xml")


def _kind(train: Path) -> str:
    if train.is_file():
        return "text-classification"
    kinds = set(_kinds(train))
    found = [kind for kind in MEDIA if kind in kinds]
    if not found:
        raise SliceFineError(f"Task {train.parent.name}: there are neither images nor clips in {train}.")
    return f"{found[0]}-classification"


# ---------------------------------------------------------------- files


def _of_file(path: Path) -> Found:
    content = schema.read_yaml(path)
    if unknown := [key for key in content if key != "tasks"]:
        raise SliceFineError(f"Suite {path}: a suite has the one key `tasks`; got {listed(list(map(str, unknown)))}.")
    tasks = content.get("tasks")
    if not isinstance(tasks, dict) or not tasks:
        raise SliceFineError(
            f"Suite {path}: `tasks` maps the name of each task to its settings; got {json.dumps(tasks, default=str)}."
        )
    for name, given in tasks.items():
        try:
            yield str(name), _of_settings(path, str(name), given)
        except SliceFineError as error:
            yield str(name), error


def _of_settings(path: Path, name: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise SliceFineError(
            f"Task {name}: its settings are a mapping (`recipe: ...`, `test: ...`, `data.train: ...`); got {given!r}."
        )
    keys = [*_KEYS, *schema.settings(Recipe)]
    own, problems = {}, []
    for key, value in _flattened(given).items():
        if key not in keys:
            problems.append(f"Task {name}: there is no setting {key!r}.{did_you_mean(key, keys)}")
        elif key.startswith("slice.") or (key in DECIDED and not key.startswith(("data.", "task"))):
            problems.append(f"Task {name}: `{key}` is decided by the benchmark, for every method alike. Leave it out.")
        else:
            own[key] = value
    steps, scale = own.get("steps", LEAST_STEPS), own.get("rate_scale", 1.0)
    if type(steps) is not int or steps < LEAST_STEPS:
        problems.append(f"Task {name}: `steps` is a whole number, at least {LEAST_STEPS}; got {steps!r}.")
    if "grid_steps" in own and (type(own["grid_steps"]) is not int or own["grid_steps"] < 1):
        problems.append(f"Task {name}: `grid_steps` is a whole number, at least 1; got {own['grid_steps']!r}.")
    if type(scale) not in (int, float) or not 0 < scale < math.inf:
        problems.append(f"Task {name}: `rate_scale` is a number above 0; got {scale!r}.")
    raise_all(problems, "Settings")
    recipe = own.pop("recipe", None)
    content = _flat(_recipe(path, str(recipe))) if recipe is not None else {}
    if isinstance(content.get("data.validation"), float):
        del content["data.validation"]  # a share that was written for training; here `--held_out` says it
    for key in (TEST, "data.train", "data.validation", "model.name"):
        if isinstance(own.get(key), str):
            own[key] = _beside(path, own[key])
    return content | own


def _recipe(path: Path, name: str) -> Path:
    return path.parent / name if (path.parent / name).is_file() else find(name)


def _beside(path: Path, name: str) -> str:
    """Names of files are relative to the suite's file; what is no file there is a name of the hub."""
    return str(path.parent / name) if (path.parent / name).exists() else name


def _flat(path: Path) -> dict[str, Any]:
    return _flattened(schema.read_yaml(path))


def _flattened(content: Mapping[Any, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= (
            {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {str(key): value}
        )
    return flat
