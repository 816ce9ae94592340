"""Image classification: one image to one of several classes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    BaseImageProcessor,
    DefaultDataCollator,
    PreTrainedModel,
    TrainingArguments,
)

from slicefine.errors import SliceFineError, first_line
from slicefine.training import media
from slicefine.training.checked import CheckedTrainer
from slicefine.training.heads import load_base_classifier, load_classifier
from slicefine.training.images import IMAGES, check_image, dark, drawn, read_image
from slicefine.training.media import Examples, MediaDataset
from slicefine.training.media_sources import Item
from slicefine.training.metrics import scores_of
from slicefine.training.recipe import DataSettings, ModelSettings, Recipe
from slicefine.training.tasks import Prepared

PEFT_TASK_TYPE = None  # PEFT has no name for it
TRAINER = CheckedTrainer
PRETRAINED = AutoModel

TRIED = ((97, 61), (61, 97))
"""Sizes of two images, width and height, by which is tried whether the processor fits the model."""


@dataclass(frozen=True)
class Pixels:
    """From an image to the inputs of a model, changed at random on the way if `augmentation` names changes."""

    processor: BaseImageProcessor
    augmentation: list[str] | None = None
    dtype: torch.dtype = torch.float32
    """Of the weights: not every model converts its inputs."""

    def __call__(self, item: Item, draw: random.Random) -> dict[str, Any]:
        return self.of(drawn(self.augmentation, draw)(read_image(item)))

    def of(self, image: Image.Image) -> dict[str, Any]:
        """Inputs for one RGB image, without a dimension for the batch: `pixel_values` `(channels, height, width)`."""
        made: Any = self.processor(images=image, return_tensors="pt")
        return {
            name: value[0].to(self.dtype) if value.is_floating_point() else value[0] for name, value in made.items()
        }


def arguments(data: DataSettings, settings: dict[str, Any]) -> TrainingArguments:
    """What `TRAINER` takes beside model and examples. Those are opened when needed: no column of theirs is left out."""
    return TrainingArguments(**settings, remove_unused_columns=False)


def read(data: DataSettings) -> Examples:
    """Read the sources, number the classes and decode every image once. Raises `SliceFineError` with every problem."""
    largest: list[int] = []
    examples = media.read(data, column=data.image, kind=IMAGES, check=partial(check_image, largest=largest))
    return replace(examples, notes=[*examples.notes, *dark(largest)])


def prepare(recipe: Recipe, examples: Examples) -> Prepared:
    """Load image processor and model. Images are opened, changed and processed batch by batch."""
    settings = recipe.model
    config = load_config(settings, examples.classes)
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise SliceFineError(
            f"`model.name`: transformers has no image classifier of the architecture {config.model_type}, that of {settings.name}. Name "
            "a model of images: a ViT, DINOv2, Swin, ConvNeXt, CLIP or ResNet, say."
        )
    processor = load_processor(settings)
    found = load_classifier(AutoModelForImageClassification, settings, config, partial(not_loaded, settings))
    model = found.model
    notes = [*examples.notes, *found.notes, *freeze_statistics(model)]
    plain = Pixels(processor, dtype=model.dtype)
    refuse_other_processor(model, [plain.of(Image.new("RGB", size, "gray")) for size in TRIED], settings.name)
    seed = recipe.training.seed
    return Prepared(
        model=model,
        processor=processor,
        train=MediaDataset(examples.train, replace(plain, augmentation=recipe.data.augmentation), seed),
        validation=MediaDataset(examples.validation, plain, seed),
        collator=DefaultDataCollator(),
        compute_metrics=scores_of(recipe.data, examples.classes),
        new_modules=found.trained_in_full,
        notes=notes,
    )


def load_base(name: str, folder: Path) -> PreTrainedModel:
    """The base model with the classes and dtype that `config.json` in the adapter's `folder` says."""
    return load_base_classifier(AutoModelForImageClassification, name, folder)


def load_config(settings: ModelSettings, classes: Sequence[str]) -> Any:
    """The model's configuration with a head for `classes`. Raises `SliceFineError` if it does not load."""
    try:
        return AutoConfig.from_pretrained(
            settings.name,
            id2label=dict(enumerate(classes)),
            label2id={name: number for number, name in enumerate(classes)},
            problem_type="single_label_classification",
            trust_remote_code=False,
        )
    except (OSError, ValueError) as error:
        raise SliceFineError(not_loaded(settings, error)) from error


def load_processor(settings: ModelSettings) -> BaseImageProcessor:
    """The model's own image processor, in the version that works with Pillow. Raises `SliceFineError` if it has none."""
    try:
        return AutoImageProcessor.from_pretrained(settings.name, backend="pil", trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise SliceFineError(
            f"`model.name`: images are prepared by the model's own image processor; {settings.name} has none that loads "
            f"({first_line(error)}). Put the preprocessor_config.json of the original model into the folder: "
            "`AutoImageProcessor.from_pretrained(ORIGINAL).save_pretrained(FOLDER)`."
        ) from error


def refuse_other_processor(model: PreTrainedModel, tried: list[dict[str, Any]], name: str) -> None:
    """Raise `SliceFineError` unless `model` takes what its processor made of some examples, in one batch and one by one."""
    shapes = sorted({tuple(inputs["pixel_values"].shape) for inputs in tried})
    config: Any = model.config
    vision = getattr(config, "vision_config", config)
    wanted = {key: getattr(vision, key, None) for key in ("num_channels", "image_size", "num_frames")}
    takes = ", ".join(f"{key} {value}" for key, value in wanted.items() if value is not None) or "no size"
    fix = "Take the preprocessor_config.json that belongs to the model, or correct its sizes."
    if len(shapes) > 1:
        raise SliceFineError(
            f"`model.name`: a batch has inputs of one shape; the processor of {name} makes {' and '.join(map(str, shapes))} of differently "
            f"shaped examples. {fix}"
        )
    batch = DefaultDataCollator()(tried)
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(**batch)
    except (ValueError, RuntimeError, IndexError) as error:
        raise SliceFineError(
            f"`model.name`: the processor of {name} does not fit the model: it makes inputs of shape {shapes[0]}, config.json says {takes}, "
            f"and the model refuses them ({first_line(error)}). {fix}"
        ) from error
    finally:
        model.train(training)


def freeze_statistics(model: nn.Module) -> list[str]:
    """Keep the running statistics of batch normalisation as they were pretrained; a note if there are any.

    They would change with every batch, and are no parameters: an adapter could not hold them, and a loaded one would not
    compute what was trained.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for layer in layers:
        layer.register_forward_pre_hook(_as_in_evaluation)
    if not layers:
        return []
    return [f"The statistics of {len(layers)} layers of batch normalisation stay as they were pretrained."]


def _as_in_evaluation(module: nn.Module, _inputs: Any) -> None:
    module.eval()


def not_loaded(settings: ModelSettings, error: Exception) -> str:
    """What to say if transformers does not load the model or its image processor."""
    return (
        f"`model.name` is a folder with a pretrained model and its image processor, or the name of one on the hub; "
        f"{settings.name!r} did not load: {first_line(error)}."
    )
