"""What a smoke test of images or clips is made of: some files, an image processor, and a tiny configuration that fits it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoImageProcessor, BaseImageProcessor
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from slicefine.training.media import Examples, Part
from slicefine.training.recipe import DataSettings
from slicefine.training.smoke_config import shrunk
from slicefine.training.smoke_rows import common, spread

SIDE = 64
"""Height and width of what the tiny model sees: enough for five halvings, and for patches of up to 32 pixels."""
WIDTHS, HEADS = (128, 128, 256, 256, 256), 2
"""Of the stages of a model that has stages."""


def write_some(data: DataSettings, examples: Any, count: int, folder: Path) -> dict[str, Any]:
    """See `StandIns`. Of a few classes."""
    found: Examples = getattr(examples, "clips", examples)
    classes = common(found.train.labels, found.validation.labels)
    column = data.video if hasattr(examples, "clips") else data.image
    paths = {}
    for name, part in (("train", found.train), ("validation", found.validation)):
        rows = [
            {column: _file(part, number, folder / f"{name}-{number}"), data.label: found.classes[part.labels[number]]}
            for number in spread(part.labels, classes, count)
        ]
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        paths[f"data.{name}"] = str(path)
    return paths


def _file(part: Part, number: int, place: Path) -> str:
    """The path of an example; what is within a hub data set is written to `place`."""
    item = part.item(number)
    if isinstance(item, bytes):
        place.write_bytes(item)
        item = place
    return str(item.resolve())


def load_processor(name: str) -> BaseImageProcessor:
    """See `StandIns`."""
    return AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)


def make_processor(config: Any, folder: Path) -> BaseImageProcessor:
    """See `StandIns`."""
    name = (IMAGE_PROCESSOR_MAPPING_NAMES.get(config.model_type) or {}).get("pil", "ViTImageProcessorPil")
    return getattr(transformers, str(name))()


def shrink(config: Any, processor: BaseImageProcessor) -> Any:
    """See `StandIns`. The sizes of `processor` are set to those of the tiny model."""
    own: Any = processor
    own.size = _side(own.size)
    if own.crop_size is not None:
        own.crop_size = _side(own.crop_size)
    return shrunk(config, _small_vision)


def _side(size: Any) -> dict[str, int]:
    given = {name: value for name, value in dict(size).items() if value is not None}
    return dict.fromkeys(given or ("height", "width"), SIDE)


def _small_vision(values: dict[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    if values.get("image_size") is not None:
        small["image_size"] = SIDE
    if isinstance(values.get("window_size"), int):
        small["window_size"] = 2  # no larger than any stage is wide
    stages = len(values["depths"]) if values.get("depths") else 0
    if stages:
        small["depths"] = [1] * stages
        small |= {name: stages for name in ("num_stages", "num_layers") if name in values}
    if stages and values.get("embed_dim"):
        small["embed_dim"] = WIDTHS[0] // 4
    if stages and values.get("hidden_sizes"):
        small["hidden_sizes"] = list(WIDTHS[:stages])
    if stages and values.get("num_heads"):
        small["num_heads"] = [HEADS] * stages
    return small
