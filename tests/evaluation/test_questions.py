from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from parrot import boolq_rows, write_rows

from slicefine import SliceFineError
from slicefine.evaluation.questions import read
from slicefine.evaluation.suites import SUITES
from slicefine.training.prompts import prompt

BOOLQ, PIQA = SUITES["commonsense"].tasks[:2]
GSM8K = SUITES["math"].tasks[1]


def test_lines_of_json(data: str) -> None:
    found = read([BOOLQ, PIQA], data)
    assert [question.gold for question in found["boolq"]] == ["true", "false", "true"]
    assert [question.key for question in found["piqa"]] == [("piqa", 1), ("piqa", 2)]
    assert found["boolq"][0].prompt == prompt(boolq_rows()[0]["instruction"])


def test_the_layout_of_llm_adapters(tmp_path: Path) -> None:
    path = tmp_path / "GSM8K" / "test.json"
    path.parent.mkdir()
    path.write_text(json.dumps([{"instruction": "How many?", "input": "", "output": "", "answer": 7.0}]))
    (question,) = read([GSM8K], str(tmp_path))["gsm8k"]
    assert (question.gold, question.instruction) == ("7.0", "How many?")


def test_the_input_is_part_of_the_prompt(tmp_path: Path) -> None:
    write_rows(tmp_path / "boolq" / "test.jsonl", [{"instruction": "Is it?", "input": "It is.", "answer": "true"}])
    (question,) = read([BOOLQ], str(tmp_path))["boolq"]
    assert question.prompt == prompt("Is it?", "It is.")


def test_a_limit_takes_the_first_of_each_task(data: str) -> None:
    found = read([BOOLQ, PIQA], data, limit=1)
    assert {name: [question.row for question in rows] for name, rows in found.items()} == {"boolq": [1], "piqa": [1]}


def test_all_missing_files_at_once(data: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "winogrande" / "test.csv", [])
    with pytest.raises(SliceFineError) as caught:
        read(SUITES["commonsense"].tasks, data)
    message = str(caught.value)
    assert "6 problems" in message
    assert f"hellaswag: there is no folder {data}/hellaswag." in message
    assert (
        f"winogrande: a test set is test.jsonl or test.json (JSON objects with instruction, input, answer); {data}/winogrande has test.csv."
        in message
    )
    assert message.endswith("Add it, or score the others: --tasks boolq piqa.")


@pytest.mark.parametrize(("name", "says"), [("absent", "does not exist"), ("data/boolq/test.jsonl", "is a file")])
def test_data_is_a_folder(data: str, tmp_path: Path, name: str, says: str) -> None:
    with pytest.raises(SliceFineError, match=f"`--data` is a folder .* {says}"):
        read([BOOLQ], str(tmp_path / name))


def test_rows_that_are_no_questions_are_all_named(tmp_path: Path) -> None:
    good = boolq_rows()[0]
    bad: list[Any] = [
        good | {"answer": "yes"},
        good | {"instruction": " "},
        good | {"input": 3},
        {"question": "?", "answer": "true"},
    ]
    path = write_rows(tmp_path / "boolq" / "test.jsonl", [good, *bad])
    with pytest.raises(SliceFineError) as caught:
        read([BOOLQ], str(tmp_path))
    for line, says in (
        (2, "one of true, false; got 'yes'"),
        (3, "a text in 'instruction'; got ' '"),
        (4, "'input' is a text; got 3"),
        (5, "a text in 'instruction'; got None"),
    ):
        assert f"{path}:{line}: " in str(caught.value)
        assert says in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("test.jsonl", b'{"a": 1}\n{"a": \n', r"test.jsonl:2: not valid JSON"),
        ("test.jsonl", b"[1]\n", r"test.jsonl:1: each line is a JSON object"),
        ("test.jsonl", b'{"a": "\xff"}\n', r"test.jsonl:1: .*is not UTF-8"),
        ("test.jsonl", b"\n", r"test.jsonl has no questions"),
        ("test.json", b'{"a": 1}', r"test.json: a .json file is a list of objects"),
        ("test.json", b"[1]", r"test.json:1 \(row 1\): each element of the list is a JSON object"),
        ("test.json", b"[", r"test.json:1: not valid JSON"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq" / name).write_bytes(content)
    with pytest.raises(SliceFineError, match=says):
        read([BOOLQ], str(tmp_path))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """`datasets.load_dataset` without a network: what it is asked for, and rows in the hub's format."""
    asked: list[tuple[Any, ...]] = []

    def load(name: str, subset: str | None, *, split: str, data_dir: str | None, revision: str | None) -> Any:
        asked.append((name, subset, split, data_dir, revision))
        rows = {
            "google/boolq": [{"question": "is it", "answer": True, "passage": "."}],
            "ChilleD/SVAMP": [{"Body": f"It is {split}.", "Question": "How many?", "Answer": "3.0"}],
            "baber/piqa": [{"goal": "a", "sol1": "b"}],
        }
        if name not in rows:
            raise ConnectionError("Couldn't reach the hub")
        return datasets.Dataset.from_list(rows[name])

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_from_the_hub(hub: list[tuple[Any, ...]]) -> None:
    (question,) = read([BOOLQ], None)["boolq"]
    assert question.instruction.startswith("Please answer the following question with true or false, question: is it?")
    svamp = SUITES["math"].tasks[4]
    assert [question.instruction for question in read([svamp], None)["svamp"]] == [
        "It is train. How many?",
        "It is test. How many?",
    ]
    assert hub == [
        ("google/boolq", None, "validation", None, None),
        ("ChilleD/SVAMP", None, "train", None, None),
        ("ChilleD/SVAMP", None, "test", None, None),
    ]


def test_what_the_hub_does_not_give(hub: list[tuple[Any, ...]]) -> None:
    with pytest.raises(
        SliceFineError, match=r"baber/piqa, split validation, row 1: not in the form .*KeyError\('sol2'\)"
    ):
        read([PIQA], None)
    with pytest.raises(
        SliceFineError, match=r"'openai/gsm8k' \(subset 'main', split 'test'\) .*Couldn't reach .*--data"
    ):
        read([GSM8K, PIQA], None)
    assert len(hub) == 2
