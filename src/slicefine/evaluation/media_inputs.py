"""Labelled images and clips, from where they are to the inputs of a model. They are opened when they are needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from typing import Any

from transformers import BaseImageProcessor, PreTrainedModel, default_data_collator

from slicefine.errors import SliceFineError, raise_all
from slicefine.evaluation import models
from slicefine.evaluation.inputs import Examples, Inputs
from slicefine.evaluation.models import Source
from slicefine.training.data import shorten
from slicefine.training.media import Check, MediaDataset, Part, Transform, file_problems, placed
from slicefine.training.media_sources import Item, Kind, MediaTable, read_sources
from slicefine.training.recipe import DataSettings


def read(task: str, data: DataSettings, config: Any) -> Media:
    """The images or clips in `data.train`. As `inputs.read`."""
    if task == "image-classification":
        return _images(data)
    frames = getattr(config, "num_frames", None)
    if frames is None:
        raise SliceFineError(
            "Clips are for models whose configuration says `num_frames` (videomae, timesformer, vivit); this one is a "
            f"{config.model_type}."
        )
    return _clips(data, frames)


def _images(data: DataSettings) -> Media:
    from slicefine.training.images import IMAGES, check_image
    from slicefine.training.tasks.image_classification import Pixels

    return Media(data, data.image, IMAGES, check_image, lambda processor, model: Pixels(processor, dtype=model.dtype))


def _clips(data: DataSettings, num_frames: int) -> Media:
    from slicefine.training.clips import count_frames, too_few
    from slicefine.training.tasks.video_classification import KIND
    from slicefine.training.tasks.video_classification import Inputs as Frames

    def check(item: Item) -> str | None:
        try:
            found = count_frames(item)
        except SliceFineError as error:
            return str(error)
        return too_few(found, num_frames) if found < num_frames else None

    return Media(
        data,
        data.video,
        KIND,
        check,
        lambda processor, model: Frames(processor=processor, num_frames=num_frames, dtype=model.dtype),
    )


class Media:
    """Images or clips."""

    def __init__(
        self,
        data: DataSettings,
        column: str,
        kind: Kind,
        check: Check,
        transform: Callable[[BaseImageProcessor, PreTrainedModel], Transform],
    ) -> None:
        # Only this source: a fraction for validation is none.
        self._media: MediaTable = read_sources(dataclasses.replace(data, validation=0.5), column, kind)["train"]
        self._on_error, self._kind, self._check, self._transform = data.on_error, kind, check, transform
        self.table = self._media.labels

    def refuse_bad(self, rows: Sequence[int]) -> dict[int, str]:
        bad = file_problems(self._media, self._kind, self._check, rows)
        if self._on_error == "fail":
            raise_all(
                shorten(placed(self.table, bad)),
                f"Test sets: {self._kind.noun}s that cannot be used (mend them, or leave them out)",
            )
        return bad

    def processor(self, source: Source) -> BaseImageProcessor:
        return models.load_image_processor(source)

    def inputs(self, source: Source, processor: Any, model: PreTrainedModel, rows: Sequence[int]) -> Inputs:
        part = Part(
            items=self._media.items,
            rows=list(rows),
            labels=[0] * len(rows),  # of no use: a loss is not computed
            places=[self.table.places[row] for row in rows],
        )
        return Inputs(
            dataset=MediaDataset(part, self._transform(processor, model), 0),
            lengths=[1] * len(rows),
            collator=default_data_collator,
        )

    def identities(self, of: Examples) -> Iterator[str | None]:
        """A hash of the bytes, computed only where files of this size are in both sources."""
        assert isinstance(of, Media)
        sizes = of.sizes
        for item in self._media.items:
            size = _size(item)
            yield (
                None
                if size not in sizes
                else blake2b(item if isinstance(item, bytes) else item.read_bytes()).hexdigest()
            )

    @property
    def sizes(self) -> set[int | None]:
        return {_size(item) for item in self._media.items} - {None}


def _size(item: Item) -> int | None:
    if isinstance(item, bytes):
        return len(item)
    return item.stat().st_size if item.is_file() else None
