"""The recipes for clips, each with a tiny model of its architecture and clips made on the spot."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from filming import film
from transformers import AutoConfig, AutoImageProcessor

from slicefine.training import shipped
from slicefine.training.named import SUITES
from slicefine.training.recipe import Recipe
from slicefine.training.record import RunRecord
from slicefine.training.run import planned_steps
from slicefine.training.smoke import smoke

RECIPES = [f"videomae-base-{name}" for name in SUITES["video"]]
GENERIC = "videomae-base-video-classification"


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`<split>/<class>/<file>`: clips of 20 frames, dark ones and bright ones."""
    root = tmp_path_factory.mktemp("clips")
    for split, count in (("train", 8), ("test", 4)):
        for name, codec, suffix in (("Archery", "mpeg4", "avi"), ("Bowling", "libx264", "mp4")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                film(root / split / name / f"{number}.{suffix}", 20, codec=codec)
    return root


def test_what_ships() -> None:
    assert sorted(name for name in shipped.shipped() if name.startswith("videomae-")) == sorted([*RECIPES, GENERIC])


@pytest.mark.parametrize("name", RECIPES)
def test_the_method_is_the_papers_and_the_rest_is_declared(name: str) -> None:
    path = shipped.find(name)
    recipe = Recipe.load(path)
    assert (recipe.slice.r, recipe.slice.axis, recipe.data.name) == (5, "alternate", name.rpartition("-")[2])
    lines = path.read_text().splitlines()
    for key in ("r", "slide_every", "order", "learning_rate", "num_train_epochs", "augmentation"):
        (at,) = [number for number, line in enumerate(lines) if line.strip().startswith(f"{key}:")]
        assert lines[at - 1].strip().startswith("#"), key
    (said,) = [line for line in lines if " clips " in line and " steps with " in line]
    passes, rows, steps, moves = (int(number.replace(",", "")) for number in re.findall(r"[\d,]+\d|\d+", said))
    assert passes == recipe.training.num_train_epochs
    assert planned_steps(rows, recipe) == steps
    assert recipe.slice.slide_every == math.ceil(steps / 8)
    assert recipe.slice_schedule.moves(steps - 1) == moves == 7


def test_the_recipe_for_clips_of_your_own_is_of_no_data_set() -> None:
    recipe = Recipe.load(shipped.find(GENERIC))
    assert recipe.problems() == []
    assert (recipe.data.name, recipe.data.train, recipe.data.validation) == (None, "clips", 0.1)


@pytest.mark.parametrize("name", [*RECIPES, GENERIC])
def test_every_recipe_runs_with_a_tiny_model(
    name: str, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a hub; all other settings are those of the recipe."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "smoke"
    folder.mkdir()
    changed = {"data.train": str(clips), "data.validation": "test"}
    said = "\n".join(smoke(Recipe.load(shipped.find(name), changed), folder))
    assert "a tiny videomae (" in said
    assert "finished: 4 steps, moves: 1, validation loss " in said
    assert "all examples read and checked (16 for train, 8 for validation)" in said
    config = AutoConfig.from_pretrained(folder / "model")
    assert (config.num_frames, config.tubelet_size) == (16, 2)
    assert AutoImageProcessor.from_pretrained(folder / "model").crop_size["height"] == config.image_size
    record = RunRecord.read(folder / "run")
    assert set(record.metrics["after"]) == {"loss", "accuracy", *(["f1_macro"] if name == GENERIC else [])}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["smoke"]
