from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import pytest

from slicefine import SliceFineError, SliceFineWarning
from slicefine.evaluation.answers import Answer, Answers
from slicefine.evaluation.questions import Question

ASKED = Question(task="boolq", row=1, instruction="Is it?", input="", gold="true")
ANSWER = Answer(
    task="boolq", row=1, prompt=ASKED.prompt, prompt_tokens=9, output="it is\nü true\u2028", output_tokens=4, ended=True,
    answer="true", gold="true", right=True,
)  # fmt: skip
SECOND = dataclasses.replace(ANSWER, row=2, answer=None, right=False)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    answers = Answers(tmp_path)
    answers.append([ANSWER])
    answers.append([SECOND])
    return answers.path


def test_what_is_written_is_read(written: Path) -> None:
    assert Answers(written.parent).found == {("boolq", 1): ANSWER, ("boolq", 2): SECOND}
    assert len(written.read_text().split("\n")) == 3


@pytest.mark.parametrize("kept", range(1, 30))
def test_a_torn_last_line_is_dropped(written: Path, kept: int) -> None:
    first, second = written.read_bytes().splitlines(keepends=True)
    written.write_bytes(first + second[:-kept])
    with pytest.warns(SliceFineWarning, match=r"answers\.jsonl was cut off .* asked again"):
        answers = Answers(written.parent)
    assert answers.found == {("boolq", 1): ANSWER}
    answers.append([SECOND])
    assert written.read_bytes() == first + second


def test_nothing_of_a_torn_line_stays_behind_a_shorter_one(written: Path) -> None:
    first, second = written.read_bytes().splitlines(keepends=True)
    written.write_bytes(first + second[:-2])
    with pytest.warns(SliceFineWarning):
        answers = Answers(written.parent)
    short = dataclasses.replace(SECOND, output="")
    answers.append([short])
    assert Answers(written.parent).found == {("boolq", 1): ANSWER, ("boolq", 2): short}


@pytest.mark.parametrize("torn", [0, 5])
def test_of_two_writers_the_second_is_refused_and_the_first_loses_nothing(written: Path, torn: int) -> None:
    first, second = written.read_bytes().splitlines(keepends=True)
    written.write_bytes(first + second[: len(second) - torn])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The last line", SliceFineWarning)
        one, other = Answers(written.parent), Answers(written.parent)
    third = dataclasses.replace(ANSWER, row=3, output="x" * 500)
    one.append([SECOND, third])
    content = written.read_bytes()
    with pytest.raises(SliceFineError, match=r"Another process writes into .*answers\.jsonl: wait .* another --output"):
        other.append([SECOND])
    assert written.read_bytes() == content
    one.append([dataclasses.replace(third, row=4)])
    assert sorted(Answers(written.parent).found) == [("boolq", row) for row in (1, 2, 3, 4)]


def test_reading_changes_nothing(written: Path) -> None:
    torn = written.read_bytes()[:-5]
    written.write_bytes(torn)
    with pytest.warns(SliceFineWarning):
        Answers(written.parent)
    assert written.read_bytes() == torn


@pytest.mark.parametrize("line", ["nothing", "[]", "{}", '{"task": "boolq"}', "3"])
def test_a_whole_line_that_is_no_answer_is_an_error(written: Path, line: str) -> None:
    written.write_text(f"{line}\n" + written.read_text())
    with pytest.raises(SliceFineError, match=r"answers\.jsonl:1: (.|\n)*--overwrite"):
        Answers(written.parent)


def test_fields_of_other_types_are_an_error(written: Path) -> None:
    written.write_text(written.read_text().replace('"prompt_tokens": 9', '"prompt_tokens": "9"'))
    with pytest.raises(SliceFineError, match=r"answers\.jsonl:1: not the fields of an answer"):
        Answers(written.parent)


@pytest.mark.parametrize(
    ("question", "tokens", "says"),
    [
        (ASKED, 9, None),
        (dataclasses.replace(ASKED, instruction="Is it not?"), 9, "the prompt was .*Is it\\?.* and is .*Is it not\\?"),
        (dataclasses.replace(ASKED, gold="false"), 9, "the answer was 'true' and is 'false' now"),
        (ASKED, 8, "the prompt had 9 tokens and has 8 now: another tokenizer"),
        (dataclasses.replace(ASKED, row=7, instruction="Is it not?"), 9, None),
    ],
)
def test_answers_to_other_questions_are_refused(
    written: Path, question: Question, tokens: int, says: str | None
) -> None:
    answers = Answers(written.parent)
    if says is None:
        answers.refuse_others([question], {question.key: tokens})
    else:
        with pytest.raises(SliceFineError, match=f"boolq, row 1: {says}"):
            answers.refuse_others([question], {question.key: tokens})
