"""The file of finished answers, `answers.jsonl`: one line a question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from slicefine.errors import raise_all
from slicefine.evaluation.questions import Question
from slicefine.evaluation.store import Store
from slicefine.training.data import shorten

FILE = "answers.jsonl"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model answered to a question, and whether it is right."""

    task: str
    row: int
    prompt: str
    prompt_tokens: int
    output: str
    """All that was generated."""
    output_tokens: int
    ended: bool
    """False if the output was cut at the most tokens."""
    answer: str | None
    """What was taken for the answer; None if there is none in the output."""
    gold: str
    right: bool

    @property
    def key(self) -> tuple[str, int]:
        return self.task, self.row


class Answers(Store[Answer]):
    """The answers in a folder."""

    FILE = FILE
    ITEM = Answer
    TYPES: ClassVar = {
        "task": str, "row": int, "prompt": str, "prompt_tokens": int, "output": str, "output_tokens": int, "ended": bool,
        "answer": (str, type(None)), "gold": str, "right": bool,
    }  # fmt: skip
    CALLED = "an answer"
    AGAIN = "its question is asked again"

    def refuse_others(self, questions: Sequence[Question], prompt_tokens: Mapping[tuple[str, int], int]) -> None:
        """Raise `SliceFineError` unless what was answered is what is asked now."""
        problems = []
        for question in questions:
            kept = self.found.get(question.key)
            if kept is None:
                continue
            where = f"{question.task}, row {question.row}"
            if kept.prompt != question.prompt:
                problems.append(f"{where}: the prompt was {kept.prompt[-60:]!r} and is {question.prompt[-60:]!r} now.")
            elif kept.gold != question.gold:
                problems.append(f"{where}: the answer was {kept.gold!r} and is {question.gold!r} now.")
            elif kept.prompt_tokens != prompt_tokens[question.key]:
                problems.append(
                    f"{where}: the prompt had {kept.prompt_tokens} tokens and has {prompt_tokens[question.key]} now: another tokenizer."
                )
        raise_all(
            shorten(problems),
            f"{self.path} has answers to other questions; start anew with --overwrite, or name another --output. What differs",
        )
