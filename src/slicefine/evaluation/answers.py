"""The file of finished answers, `answers.jsonl`: one line a question, written batch by batch, so that nothing is lost."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slicefine.errors import SliceFineError, SliceFineWarning, raise_all
from slicefine.evaluation.questions import Question
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


_TYPES = {
    "task": str, "row": int, "prompt": str, "prompt_tokens": int, "output": str, "output_tokens": int, "ended": bool,
    "answer": (str, type(None)), "gold": str, "right": bool,
}  # fmt: skip


class Answers:
    """The answers in a folder. What a process wrote last, cut off in the middle of a line, is dropped with a warning."""

    def __init__(self, folder: Path) -> None:
        """Read the file in `folder`, if there is one. Raises `SliceFineError` for lines that are no answers."""
        self.path = folder / FILE
        self._length = self._size = 0
        """Bytes of whole lines, and of all."""
        self.found: dict[tuple[str, int], Answer] = {}
        if self.path.is_file():
            self._read()

    def _read(self) -> None:
        content = self.path.read_bytes()
        self._length, self._size = content.rfind(b"\n") + 1, len(content)
        if self._length < self._size:
            warnings.warn(
                f"The last line of {self.path} was cut off when it was written; its question is asked again.",
                SliceFineWarning,
                stacklevel=3,
            )
        problems = []
        for number, line in enumerate(content[: self._length].splitlines(), 1):
            try:
                values = json.loads(line)
                wrong = values.keys() != _TYPES.keys() or [
                    name for name, kind in _TYPES.items() if not isinstance(values[name], kind)
                ]
                if wrong:
                    raise ValueError("not the fields of an answer")
            except (ValueError, AttributeError) as error:
                problems.append(f"{self.path}:{number}: {error}.")
                continue
            answer = Answer(**values)
            self.found[answer.key] = answer
        if problems:
            raise SliceFineError(
                "\n".join([*shorten(problems), "Start anew with --overwrite, or name another --output."])
            )

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

    def append(self, answers: Sequence[Answer]) -> None:
        """Write the answers of a batch through to the disk.

        Raises `SliceFineError` if the file is not as this object has read or left it: another process writes into it.
        """
        lines = "".join(json.dumps(dataclasses.asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
        with self.path.open("ab") as file:
            if file.tell() != self._size:
                raise SliceFineError(
                    f"Another process writes into {self.path}: wait for it, or choose another --output."
                )
            file.truncate(self._length)
            file.write(lines.encode("utf-8", "replace"))
            file.flush()
            os.fsync(file.fileno())
            self._length = self._size = file.seek(0, os.SEEK_END)
        self.found |= {answer.key: answer for answer in answers}
