"""Training examples that are test questions.

Two texts are the same question if they have the same words and numbers in the same order: case, white space and
punctuation do not count.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slicefine.errors import SliceFineError, SliceFineWarning, raise_all
from slicefine.evaluation.questions import Question, Questions
from slicefine.training import schema
from slicefine.training.data import SUFFIXES, read_table
from slicefine.training.folder import RECIPE
from slicefine.training.prompts import instruction_of

SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """Where training examples are."""

    source: str
    """File, or name of a hub data set."""
    subset: str | None = None
    split: str = "train"
    text: str = "text"
    """Column of plain texts."""

    @property
    def is_file(self) -> bool:
        return Path(self.source).suffix.lower() in SUFFIXES or Path(self.source).exists()


@dataclass(kw_only=True)
class Contamination:
    """What was found."""

    sources: list[str]
    """Training sets that were looked through."""
    rows: dict[str, int] = field(default_factory=dict)
    """Training examples that are a question of the task, by its name."""
    questions: dict[str, int] = field(default_factory=dict)
    """Questions of the task that are among the training examples."""
    examples: list[str] = field(default_factory=list)
    """The first of them: `file:line -> task, row`."""

    def refuse(self) -> None:
        """Raise `SliceFineError` if anything was found."""
        if not self.rows:
            return
        counts = ", ".join(f"{task} {self.questions[task]}" for task in self.rows)
        shown = "\n".join(f"  {example}" for example in self.examples)
        raise SliceFineError(
            f"The model was trained on questions that it is asked: {sum(self.rows.values())} training examples are test "
            f"questions ({counts}).\n{shown}\nTrain without them, or accept it with --allow_contamination; the result "
            "will say so."
        )


def check(questions: Questions, training: Sequence[TrainingSet]) -> Contamination:
    """Look for the questions in the training sets. Raises `SliceFineError` for all files that are missing."""
    raise_all(
        [
            f"the file {item.source} {'is a folder' if Path(item.source).is_dir() else 'does not exist'}."
            for item in training
            if item.is_file and not Path(item.source).is_file()
        ],
        "`--train_data`",
    )
    asked: dict[str, list[Question]] = {}
    for question in (question for found in questions.values() for question in found):
        asked.setdefault(normalised(f"{question.instruction} {question.input}"), []).append(question)
    result = Contamination(sources=[item.source for item in training])
    rows: Counter[str] = Counter()
    hit: set[tuple[str, int]] = set()
    for item in training:
        table = read_table(item.source, None, subset=item.subset, split=item.split)
        for place, row in zip(table.places, table.rows, strict=True):
            same = [question for text in texts(row, item.text) for question in asked.get(normalised(text), [])]
            rows.update({question.task for question in same})
            hit.update(question.key for question in same)
            if same and len(result.examples) < SHOWN:
                result.examples.append(f"{place} -> {same[0].task}, row {same[0].row}")
    result.rows = {task: rows[task] for task in questions if rows[task]}
    result.questions = {task: sum(key[0] == task for key in hit) for task in result.rows}
    return result


def of_run(run: Path) -> TrainingSet | None:
    """The training set that the recipe of a run names; None, with a warning, if it is not there any more."""
    data = schema.read_yaml(run / RECIPE).get("data") or {}
    if not data.get("train"):
        return None
    training = TrainingSet(
        source=data["train"],
        subset=data.get("subset"),
        split=data.get("train_split") or "train",
        text=data.get("text") or "text",
    )
    if training.is_file and not Path(training.source).is_file():
        warnings.warn(
            f"The training examples of {run}, {training.source}, are not there any more: whether test questions are among "
            "them cannot be checked. Name the file with --train_data.",
            SliceFineWarning,
            stacklevel=2,
        )
        return None
    return training


def normalised(text: str) -> str:
    """The words and numbers of `text` in lower case, one space between them."""
    return " ".join(re.findall(r"\w+", text.lower()))


def texts(row: dict[str, Any], text: str = "text") -> Iterator[str]:
    """What a training example asks: its instruction and input, its prompt or text, or its user's messages."""
    if isinstance(row.get("instruction"), str):
        yield f"{row['instruction']} {row.get('input') or ''}"
    for name in ("prompt", "question", text, "messages"):
        value = row.get(name)
        if isinstance(value, str):
            yield instruction_of(value)
        elif isinstance(value, list):
            for message in value:
                if isinstance(message, dict) and message.get("role") == "user":
                    yield instruction_of(str(message.get("content")))
