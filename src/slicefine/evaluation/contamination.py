"""Training examples that are test questions.

Two texts are the same question if they have the same words and numbers in the same order: case, white space, punctuation
and the way in which Unicode writes a character do not count. A question of `LONG` words or more is also found inside of a text.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from slicefine.errors import SliceFineError, SliceFineWarning, raise_all
from slicefine.evaluation.questions import Question, Questions
from slicefine.training import record as records
from slicefine.training import schema
from slicefine.training.data import SUFFIXES, read_table
from slicefine.training.folder import RECIPE
from slicefine.training.prompts import instruction_of

SHOWN = 5
LONG = 8
"""Words from which on a question is not inside of another text by chance."""
USERS = ("user", "human")


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """Where training examples are."""

    source: str
    """File, or name of a hub data set."""
    subset: str | None = None
    split: str = "train"
    text: str = "text"
    """Column of plain texts."""
    fingerprint: str | None = None
    """What `Table.fingerprint` of the file was in training; None if that is not known."""

    @property
    def is_file(self) -> bool:
        return Path(self.source).suffix.lower() in SUFFIXES or Path(self.source).exists()


@dataclass(kw_only=True)
class Contamination:
    """What was found."""

    sources: list[str]
    """Training sets that were looked through."""
    tasks: list[str] = field(default_factory=list)
    """Tasks whose questions were looked for."""
    rows: dict[str, int] = field(default_factory=dict)
    """Training examples that are a question of the task, by its name."""
    questions: dict[str, int] = field(default_factory=dict)
    """Questions of the task that are among the training examples."""
    examples: list[str] = field(default_factory=list)
    """The first of them: `file:line -> task, row`."""

    def refuse(self, asked: str = "questions that it is asked", called: str = "test questions") -> None:
        """Raise `SliceFineError` if anything was found."""
        if not self.rows:
            return
        counts = ", ".join(f"{task} {self.questions[task]}" for task in self.rows)
        shown = "\n".join(f"  {example}" for example in self.examples)
        raise SliceFineError(
            f"The model was trained on {asked}: {sum(self.rows.values())} training examples are {called} "
            f"({counts}).\n{shown}\nTrain without them, or accept it with --allow_contamination; the result "
            "will say so."
        )


def check(questions: Questions, training: Sequence[TrainingSet]) -> Contamination:
    """Look for the questions in the training sets.

    Raises `SliceFineError` for all files that are missing, and for one that is not what it was in training.
    """
    raise_all(
        [
            f"the file {item.source} {'is a folder' if Path(item.source).is_dir() else 'does not exist'}."
            for item in training
            if item.is_file and not Path(item.source).is_file()
        ],
        "`--train_data`",
    )
    asked = _Index(question for found in questions.values() for question in found)
    result = Contamination(sources=[item.source for item in training], tasks=list(questions))
    rows: Counter[str] = Counter()
    hit: set[tuple[str, int]] = set()
    for item in training:
        table = read_table(item.source, None, subset=item.subset, split=item.split)
        if item.fingerprint not in (None, table.fingerprint):
            raise SliceFineError(
                f"The training examples, {item.source}, were changed since the model was trained: whether test questions were "
                "among them cannot be checked. Put the file back, or name the file that has them with --train_data."
            )
        for place, row in zip(table.places, table.rows, strict=True):
            same = [question for text in texts(row, item.text) for question in asked.within(text)]
            rows.update({question.task for question in same})
            hit.update(question.key for question in same)
            if same and len(result.examples) < SHOWN:
                result.examples.append(f"{place} -> {same[0].task}, row {same[0].row}")
    result.rows = {task: rows[task] for task in questions if rows[task]}
    result.questions = {task: sum(key[0] == task for key in hit) for task in result.rows}
    return result


class _Index:
    """Finds the questions in a text, in a time that hardly depends on how many questions there are."""

    def __init__(self, questions: Iterable[Question]) -> None:
        self.asked: defaultdict[str, list[Question]] = defaultdict(list)
        self.lengths: defaultdict[str, set[int]] = defaultdict(set)
        """First `LONG` words -> in how many words the questions end that begin with them."""
        for question in questions:
            text = normalised(f"{question.instruction} {question.input}")
            self.asked[text].append(question)
            words = text.split()
            if len(words) >= LONG:
                self.lengths[" ".join(words[:LONG])].add(len(words))

    def within(self, text: str) -> list[Question]:
        text = normalised(text)
        found = {text}
        starts = [0, *accumulate(len(word) + 1 for word in text.split())]
        for first, start in enumerate(starts[:-LONG]):
            for length in self.lengths.get(text[start : starts[first + LONG] - 1], ()):
                if first + length < len(starts):
                    found.add(text[start : starts[first + length] - 1])
        return [question for part in sorted(found, key=len, reverse=True) for question in self.asked.get(part, ())]


def with_earlier(
    now: dict[str, Any] | None, earlier: dict[str, Any] | None, asked: Container[str]
) -> dict[str, Any] | None:
    """What is known of all tasks, as dicts of `Contamination`: of those `asked` from `now`, of the others from `earlier`."""
    if not earlier or not (others := [task for task in earlier.get("tasks", ()) if task not in asked]):
        return now
    now = now or dataclasses.asdict(Contamination(sources=[]))
    return now | {
        "sources": list(dict.fromkeys([*earlier["sources"], *now["sources"]])),
        "tasks": [*others, *now["tasks"]],
        "rows": {task: earlier["rows"][task] for task in others if task in earlier["rows"]} | now["rows"],
        "questions": {task: earlier["questions"][task] for task in others if task in earlier["questions"]}
        | now["questions"],
        "examples": [*now["examples"], *earlier["examples"]][:SHOWN],
    }


def of_run(run: Path) -> TrainingSet | None:
    """The training set that the recipe of a run names, if it has one; None, with a warning, if it is not there any more."""
    data = schema.read_yaml(run / RECIPE).get("data") or {} if (run / RECIPE).is_file() else {}
    if not data.get("train"):
        return None
    trained = records.RunRecord.read(run).data.get("train", {}) if (run / records.FILE).is_file() else {}
    fingerprint = trained.get("fingerprint", "")
    training = TrainingSet(
        source=data["train"],
        subset=data.get("subset"),
        split=data.get("train_split") or "train",
        text=data.get("text") or "text",
        # Those of the hub depend on the columns that are read.
        fingerprint=fingerprint if fingerprint.startswith("sha256:") else None,
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
    """The words and numbers of `text` in lower case, one space between them; 1,000 is 1000."""
    plain = unicodedata.normalize("NFKC", text).lower()
    return " ".join(re.findall(r"\w+", re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", plain)))


def texts(row: dict[str, Any], text: str = "text") -> Iterator[str]:
    """What a training example asks: its instruction and input, its prompt or text, or its user's messages."""
    if isinstance(row.get("instruction"), str):
        yield f"{row['instruction']} {row.get('input') or ''}"
    for name in ("prompt", "question", "query", text, "messages"):
        value = row.get(name)
        if isinstance(value, str):
            yield _asked(value)
        elif isinstance(value, list):
            for message in value:
                if isinstance(message, dict) and message.get("role") in USERS:
                    yield _asked(str(message.get("content")))


def _asked(text: str) -> str:
    # In a prompt that `instruction_of` does not know, the mark stands between instruction and input.
    return instruction_of(text).replace("### Input:", "")
