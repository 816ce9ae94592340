from __future__ import annotations

import pytest

from slicefine.training.prompts import RESPONSE, instruction_of, prompt


def test_the_published_wording() -> None:
    assert prompt("Say hello.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request. \n\n"
        "### Instruction:\nSay hello.\n\n### Response:\n"
    )
    assert prompt("Say it.", "hello") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request. \n\n### Instruction:\nSay it.\n\n### Input:\nhello\n\n"
        "### Response:\n"
    )


def test_a_prompt_ends_where_the_answer_begins() -> None:
    assert prompt("a", "b").endswith(f"{RESPONSE}\n")


@pytest.mark.parametrize(
    ("text", "instruction"),
    [
        (prompt("Say hello."), "Say hello."),
        (prompt("Say hello.") + "hello", "Say hello."),
        (prompt("Say it.", "hello").strip(), "Say it.\n\nhello"),
        ("no prompt", "no prompt"),
        ("a text with ### Instruction:\nin it", "a text with ### Instruction:\nin it"),
    ],
)
def test_the_instruction_of_a_prompt(text: str, instruction: str) -> None:
    assert instruction_of(text) == instruction
