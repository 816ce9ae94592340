"""The recipes for images, each with a tiny model of its architecture and images made on the spot."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from pictures import folder
from transformers import AutoConfig, AutoImageProcessor

from slicefine.training import shipped
from slicefine.training.named import SUITES
from slicefine.training.recipe import Recipe
from slicefine.training.record import RunRecord
from slicefine.training.run import planned_steps
from slicefine.training.smoke import smoke

RECIPES = [f"vit-base-{name}" for name in SUITES["vtab-image"]]
GENERIC = "vit-base-image-classification"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`<split>/<class>/<file>`"""
    root = tmp_path_factory.mktemp("images")
    folder(root / "train", 8)
    folder(root / "test", 2)
    return root


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_what_ships() -> None:
    assert sorted(name for name in shipped.shipped() if name.startswith("vit-")) == sorted([*RECIPES, GENERIC])


@pytest.mark.parametrize("name", RECIPES)
def test_the_method_is_the_papers_and_the_rest_is_declared(name: str) -> None:
    path = shipped.find(name)
    recipe = Recipe.load(path)
    assert recipe.problems() == []
    assert (recipe.slice.r, recipe.slice.axis, recipe.data.name) == (5, "alternate", name.rpartition("-")[2])
    lines = path.read_text().splitlines()
    for key in ("r", "slide_every", "order", "learning_rate", "max_steps", "augmentation"):
        (at,) = [number for number, line in enumerate(lines) if line.strip().startswith(f"{key}:")]
        assert lines[at - 1].strip().startswith("#"), key
    (said,) = [line for line in lines if " images are " in line]
    passes, images, steps, moves = (int(number.replace(",", "")) for number in re.findall(r"[\d,]+\d|\d+", said))
    assert steps == recipe.training.max_steps == planned_steps(images, recipe)
    assert steps == passes * math.ceil(images / recipe.training.per_device_train_batch_size)
    assert recipe.slice.slide_every == steps / 8
    assert recipe.slice_schedule.moves(steps - 1) == moves == 7


@pytest.mark.parametrize("name", RECIPES)
def test_a_name_alone_means_the_hub_and_a_folder_is_taken_instead(name: str, images: Path) -> None:
    from_hub = Recipe.load(shipped.find(name)).resolved().data
    assert from_hub.train is not None
    assert "/" in from_hub.train
    assert isinstance(from_hub.validation, str)
    local = Recipe.load(shipped.find(name), {"data.train": str(images)}).resolved().data
    assert (local.train, local.validation, local.image, local.label) == (str(images), 0.1, "image", "label")


@pytest.mark.parametrize("name", [*RECIPES, GENERIC])
def test_every_recipe_runs_with_a_tiny_model(name: str, images: Path, tmp_path: Path) -> None:
    """Without a hub; all other settings are those of the recipe."""
    place = tmp_path / "smoke"
    place.mkdir()
    recipe = Recipe.load(shipped.find(name), {"data.train": str(images), "data.validation": "test"})
    said = "\n".join(smoke(recipe, place))
    assert "a tiny vit (" in said
    assert "finished: 4 steps, moves: 1, validation loss " in said
    assert "all examples read and checked (24 for train, 6 for validation)" in said
    config = AutoConfig.from_pretrained(place / "model")
    assert AutoImageProcessor.from_pretrained(place / "model", backend="pil").size["height"] == config.image_size
    record = RunRecord.read(place / "run")
    assert set(record.metrics["after"]) == {"loss", "accuracy", *(["f1_macro"] if name == GENERIC else [])}
    assert record.metrics["after"]["loss"] < record.metrics["before"]["loss"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["smoke"]


def test_the_recipe_for_images_of_your_own_is_of_no_data_set() -> None:
    recipe = Recipe.load(shipped.find(GENERIC))
    assert recipe.problems() == []
    assert (recipe.data.name, recipe.data.train, recipe.data.validation) == (None, "photos", 0.1)


@pytest.mark.parametrize("architecture", ["swin", "dinov2", "convnext", "clip", "beit", "deit"])
def test_other_architectures(architecture: str, images: Path, tmp_path: Path) -> None:
    changed = {"data.train": str(images), "model.name": "nobody/nothing", "model.architecture": architecture}
    said = "\n".join(smoke(Recipe.load(shipped.find(RECIPES[0]), changed), tmp_path))
    assert f"a tiny {architecture} (" in said
    assert RunRecord.read(tmp_path / "run").status == "finished"


def test_many_classes_are_tried_with_a_few(images: Path, tmp_path: Path) -> None:
    """One example of each of a hundred classes would be refused, or teach nothing."""
    from pictures import picture

    for number in range(40):
        for split, count in (("train", 3), ("test", 1)):
            place = tmp_path / "many" / split / f"class {number}"
            place.mkdir(parents=True)
            for n in range(count):
                picture("red", n).save(place / f"{n}.png")
    recipe = Recipe.load(shipped.find(RECIPES[0]), {"data.train": str(tmp_path / "many"), "data.validation": "test"})
    (tmp_path / "smoke").mkdir()
    said = "\n".join(smoke(recipe, tmp_path / "smoke"))
    assert "(120 for train, 40 for validation)" in said
    assert RunRecord.read(tmp_path / "smoke" / "run").data["train"]["examples"] == 24
