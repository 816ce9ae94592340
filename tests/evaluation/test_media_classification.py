"""Classifiers of images and clips, trained by real runs, scored on folders and tables of files made on the spot."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from classifiers import FRAMES, clip_model, image_model, paint, shoot, trained, write_table
from filming import film
from peft import PeftModel
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForVideoClassification,
)

from slicefine import SliceFineError
from slicefine.cli.evaluate import summary
from slicefine.evaluation.run import evaluate
from slicefine.evaluation.sets import LabelledSet, under_its_own_name
from slicefine.evaluation.settings import Settings
from slicefine.training.clips import read_frames
from slicefine.training.recipe import DataSettings

HELD = range(20, 26)


@pytest.fixture(scope="module")
def image_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained for the data set pets: of red and blue images."""
    root = tmp_path_factory.mktemp("images")
    settings = {"data.name": "pets", "training.dataloader_num_workers": 2}
    model, data = image_model(root / "model"), paint(root / "train", range(16))
    return trained("image-classification", model, data, root / "run", **settings)


@pytest.fixture(scope="module")
def clip_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clips")
    model, data = clip_model(root / "model"), shoot(root / "train", range(8))
    return trained("video-classification", model, data, root / "run", **{"data.name": "ucf101"})


def merged(kind: Any, run: Path) -> Any:
    """The trained model by PEFT alone."""
    config = AutoConfig.from_pretrained(run / "adapter")
    model = kind.from_pretrained(run.parent / "model", config=config)
    return PeftModel.from_pretrained(model, str(run / "adapter")).merge_and_unload().eval()


def score(model: Path, **values: Any) -> Any:
    return evaluate(Settings(model=str(model), **values))


def refused(model: Path, **values: Any) -> str:
    with pytest.raises(SliceFineError) as caught:
        score(model, **values)
    return str(caught.value)


def by_place(folder: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    return {line["place"]: line for line in lines}


def test_images_of_a_folder(image_run: Path, tmp_path: Path) -> None:
    """Predictions are those of the merged model, image by image."""
    data, out = paint(tmp_path / "held", HELD), tmp_path / "out"
    result = score(image_run, data=str(data), output=str(out))
    model = merged(AutoModelForImageClassification, image_run)
    processor = AutoImageProcessor.from_pretrained(image_run / "adapter", backend="pil")
    found = by_place(out)
    assert len(found) == 12
    for place, line in found.items():
        with torch.no_grad():
            logits = model(**processor(images=Image.open(place), return_tensors="pt")).logits[0]
        assert line["label"] == Path(place).parent.name
        assert line["predicted"] == model.config.id2label[int(logits.argmax())]
        assert line["score"] == pytest.approx(float(logits.softmax(-1).max()), abs=1e-5)
        assert line["text"] is line["text_pair"] is None
    assert result.tasks["held"]["right"] >= 11  # it has learned
    assert result.contamination["rows"] == {}
    # Saved as a plain model, it has the same to say.
    model.save_pretrained(tmp_path / "merged")
    processor.save_pretrained(tmp_path / "merged")
    again = score(tmp_path / "merged", data=str(data), output=str(tmp_path / "plain"))
    assert again.tasks["held"]["confusion"] == result.tasks["held"]["confusion"]


def test_clips_of_a_folder(clip_run: Path, tmp_path: Path) -> None:
    data, out = shoot(tmp_path / "held", HELD), tmp_path / "out"
    result = score(clip_run, data=str(data), output=str(out), batch_size=5)
    model = merged(AutoModelForVideoClassification, clip_run)
    processor = AutoImageProcessor.from_pretrained(clip_run / "adapter", backend="pil")
    for place, line in by_place(out).items():
        with torch.no_grad():
            logits = model(**processor(read_frames(Path(place), FRAMES), return_tensors="pt")).logits[0]
        assert line["score"] == pytest.approx(float(logits.softmax(-1).max()), abs=1e-4)
        assert line["predicted"] == model.config.id2label[int(logits.argmax())]
    assert result.tasks["held"]["right"] >= 11
    assert [session["batches"] for session in result.sessions] == [3]


@pytest.mark.parametrize("layout", ["test", "validation", ""])
def test_a_suite_in_local_folders(image_run: Path, tmp_path: Path, layout: str) -> None:
    paint(tmp_path / "data" / "Pets" / layout, HELD)
    if layout == "test":
        paint(tmp_path / "data" / "Pets" / "train", range(16))
        paint(tmp_path / "data" / "Pets" / "validation", range(3))
    result = score(image_run, suite="vtab-image", data=str(tmp_path / "data"), output=str(tmp_path / "out"))
    assert result.tasks["pets"]["examples"] == 12
    # Two classes are no 37 breeds: the files have the name.
    shown = tmp_path / "data" / "Pets" / layout
    assert result.table().splitlines()[0].split() == [str(shown)]
    said = f"This is not Oxford-IIIT Pets, which has 37 classes: the model has 2. The scores are those of {shown} alone"
    assert said in summary(result)


def test_a_local_set_with_the_classes_of_the_published_one_has_its_name(image_run: Path) -> None:
    place = image_run.parent / "train"
    data = DataSettings(name="pets", train=str(place))
    one = LabelledSet(name="pets", title="Oxford-IIIT Pets", data=data, own=True)
    assert under_its_own_name(one, 37) == one
    assert under_its_own_name(one, 36).title == str(place)
    of_hub = dataclasses.replace(one, data=dataclasses.replace(data, train="timm/oxford-iiit-pet"))
    assert under_its_own_name(of_hub, 36) == of_hub


def test_output_that_cannot_be_written(image_run: Path, tmp_path: Path) -> None:
    data = str(paint(tmp_path / "held", HELD[:1]))
    for output in ("/proc/x", str(image_run / "record.json" / "out")):
        assert f"nothing can be made in {output} (" in refused(image_run, data=data, output=output)


def test_a_suite_of_clips(clip_run: Path, tmp_path: Path) -> None:
    shoot(tmp_path / "data" / "ucf101" / "test", HELD[:2])
    result = score(clip_run, suite="video", data=str(tmp_path / "data"), output=str(tmp_path / "out"))
    assert result.tasks["ucf101"]["examples"] == 4
    assert "ucf101 is not on the hub" in refused(clip_run, suite="video", output=str(tmp_path / "other"))


def test_a_table_of_paths(image_run: Path, tmp_path: Path) -> None:
    paint(tmp_path, HELD)
    rows = [{"image": f"{name}/{number}.png", "label": name} for number in HELD for name in ("red", "blue")]
    table = write_table(tmp_path / "held.csv", rows)
    result = score(image_run, data=str(table), output=str(tmp_path / "out"))
    assert next(iter(by_place(tmp_path / "out"))) == f"{table}:2 (red/20.png)"
    assert result.tasks["held"]["classes"]["red"]["examples"] == 6


def test_the_hub(image_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images in memory; the training images of the run, which are files, are found among them by their bytes."""
    paint(tmp_path / "held", HELD)
    files = [*sorted((tmp_path / "held").glob("*/*.png")), image_run.parent / "train" / "red" / "3.png"]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["blue", "red"]))
    rows = {
        "image": [{"bytes": file.read_bytes(), "path": None} for file in files],
        "label": [file.parent.name for file in files],
    }
    there = datasets.Dataset.from_dict(rows, features=features)

    def load(name: str, subset: str | None, *, split: str) -> datasets.Dataset:
        assert (name, subset, split) == ("timm/oxford-iiit-pet", None, "test")
        return there

    monkeypatch.setattr(datasets, "load_dataset", load)
    out = {"suite": "vtab-image", "output": str(tmp_path / "out")}
    says = refused(image_run, **out)
    train = image_run.parent / "train" / "red" / "3.png"
    assert (
        f"1 training examples are test examples (pets 1).\n  {train} -> timm/oxford-iiit-pet, split test, row 13"
        in says
    )
    result = score(image_run, **out, allow_contamination=True)
    assert result.tasks["pets"]["examples"] == 13


def test_training_files_are_found_by_their_bytes(image_run: Path, tmp_path: Path) -> None:
    data = paint(tmp_path / "held", HELD)
    train = image_run.parent / "train"
    shutil.copy(train / "blue" / "2.png", data / "blue" / "renamed.png")
    out = {"data": str(data), "output": str(tmp_path / "out")}
    assert f"  {train / 'blue' / '2.png'} -> {data / 'blue' / 'renamed.png'}" in refused(image_run, **out)
    result = score(image_run, **out, allow_contamination=True)
    assert "contaminated: examples that the model was trained on: held 1" in summary(result)
    assert "(train 32)" in refused(image_run, data=str(train), output=str(tmp_path / "other"))


def test_files_that_cannot_be_used(image_run: Path, tmp_path: Path) -> None:
    data, out = paint(tmp_path / "held", HELD), tmp_path / "out"
    made = io.BytesIO()
    Image.effect_noise((40, 40), 90).convert("RGB").save(made, "JPEG")
    (data / "red" / "cut.jpg").write_bytes(made.getvalue()[:500])
    (data / "red" / "notes.txt").write_text("no image")
    says = refused(image_run, data=str(data), output=str(out))
    assert f"{data / 'red' / 'cut.jpg'}: it is damaged or cut short" in says
    assert f"{data / 'red' / 'notes.txt'}: the suffix .txt" in says
    assert not out.exists()
    run = shutil.copytree(image_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("on_error: fail", "on_error: skip"))
    result = score(run, data=str(data), output=str(out))
    assert result.tasks["held"]["examples"] == 12
    assert "2 of 14 files of" in summary(result)


def test_clips_that_cannot_be_used(clip_run: Path, tmp_path: Path) -> None:
    data = shoot(tmp_path / "held", HELD[:2])
    film(data / "dark" / "short.mp4", 3)
    film(data / "dark" / "sound.mp4", 0, sound=1.0)
    says = refused(clip_run, data=str(data), output=str(tmp_path / "out"))
    assert f"{data / 'dark' / 'short.mp4'}: 3 frames, fewer than the 4" in says
    assert f"{data / 'dark' / 'sound.mp4'}: no video stream" in says


def test_classes_that_the_model_does_not_know(image_run: Path, tmp_path: Path) -> None:
    data = paint(tmp_path / "held", HELD)
    (data / "red").rename(data / "green")
    says = refused(image_run, data=str(data), output=str(tmp_path / "out"))
    assert f"{data / 'green' / '20.png'}: label 'green' is not among the 2 classes of the model." in says
    assert says.startswith("Test sets, for a model with the classes blue, red: 6 problems")


def test_an_adapter_away_from_its_run(image_run: Path, clip_run: Path, tmp_path: Path) -> None:
    """What it is for is known by the architecture: PEFT has no name for images and clips."""
    for name, run, make in (("images", image_run, paint), ("clips", clip_run, shoot)):
        adapter = shutil.copytree(run / "adapter", tmp_path / name / "adapter")
        data = make(tmp_path / name / "held", HELD[:2])
        moved = score(adapter, data=str(data), output=str(tmp_path / name / "out"))
        own = score(run, data=str(data), output=str(tmp_path / name / "own"))
        assert (moved.tasks["held"]["confusion"], moved.weights) == (own.tasks["held"]["confusion"], own.weights)


def test_weights_keep_their_number_format(image_run: Path, clip_run: Path, tmp_path: Path) -> None:
    """Pixels are brought to it."""
    for kind, run, make in (
        (AutoModelForImageClassification, image_run, paint),
        (AutoModelForVideoClassification, clip_run, shoot),
    ):
        folder = tmp_path / kind.__name__
        merged(kind, run).to(torch.bfloat16).save_pretrained(folder / "model")
        shutil.copy(run / "adapter" / "preprocessor_config.json", folder / "model")
        result = score(folder / "model", data=str(make(folder / "held", HELD[:2])), output=str(folder / "out"))
        assert (result.dtype, result.tasks["held"]["right"]) == ("bfloat16", 4)


def test_a_model_without_its_processor(image_run: Path, tmp_path: Path) -> None:
    merged(AutoModelForImageClassification, image_run).save_pretrained(tmp_path / "model")
    data = paint(tmp_path / "held", HELD[:1])
    says = refused(tmp_path / "model", data=str(data), output=str(tmp_path / "out"))
    assert f"The image processor in {tmp_path / 'model'} did not load" in says
    assert not (tmp_path / "out").exists()


def test_a_run_of_another_kind(image_run: Path, tmp_path: Path) -> None:
    says = refused(image_run, suite="glue", output=str(tmp_path / "out"))
    assert "is for image-classification; got --suite glue. Give --suite vtab-image, or --data" in says
