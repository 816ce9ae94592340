"""The questions of the test sets, from files or from the hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from slicefine.errors import SliceFineError, did_you_mean, first_line, raise_all
from slicefine.evaluation.converters import HUB_SETS, HubSet
from slicefine.evaluation.scoring import gold_problem
from slicefine.evaluation.suites import Task
from slicefine.training.data import read_table, shorten
from slicefine.training.prompts import prompt

FILES = ("test.jsonl", "test.json")
Place = tuple[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question of a test set."""

    task: str
    row: int
    """From 1, in the order of the test set."""
    instruction: str
    input: str
    gold: str

    @cached_property
    def prompt(self) -> str:
        return prompt(self.instruction, self.input)

    @property
    def key(self) -> tuple[str, int]:
        return self.task, self.row


Questions = dict[str, list[Question]]


def read(tasks: Sequence[Task], data: str | None, limit: int | None = None) -> Questions:
    """The first `limit` questions of each task, by its name.

    Files are `<data>/<task>/test.jsonl` or `test.json` (a list), with the fields instruction, answer and, where there is
    one, input; case does not matter in the folder's name. Without `data`, they are loaded from the hub.

    Raises `SliceFineError` with every problem: all missing files, all rows that are no questions; for the first data set that
    the hub does not give.
    """
    places = _files(tasks, data) if data is not None else None
    problems: list[str] = []
    questions: Questions = {}
    for task in tasks:
        try:
            rows = _rows_of_file(places[task.name]) if places is not None else _rows_of_hub(task)
            questions[task.name] = list(_checked(task, rows, limit, problems))
        except SliceFineError as error:
            if places is None:  # with the hub out of reach, each set would be tried for half a minute
                raise
            problems.append(str(error))
    problems += [
        f"{places[name] if places else HUB_SETS[name].name} has no questions."
        for name, found in questions.items()
        if not found and not problems
    ]
    raise_all(shorten(problems), "Test sets")
    return questions


def _files(tasks: Sequence[Task], data: str) -> dict[str, Path]:
    folder = Path(data)
    if not folder.is_dir():
        raise SliceFineError(
            f"`--data` is a folder with a folder for each task; {data} {'is a file' if folder.exists() else 'does not exist'}."
        )
    folders = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir()}
    found: dict[str, Path] = {}
    problems = []
    for task in tasks:
        files = [path for name in FILES if (path := folders.get(task.name, folder / task.name) / name).is_file()]
        if files:
            found[task.name] = files[0]
        elif task.name in folders:
            others = ", ".join(sorted(path.name for path in folders[task.name].iterdir())) or "nothing"
            problems.append(
                f"{task.name}: a test set is {' or '.join(FILES)} (JSON objects with instruction, input, answer); "
                f"{folders[task.name]} has {others}."
            )
        else:
            problems.append(
                f"{task.name}: there is no folder {folder / task.name}.{did_you_mean(task.name, folders.keys() - found.keys())}"
            )
    if problems and found:
        problems[-1] += f" Add it, or score the others: --tasks {' '.join(found)}."
    raise_all(problems, f"Test sets in {data}")
    return found


def _rows_of_file(path: Path) -> Iterator[Place]:
    table = read_table(str(path), None)
    return zip(table.places, table.rows, strict=True)


def _rows_of_hub(task: Task) -> Iterator[Place]:
    source = HUB_SETS[task.name]
    for split in source.splits:
        for number, row in enumerate(_load(source, split), 1):
            place = f"{source.name}, split {split}, row {number}"
            try:
                yield place, source.convert(row)
            except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
                raise SliceFineError(
                    f"{place}: not in the form that {task.name} has on the hub ({error!r}). Give the test set in files, with --data."
                ) from error


def _load(source: HubSet, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(
            source.name, source.subset, split=split, data_dir=source.data_dir, revision=source.revision
        )
    # An unreachable hub, an unknown name, subset or split, a script: `datasets` and the HTTP library raise all kinds.
    except Exception as error:
        raise SliceFineError(
            f"the data set {source.name!r} (subset {source.subset or source.data_dir!r}, split {split!r}) of the hub did not "
            f"load: {first_line(error)}. Check the network, or give files with --data."
        ) from error


def _checked(task: Task, rows: Iterator[Place], limit: int | None, problems: list[str]) -> Iterator[Question]:
    for number, (place, row) in enumerate(rows, 1):
        if limit is not None and number > limit:
            return
        instruction, text, gold = row.get("instruction"), row.get("input") or "", row.get("answer")
        if not isinstance(instruction, str) or not instruction.strip():
            problems.append(f"{place}: a question is a text in 'instruction'; got {instruction!r}.")
        elif not isinstance(text, str):
            problems.append(f"{place}: 'input' is a text; got {text!r}.")
        elif problem := gold_problem(task, gold):
            problems.append(f"{place}: {problem}.")
        else:
            yield Question(task=task.name, row=number, instruction=instruction, input=text, gold=str(gold))
