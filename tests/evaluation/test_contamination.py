from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from parrot import boolq_rows, write_rows

from slicefine import SliceFineError, SliceFineWarning
from slicefine.evaluation.contamination import TrainingSet, check, normalised, of_run
from slicefine.evaluation.questions import Question, Questions, read
from slicefine.evaluation.suites import SUITES
from slicefine.training.data import read_table
from slicefine.training.prompts import prompt
from slicefine.training.record import RunRecord

SKY, HOUSE, FIRE = boolq_rows()


@pytest.fixture
def questions(data: str) -> Questions:
    return read(SUITES["commonsense"].tasks[:2], data)


def of(*paths: Path) -> list[TrainingSet]:
    return [TrainingSet(source=str(path)) for path in paths]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Is the Sky  blue?", "is the sky blue"),
        ("a\n\nb", "A b."),
        ("$5, or 3.5", "5 or 3 5"),
        ("Über", "über"),
        ("cafe\u0301", "caf\u00e9"),
        ("\uff15 apples", "5 apples"),
        ("1,000 of 2,000,000", "1000 of 2000000"),
        ("5,6", "5 6"),
    ],
)
def test_case_white_space_and_punctuation_do_not_count(one: str, other: str) -> None:
    assert normalised(one) == normalised(other)


def test_words_and_numbers_count() -> None:
    assert len({normalised(text) for text in ("5 apples", "6 apples", "5 apple", "apples 5")}) == 4


@pytest.mark.parametrize(
    "row",
    [
        SKY,
        SKY | {"instruction": SKY["instruction"].upper().replace("\n\n", "  ") + " !"},
        {"prompt": SKY["instruction"], "completion": "true"},
        {"prompt": prompt(SKY["instruction"]), "completion": "true"},
        {"text": prompt(SKY["instruction"]) + "the correct answer is true"},
        {"question": SKY["instruction"]},
        {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": SKY["instruction"]}]},
        {"prompt": [{"role": "user", "content": SKY["instruction"]}], "completion": []},
        {"prompt": f"Question: {SKY['instruction']}\nAnswer:", "completion": "true"},
        {"messages": [{"role": "human", "content": SKY["instruction"] + " Let's think step by step."}]},
        {"text": "<s>" + prompt(SKY["instruction"]) + "true</s>"},
        {"text": prompt(SKY["instruction"]).replace("\n", "\n" + 16 * " ")},
        {"text": f"{SKY['instruction']} true"},
        {"query": SKY["instruction"], "response": "true"},
    ],
)
def test_a_question_is_found_in_every_format(questions: Questions, tmp_path: Path, row: dict[str, Any]) -> None:
    other = {"instruction": "something else", "output": "x"}
    path = write_rows(tmp_path / "train.jsonl", [other, row])
    found = check(questions, of(path))
    assert (found.rows, found.questions) == ({"boolq": 1}, {"boolq": 1})
    assert found.examples == [f"{path}:2 -> boolq, row 1"]


@pytest.mark.parametrize("name", ["train.json", "train.csv", "train.parquet"])
def test_in_every_kind_of_file(questions: Questions, tmp_path: Path, name: str) -> None:
    import pandas

    path = tmp_path / name
    frame = pandas.DataFrame([FIRE | {"input": ""}])
    if name.endswith("json"):
        path.write_text(json.dumps([FIRE]))
    elif name.endswith("csv"):
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    assert check(questions, of(path)).questions == {"boolq": 1}


def test_instruction_and_input_in_a_prompt_with_something_before_it(tmp_path: Path) -> None:
    question = Question(
        task="boolq", row=1, instruction="Say whether this is true", input="the sky is blue", gold="true"
    )
    row = {"text": "<s>" + prompt(question.instruction, question.input)}
    assert check({"boolq": [question]}, of(write_rows(tmp_path / "train.jsonl", [row]))).rows == {"boolq": 1}


@pytest.mark.parametrize(
    ("asked", "text", "found"),
    [
        ("one two three four five six seven eight", "Well, one two three four five six seven eight nine", True),
        ("one two three four five six seven eight", "one two three four five six seven eight", True),
        ("one two three four five six seven eight", "zone two three four five six seven eight", False),
        ("one two three four five six seven eight", "one two three four five six seven eighty", False),
        ("one two three four five six seven eight nine", "one two three four five six seven eight", False),
        ("one two three four five six seven", "Well, one two three four five six seven", False),
        ("one two three four five six seven", "one two three four five six seven", True),
    ],
)
def test_a_long_question_is_found_inside_of_a_text(asked: str, text: str, found: bool, tmp_path: Path) -> None:
    question = Question(task="boolq", row=1, instruction=asked, input="", gold="true")
    path = write_rows(tmp_path / "train.jsonl", [{"text": text}])
    assert bool(check({"boolq": [question]}, of(path)).rows) is found


def test_in_the_column_of_plain_texts(questions: Questions, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "train.jsonl", [{"body": prompt(SKY["instruction"])}])
    assert check(questions, [TrainingSet(source=str(path), text="body")]).rows == {"boolq": 1}
    assert check(questions, of(path)).rows == {}


def test_the_answer_of_an_assistant_is_no_question(questions: Questions, tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "assistant", "content": SKY["instruction"]}]},
        {"instruction": "Repeat.", "output": SKY["instruction"]},
    ]
    assert check(questions, of(write_rows(tmp_path / "train.jsonl", rows))).rows == {}


def test_counts_and_five_examples(questions: Questions, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "train.jsonl", [SKY] * 6 + [HOUSE])
    found = check(questions, of(path))
    assert (found.rows, found.questions) == ({"boolq": 7}, {"boolq": 2})
    assert found.examples == [f"{path}:{line} -> boolq, row 1" for line in range(1, 6)]
    with pytest.raises(SliceFineError) as caught:
        found.refuse()
    assert "7 training examples are test questions (boolq 2)" in str(caught.value)
    assert f"{path}:5 -> boolq, row 1" in str(caught.value)
    assert "--allow_contamination" in str(caught.value)


def test_nothing_found_is_not_refused(questions: Questions, tmp_path: Path) -> None:
    found = check(questions, of(write_rows(tmp_path / "train.jsonl", [{"instruction": "x"}])))
    found.refuse()
    assert found.examples == []


def test_all_missing_files_at_once(questions: Questions, tmp_path: Path) -> None:
    with pytest.raises(SliceFineError, match=r"2 problems(.|\n)*a.jsonl does not exist(.|\n)*b.json does not exist"):
        check(questions, of(tmp_path / "a.jsonl", tmp_path / "b.json"))


def test_the_training_examples_of_a_run(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "train.jsonl", [SKY])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data:\n  train: {file}\n")
    assert of_run(tmp_path) == TrainingSet(source=str(file))
    recipe.write_text("data:\n  train: owner/name\n  subset: main\n  train_split: auxiliary\n  text: body\n")
    assert of_run(tmp_path) == TrainingSet(source="owner/name", subset="main", split="auxiliary", text="body")
    recipe.write_text(f"data:\n  train: {tmp_path / 'gone.jsonl'}\n")
    with pytest.warns(SliceFineWarning, match=r"gone.jsonl, are not there any more: .* --train_data"):
        assert of_run(tmp_path) is None


def test_a_training_file_that_was_replaced_since_is_refused(questions: Questions, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "train.jsonl", [FIRE])
    (tmp_path / "recipe.yaml").write_text(f"data:\n  train: {file}\n")
    trained = {"train": {"source": str(file), "fingerprint": read_table(str(file), None).fingerprint}}
    RunRecord(task="causal-lm", model="m", seed=0, started="now", data=trained).write(tmp_path)
    training = of_run(tmp_path)
    assert training is not None
    assert check(questions, [training]).rows == {"boolq": 1}
    write_rows(file, [{"instruction": "x"}])
    with pytest.raises(SliceFineError, match=r"train\.jsonl, were changed since .* with --train_data"):
        check(questions, [training])
    assert check(questions, of(file)).rows == {}


def test_a_run_without_a_recipe_names_no_training_examples(tmp_path: Path) -> None:
    assert of_run(tmp_path) is None
