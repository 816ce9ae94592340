from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    RobertaConfig,
    RobertaModel,
)

from slicefine import SliceFineError
from slicefine.training.recipe import DataSettings, Recipe
from slicefine.training.tasks import TASKS, get_task
from slicefine.training.tasks import text_classification as task


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path: Path, rows: list[dict[str, Any]], **settings: Any) -> task.Examples:
    return task.read(DataSettings(train=write(path / "train.jsonl", rows), **settings))


def refusal(path: Path, rows: list[dict[str, Any]], **settings: Any) -> str:
    with pytest.raises(SliceFineError) as error:
        read(path, rows, **settings)
    return str(error.value)


def test_every_task_is_there() -> None:
    for name in TASKS:
        assert callable(get_task(name).read)


def test_string_labels_are_numbered_in_sorted_order(tmp_path: Path) -> None:
    validation = write(tmp_path / "validation.jsonl", [{"text": "x", "label": "pear"}])
    rows = [{"text": "a", "label": "pear"}, {"text": "b", "label": "apple"}]
    examples = read(tmp_path, rows, validation=validation)
    assert examples.classes == ["apple", "pear"]
    assert examples.train.to_list() == [{"text": "a", "labels": 1}, {"text": "b", "labels": 0}]
    assert examples.validation.to_list() == [{"text": "x", "labels": 1}]
    assert examples.summary()["validation"]["examples"] == 1


def test_integer_labels_are_sorted_as_numbers(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": label} for label in (10, 9, 2) for _ in range(4)]
    examples = read(tmp_path, rows, validation=0.25)
    assert examples.classes == ["2", "9", "10"]
    assert Counter(examples.train["labels"]) == {0: 3, 1: 3, 2: 3}


def test_csv_labels_are_integers_where_all_are_digits(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *([f"t{n}", n] for n in (10, 9, 2) * 4)])
    assert task.read(DataSettings(train=str(path), validation=0.25)).classes == ["2", "9", "10"]
    path.write_text(path.read_text() + "last,none\n")
    assert task.read(DataSettings(train=str(path), validation=0.25)).classes == ["10", "2", "9", "none"]


def test_pairs(tmp_path: Path) -> None:
    rows = [{"a": "one", "b": "two", "y": n % 2} for n in range(8)]
    examples = read(tmp_path, rows, text="a", text_pair="b", label="y", validation=0.25)
    assert examples.train[0] == {"text": "one", "text_pair": "two", "labels": 0}


def test_the_split_is_the_same_every_time_and_fair_to_classes(tmp_path: Path) -> None:
    rows = [{"text": f"t{n}", "label": "rare" if n == 7 else "ab"[n % 2]} for n in range(41)]
    first, second = (read(tmp_path, rows, validation=0.2) for _ in range(2))
    assert first.train.to_list() == second.train.to_list()
    assert first.validation.to_list() == second.validation.to_list()
    assert Counter(first.validation["labels"]) == {0: 4, 1: 4}
    assert 2 in first.train["labels"]  # the only one of its class
    texts = [*first.train["text"], *first.validation["text"]]
    assert sorted(texts) == sorted(row["text"] for row in rows)


def test_a_hub_data_set_brings_its_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes", "maybe"]))
    splits = {"train": [1, 0], "validation": [1], "test": [-1]}

    def load(name: str, subset: str | None, split: str) -> datasets.Dataset:
        labels = splits[split]
        return datasets.Dataset.from_dict({"text": ["a"] * len(labels), "label": labels}, features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    examples = task.read(DataSettings(train="some/data", validation="validation"))
    assert examples.classes == ["no", "yes", "maybe"]
    assert examples.validation["labels"] == [1]
    with pytest.raises(
        SliceFineError, match=r"split test, row 1: label -1 is out of range; an integer label is 0 to 2"
    ):
        task.read(DataSettings(train="some/data", validation="test"))


GOOD = [{"text": "a", "label": 0}, {"text": "b", "label": 1}] * 4


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "the train set is empty"),
        ([{"text": None, "label": 0}], "train.jsonl:9: 'text' is a text; got null."),
        ([{"text": 3, "label": 0}], "train.jsonl:9: 'text' is a text; got 3."),
        ([{"text": " \n", "label": 0}], "train.jsonl:9: 'text' is empty."),
        ([{"text": "a", "label": None}], "train.jsonl:9: 'label' is an integer or a string; got null."),
        ([{"text": "a", "label": ""}], "train.jsonl:9: 'label' is an integer or a string; got nothing."),
        ([{"text": "a", "label": True}], "train.jsonl:9: 'label' is an integer or a string; got True."),
        ([{"text": "a", "label": 0.5}], "train.jsonl:9: 'label' is an integer or a string; got 0.5."),
        ([{"text": "a", "label": -1}], "train.jsonl:9: label -1 is out of range; an integer label is 0 or above"),
        ([{"text": "a", "label": "0"}], "labels are all integers or all strings; 'label' has 0 (%s:1) and '0' (%s:9)"),
    ],
)
def test_bad_rows(tmp_path: Path, rows: list[dict[str, Any]], says: str) -> None:
    message = refusal(tmp_path, GOOD + rows if rows else [])
    assert says.replace("%s", str(tmp_path / "train.jsonl")) in message


def test_all_problems_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, [*GOOD, {"text": "", "label": 0}, {"text": "a", "label": []}])
    assert "2 problems" in message
    assert ":9: 'text' is empty." in message
    assert ":10: 'label' is an integer or a string; got []." in message


def test_one_class_is_no_classification(tmp_path: Path) -> None:
    assert "two classes or more" in refusal(tmp_path, [{"text": "a", "label": "x"}] * 8)


def test_a_label_that_training_never_sees(tmp_path: Path) -> None:
    validation = write(tmp_path / "validation.jsonl", [{"text": "a", "label": 0}, {"text": "a", "label": 7}])
    message = refusal(tmp_path, GOOD, validation=validation)
    assert f"{validation}:2: label 7 is not among the 2 classes of the training examples." in message


def test_a_fraction_that_leaves_nothing(tmp_path: Path) -> None:
    message = refusal(tmp_path, GOOD, validation=0.01)
    assert "the validation set is empty: a fraction of 0.01 of the 8 examples" in message
    assert "larger fraction, or to a file" in message


@pytest.mark.parametrize("validation", ["fraction", "file"])
def test_a_column_that_names_rows_and_not_classes(tmp_path: Path, validation: str) -> None:
    rows = [{"text": "a", "label": f"row {number}"} for number in range(8)]
    other = write(tmp_path / "validation.jsonl", [{"text": "a", "label": "row 8"}])
    message = refusal(tmp_path, rows, validation=0.25 if validation == "fraction" else other)
    assert "in 'label' of" in message
    assert "each of the 8 rows has one of its own. Set `data.label` to the column of the classes." in message


def test_prepared_for_the_model(recipe: Recipe) -> None:
    prepared = task.prepare(recipe, task.read(recipe.data))
    assert prepared.model.config.id2label == {0: "food", 1: "space", 2: "sport"}
    assert prepared.model.config.label2id == {"food": 0, "space": 1, "sport": 2}
    assert prepared.new_modules == ["classifier"]
    assert "text" not in prepared.train.column_names
    batch = prepared.collator([prepared.train[n] for n in range(5)])
    longest = max(len(prepared.train[n]["input_ids"]) for n in range(5))
    assert batch["input_ids"].shape == (5, longest)  # padded to the longest of the batch
    assert batch["labels"].tolist() == prepared.train["labels"][:5]


def test_long_texts_are_cut(recipe: Recipe, settings: dict[str, Any]) -> None:
    short = Recipe.from_flat(settings | {"data.max_length": 3})
    prepared = task.prepare(short, task.read(short.data))
    assert {len(row) for row in prepared.train["input_ids"]} == {3}


def test_longer_than_the_model_can_read(settings: dict[str, Any]) -> None:
    recipe = Recipe.from_flat(settings | {"data.max_length": 65})
    with pytest.raises(SliceFineError, match=r"`data.max_length` is at most what .* can read, 64 tokens; got 65\."):
        task.prepare(recipe, task.read(recipe.data))


def test_no_such_model(settings: dict[str, Any], tmp_path: Path) -> None:
    recipe = Recipe.from_flat(settings | {"model.name": str(tmp_path)})
    with pytest.raises(SliceFineError, match=r"`model.name` is a folder with a pretrained model"):
        task.prepare(recipe, task.read(recipe.data))


def test_a_pair_with_one_text_empty_is_learned_and_noted(tmp_path: Path) -> None:
    rows = [{"a": f"one {n}", "b": "" if n in (3, 5) else "two", "y": n % 2} for n in range(16)]
    columns = {"text": "a", "text_pair": "b", "label": "y", "validation": 0.25}
    examples = read(tmp_path, rows, **columns)
    assert examples.notes == [f"Pairs with one text empty: 2, the first at {tmp_path / 'train.jsonl'}:4."]
    assert len(examples.train) + len(examples.validation) == 16
    rows[7] |= {"a": " "}
    rows[3] |= {"a": " "}
    rows[5] |= {"b": None}
    message = refusal(tmp_path, rows, **columns)
    assert "2 problems" in message
    assert ":4: 'a' and 'b' are empty." in message
    assert ":6: 'b' is a text; got null." in message


def test_notes_of_classes_reach_the_record(settings: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"text": "ball", "label": n % 2} for n in range(40)] + [{"text": "moon", "label": 2}]
    recipe = Recipe.from_flat(settings | {"data.train": write(tmp_path / "rare.jsonl", rows)})
    notes = task.prepare(recipe, task.read(recipe.data)).notes
    assert notes == ["Classes with one training example alone: '2'.", "Classes without a validation example: '2'."]


def test_long_pairs_keep_something_of_both(settings: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"text": "ball " * 40, "text_pair": "moon " * (40 if n % 2 else 2), "label": n % 2} for n in range(16)]
    path = write(tmp_path / "pairs.jsonl", rows)
    recipe = Recipe.from_flat(settings | {"data.train": path, "data.text_pair": "text_pair", "data.max_length": 16})
    prepared = task.prepare(recipe, task.read(recipe.data))
    tokens = [prepared.train["input_ids"][prepared.train["labels"].index(label)] for label in (0, 1)]
    ball, moon = prepared.processor.convert_tokens_to_ids(["ball", "moon"])
    for row, (balls, moons) in zip(tokens, ((11, 2), (6, 7)), strict=True):
        assert (len(row), row.count(ball), row.count(moon)) == (16, balls, moons)


def test_numbers_are_predicted_by_one_output(settings: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"text": "ball", "label": n / 4} for n in range(16)]
    changed = {"data.train": write(tmp_path / "numbers.jsonl", rows), "data.label_kind": "number"}
    recipe = Recipe.from_flat(settings | changed)
    examples = task.read(recipe.data)
    assert "classes" not in examples.summary()
    assert sorted([*examples.train["labels"], *examples.validation["labels"]]) == [n / 4 for n in range(16)]
    assert len(examples.validation) == 4
    prepared = task.prepare(recipe, examples)
    assert (prepared.model.config.num_labels, prepared.model.config.problem_type) == (1, "regression")
    assert prepared.collator is not None
    batch = prepared.collator([prepared.train[n] for n in range(3)])
    assert batch["labels"].dtype == torch.float32
    assert "less than one example. Set" in refusal(tmp_path, rows, label_kind="number", validation=0.01)


@pytest.mark.parametrize("outputs", [5, 1, 3])
def test_a_head_of_another_size_is_replaced_and_noted(
    outputs: int, settings: dict[str, Any], model_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tuned"
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.save_pretrained(folder)
    config = BertConfig.from_pretrained(model_folder, num_labels=outputs)
    saved = BertForSequenceClassification(config)
    saved.save_pretrained(folder)
    recipe = Recipe.from_flat(settings | {"model.name": str(folder)})
    prepared = task.prepare(recipe, task.read(recipe.data))
    assert prepared.model.config.num_labels == 3
    replaced = [f"The head of {outputs} classes in the files of {folder} was replaced by a new one of 3."]
    assert prepared.notes == (replaced if outputs != 3 else [])
    assert prepared.new_modules == ["classifier"]  # trained in full, also if it is not new
    kept = prepared.model.state_dict()["bert.pooler.dense.weight"]
    assert torch.equal(kept, saved.state_dict()["bert.pooler.dense.weight"])


def test_another_size_elsewhere_is_damage(settings: dict[str, Any], model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    config = BertConfig.from_pretrained(model_folder)
    BertModel(config).save_pretrained(folder)
    config.intermediate_size = 40
    config.save_pretrained(folder)
    recipe = Recipe.from_flat(settings | {"model.name": str(folder)})
    with pytest.raises(
        SliceFineError, match=r"(?s)is damaged.*intermediate.dense.bias has shape \(48,\) in the files, \(40,\)"
    ):
        task.prepare(recipe, task.read(recipe.data))


def test_positions_that_begin_behind_the_pad_token(
    settings: dict[str, Any], model_folder: Path, tmp_path: Path
) -> None:
    """RoBERTa's table of 20 positions with pad token 3 has room for 16 tokens."""
    folder = tmp_path / "roberta"
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(3)
    tokenizer.save_pretrained(folder)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=20, pad_token_id=3, **small)
    RobertaModel(config).save_pretrained(folder)
    recipe = Recipe.from_flat(settings | {"model.name": str(folder), "data.max_length": 16})
    prepared = task.prepare(recipe, task.read(recipe.data))
    full = torch.full((1, 16), 5)
    assert prepared.model(full).logits.shape == (1, 3)
    with pytest.raises((IndexError, RuntimeError)):
        prepared.model(torch.full((1, 17), 5))
    longer = Recipe.from_flat(settings | {"model.name": str(folder), "data.max_length": 17})
    with pytest.raises(SliceFineError, match=r"at most what .* can read, 16 tokens; got 17\."):
        task.prepare(longer, task.read(longer.data))
