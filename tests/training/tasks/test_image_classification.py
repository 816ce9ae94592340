"""Images from files on disk to trained, saved, resumed and exported models, on tiny models with random weights."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from pictures import COLORS, folder, picture, table
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from slicefine import SliceFineError, SliceFineWarning
from slicefine.cli.train import summary
from slicefine.training.export import export
from slicefine.training.progress import StepTimer
from slicefine.training.recipe import Recipe
from slicefine.training.record import RunRecord
from slicefine.training.run import train
from slicefine.training.tasks import image_classification as task

SIDE = 32
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
STAGES = {"depths": [1, 1], "num_channels": 3}
CONFIGS: dict[str, Any] = {
    "vit": lambda: ViTConfig(image_size=SIDE, patch_size=8, **SMALL),
    "dinov2": lambda: transformers.Dinov2Config(image_size=SIDE, patch_size=8, **SMALL),
    "swin": lambda: transformers.SwinConfig(
        image_size=SIDE, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4
    ),
    "convnext": lambda: transformers.ConvNextConfig(hidden_sizes=[16, 32], num_stages=2, **STAGES),
    "clip": lambda: transformers.CLIPConfig(
        vision_config={"image_size": SIDE, "patch_size": 8, **SMALL},
        text_config={"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, **SMALL},
    ),
    "resnet": lambda: transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], layer_type="basic", **STAGES),
    "bit": lambda: transformers.BitConfig(embedding_size=32, hidden_sizes=[128, 128], **STAGES),
}
# Convolutions are named; all-linear means linear layers.
CONVOLUTIONS = {"resnet": ["convolution"], "bit": ["conv1", "conv2"]}


def save_model(architecture: str, place: Path, side: int = SIDE, **changed: Any) -> Path:
    """A model with random weights and no head, and an image processor for `side` times `side` pixels."""
    torch.manual_seed(0)
    config = CONFIGS[architecture]()
    for name, value in changed.items():
        setattr(config, name, value)
    transformers.AutoModel.from_config(config).save_pretrained(place)
    transformers.ViTImageProcessorPil(size={"height": side, "width": side}).save_pretrained(place)
    return place


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """Dotted settings of a run of 12 steps with 3 moves of a ViT with dropout."""
    return {
        "task": "image-classification",
        "model.name": str(save_model("vit", tmp_path / "model", hidden_dropout_prob=0.1)),
        "data.train": str(folder(tmp_path / "data", 8)),
        "data.validation": 0.25,
        "output": str(tmp_path / "run"),
        "slice.r": 2,
        "slice.slide_every": 4,
        "training.learning_rate": 1e-2,
        "training.per_device_train_batch_size": 3,
        "training.num_train_epochs": 2,
        "training.logging_steps": 2,
        "training.report_to": "none",
    }


def override(settings: dict[str, Any], **values: Any) -> Recipe:
    return Recipe.from_flat(settings | {key.replace("__", "."): value for key, value in values.items()})


def refusal(settings: dict[str, Any], **values: Any) -> str:
    with pytest.raises(SliceFineError) as error:
        train(override(settings, **values))
    assert not Path(settings["output"]).exists()
    return str(error.value)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_architecture_trains_loads_and_is_exported(
    architecture: str, settings: dict[str, Any], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    shutil.rmtree(settings["model.name"])
    model = save_model(architecture, Path(settings["model.name"]))
    named = {"slice.target_modules": CONVOLUTIONS[architecture]} if architecture in CONVOLUTIONS else {}
    record = train(Recipe.from_flat(settings | named | {"training.max_steps": 9}))
    assert (record.status, record.steps, record.moves) == ("finished", 9, 2)
    assert record.metrics["after"]["loss"] < record.metrics["before"]["loss"]
    assert set(record.metrics["after"]) == {"loss", "accuracy", "f1_macro"}
    adapter = tmp_path / "run" / "adapter"
    assert {"adapter_model.safetensors", "config.json", "preprocessor_config.json"} <= {
        p.name for p in adapter.iterdir()
    }
    assert json.loads((adapter / "adapter_config.json").read_text())["task_type"] is None
    (head,) = record.modules_to_save
    assert any(f".{head}.weight" in key for key in load_file(adapter / "adapter_model.safetensors"))

    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    loaded = PeftModel.from_pretrained(task.load_base(str(model), adapter), str(adapter)).eval()  # pyright: ignore
    with torch.no_grad():
        expected = loaded(pixel_values=pixels).logits
    export(tmp_path / "run", "merged", tmp_path / "merged")
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "merged").eval()
    assert plain.config.id2label == dict(enumerate(sorted(COLORS)))
    with torch.no_grad():
        assert torch.equal(plain(pixel_values=pixels).logits, expected)
    assert AutoImageProcessor.from_pretrained(tmp_path / "merged", backend="pil").size["height"] == SIDE

    export(tmp_path / "run", "slices", tmp_path / "slices")
    assert (tmp_path / "slices" / "preprocessor_config.json").is_file()
    if architecture not in CONVOLUTIONS:
        with pytest.warns(SliceFineWarning, match="not the whole of what was trained"):
            export(tmp_path / "run", "lora", tmp_path / "lora", drop_biases_and_heads=True)
        assert (tmp_path / "lora" / "preprocessor_config.json").is_file()


def test_it_learns_from_a_table_and_says_so_of_its_classes(settings: dict[str, Any], tmp_path: Path) -> None:
    record = train(override(settings, data__train=str(table(tmp_path / "table", 8)), training__num_train_epochs=6))
    assert record.metrics["after"]["accuracy"] == 1
    assert record.data["classes"] == sorted(COLORS)
    assert record.data["train"]["examples"] == 18


def test_the_saved_processor_and_head_classify_a_new_image(settings: dict[str, Any], tmp_path: Path) -> None:
    train(override(settings, training__num_train_epochs=6))
    export(tmp_path / "run", "merged", tmp_path / "merged")
    pipe = transformers.pipeline("image-classification", str(tmp_path / "merged"), use_fast=False)
    for color in COLORS:
        assert pipe(picture(color, 1000))[0]["label"] == color


@pytest.mark.parametrize(
    ("stop", "changed"),
    [
        pytest.param(4, {}, id="within the first epoch"),
        pytest.param(6, {}, id="between two epochs"),
        pytest.param(9, {}, id="within the second epoch"),
        pytest.param(9, {"training.dataloader_num_workers": 2}, id="with workers"),
    ],
)
def test_a_resumed_run_is_bit_identical_with_augmentation(
    stop: int,
    changed: dict[str, Any],
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings |= {"data.augmentation": ["crop", "flip", "color"]}
    train(override(settings, output=str(tmp_path / "whole")))
    torch.manual_seed(1234)
    random.seed(1234)
    np.random.seed(1234)
    end_step = StepTimer.on_step_end

    def on_step_end(self: StepTimer, *args: Any, **kwargs: Any) -> None:
        end_step(self, *args, **kwargs)
        if len(self.seconds) == stop:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(StepTimer, "on_step_end", on_step_end)
        assert train(Recipe.from_flat(settings | changed)).steps == stop
    record = train(Recipe.from_flat(settings | changed), resume=True)
    assert (record.status, record.resumed_from) == ("finished", [stop])
    whole = RunRecord.read(tmp_path / "whole")
    assert record.metrics == whole.metrics
    for name in ("adapter_model.safetensors", "adapter_config.json", "preprocessor_config.json"):
        assert (tmp_path / "run" / "adapter" / name).read_bytes() == (
            tmp_path / "whole" / "adapter" / name
        ).read_bytes()


def test_augmentation_is_for_training_alone_and_follows_the_seed(settings: dict[str, Any]) -> None:
    def prepared(**values: Any) -> Any:
        recipe = override(settings, **values)
        return task.prepare(recipe, task.read(recipe.data))

    plain, made = prepared(), prepared(data__augmentation=["crop", "flip", "color"])
    other = prepared(data__augmentation=["crop", "flip", "color"], training__seed=7)

    def same(one: Any, two: Any) -> bool:
        return all(torch.equal(one[n]["pixel_values"], two[n]["pixel_values"]) for n in range(len(one)))

    assert same(plain.validation, made.validation)
    assert not same(plain.train, made.train)
    assert same(made.train, prepared(data__augmentation=["color", "flip", "crop"]).train)
    assert not same(made.train, other.train)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "I;16"])
def test_images_of_any_mode_and_shape_are_seen_as_their_rgb(
    mode: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Also those that are 1 or 3 pixels high, which are easily taken for channels."""
    pixels = task.Pixels(task.load_processor(Recipe.from_flat(settings).model))
    for size in ((30, 24), (40, 1), (3, 50), (1, 1), (3, 3)):
        image = picture("green", 1, size)
        if mode == "I;16":
            image = image.convert("L")
            Image.fromarray(np.asarray(image).astype(np.uint16) * 257).save(tmp_path / "a.png")
        else:
            image = image.convert(mode)
            image.save(tmp_path / "a.tiff")
        (path,) = tmp_path.glob("a.*")
        found = pixels(path, random.Random(0))["pixel_values"]
        assert (found.shape, found.dtype) == ((3, SIDE, SIDE), torch.float32)
        assert torch.equal(found, pixels.of(image.convert("RGB"))["pixel_values"])


def test_images_of_twelve_bits_are_noted_once(settings: dict[str, Any]) -> None:
    for path in Path(settings["data.train"]).glob("*/*"):
        Image.fromarray(np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 16).save(path.with_suffix(".png"))
        if path.suffix != ".png":
            path.unlink()
    (note,) = [note for note in task.read(override(settings).data).notes if "images of 16 bits" in note]
    assert re.match(r"The largest value in 24 images of 16 bits is \d{4} of 65535", note)


def test_a_head_of_other_classes_is_replaced(settings: dict[str, Any], tmp_path: Path) -> None:
    model = Path(settings["model.name"])
    config = ViTConfig(image_size=SIDE, patch_size=8, num_labels=10, **SMALL)
    ViTForImageClassification(config).save_pretrained(model)
    record = train(Recipe.from_flat(settings))
    (note,) = [note for note in record.notes if "head" in note]
    assert re.search(r"head of 10 classes .* replaced by a new one of 3", note)
    assert record.modules_to_save == ["classifier"]
    export(tmp_path / "run", "merged", tmp_path / "merged")
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "merged").config.num_labels == 3
    assert task.load_base(str(model), tmp_path / "run" / "adapter").config.num_labels == 3


def test_statistics_of_batch_normalisation_stay(settings: dict[str, Any], tmp_path: Path) -> None:
    shutil.rmtree(settings["model.name"])
    save_model("resnet", Path(settings["model.name"]))
    recipe = override(settings, slice__target_modules=["convolution"])
    prepared = task.prepare(recipe, task.read(recipe.data))
    before = {name: buffer.clone() for name, buffer in prepared.model.named_buffers()}
    assert "running_mean" in str(list(before))
    batch = prepared.collator([prepared.train[n] for n in range(6)])
    with torch.no_grad():
        assert torch.equal(prepared.model.train()(**batch).loss, prepared.model.eval()(**batch).loss)
    assert all(torch.equal(buffer, before[name]) for name, buffer in prepared.model.named_buffers())
    assert prepared.notes == ["The statistics of 6 layers of batch normalisation stay as they were pretrained."]


def test_weights_in_bfloat16(settings: dict[str, Any]) -> None:
    for architecture in ("vit", "convnext"):
        shutil.rmtree(settings["model.name"])
        save_model(architecture, Path(settings["model.name"]))
        recipe = override(
            settings, model__dtype="bfloat16", training__max_steps=2, output=settings["output"] + architecture
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SliceFineWarning)  # two steps are few
            assert train(recipe).status == "finished"


# ---------------------------------------------------------------- what is refused


def test_bad_files_are_refused_before_the_model_is_loaded(settings: dict[str, Any]) -> None:
    bad = Path(settings["data.train"]) / "red" / "0.png"
    bad.write_bytes(bad.read_bytes()[:100])
    said = refusal(settings, model__name="/absent/model")
    assert "no folder /absent/model" in said
    shutil.rmtree(Path(settings["model.name"]) / "nothing", ignore_errors=True)
    (Path(settings["model.name"]) / "model.safetensors").unlink()
    assert "red/0.png: it is damaged or cut short" in refusal(settings)


def test_skipped_files_are_on_record(settings: dict[str, Any]) -> None:
    (Path(settings["data.train"]) / "red" / "0.png").write_bytes(b"")
    record = train(override(settings, data__on_error="skip"))
    assert record.data["train"]["skipped"] == 1
    assert "1 of 24 images of the train set are left out" in record.notes[0]
    assert "red/0.png: it is empty" in record.notes[0]


def test_a_processor_of_another_size(settings: dict[str, Any]) -> None:
    transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(settings["model.name"])
    said = refusal(settings)
    assert "does not fit the model: it makes inputs of shape (3, 16, 16), config.json says num_channels 3" in said
    assert "image_size 32" in said
    assert "Take the preprocessor_config.json that belongs to the model" in said


def test_a_processor_without_a_size(settings: dict[str, Any]) -> None:
    transformers.ViTImageProcessorPil(do_resize=False).save_pretrained(settings["model.name"])
    assert "a batch has inputs of one shape; the processor of" in refusal(settings)


def test_a_model_of_grey_images(settings: dict[str, Any]) -> None:
    shutil.rmtree(settings["model.name"])
    save_model("vit", Path(settings["model.name"]), num_channels=1)
    assert "it makes inputs of shape (3, 32, 32), config.json says num_channels 1" in refusal(settings)


def test_no_processor(settings: dict[str, Any]) -> None:
    (Path(settings["model.name"]) / "preprocessor_config.json").unlink()
    said = refusal(settings)
    assert "images are prepared by the model's own image processor" in said
    assert "Put the preprocessor_config.json of the original model into the folder" in said


def test_a_model_of_texts(settings: dict[str, Any], model_folder: Path) -> None:
    said = refusal(settings, model__name=str(model_folder))
    assert "transformers has no image classifier of the architecture bert" in said


# ---------------------------------------------------------------- loading


class Slow(task.Pixels):
    """Takes as long as a large image."""

    def __call__(self, item: Any, draw: random.Random) -> dict[str, Any]:
        time.sleep(0.05)
        return super().__call__(item, draw)


@pytest.mark.parametrize("slow", [True, False])
def test_the_share_of_time_spent_waiting_is_on_record(
    slow: bool, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if slow:
        monkeypatch.setattr(task, "Pixels", Slow)
    else:  # pixels that are there at once, and steps that take their time
        monkeypatch.setattr(task.MediaDataset, "__getitem__", lambda self, n: {"pixel_values": SEEN, "labels": n % 3})
        monkeypatch.setattr(StepTimer, "on_step_begin", _begin_and_wait(StepTimer.on_step_begin))
    record = train(Recipe.from_flat(settings))
    share = record.timings["data_wait_share"]
    assert (0.6 < share <= 1) if slow else (0 <= share < 0.2)
    hint = (
        f"waiting      {share:.0%} of the time of steps was spent waiting for data: raise --training.dataloader_num_w"
    )
    assert (hint in summary(record, "runs/x")) == slow


SEEN = torch.zeros(3, SIDE, SIDE)


def _begin_and_wait(begin: Any) -> Any:
    def on_step_begin(self: StepTimer, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        time.sleep(0.05)

    return on_step_begin


def test_ctrl_c_reaches_the_processes_that_load_as_well_and_is_answered_once(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    folder(tmp_path / "data", 60)
    more = {"training.dataloader_num_workers": 2, "training.save_steps": 5, "training.num_train_epochs": 1000}
    recipe = Recipe.from_flat(settings | more)  # 45 steps an epoch: the processes are there when the signal comes
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    command = [sys.executable, "-m", "slicefine.cli.main", "train", str(tmp_path / "recipe.yaml")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
    ) as process:
        record = tmp_path / "run" / "record.json"
        checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-5"
        deadline = time.monotonic() + 90
        while not checkpoint.is_dir() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as the terminal does: to every process of the command
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.count("Stopping after this step, with a checkpoint.") == 1
    assert "Traceback" not in err
    assert json.loads(record.read_text())["status"] == "interrupted"
    assert "Interrupted after step" in out


def test_a_head_of_other_classes_is_kept_with_a_note_and_trained_in_full(settings: dict[str, Any]) -> None:
    config = CONFIGS["vit"]()
    config.id2label = {number: f"breed {number}" for number in range(len(COLORS))}
    ViTForImageClassification(config).save_pretrained(settings["model.name"])
    record = train(Recipe.from_flat(settings | {"training.max_steps": 5}))
    assert record.modules_to_save == ["classifier"]
    assert any("head in the files of" in note and "breed 0" in note for note in record.notes)
