"""Video classification: one clip to one of several classes.

The model sees `num_frames` frames of a clip, evenly spaced in time (see `clips.read_frames`), as its own processor makes them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForVideoClassification,
    BaseImageProcessor,
    DefaultDataCollator,
    PreTrainedConfig,
    PreTrainedModel,
    TrainingArguments,
)

from slicefine.errors import SliceFineError, raise_all
from slicefine.training import media
from slicefine.training.checked import CheckedTrainer
from slicefine.training.clips import count_frames, read_frames, too_few
from slicefine.training.data import shorten
from slicefine.training.heads import load_base_classifier, load_classifier
from slicefine.training.images import drawn
from slicefine.training.media import MediaDataset, Part, left_out, refused
from slicefine.training.media_sources import Item, Kind
from slicefine.training.metrics import scores_of
from slicefine.training.recipe import DataSettings, Recipe
from slicefine.training.tasks import Prepared
from slicefine.training.tasks.image_classification import (
    TRIED,
    load_config,
    load_processor,
    not_loaded,
    refuse_other_processor,
)

PEFT_TASK_TYPE = None  # PEFT has no name for it
TRAINER = CheckedTrainer
PRETRAINED = AutoModel
KIND = Kind(
    noun="clip",
    feature="Video",
    suffixes=(
        ".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ts", ".ogv", ".gif",
    ),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Checked clips, and how many frames each has: how many are needed is known when the model is."""

    clips: media.Examples
    frames: dict[Path | bytes, int]
    """By `_key` of the clip."""

    def summary(self) -> dict[str, Any]:
        """Sources, sizes, skipped clips and classes, for the run record."""
        return self.clips.summary()


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Makes inputs of the model from a clip, in the processes that prepare batches."""

    processor: BaseImageProcessor
    num_frames: int
    dtype: torch.dtype
    augmentation: list[str] | None = None

    def __call__(self, item: Item, draw: random.Random) -> dict[str, Any]:
        """Decode, change and process a clip. What is drawn is the same for all of its frames."""
        change = drawn(self.augmentation, draw)
        return self.of([change(frame) for frame in read_frames(item, self.num_frames)])

    def of(self, frames: list[Image.Image]) -> dict[str, Any]:
        """`pixel_values` `(frames, channels, height, width)` of `dtype`."""
        made: Any = self.processor(frames, return_tensors="pt")
        return {"pixel_values": made["pixel_values"][0].to(self.dtype)}


def arguments(data: DataSettings, settings: dict[str, Any]) -> TrainingArguments:
    """What `TRAINER` takes beside model and examples."""
    return TrainingArguments(**settings, remove_unused_columns=False)


def read(data: DataSettings) -> Examples:
    """Read the sources, number the classes, and decode every clip once, to the end. Raises as `media.read`."""
    frames: dict[Path | bytes, int] = {}

    def check(item: Item) -> str | None:
        try:
            found = frames[_key(item)] = count_frames(item)
        except SliceFineError as error:
            return str(error)
        least = data.num_frames or 1
        return too_few(found, least) if found < least else None

    return Examples(clips=media.read(data, column=data.video, kind=KIND, check=check), frames=frames)


def prepare(recipe: Recipe, examples: Examples) -> Prepared:
    """Load processor and model. Clips are decoded when they are needed."""
    settings, data, clips = recipe.model, recipe.data, examples.clips
    config = load_config(settings, clips.classes)
    own = getattr(config, "num_frames", None)
    if own is None:
        raise SliceFineError(
            "video-classification is for models whose configuration says `num_frames` (videomae, timesformer, vivit); "
            f"{settings.name} is a {config.model_type}."
        )
    config.num_frames = data.num_frames or own
    _refuse_odd(config, settings.name)
    processor = load_processor(settings)
    parts, notes = _long_enough(examples, config.num_frames, data.on_error)

    def refuse_other_positions(resized: dict[str, tuple[int, ...]]) -> None:
        positions = [key for key, shape in resized.items() if len(shape) > 2]
        if config.num_frames != own and positions:
            raise SliceFineError(
                f"`data.num_frames` is {own} for {settings.name}, which has learned a position for each frame ({', '.join(positions)}); "
                f"got {config.num_frames}. Leave it out."
            )

    found = load_classifier(
        AutoModelForVideoClassification,
        settings,
        config,
        partial(not_loaded, settings),
        refuse_other_positions,
    )
    model = found.model
    plain = Inputs(processor=processor, num_frames=config.num_frames, dtype=model.dtype)
    refuse_other_processor(
        model, [plain.of([Image.new("RGB", size, "gray")] * config.num_frames) for size in TRIED], settings.name
    )
    return Prepared(
        model=model,
        processor=processor,
        train=MediaDataset(parts["train"], replace(plain, augmentation=data.augmentation), recipe.training.seed),
        validation=MediaDataset(parts["validation"], plain, recipe.training.seed),
        collator=DefaultDataCollator(),
        compute_metrics=scores_of(data, clips.classes),
        new_modules=found.trained_in_full,
        notes=[*clips.notes, *notes, *found.notes],
    )


def load_base(name: str, folder: Path) -> PreTrainedModel:
    """The base model with the classes, frames and dtype that `config.json` in the adapter's `folder` says."""
    return load_base_classifier(AutoModelForVideoClassification, name, folder)


def _key(item: Item) -> Path | bytes:
    return blake2b(item).digest() if isinstance(item, bytes) else item


def _long_enough(examples: Examples, num_frames: int, on_error: str) -> tuple[dict[str, Part], list[str]]:
    """The clips with `num_frames` frames or more, and a note of the others, which are refused unless `on_error` is skip."""
    parts, problems = {}, []
    asked = 0
    for name in ("train", "validation"):
        part: Part = getattr(examples.clips, name)
        found = [examples.frames[_key(part.item(n))] for n in range(len(part))]
        short = [
            f"{place}: {too_few(count, num_frames)}"
            for place, count in zip(part.places, found, strict=True)
            if count < num_frames
        ]
        parts[name] = part.take([n for n, count in enumerate(found) if count >= num_frames])
        problems += short
        asked += len(part) + examples.clips.sources[name].get("skipped", 0)
    if on_error == "fail" and problems:
        raise SliceFineError(refused(shorten(problems), len(problems), asked, KIND.noun))
    notes = [left_out(problems, asked, "clips", "they are too short")] if problems else []
    lost = set(examples.clips.train.labels) - set(parts["train"].labels)
    raise_all(
        [
            *(
                f"of the class {examples.clips.classes[n]!r}, no clip is long enough for training."
                for n in sorted(lost)
            ),
            *(["no clip of the validation set is long enough."] if not len(parts["validation"]) else []),
        ],
        "Data",
    )
    return parts, notes


def _refuse_odd(config: PreTrainedConfig, name: str) -> None:
    """Raise `SliceFineError` for frames that fill no tubelet: models leave them out without a word."""
    tubelet = getattr(config, "tubelet_size", 1)
    joined = tubelet if isinstance(tubelet, int) else tubelet[0]
    left = config.num_frames % joined
    if left:
        lower = config.num_frames - left
        fitting = f"{lower} or {lower + joined}" if lower else str(joined)
        raise SliceFineError(
            f"`data.num_frames` is a multiple of {joined}, for {name} takes {joined} frames together; got {config.num_frames}. Set it to "
            f"{fitting}."
        )
