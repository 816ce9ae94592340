"""Clips made on the spot, through the task and through whole runs with a tiny VideoMAE."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from filming import film, film_bytes, noise
from torch.utils.data import DataLoader
from transformers import (
    AutoImageProcessor,
    AutoModelForVideoClassification,
    PreTrainedConfig,
    TimesformerConfig,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    ViTConfig,
    ViTForImageClassification,
    VivitConfig,
)

from slicefine import SliceFineError
from slicefine.training.clips import read_frames
from slicefine.training.export import export
from slicefine.training.progress import StepTimer
from slicefine.training.recipe import Recipe
from slicefine.training.record import RunRecord
from slicefine.training.run import train
from slicefine.training.tasks import video_classification as task

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 32}
FRAMES = 4
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "videomae": lambda: VideoMAEConfig(**SMALL, num_frames=FRAMES, tubelet_size=2, patch_size=16, num_labels=5),
    "timesformer": lambda: TimesformerConfig(**SMALL, num_frames=FRAMES, patch_size=16),
    "vivit": lambda: VivitConfig(**SMALL, num_frames=FRAMES, tubelet_size=[2, 16, 16]),
}
PROCESSOR = {
    "image_processor_type": "VideoMAEImageProcessor",
    "size": {"shortest_edge": 32},
    "crop_size": {"height": 32, "width": 32},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def model_folder(folder: Path, kind: str = "videomae", **processor: Any) -> Path:
    """Random weights, and the file of a processor as the hub has it."""
    torch.manual_seed(0)
    AutoModelForVideoClassification.from_config(CONFIGS[kind]()).save_pretrained(folder)
    own = {"image_processor_type": "VivitImageProcessor"} if kind == "vivit" else {}
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | own | processor))
    return folder


@pytest.fixture(scope="session")
def videomae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("videomae"))


def moving(*, right: bool, start: int) -> list[np.ndarray]:
    """A white bar on its way across: one frame alone does not tell where to."""
    frames = []
    for step in range(8):
        frame = np.full((40, 56, 3), 30, np.uint8)
        at = (start + 6 * (step if right else -step)) % 48
        frame[:, at : at + 8] = 230
        frames.append(frame)
    return frames


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`<split>/<class>/<file>`: bars that move to the left and to the right; MP4, AVI and WebM."""
    root = tmp_path_factory.mktemp("clips")
    kinds = [("mp4", "libx264"), ("avi", "mpeg4"), ("webm", "libvpx")]
    for split, count in (("train", 12), ("validation", 6)):
        for right, name in ((False, "left"), (True, "right")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                suffix, codec = kinds[number % 3]
                film(root / split / name / f"{number}.{suffix}", moving(right=right, start=4 * number), codec=codec)
    return root


@pytest.fixture
def settings(videomae: Path, clips: Path, tmp_path: Path) -> dict[str, Any]:
    """Dotted settings of a run of 12 steps with 2 moves."""
    return {
        "task": "video-classification",
        "model.name": str(videomae),
        "data.train": str(clips),
        "data.validation": "validation",
        "output": str(tmp_path / "run"),
        "slice.r": 2,
        "slice.slide_every": 4,
        "training.learning_rate": 5e-3,
        "training.per_device_train_batch_size": 4,
        "training.num_train_epochs": 2,
        "training.logging_steps": 2,
        "training.report_to": "none",
    }


def prepared(settings: dict[str, Any], **changed: Any) -> Any:
    recipe = Recipe.from_flat(settings | {name.replace("__", "."): value for name, value in changed.items()})
    return task.prepare(recipe, task.read(recipe.data))


def refusal(settings: dict[str, Any], **changed: Any) -> str:
    with pytest.raises(SliceFineError) as error:
        prepared(settings, **changed)
    return str(error.value)


# ---------------------------------------------------------------- what the model gets


def test_clips_of_folders(settings: dict[str, Any], clips: Path) -> None:
    examples = task.read(Recipe.from_flat(settings).data)
    assert examples.clips.classes == ["left", "right"]
    assert (len(examples.clips.train), len(examples.clips.validation)) == (24, 12)
    assert set(examples.frames.values()) == {8}
    assert examples.summary()["train"]["examples"] == 24
    assert examples.clips.train.places[0] == str(clips / "train" / "left" / "0.mp4")


def test_inputs_are_what_the_processor_makes_of_evenly_spaced_frames(settings: dict[str, Any], clips: Path) -> None:
    made = prepared(settings)
    processor = AutoImageProcessor.from_pretrained(settings["model.name"])
    expected = processor(read_frames(clips / "train" / "left" / "1.avi", FRAMES), return_tensors="pt")["pixel_values"]
    example = made.train[1]
    assert torch.equal(example["pixel_values"], expected[0])
    assert (example["pixel_values"].shape, example["labels"]) == ((FRAMES, 3, 32, 32), 0)
    batch = made.collator([made.train[n] for n in (1, 23)])
    assert batch["pixel_values"].shape == (2, FRAMES, 3, 32, 32)
    assert batch["labels"].tolist() == [0, 1]
    assert made.model(**batch).logits.shape == (2, 2)
    assert made.model.config.id2label == {0: "left", 1: "right"}
    assert "The head of 5 classes" in made.notes[-1]
    assert made.new_modules == ["classifier"]


def test_half_precision(settings: dict[str, Any]) -> None:
    made = prepared(settings, model__dtype="bfloat16")
    assert made.train[0]["pixel_values"].dtype == torch.bfloat16
    assert made.model(**made.collator([made.train[0]])).loss.isfinite()


def test_a_table_of_paths(settings: dict[str, Any], clips: Path) -> None:
    rows = [{"clip": f"{name}/{n}.mp4", "action": name} for name in ("left", "right") for n in (0, 3, 6, 9)]
    table = clips / "train" / "table.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changed = {"data.train": str(table), "data.video": "clip", "data.label": "action", "data.validation": 0.25}
    try:
        made = prepared(settings | changed)
    finally:
        table.unlink()
    assert (len(made.train), len(made.validation)) == (6, 2)
    assert made.train[0]["pixel_values"].shape == (FRAMES, 3, 32, 32)


def test_a_data_set_of_the_hub(
    settings: dict[str, Any], clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its clips are files, or the content of files in its tables. Neither torchcodec nor torchvision is needed."""
    features = datasets.Features(video=datasets.Video(), label=datasets.ClassLabel(names=["left", "right"]))

    more: list[bytes] = []

    def load(name: str, subset: str | None, split: str) -> datasets.Dataset:
        files = [clips / split / side / f"{n}.mp4" for n in (0, 3) for side in ("left", "right")]
        cells = [
            {"bytes": file.read_bytes(), "path": None} if n % 2 else {"bytes": None, "path": str(file)}
            for n, file in enumerate(files)
        ]
        cells += [{"bytes": content, "path": None} for content in more]
        return datasets.Dataset.from_dict({"video": cells, "label": [0, 1] * 2 + [0] * len(more)}, features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    made = prepared(settings, data__train="some/clips", data__validation="validation")
    assert made.model.config.id2label == {0: "left", 1: "right"}
    plain = prepared(settings)
    for n, number in ((0, 0), (1, 12), (2, 5), (3, 17)):  # among the 24 files of the folder
        assert torch.equal(made.train[n]["pixel_values"], plain.train[number]["pixel_values"])
    more.append(film_bytes(tmp_path / "short.avi", 3))
    message = refusal(settings, data__train="some/clips", data__validation="validation")
    assert "2 of 10 clips cannot be used" in message
    assert "some/clips, split train, row 5: 3 frames, fewer than the 4 that are sampled." in message
    assert "some/clips, split validation, row 5: 3 frames" in message


def test_changes_to_training_examples_are_the_same_for_all_frames(settings: dict[str, Any], tmp_path: Path) -> None:
    """A still clip stays still, however it is cut, mirrored and coloured; and is another one in the next epoch."""
    picture = np.zeros((40, 56, 3), np.uint8)
    picture[5:20, 8:20] = (200, 120, 40)
    for name in ("a", "b"):
        for n in range(4):
            (tmp_path / name).mkdir(exist_ok=True)
            film(tmp_path / name / f"{n}.avi", [picture] * 4)
    still = {"data.train": str(tmp_path), "data.validation": 0.25, "output": str(tmp_path / "run")}
    plain, changed = (
        prepared(settings | still),
        prepared(settings | still, data__augmentation=["crop", "flip", "color"]),
    )
    seen = []
    for epoch in range(3):
        changed.train.set_epoch(epoch)
        values = changed.train[0]["pixel_values"]
        assert all(torch.allclose(values[0], frame, atol=0.1) for frame in values)
        assert not torch.allclose(values[0], plain.train[0]["pixel_values"][0], atol=0.5)
        seen.append(values)
    assert not torch.allclose(seen[0], seen[1], atol=0.5)
    assert torch.equal(changed.validation[0]["pixel_values"], plain.validation[0]["pixel_values"])


def test_worker_processes_make_the_same(settings: dict[str, Any]) -> None:
    made = prepared(settings, data__augmentation=["crop", "flip", "color"])
    loaders = [
        DataLoader(
            made.train, batch_size=4, collate_fn=made.collator, num_workers=workers, timeout=60 if workers else 0
        )
        for workers in (0, 2)
    ]
    for one, other in zip(*loaders, strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"])
        assert torch.equal(one["labels"], other["labels"])


@pytest.mark.parametrize("num_frames", [None, 2, 8])
def test_the_number_of_frames(num_frames: int | None, settings: dict[str, Any]) -> None:
    """VideoMAE computes its positions, so any number of frames that fills tubelets will do."""
    made = prepared(settings, data__num_frames=num_frames)
    batch = made.collator([made.train[0]])
    assert batch["pixel_values"].shape[1] == made.model.config.num_frames == (num_frames or FRAMES)
    assert made.model(**batch).loss.isfinite()


@pytest.mark.parametrize("kind", ["timesformer", "vivit"])
def test_other_models(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    name = str(model_folder(tmp_path / kind, kind))
    made = prepared(settings, model__name=name)
    batch = made.collator([made.train[0], made.train[1]])
    assert made.model(**batch).logits.shape == (2, 2)
    message = refusal(settings, model__name=name, data__num_frames=8)
    assert f"`data.num_frames` is 4 for {name}, which has learned a position for each frame (" in message
    assert "got 8. Leave it out." in message


# ---------------------------------------------------------------- what does not fit


def test_frames_that_fill_no_tubelet(settings: dict[str, Any]) -> None:
    message = refusal(settings, data__num_frames=5)
    assert "`data.num_frames` is a multiple of 2" in message
    assert "got 5. Set it to 4 or 6." in message
    assert "Set it to 2." in refusal(settings, data__num_frames=1)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}}, "inputs of shape (4, 3, 48, 48)"),
        ({"do_center_crop": False}, "(4, 3, 32, 50) and (4, 3, 50, 32)"),  # each clip would keep a shape of its own
        (
            {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}},
            "inputs of shape (3, 32, 32)",
        ),
    ],
)
def test_a_processor_that_does_not_fit(
    changed: dict[str, Any], says: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    message = refusal(settings, model__name=str(model_folder(tmp_path / "model", **changed)))
    assert says in message
    assert "Take the preprocessor_config.json that belongs to the model, or correct its sizes." in message


def test_models_for_other_things(settings: dict[str, Any], tmp_path: Path) -> None:
    message = refusal(settings, model__name=str(tmp_path))
    assert "`model.name` is a folder with a pretrained model and its image processor" in message
    folder = tmp_path / "vit"
    ViTForImageClassification(ViTConfig(**SMALL)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    assert "models whose configuration says `num_frames`" in refusal(settings, model__name=str(folder))
    assert "is a vit." in refusal(settings, model__name=str(folder))


# ---------------------------------------------------------------- bad clips


@pytest.fixture
def with_bad_ones(tmp_path: Path) -> Path:
    """Two classes of five good clips each, and one bad clip of every sort."""
    root = tmp_path / "bad"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for n in range(5):
            film(root / name / f"{n}.avi", 6)
    (root / "a" / "empty.mp4").write_bytes(b"")
    (root / "a" / "text.mp4").write_text("no clip")
    whole = film_bytes(root / "b" / "half.avi", noise(6))
    (root / "b" / "half.avi").write_bytes(whole[: len(whole) // 2])
    film(root / "b" / "sound.mp4", [], sound=0.5)
    film(root / "b" / "short.avi", 3)
    return root


BAD = {
    "a/empty.mp4": "the file is empty (0 bytes).",
    "a/text.mp4": "no video that FFmpeg can read",
    "b/half.avi": "the file is cut short or damaged",
    "b/sound.mp4": "no video stream in it; there is audio.",
    "b/short.avi": "3 frames, fewer than the 4 that are sampled.",
}


def test_all_bad_clips_are_named_before_the_model_is_loaded(
    settings: dict[str, Any], with_bad_ones: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoModelForVideoClassification, "from_pretrained", None)
    given = {"data.train": str(with_bad_ones), "data.validation": 0.2}
    message = refusal(settings | given, data__num_frames=4)
    for name, says in BAD.items():
        assert f"{with_bad_ones / name}: {says}" in message
    assert "--data.on_error skip" in message
    # Where the model says how many frames are needed, this is known a moment later.
    message = refusal(settings | given)
    assert "short.avi" not in message
    assert "sound.mp4: no video stream" in message
    for name in BAD:
        if "short" not in name:
            (with_bad_ones / name).unlink()
    message = refusal(settings | given)
    assert message.startswith("Data: 1 of 11 clips cannot be used.")
    assert f"{with_bad_ones / 'b/short.avi'}: {BAD['b/short.avi']}" in message
    assert "--data.on_error skip" in message


@pytest.mark.parametrize("num_frames", [None, 4])
def test_bad_clips_are_left_out_counted_and_named(
    num_frames: int | None, settings: dict[str, Any], with_bad_ones: Path
) -> None:
    made = prepared(
        settings | {"data.train": str(with_bad_ones), "data.validation": 0.2},
        data__on_error="skip",
        data__num_frames=num_frames,
    )
    assert len(made.train) + len(made.validation) == 10
    notes = "\n".join(made.notes)
    for name in BAD:
        assert str(with_bad_ones / name) in notes
    if num_frames:
        assert "5 of 15 clips of the train set are left out, because they cannot be used:\n" in notes
    else:  # as many as the model takes, which is known later
        assert "4 of 15 clips of the train set are left out, because they cannot be used:\n" in notes
        assert "1 of 15 clips are left out, because they are too short:\n" in notes


def test_a_class_whose_clips_are_all_short(settings: dict[str, Any], tmp_path: Path) -> None:
    for name, frames in (("a", 6), ("b", 2)):
        (tmp_path / name).mkdir()
        for n in range(4):
            film(tmp_path / name / f"{n}.avi", frames)
    given = settings | {"data.train": str(tmp_path), "data.validation": 0.25, "data.on_error": "skip"}
    assert "of the class 'b', no clip is long enough for training." in refusal(given)


def test_labels_that_differ_between_splits(settings: dict[str, Any], tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "validation/a", "validation/c"):
        (tmp_path / name).mkdir(parents=True)
        for n in range(2):
            film(tmp_path / name / f"{n}.avi", 4)
    message = refusal(settings | {"data.train": str(tmp_path)})
    assert "label 'c' is not among the 2 classes of the training examples." in message
    assert str(tmp_path / "validation" / "c" / "0.avi") in message


def test_an_empty_folder(settings: dict[str, Any], tmp_path: Path) -> None:
    assert "is empty" in refusal(settings | {"data.train": str(tmp_path), "data.validation": 0.2})


def test_a_clip_that_goes_bad_while_training(settings: dict[str, Any], tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for n in range(4):
            film(tmp_path / name / f"{n}.avi", 4)
    made = prepared(settings | {"data.train": str(tmp_path), "data.validation": 0.25})
    place = Path(made.train.part.places[0])
    place.write_bytes(b"")
    with pytest.raises(SliceFineError, match=r"avi: it was readable .*: the file is empty \(0 bytes\)"):
        made.train[0]


# ---------------------------------------------------------------- end to end


def test_a_run_from_clips_to_a_model(settings: dict[str, Any], tmp_path: Path) -> None:
    """Train with two worker processes, export, and load where slicefine is not needed."""
    settings |= {"training.dataloader_num_workers": 2, "data.augmentation": ["color"]}
    record = train(Recipe.from_flat(settings))
    assert (record.status, record.steps, record.moves) == ("finished", 12, 2)
    assert set(record.metrics["after"]) == {"loss", "accuracy", "f1_macro"}
    assert record.modules_to_save == ["classifier"]
    merged = tmp_path / "merged"
    export(Path(settings["output"]), "merged", merged)
    model = AutoModelForVideoClassification.from_pretrained(merged).eval()
    processor = AutoImageProcessor.from_pretrained(merged)
    clip = Path(settings["data.train"]) / "validation" / "right" / "0.mp4"
    inputs = processor(read_frames(clip, model.config.num_frames), return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    base = AutoModelForVideoClassification.from_pretrained(settings["model.name"])
    changed = [
        name
        for name, weight in base.videomae.named_parameters()
        if not torch.equal(weight, model.videomae.get_parameter(name))
    ]
    assert any("attention.query.weight" in name for name in changed)
    assert logits.shape == (1, 2)
    assert model.config.id2label == {0: "left", 1: "right"}


def test_a_run_stopped_and_resumed_is_the_same_to_the_bit(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With changes drawn anew for each example and epoch, and with other processes that prepare them."""
    settings |= {"data.augmentation": ["crop", "flip", "color"]}
    train(Recipe.from_flat(settings | {"output": str(tmp_path / "whole")}))
    torch.manual_seed(1234)
    end_step = StepTimer.on_step_end

    def stop(timer: StepTimer, *args: Any, **kwargs: Any) -> None:
        end_step(timer, *args, **kwargs)
        if len(timer.seconds) == 8:  # in the second epoch
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(StepTimer, "on_step_end", stop)
        assert train(Recipe.from_flat(settings | {"training.dataloader_num_workers": 2})).status == "interrupted"
    record = train(Recipe.from_flat(settings), resume=True)
    assert (record.status, record.resumed_from) == ("finished", [8])
    assert record.metrics == RunRecord.read(tmp_path / "whole").metrics
    one, other = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("run", "whole"))
    assert one.read_bytes() == other.read_bytes()


def test_two_processes_keep_the_model_busy(
    settings: dict[str, Any], clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where clips take as long as steps. Both are made slow here, so that a busy machine does not decide."""
    read, forward = task.read_frames, VideoMAEForVideoClassification.forward

    def slow_read(*args: Any) -> Any:
        time.sleep(0.05)
        return read(*args)

    def slow_forward(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.07)
        return forward(*args, **kwargs)

    monkeypatch.setattr(task, "read_frames", slow_read)
    monkeypatch.setattr(VideoMAEForVideoClassification, "forward", slow_forward)
    settings |= {"data.train": str(clips / "train"), "data.validation": 0.1}
    settings |= {"training.per_device_train_batch_size": 1, "training.max_steps": 16}
    shares = []
    for workers in (0, 2):
        given = {"training.dataloader_num_workers": workers, "output": f"{settings['output']}{workers}"}
        shares.append(train(Recipe.from_flat(settings | given)).timings["data_wait_share"])
    assert shares[0] > 0.25
    assert shares[1] < 0.75 * shares[0]  # the processes take a moment to start
