from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slicefine import SliceFineConfig, SliceFineError
from slicefine.training import schema, shipped
from slicefine.training.recipe import Recipe, SliceSettings, TrainingSettings

ROOT = Path(__file__).parents[2]
SHIPPED = sorted([*ROOT.glob("recipes/*.yaml"), *ROOT.glob("src/**/*.yaml")])
GOOD = """
task: text-classification
model: {name: bert}
data: {train: train.jsonl}
output: runs/a
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(tmp_path: Path, text: str, **overrides: Any) -> str:
    with pytest.raises(SliceFineError) as error:
        Recipe.load(write(tmp_path, text), overrides)
    return str(error.value)


def test_defaults_are_those_of_the_config_but_for_r(tmp_path: Path) -> None:
    recipe = Recipe.load(write(tmp_path, GOOD))
    config = SliceFineConfig()
    for item in dataclasses.fields(SliceSettings):
        assert getattr(recipe.slice, item.name) == (5 if item.name == "r" else getattr(config, item.name)), item.name


def test_training_names_are_those_of_transformers() -> None:
    from transformers import TrainingArguments

    theirs = {item.name for item in dataclasses.fields(TrainingArguments)}
    assert {item.name for item in dataclasses.fields(TrainingSettings)} <= theirs


def test_overrides_win_and_are_typed(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "slice: {r: 3, axis: row}\ntraining: {learning_rate: 1e-4}\n")
    recipe = Recipe.load(path, {"slice.r": "7", "data.validation": "val.csv"})
    assert (recipe.slice.r, recipe.slice.axis, recipe.data.validation) == (7, "row", "val.csv")
    assert recipe.training.learning_rate == 1e-4  # YAML itself reads 1e-4 as a string


def test_yaml_round_trip(tmp_path: Path) -> None:
    recipe = Recipe.load(write(tmp_path, GOOD), {"slice.target_modules": ["query", "value"], "slice.slide_every": None})
    assert Recipe.load(write(tmp_path, recipe.to_yaml())) == recipe
    assert Recipe.from_flat(recipe.flat()) == recipe


def test_resolved_makes_paths_absolute_and_leaves_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").touch()
    recipe = Recipe.load(write(tmp_path, GOOD)).resolved()
    assert recipe.data.train == str(tmp_path / "train.jsonl")
    assert recipe.output == str(tmp_path / "runs" / "a")
    assert recipe.model.name == "bert"
    assert recipe.resolved() == recipe


def test_a_split_is_no_path_whatever_lies_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("test", "validation", "photos/test"):
        (tmp_path / folder).mkdir(parents=True)
    for name, split in (("vit-base-pets", "test"), ("roberta-base-glue-mrpc", "validation")):
        assert Recipe.load(shipped.find(name)).resolved().data.validation == split
    recipe = Recipe.load(
        shipped.find("vit-base-image-classification"), {"data.train": "photos", "data.validation": "test"}
    )
    assert recipe.resolved().data.validation == "test"
    recipe = Recipe.load(
        shipped.find("vit-base-image-classification"), {"data.train": "photos", "data.validation": "validation"}
    )
    assert recipe.resolved().data.validation == str(tmp_path / "validation")


def test_all_problems_at_once_with_the_file_named(tmp_path: Path) -> None:
    message = refusal(
        tmp_path,
        """
        task: text-clasification
        model: {nam: bert}
        data: {train: a.jsonl, validation: 1.5, max_length: 0}
        slice: {rr: 3, axis: rov, r: 0}
        training: {learning_rate: fast, num_train_epoch: 1, max_steps: 0}
        output: runs/a
        """,
        **{"model.name": "bert"},
    )
    assert str(tmp_path / "recipe.yaml") in message
    for part in (
        "there is no setting 'model.nam'. Did you mean 'model.name'?",
        "there is no setting 'slice.rr'. Did you mean 'slice.r'?",
        "there is no setting 'training.num_train_epoch'. Did you mean 'training.num_train_epochs'?",
        "`slice.axis` is one of row, column, alternate, coupled; got 'rov'. Did you mean 'row'?",
        "`training.learning_rate` is a number; got 'fast'.",
        "`task` is one of text-classification, image-classification, video-classification, causal-lm; got 'text-clasification'. Did you mean 'text-classification'?",
        "`data.validation` as a fraction lies between 0 and 1, ends excluded; got 1.5.",
        "`data.max_length` is at least 1; got 0.",
        "`slice.r` is the number of rows or columns in a slice, a whole number of at least 1; got 0.",
        "`training.max_steps` is at least 1, or -1 for none; got 0.",
    ):
        assert part in message


def test_what_is_missing_is_named_with_its_help_and_the_rest_is_checked(tmp_path: Path) -> None:
    message = refusal(tmp_path, "slice: {r: 0}")
    assert "5 problems" in message
    assert "`slice.r` is the number of rows or columns in a slice, a whole number of at least 1; got 0." in message
    for key in ("task", "output", "model.name", "data.train"):
        assert f"`{key}` is missing: {schema.settings(Recipe)[key].help}." in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a\n- b\n", "holds a list"),
        ("", "holds nothing"),
        ("just words", "holds a string"),
        ("task: a\nmodel: {name: b\ndata: c\n", "line 3 is not valid YAML"),
        ("task: a\nslice:\n  r: 1\n  r: 2\n", "line 4 is not valid YAML: 'r' stands in line 3 already"),
        ("task: a\ntask: b\n", "line 2 is not valid YAML: 'task' stands in line 1 already"),
        ("slice: 3\n", "`slice` is a mapping of settings; got 3."),
        ("r: 3\n", "there is no setting 'r'. Did you mean 'slice.r'?"),
        ("learning_rat: 3\n", "there is no setting 'learning_rat'. Did you mean 'training.learning_rate'?"),
        ("3: 3\n", "there is no setting '3'."),
        ("task: null\n", "`task` is a string; got null."),
        ("training: {bf16: 3}\n", "`training.bf16` is true or false; got 3."),
        ("slice: {slide_every: often}\n", "`slice.slide_every` is a whole number or null; got 'often'."),
        ("slice: {slide_every: None}\n", "`slice.slide_every` is a whole number or null; got 'None'. Write null."),
        ("data: {validation: none}\n", "`data.validation` cannot be left out. Use a small fraction"),
        (
            "data: {validation: 10%}\n",
            "`data.validation` as a fraction is a number between 0 and 1; got '10%'. Write 0.1.",
        ),
        ("data: {validation: 12.5 %}\n", "Write 0.125."),
        ("slice: {target_modules: [1]}\n", "`slice.target_modules` is a string or a list of strings; got [1]."),
    ],
)
def test_bad_files(tmp_path: Path, text: str, says: str) -> None:
    message = refusal(tmp_path, text)
    assert says in message
    assert "recipe.yaml" in message


def test_no_file_and_not_utf8(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    with pytest.raises(SliceFineError, match=r"there is none at .*recipes\.yaml\. Did you mean '.*recipe\.yaml'\?"):
        Recipe.load(tmp_path / "recipes.yaml")
    (tmp_path / "recipe.yaml").write_bytes(b"task: \xff")
    with pytest.raises(SliceFineError, match=r"recipe\.yaml is not UTF-8 text \(byte 6\)"):
        Recipe.load(tmp_path / "recipe.yaml")


def test_an_empty_section_is_its_defaults(tmp_path: Path) -> None:
    assert Recipe.load(write(tmp_path, GOOD + "slice:\n")).slice == SliceSettings()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.learning_rate", 0.0),
        ("training.learning_rate", float("nan")),
        ("training.warmup_steps", -1.0),
        ("training.per_device_train_batch_size", 0),
        ("training.save_steps", 0),
        ("slice.slide_every", 0),
        ("model.name", ""),
        ("data.text_pair", "text"),
        ("data.subset", "sst2"),
        ("data.train_split", "test"),
        ("data.num_frames", 8),
        ("data.on_error", "skip"),
        ("data.augmentation", ["flip"]),
        ("data.image", "path"),
        ("data.packing", True),
        ("training.seed", 2**32),
        ("slice.target_modules", "*query"),
        ("slice.exclude_modules", "*pooler*"),
    ],
)
def test_values_out_of_range(settings: dict[str, Any], key: str, value: Any) -> None:
    (problem,) = Recipe.from_flat(settings | {key: value}).problems()
    assert f"`{key}`" in problem


def test_every_setting_has_help() -> None:
    for setting in schema.settings(Recipe).values():
        assert setting.help, setting.key
        assert "\n" not in setting.help, setting.key


def test_no_heavy_imports() -> None:
    code = (
        "import sys; import slicefine.training.recipe, slicefine.training.record, slicefine.training.data; "
        "print({'torch', 'peft', 'transformers', 'datasets', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_recipe_is_shipped() -> None:
    assert SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_recipes(path: Path) -> None:
    recipe = Recipe.load(path)
    # Decimals without a point or an exponent are strings to YAML: what is written is what is meant.
    assert Recipe.from_flat(recipe.flat()) == recipe
    # What PEFT and the Trainer would refuse.
    SliceFineConfig(**dataclasses.asdict(recipe.slice))


@pytest.mark.parametrize(
    ("task", "key", "value", "says"),
    [
        (
            "image-classification",
            "data.text",
            "t",
            "`data.text` is for text-classification, causal-lm; this is image-cl",
        ),
        ("image-classification", "data.max_length", 64, "`data.max_length` is for text-classification, causal-lm;"),
        ("image-classification", "data.label_kind", "number", "`data.label_kind` is for text-classification;"),
        ("image-classification", "data.num_frames", 8, "`data.num_frames` is for video-classification; this is image-"),
        (
            "causal-lm",
            "data.on_error",
            "skip",
            "`data.on_error` is for image-classification, video-classification; this",
        ),
        (
            "causal-lm",
            "data.label",
            "y",
            "`data.label` is for text-classification, image-classification, video-classif",
        ),
        ("video-classification", "data.num_frames", 0, "`data.num_frames` is at least 1; got 0."),
        (
            "video-classification",
            "data.video",
            "label",
            "`data.video` and `data.label` are different columns; got label, l",
        ),
        (
            "image-classification",
            "data.augmentation",
            ["flip", "colour"],
            "`data.augmentation` names crop, flip, color; got 'colour'. Did you mean 'color'?",
        ),
    ],
)
def test_settings_of_images_clips_and_texts(task: str, key: str, value: Any, says: str) -> None:
    values = {"task": task, "model.name": "m", "output": "o", "data.train": "folder", key: value}
    (problem,) = Recipe.from_flat(values).problems()
    assert says in problem


@pytest.mark.parametrize("task", ["image-classification", "video-classification"])
def test_what_images_and_clips_share(task: str) -> None:
    shared = {"data.on_error": "skip", "data.augmentation": ["crop", "flip", "color"], "data.label": "y"}
    assert (
        Recipe.from_flat({"task": task, "model.name": "m", "output": "o", "data.train": "f"} | shared).problems() == []
    )


def test_the_share_for_validation_depends_on_the_name(tmp_path: Path) -> None:
    assert Recipe.load(write(tmp_path, GOOD)).data.validation == 0.1
    assert Recipe.load(write(tmp_path, GOOD), {"data.name": "sst2"}).data.validation == 0.1
    by_name = Recipe.load(write(tmp_path, GOOD.replace("train: train.jsonl", "name: sst2")))
    assert (by_name.data.validation, by_name.resolved().data.validation) == (None, "validation")
    assert Recipe.load(write(tmp_path, by_name.to_yaml())) == by_name
    assert Recipe.load(write(tmp_path, by_name.resolved().to_yaml())) == by_name.resolved()
