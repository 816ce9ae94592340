"""What an evaluation came to: `results.json`, and the table of the paper."""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from slicefine.errors import SliceFineError, raise_all
from slicefine.evaluation.answers import Answer
from slicefine.evaluation.scoring import response, wilson
from slicefine.evaluation.suites import SUITES, Task
from slicefine.training.record import write_atomically

FILE = "results.json"
OTHER_FOLDER = "Start anew with --overwrite, or name another --output."


@dataclass(kw_only=True)
class Outcome(ABC):
    """What is known of any evaluation; written when it begins and when it ends."""

    DECIDES: ClassVar[tuple[str, ...]]
    """What the answers depend on. Batches may change: they do not decide an answer, up to rounding."""
    ASKED: ClassVar[str]
    """What is asked, in the plural."""

    status: Literal["running", "finished", "interrupted", "failed"] = "running"
    suite: str | None
    model: str
    """As it was given."""
    base: str
    """Folder, or hub name, of the model; for an adapter, of its base."""
    weights: str
    """Fingerprint of all weights, the adapter merged."""
    dtype: str
    data: str | None = None
    """File or folder of the test sets; None = the hub."""
    limit: int | None = None
    """Most questions, or examples, of each test set; None = all."""
    contamination: dict[str, Any] | None = None
    """Training examples that are in the test sets; None if it was not checked."""
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Counts and scores by task."""
    average: float | None = None
    """Mean of the tasks' scores, whatever their sizes; None unless all of their questions are answered."""
    sessions: list[dict[str, Any]] = field(default_factory=list)
    """Each time it was started: times, seconds, speed, batch size, versions, hardware."""

    folder = None  # where it was written; no field, for it is not written itself

    @property
    def searched(self) -> bool:
        """Whether training examples can be searched for what is asked."""
        return True

    @abstractmethod
    def table(self) -> str:
        """The scores, a column a task and the average last."""

    def details(self) -> list[str]:
        """Tables of the parts of a score."""
        return []

    @abstractmethod
    def notes(self) -> list[str]:
        """What else to know of the last session."""

    def write(self, folder: Path) -> None:
        """Write `results.json` into `folder`, all or nothing."""
        self.folder = folder
        write_atomically(folder / FILE, json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The results in `folder`, if there are any. Raises `SliceFineError` if the file cannot be theirs."""
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise SliceFineError(f"{path} is not of an evaluation of this kind ({error}). {OTHER_FOLDER}") from error

    def refuse_other(self, model: str, folder: Path, **now: Any) -> None:
        """Raise `SliceFineError` with what differs of `now`, names of `DECIDES`, for the model called `model`."""
        words = {"weights": f"the weights are others: answered by {self.model}, asked of {model} now."}
        raise_all(
            [
                words.get(name, f"`{name}` was {getattr(self, name)} and is {now[name]} now.")
                for name in self.DECIDES
                if name in now and getattr(self, name) != now[name]
            ],
            f"{folder} holds answers of another evaluation. {OTHER_FOLDER} What differs",
        )


@dataclass(kw_only=True)
class Results(Outcome):
    """What an evaluation of generated answers came to.

    Of each task: `questions` answered of those `asked` (None if not known), `right`, `accuracy` (0 to 1), its 95 % `interval` (Wilson),
    `unanswered` (no answer in the output), `empty` (nothing was written), `cut` (outputs that have not ended). The average is
    that of the accuracies.
    """

    DECIDES = ("suite", "engine", "weights", "dtype", "max_new_tokens", "num_beams")
    ASKED = "questions"

    suite: str
    engine: str
    max_new_tokens: int | None = None
    """Most tokens of an answer."""
    num_beams: int | None = None
    """1 = greedy."""

    def table(self) -> str:
        """The table of the paper, a column a task and the average last, with intervals and counts below."""
        tasks = {task.name: task for task in SUITES[self.suite].tasks}
        rows: dict[str, list[str]] = {
            "": [tasks[name].title for name in self.tasks],
            "accuracy, %": [f"{100 * scores['accuracy']:.1f}" for scores in self.tasks.values()],
            "95 % interval": [
                "{:.1f}-{:.1f}".format(*(100 * end for end in s["interval"])) for s in self.tasks.values()
            ],
            "questions": [self._questions(tasks[name], scores) for name, scores in self.tasks.items()],
        }
        if any("unanswered" in scores for scores in self.tasks.values()):
            rows["unanswered"] = [str(scores["unanswered"]) for scores in self.tasks.values()]
        if any("acc_norm" in scores for scores in self.tasks.values()):
            rows["acc_norm, %"] = [
                f"{100 * scores['acc_norm']:.1f}" if "acc_norm" in scores else "" for scores in self.tasks.values()
            ]
        rows[""].append("average")
        rows["accuracy, %"].append("-" if self.average is None else f"{100 * self.average:.1f}")
        return aligned(rows)

    @property
    def searched(self) -> bool:
        return self.engine == "generate"  # the test sets of the harness are its own

    def notes(self) -> list[str]:
        session = self.sessions[-1]
        if "tokens_per_second" not in session:
            return []
        how = "greedy" if self.num_beams == 1 else f"{self.num_beams} beams"
        return [
            f"{how}, at most {self.max_new_tokens} tokens; {session['answers']} answers in {session['seconds']:.1f} s, "
            f"{session['tokens_per_second']:.0f} tokens/s"
        ]

    def _questions(self, task: Task, scores: dict[str, Any]) -> str:
        asked = scores.get("asked") or scores["questions"]
        if scores["questions"] < asked:
            return f"{scores['questions']} of {asked}"
        whole = self.limit is not None or scores["questions"] == task.questions
        return str(scores["questions"]) if whole else f"{scores['questions']} of {task.questions}"


def scores(answers: Iterable[Answer]) -> dict[str, Any]:
    """The counts and the accuracy of one task's answers."""
    given = list(answers)
    return proportion(sum(answer.right for answer in given), len(given)) | {
        "unanswered": sum(answer.answer is None for answer in given),
        "empty": sum(not response(answer.output) for answer in given),
        "cut": sum(not answer.ended for answer in given),
    }


def proportion(right: int, questions: int) -> dict[str, Any]:
    """An accuracy with its count and interval."""
    return {
        "questions": questions,
        "right": right,
        "accuracy": right / questions if questions else 0.0,
        "interval": list(wilson(right, questions)),
    }


def average(tasks: dict[str, dict[str, Any]]) -> float | None:
    """The mean of the tasks' accuracies, whatever their sizes, as in the paper; None without a task."""
    accuracies = [scores["accuracy"] for scores in tasks.values()]
    return sum(accuracies) / len(accuracies) if accuracies else None


def aligned(rows: Mapping[str, Sequence[str]]) -> str:
    """A table: the name of each row, and its cells, which may be fewer than the columns."""
    first = max(map(len, rows))
    columns = max(map(len, rows.values()))
    cells = {name: [*values, *[""] * (columns - len(values))] for name, values in rows.items()}
    widths = [max(len(values[column]) for values in cells.values()) for column in range(columns)]
    return "\n".join(
        "  ".join(
            [name.ljust(first), *(value.rjust(width) for value, width in zip(values, widths, strict=True))]
        ).rstrip()
        for name, values in cells.items()
    )
