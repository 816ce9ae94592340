"""The published rules on answers written by hand, the tricky ones included: what they do is what is tested."""

from __future__ import annotations

import math

import pytest
from scipy.stats import binomtest

from slicefine.evaluation.scoring import extract, gold_problem, is_right, response, wilson
from slicefine.evaluation.suites import SUITES

TASKS = {task.name: task for suite in SUITES.values() for task in suite.tasks}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("the answer is 7.", "7."),
        ("1,000", "1000"),
        ("1000.0", "1000.0"),
        ("$1,234,567.89", "1234567.89"),
        ("not 7 but 8", "8"),
        ("8, not 7", "7"),
        ("-3", "-3"),
        ("10-3", "-3"),
        ("10 - 3", "3"),
        ("3.", "3."),
        ("$5", "5"),
        ("50%", "50"),
        ("1/2", "2"),
        (".5", "5"),
        ("1e3", "3"),
        ("3 + 4 = 7 apples", "7"),
        ("7 apples on 2 trees", "2"),
        ("1, 2 and 3", "3"),
        ("1,2", "12"),
        ("3.5.2", "2"),
        ("version 1.2.3", "3"),
        ("seven", None),
        ("", None),
        ("--", None),
    ],
)
def test_the_last_number_is_the_answer(text: str, answer: str | None) -> None:
    assert extract(TASKS["gsm8k"], text) == answer


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("1000", "1000.0", True),
        ("1000.0", "1000", True),
        ("7.", "7", True),
        ("-3", "3", False),
        ("3", "-3", False),
        ("0.667", "0.6666666666666666", True),
        ("0.66", "0.6666666666666666", False),
        ("2.001", "2", True),
        ("2.0011", "2", False),
        ("8", "7", False),
        ("9" * 400, "9", False),
        (None, "0", False),
    ],
)
def test_numbers_are_compared_within_a_thousandth(answer: str | None, gold: str, right: bool) -> None:
    assert is_right(TASKS["gsm8k"], answer, gold) is right


@pytest.mark.parametrize(
    ("task", "text", "answer"),
    [
        ("boolq", "the correct answer is true", "true"),
        ("boolq", "false, not true", "false"),
        ("boolq", "It is not true but false", "true"),
        ("boolq", "untrue", "true"),
        ("boolq", "True", None),
        ("boolq", "yes", None),
        ("boolq", "", None),
        ("piqa", "the correct answer is solution2", "solution2"),
        ("piqa", "solution 2", None),
        ("piqa", "Solution1", None),
        ("piqa", "solution12", "solution1"),
        ("piqa", "answer1", None),
        ("social_i_qa", "answer3 or answer1", "answer3"),
        ("arc-easy", "answer5", "answer5"),
        ("arc-challenge", "answer6", None),
        ("openbookqa", "answer4.", "answer4"),
        ("hellaswag", "ending4", "ending4"),
        ("hellaswag", "ending5", None),
        ("winogrande", "option1/option2", "option1"),
        ("winogrande", "Option2: Maria", None),
    ],
)
def test_the_first_word_that_is_an_answer_counts(task: str, text: str, answer: str | None) -> None:
    assert extract(TASKS[task], text) == answer


def test_a_word_is_right_if_it_is_the_gold_word() -> None:
    boolq = TASKS["boolq"]
    assert is_right(boolq, "true", "true")
    assert not is_right(boolq, "true", "false")
    assert not is_right(boolq, None, "false")


def test_a_second_prompt_written_by_the_model_is_not_scored() -> None:
    assert response(" It is 7.\n\n### Response:\n8") == "It is 7."
    assert response("### Response:\n8") == ""
    assert response("It is 7.") == "It is 7."


@pytest.mark.parametrize(
    ("task", "gold", "says"),
    [
        ("boolq", "true", None),
        ("boolq", "yes", "the answer is one of true, false; got 'yes'"),
        ("boolq", None, "got None"),
        ("arc-easy", "answer5", None),
        ("svamp", "8.0", None),
        ("svamp", 8.0, None),
        ("svamp", "eight", "the answer is a number; got 'eight'"),
        ("svamp", "nan", "the answer is a number"),
        ("svamp", "inf", "the answer is a number"),
        ("svamp", "1,000", "the answer is a number"),
    ],
)
def test_answers_of_test_sets_are_checked(task: str, gold: object, says: str | None) -> None:
    problem = gold_problem(TASKS[task], gold)
    assert problem is None if says is None else says in str(problem)


@pytest.mark.parametrize(("right", "total"), [(0, 7), (7, 7), (1, 1), (3, 10), (2033, 3270)])
def test_wilson_as_scipy_has_it(right: int, total: int) -> None:
    expected = binomtest(right, total).proportion_ci(0.95, method="wilson")
    assert wilson(right, total) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_of_nothing_is_everything() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(0, 5)
    assert low == 0.0
    assert math.isfinite(high)
