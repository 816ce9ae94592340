from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from slicefine import SliceFineError
from slicefine.training.named import NAMED, SUITES
from slicefine.training.recipe import Recipe
from slicefine.training.tasks import TASKS, get_task

SENTENCES = {"sentence": "a b", "idx": 0}
PAIRS = {
    "sentence1": "a",
    "sentence2": "b",
    "question1": "c",
    "question2": "d",
    "premise": "e",
    "hypothesis": "f",
    "question": "g",
    "sentence": "h",
}


def recipe(name: str | None, **changed: Any) -> Recipe:
    task = NAMED[name].task if name in NAMED else "text-classification"
    values = {"task": task, "model.name": "m", "output": "runs/a", "data.name": name}
    return Recipe.from_flat(values | {key.replace("__", "."): value for key, value in changed.items()})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None, str]]:
    """A hub with GLUE on it, of a few rows; returns what is asked for."""
    asked: list[tuple[str, str | None, str]] = []

    def load(name: str, subset: str | None, split: str) -> datasets.Dataset:
        asked.append((name, subset, split))
        assert name == "nyu-mll/glue"
        if subset == "stsb":
            label, labels = datasets.Value("float32"), [0.0, 2.5, 5.0, 3.5] * 4
        elif subset == "mnli":
            label = datasets.ClassLabel(names=["entailment", "neutral", "contradiction"])
            labels = [0, 1, 2, 1] * 4
        else:
            label, labels = datasets.ClassLabel(names=["no", "yes"]), [0, 1, 1, 0] * 4
        if split == "test":
            labels = [-1] * 16
        texts = PAIRS if subset not in ("cola", "sst2") else SENTENCES
        columns = {column: [f"{text} {number}" for number in range(16)] for column, text in texts.items()}
        features = {column: datasets.Value("string") for column in columns} | {"label": label}
        return datasets.Dataset.from_dict(columns | {"label": labels}, datasets.Features(features))

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_every_set_is_of_one_suite_and_of_a_task_there_is() -> None:
    assert sorted(name for names in SUITES.values() for name in names) == sorted(NAMED)
    assert [len(names) for names in SUITES.values()] == [9, 7, 3]
    for name, named in NAMED.items():
        assert (named.name, named.task in TASKS, bool(named.metrics)) == (name, True, True)
        assert {"label"} < named.columns.keys() <= {"text", "text_pair", "label", "image", "video"}


@pytest.mark.parametrize("name", SUITES["glue"])
def test_glue_by_name(name: str, hub: list[tuple[str, str | None, str]]) -> None:
    asked_for = recipe(name)
    assert asked_for.problems() == []
    resolved = asked_for.resolved()
    assert resolved.problems() == []
    assert resolved.resolved() == resolved
    examples = get_task("text-classification").read(resolved.data)
    validation = "validation_matched" if name == "mnli" else "validation"
    assert hub == [("nyu-mll/glue", name, "train"), ("nyu-mll/glue", name, validation)]
    columns = NAMED[name].columns
    texts = SENTENCES if name in ("cola", "sst2") else PAIRS
    assert examples.train[0]["text"] == f"{texts[columns['text']]} 0"
    assert examples.train[0].get("text_pair") == (
        f"{texts[columns['text_pair']]} 0" if "text_pair" in columns else None
    )
    assert examples.train["labels"][:4] == (
        [0.0, 2.5, 5.0, 3.5] if name == "stsb" else [0, 1, 2, 1] if name == "mnli" else [0, 1, 1, 0]
    )
    assert examples.classes == {"stsb": [], "mnli": ["entailment", "neutral", "contradiction"]}.get(name, ["no", "yes"])


def test_the_docs_name_every_set_with_its_place_and_scores() -> None:
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    for name, named in NAMED.items():
        *_, place, scores, _ = rows[name].split("|")
        assert (f"`{named.hub}`" if named.hub else "none") in place
        assert scores.replace("`", "").replace(" ", "").split(",") == list(named.metrics)


def test_a_fraction_for_validation_stays_one(hub: list[tuple[str, str | None, str]]) -> None:
    examples = get_task("text-classification").read(recipe("rte", data__validation=0.25).resolved().data)
    assert hub == [("nyu-mll/glue", "rte", "train")]
    assert (len(examples.train), len(examples.validation)) == (12, 4)


def test_the_unlabelled_test_split_is_refused(hub: list[tuple[str, str | None, str]]) -> None:
    with pytest.raises(SliceFineError, match=r"nyu-mll/glue, split test, row 1: label -1 is out of range"):
        get_task("text-classification").read(recipe("rte", data__validation="test").resolved().data)


@pytest.mark.parametrize("name", ["sst2", "stsb", "pets", "ucf101"])
def test_with_a_source_of_your_own_the_name_decides_labels_and_scores_alone(name: str, tmp_path: Path) -> None:
    pair = {"data__text_pair": "other"} if name == "stsb" else {}
    asked_for = recipe(name, data__train=str(tmp_path), data__label="y", **pair)
    assert asked_for.problems() == []
    data = asked_for.resolved().data
    assert (data.train, data.label, data.text, data.image, data.video) == (str(tmp_path), "y", "text", "image", "video")
    assert (data.subset, data.train_split, data.validation) == (None, "train", 0.1)
    assert data.label_kind == NAMED[name].label_kind


def test_images_and_clips_by_name() -> None:
    pets = recipe("pets").resolved().data
    assert (pets.train, pets.image, pets.label, pets.validation) == ("timm/oxford-iiit-pet", "image", "label", "test")
    hmdb = recipe("hmdb51").resolved().data
    assert (hmdb.train, hmdb.video, hmdb.label, hmdb.validation) == ("mteb/HMDB51", "video", "label", "test")


@pytest.mark.parametrize(
    ("name", "changed", "says"),
    [
        ("sst", {}, "`data.name` is one of cola, sst2, mrpc, "),
        ("sst", {}, "got 'sst'. Did you mean 'sst2'?"),
        ("sst2", {"task": "image-classification"}, "`data.name` sst2 is a data set for text-classification; this is image-classification."),
        ("pets", {"task": "causal-lm"}, "`data.name` pets is a data set for image-classification; this is causal-lm."),
        ("ucf101", {}, "`data.name` ucf101 is not on the hub in a form that can be read. Set `data.train` to a folder or table"),
        ("rte", {"data__text": "premise"}, "`data.text` of rte is sentence1; got 'premise'. Leave it out, or set `data.train` as well."),
        ("sst2", {"data__text_pair": "other"}, "`data.text_pair` of sst2 is null; got 'other'."),
        ("sst2", {"data__subset": "cola"}, "`data.subset` of sst2 is sst2; got 'cola'."),
        ("pets", {"data__train_split": "test"}, "`data.train_split` of pets is train; got 'test'."),
        ("sst2", {"data__label_kind": "number"}, "`data.label_kind` of sst2 is class; got number. Leave it out."),
        ("stsb", {"data__train": "a.csv"}, "`data.text_pair` is missing: stsb is of pairs of texts. Name the columns of both, as on the hub: --data.text sentence1 --data.text_pair sentence2"),
        (None, {}, "`data.train` is missing: "),
    ],
)  # fmt: skip
def test_what_does_not_go_with_a_name(name: str | None, changed: dict[str, Any], says: str) -> None:
    (problem,) = recipe(name, **changed).problems()
    assert says in problem


def test_a_named_set_of_texts_has_its_own_number_of_classes(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "".join(f"ball {n},{n % 3}\n" for n in range(12)))
    read = get_task("text-classification").read
    with pytest.raises(
        SliceFineError, match=r"`data\.name` sst2 has 2 classes; the examples have 3: 0, 1, 2\. .*--data\.label"
    ):
        read(recipe("sst2", data__train=str(path)).resolved().data)
    path.write_text("text,label\n" + "".join(f"ball {n},{n % 2}\n" for n in range(12)))
    assert read(recipe("sst2", data__train=str(path)).resolved().data).classes == ["0", "1"]


def test_a_few_classes_of_a_set_of_images_are_noted(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for n in range(4):
            Image.new("RGB", (8, 8), (n, 0, len(label))).save(tmp_path / label / f"{n}{label}.png")
    read = get_task("image-classification").read
    note = "`data.name` pets has 37 classes; the examples have 2: cat, dog."
    assert note in read(recipe("pets", data__train=str(tmp_path), data__validation=0.25).resolved().data).notes
    unknown = read(recipe("caltech101", data__train=str(tmp_path), data__validation=0.25).resolved().data)
    assert not any("has" in note and "classes" in note for note in unknown.notes)
