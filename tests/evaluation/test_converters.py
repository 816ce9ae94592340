"""Rows in the hub's formats, made by hand, and the published rows that they must become."""

from __future__ import annotations

from typing import Any

import pytest

from slicefine.evaluation.converters import HUB_SETS
from slicefine.evaluation.scoring import gold_problem
from slicefine.evaluation.suites import SUITES

CHOICES = {"text": ["red", "green", "blue"], "label": ["A", "B", "C"]}
ASK = "Please choose the correct answer to the question: "
CASES: list[tuple[str, dict[str, Any], str, str]] = [
    (
        "boolq",
        {"question": "is house tax and property tax are same", "answer": True, "passage": "Property tax ..."},
        "Please answer the following question with true or false, question: is house tax and property tax are same?\n\n"
        "Answer format: true/false",
        "true",
    ),
    (
        "piqa",
        {"goal": "dresser", "sol1": "replace drawer with bobby pin ", "sol2": "finish, woodgrain", "label": 1},
        "Please choose the correct solution to the question: dresser\n\nSolution1: replace drawer with bobby pin \n\n"
        "Solution2: finish, woodgrain\n\nAnswer format: solution1/solution2",
        "solution2",
    ),
    (
        "social_i_qa",
        {
            "context": "Tracy didn't go home.",
            "question": "What does Tracy need to do?",
            "answerA": "make a plan",
            "answerB": "Go home",
            "answerC": "Find a place",
            "label": "3",
        },
        f"{ASK}Tracy didn't go home. What does Tracy need to do?\n\nAnswer1: make a plan Answer2: Go home "
        "Answer3: Find a place\n\nAnswer format: answer1/answer2/answer3",
        "answer3",
    ),
    (
        "hellaswag",
        {
            "activity_label": "Playing drums",
            "ctx": "People are standing behind large drums. a man",
            "ctx_a": "People are standing behind large drums.",
            "ctx_b": "a man",
            "endings": ["is playing.", "starts.", "begins.", "stops."],
            "label": "3",
        },
        "Please choose the correct ending to complete the given sentence: Playing drums: People are standing behind large "
        "drums. A man\n\nEnding1: is playing. Ending2: starts. Ending3: begins. Ending4: stops.\n\n"
        "Answer format: ending1/ending2/ending3/ending4",
        "ending4",
    ),
    (
        "hellaswag",
        {
            "activity_label": "Travel",
            "ctx_a": "[header] How",
            "ctx_b": "",
            "endings": ["a", "b", "c", "d"],
            "label": "0",
        },
        "Please choose the correct ending to complete the given sentence: Travel: [header] How\n\nEnding1: a Ending2: b "
        "Ending3: c Ending4: d\n\nAnswer format: ending1/ending2/ending3/ending4",
        "ending1",
    ),
    (
        "winogrande",
        {"sentence": "Sarah was better than Maria so _ won.", "option1": "Sarah", "option2": "Maria", "answer": "1"},
        "Please choose the correct answer to fill in the blank to complete the given sentence: Sarah was better than Maria so "
        "_ won.\n\nOption1: Sarah Option2: Maria Answer format: option1/option2",
        "option1",
    ),
    (
        "arc-easy",
        {"id": "x", "question": "Which is a colour of grass?", "choices": CHOICES, "answerKey": "B"},
        f"{ASK}Which is a colour of grass?\n\nAnswer1: red Answer2: green Answer3: blue\n\nAnswer format: answer1/answer2/answer3",
        "answer2",
    ),
    (
        "arc-challenge",
        {"question": "Which?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
        f"{ASK}Which?\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2",
        "answer2",
    ),
    (
        "openbookqa",
        {"question_stem": "There is most likely fog around:", "choices": CHOICES, "answerKey": "A"},
        f"{ASK}There is most likely fog around:\n\nAnswer1: red Answer2: green Answer3: blue\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer1",
    ),
    ("gsm8k", {"question": "How many?", "answer": "2 * 617 = <<2*617=1234>>1234\n#### 1,234"}, "How many?", "1234"),
    ("multiarith", {"question": " How many? ", "final_ans": "15"}, " How many? ", "15"),
    ("addsub", {"input": "How many ?", "output_program": "print(4)", "output_answer": "4"}, "How many ?", "4"),
    ("singleeq", {"input": "How many ?", "output_answer": "0.6"}, "How many ?", "0.6"),
    (
        "svamp",
        {"Body": "Each pack costs 76 dollars", "Question": "How much is it?", "Answer": "8.0", "Type": "Subtraction"},
        "Each pack costs 76 dollars. How much is it?",
        "8.0",
    ),
    (
        "svamp",
        {"Body": "It costs 76 dollars.", "Question": "How much?", "Answer": 8.0},
        "It costs 76 dollars. How much?",
        "8.0",
    ),
]


@pytest.mark.parametrize(("task", "row", "instruction", "answer"), CASES)
def test_a_row_of_the_hub_becomes_a_published_row(
    task: str, row: dict[str, Any], instruction: str, answer: str
) -> None:
    assert HUB_SETS[task].convert(row) == {"instruction": instruction, "answer": answer}


def test_every_task_has_a_home_and_a_case() -> None:
    tasks = [task for suite in SUITES.values() for task in suite.tasks]
    assert list(HUB_SETS) == [task.name for task in tasks]
    assert {case[0] for case in CASES} == HUB_SETS.keys()
    for task in tasks:
        answers = [answer for name, *_, answer in CASES if name == task.name]
        assert [gold_problem(task, answer) for answer in answers] == [None] * len(answers)


def test_a_row_without_a_label_has_no_answer() -> None:
    row = {"goal": "a", "sol1": "b", "sol2": "c", "label": -1}
    assert HUB_SETS["piqa"].convert(row)["answer"] == "solution0"
    assert gold_problem(SUITES["commonsense"].tasks[1], "solution0")
