"""The recipes that ship, and the smoke test that users give their own."""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from slicefine import SliceFineError
from slicefine.training import shipped
from slicefine.training.named import NAMED, SUITES
from slicefine.training.recipe import Recipe
from slicefine.training.record import RunRecord
from slicefine.training.run import planned_steps, train
from slicefine.training.smoke import smoke

ROOT = Path(__file__).parents[2]
MODELS = {"llama-3.2-3b": "llama", "gemma-3-12b": "gemma3", "deepseek-r1-8b": "llama"}
LANGUAGE = [f"{model}-{task}" for model in MODELS for task in ("commonsense", "math")]
ROBERTA = [f"roberta-base-glue-{name}" for name in SUITES["glue"]]
MINILM = [f"minilm-{name}" for name in ("cola", "mrpc", "sst2", "trec")]
# Beginnings of names whose tests are further below, or in a file of their own.
IMAGES_AND_CLIPS = ("vit-", "videomae-")
ROWS = {
    "commonsense": [
        {
            "instruction": "Please answer the following question with true or false, question: can u drive in canada with us license?",
            "input": "",
            "output": "the correct answer is true",
            "answer": "true",
        },
        {
            "instruction": "Please choose the correct solution to the question: How do I ready a guinea pig cage for it's new occupants?\n\n"
            "Solution1: Provide the guinea pig with a cage full of a few inches of bedding.\n\nSolution2: Provide it with jeans.\n\n"
            "Answer format: solution1/solution2",
            "input": "",
            "output": "the correct answer is solution1",
            "answer": "solution1",
        },
    ],
    "math": [
        {
            "instruction": "Olivia has $23. She bought five bagels for $3 each. How much money does she have left?",
            "input": "",
            "output": "Five bagels for $3 each are 5 * 3 = 15 dollars. She has 23 - 15 = 8 dollars left. The answer is 8.",
            "answer": "8.0",
        },
        {
            "instruction": "A baker made 7 trays of 12 rolls and sold 30. How many rolls are left?",
            "input": "",
            "output": "There were 7 * 12 = 84 rolls. 84 - 30 = 54. The answer is 54.",
            "answer": "54.0",
        },
    ],
}


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def data_of(task: str, tmp_path: Path) -> str:
    rows: list[Any] = ROWS.get(task) or [{"text": f"ball {n}", "label": ("a", "b")[n % 2]} for n in range(2)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows * 50))
    return str(path)


def test_what_ships() -> None:
    texts = {name for name in shipped.shipped() if not name.startswith(IMAGES_AND_CLIPS)}
    assert texts == {*LANGUAGE, *ROBERTA, *MINILM, "minilm-text-classification"}
    assert {path.parent for path in shipped.shipped().values()} == {ROOT / "recipes"}
    for path in shipped.shipped().values():
        assert len(shipped.headline(path)) > 20


def test_the_wheel_has_them_where_they_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert build["force-include"] == {"recipes": "slicefine/recipes"}
    folder = tmp_path / "slicefine" / "recipes"
    folder.mkdir(parents=True)
    (folder / "one.yaml").write_text("# What it is for.\n")
    monkeypatch.setattr(shipped.slicefine, "__file__", str(tmp_path / "slicefine" / "__init__.py"))
    assert shipped.find("one") == folder / "one.yaml"
    assert shipped.headline(folder / "one.yaml") == "What it is for"


def test_a_folder_of_the_name_is_not_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama-3.2-3b-math").mkdir()  # the output of its run, say
    assert shipped.find("llama-3.2-3b-math") == ROOT / "recipes" / "llama-3.2-3b-math.yaml"
    (tmp_path / "mine").write_text("task: causal-lm\n")
    assert shipped.find("mine") == Path("mine")


def test_names_and_paths() -> None:
    assert shipped.find("llama-3.2-3b-math") == ROOT / "recipes" / "llama-3.2-3b-math.yaml"
    assert shipped.find("absent.yaml") == Path("absent.yaml")  # Recipe.load says what is wrong with it
    with pytest.raises(SliceFineError, match=r"no recipe 'llama-3b-math'\. Did you mean 'llama-3\.2-3b-math'\?"):
        shipped.find("llama-3b-math")


@pytest.mark.parametrize("name", LANGUAGE)
def test_the_method_is_the_papers_and_the_rest_is_declared(name: str) -> None:
    path = shipped.find(name)
    recipe = Recipe.load(path)
    assert (recipe.slice.r, recipe.slice.axis, recipe.slice.slide_every) == (5, "alternate", 500)
    lines = path.read_text().splitlines()
    declared(
        lines,
        "r",
        "slide_every",
        "learning_rate",
        "per_device_train_batch_size",
        "order",
        "max_length",
        "validation",
    )
    _, moves = counted(recipe, lines, held_out=recipe.data.validation)
    assert 5 <= moves <= 10


@pytest.mark.parametrize("name", [*ROBERTA, *MINILM])
def test_the_method_is_the_papers_for_texts_too_but_for_minilm(name: str) -> None:
    path = shipped.find(name)
    recipe = Recipe.load(path)
    # Where coupled slices were measured to be better they are what the recipe has, and the paper's setting is in its comments.
    assert (recipe.slice.r, recipe.slice.axis) == ((5, "alternate") if name in ROBERTA else (24, "coupled"))
    assert name in ROBERTA or "--slice.r 5 --slice.axis alternate --slice.slide_every 500" in path.read_text()
    lines = path.read_text().splitlines()
    if name in ROBERTA:
        declared(lines, "r", "slide_every", "learning_rate", "per_device_train_batch_size", "order", "max_length")
        assert recipe.data.name == name.rpartition("-")[2]
    steps, moves = counted(recipe, lines)
    assert moves == (7 if name in ROBERTA else 0)  # in an eighth of the run each
    assert recipe.slice.slide_every == (math.ceil(steps / 8) if name in ROBERTA else None)


def declared(lines: list[str], *keys: str) -> None:
    """Check that whose choice each value is stands right above it."""
    for key in keys:
        (at,) = [number for number, line in enumerate(lines) if line.strip().startswith(f"{key}:")]
        assert lines[at - 1].strip().startswith(("# Paper", "# Our choice")), key


def counted(recipe: Recipe, lines: list[str], held_out: float = 0.0) -> tuple[int, int]:
    """Steps and moves in "One pass over 170,420 rows is 5,273 steps with 10 moves.", checked by counting again."""
    (said,) = [line for line in lines if " rows " in line and " steps with " in line]
    words = [word.replace(",", "") for word in said.partition(" over ")[2].split()]
    rows, steps, moves = (int(word) for word in words if word.isdigit())
    assert planned_steps(rows - round(held_out * rows), recipe) == steps
    assert recipe.slice_schedule.moves(steps - 1) == moves
    return steps, moves


@pytest.mark.filterwarnings("ignore:axis='coupled'. 1 of 13 weights have no partner")  # the pooler, which trains rows
@pytest.mark.parametrize("name", [*LANGUAGE, "minilm-text-classification"])
def test_every_recipe_runs_with_a_tiny_model_of_its_architecture(name: str, tmp_path: Path) -> None:
    """Without a hub; all other settings are those of the recipe."""
    recipe = Recipe.load(shipped.find(name), {"data.train": data_of(name.rpartition("-")[2], tmp_path)})
    folder = tmp_path / "smoke"
    folder.mkdir()
    lines = smoke(recipe, folder)
    said = "\n".join(lines)
    expected = MODELS.get(name.rpartition("-")[0], "bert")
    assert AutoConfig.from_pretrained(folder / "model").model_type == expected
    assert f"a tiny {expected} (" in said
    assert f"finished: 4 steps, moves: {int(name in LANGUAGE)}, validation loss " in said
    assert "all examples read and checked (" in said
    assert str(folder) in said
    record = RunRecord.read(folder / "run")
    assert record.metrics["after"]["loss"] < record.metrics["before"]["loss"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.json", "smoke"]


@pytest.mark.filterwarnings("ignore:axis='coupled'. 1 of 13 weights have no partner")  # the pooler, which trains rows
@pytest.mark.parametrize("name", [*ROBERTA, *MINILM])
def test_every_recipe_for_texts_runs_with_a_tiny_model_of_its_architecture(name: str, tmp_path: Path) -> None:
    """On files with the columns that the recipe's first lines tell, for there is no hub here."""
    task = name.rpartition("-")[2]
    pair = "text_pair" in NAMED[task].columns if task in NAMED else False
    classes = {"mnli": 3, "trec": 6}.get(task, 2)
    rows = [
        {"text": f"what is number {n}", "label": n % 26 / 5 if task == "stsb" else n % classes}
        | ({"text_pair": f"it is {n % classes}"} if pair else {})
        for n in range(60)
    ]
    files = {"train": tmp_path / "train.jsonl", "validation": tmp_path / "validation.jsonl"}
    for file in files.values():
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {f"data.{key}": str(file) for key, file in files.items()} | (
        {"data.text_pair": "text_pair"} if pair else {}
    )
    folder = tmp_path / "smoke"
    folder.mkdir()
    said = "\n".join(smoke(Recipe.load(shipped.find(name), given), folder))
    architecture = "roberta" if name in ROBERTA else "bert"
    assert f"a tiny {architecture} (" in said
    assert f"finished: 4 steps, moves: {int(name in ROBERTA)}, validation loss " in said
    assert "all examples read and checked (60 for train, 60 for validation)" in said
    scores = NAMED[task].metrics if task in NAMED else ("accuracy", "f1_macro")
    record = RunRecord.read(folder / "run")
    assert record.metrics["after"].keys() == {"loss", *scores}
    config = AutoConfig.from_pretrained(folder / "run" / "adapter")
    assert (config.model_type, config.num_labels) == (architecture, 1 if task == "stsb" else classes)


def test_a_regression_from_a_file_of_texts_can_be_tried(settings: dict[str, Any], tmp_path: Path) -> None:
    """In CSV numbers are texts, and they are numbers in what the smoke test writes."""
    path = tmp_path / "scores.csv"
    path.write_text("text,label\n" + "".join(f"ball goal,{n % 26 / 5}\n" for n in range(60)))
    folder = tmp_path / "smoke"
    folder.mkdir()
    said = smoke(Recipe.from_flat(settings | {"data.train": str(path), "data.label_kind": "number"}), folder)
    assert "finished: 4 steps" in "\n".join(said)
    assert not any(line.startswith("classes") for line in said)
    assert RunRecord.read(folder / "run").metrics["after"].keys() == {"loss", "pearson", "spearman", "mse"}


def test_the_smoke_test_names_the_classes(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "smoke"
    folder.mkdir()
    assert "classes    3: food, space, sport" in smoke(Recipe.from_flat(settings), folder)


def test_a_depth_window_is_trained_and_left_out_of_the_smoke_test(settings: dict[str, Any], tmp_path: Path) -> None:
    """Of the tiny model's two blocks a window cannot take as many."""
    window = {"slice.depth_window": [0, 1], "slice.depth_every": 2, "slice.depth_stack": "bert.encoder.layer"}
    recipe = Recipe.from_flat(settings | window | {"training.max_steps": 4, "slice.slide_every": 1})
    train(recipe)
    config = json.loads((Path(recipe.output) / "adapter" / "adapter_config.json").read_text())
    assert {f"slice.{name}": config[name] for name in ("depth_window", "depth_every", "depth_stack")} == window
    elsewhere = {"slice.depth_window": [0, 5], "slice.depth_stack": "model.layers", "output": str(tmp_path / "other")}
    (tmp_path / "smoke").mkdir()
    smoke(Recipe.from_flat(recipe.flat() | elsewhere), tmp_path / "smoke")


def test_the_smoke_test_takes_what_it_can_have_of_the_model(lm_settings: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "smoke"
    folder.mkdir()
    said = "\n".join(smoke(Recipe.from_flat(lm_settings), folder))
    assert f"as the configuration of {lm_settings['model.name']} says" in said
    assert f"that of {lm_settings['model.name']}" in said
    config = AutoConfig.from_pretrained(folder / "model")
    assert (config.vocab_size, config.hidden_size, config.attention_dropout) == (258, 64, 0.1)


def test_a_model_that_stores_its_weights_transposed(lm_settings: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "smoke"
    folder.mkdir()
    changed = {"model.name": "nobody/nothing", "model.architecture": "gpt2"}
    assert "a tiny gpt2 (" in "\n".join(smoke(Recipe.from_flat(lm_settings | changed), folder))
    assert RunRecord.read(folder / "run").status == "finished"


def test_the_smoke_test_finds_what_is_wrong(lm_settings: dict[str, Any], tmp_path: Path) -> None:
    def refusal(**changed: Any) -> str:
        with pytest.raises(SliceFineError) as error:
            smoke(
                Recipe.from_flat(lm_settings | {key.replace("__", "."): value for key, value in changed.items()}),
                tmp_path,
            )
        return str(error.value)

    assert "set `model.architecture` (llama, say)" in refusal(model__name="nobody/nothing")
    said = refusal(model__name="nobody/nothing", model__architecture="lama")
    assert "got 'lama'. Did you mean 'llama'?" in said
    assert "Did you mean 'q_proj'?" in refusal(slice__target_modules=["q_porj"])
    Path(lm_settings["data.train"]).write_text(
        "[" + '{"instruction": "a", "output": "b"},' * 99 + '{"instruction": ""}]'
    )
    assert (
        ":1 (row 100): the columns 'instruction' are of no known format." in refusal()
    )  # the last row is checked as well
