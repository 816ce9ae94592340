"""Tasks by name, one module each.

To add a task, write its module with what `Task` asks for and name it in `TASKS`, and in `STAND_INS` the module by which a
smoke test makes tiny models and a few examples of the kind. Modules are imported when a run needs them, so that names can
be checked without torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from slicefine.training.extras import require_task

if TYPE_CHECKING:
    from pathlib import Path

    from datasets import Dataset
    from transformers import (
        BaseImageProcessor,
        BaseVideoProcessor,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        TrainingArguments,
    )

    from slicefine.training.checked import CheckedTrainer
    from slicefine.training.media import MediaDataset
    from slicefine.training.recipe import DataSettings, Recipe

TASKS = {
    "text-classification": "slicefine.training.tasks.text_classification",
    "image-classification": "slicefine.training.tasks.image_classification",
    "video-classification": "slicefine.training.tasks.video_classification",
    "causal-lm": "slicefine.training.tasks.causal_lm",
}
STAND_INS = {
    "text-classification": "slicefine.training.smoke_text",
    "causal-lm": "slicefine.training.smoke_text",
    "image-classification": "slicefine.training.smoke_media",
    "video-classification": "slicefine.training.smoke_media",
}


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """All that a trainer needs for one run."""

    model: PreTrainedModel
    """The pretrained model, with new layers where the task needs them."""
    processor: PreTrainedTokenizerBase | BaseImageProcessor | BaseVideoProcessor
    """What makes inputs of the model from texts, images or clips; saved beside the adapter."""
    train: Dataset | MediaDataset
    """Training examples, ready for `collator`."""
    validation: Dataset | MediaDataset
    """Validation examples, ready for `collator`."""
    collator: Callable[..., Any] | None
    """Makes a batch of examples; None = as the trainer of the task does."""
    compute_metrics: Callable[..., dict[str, float]] | None
    """Scores of a whole validation pass; None = as the trainer of the task does."""
    new_modules: list[str]
    """Modules that the pretrained files have no values for: they are trained in full and saved."""
    notes: list[str] = field(default_factory=list)
    """What was decided for the user; printed, and kept in the record."""


class Task(Protocol):
    """What the module of a task offers."""

    PEFT_TASK_TYPE: str | None
    """PEFT's name of the task; it decides the class of the PEFT model. None where PEFT has no name."""
    TRAINER: type[CheckedTrainer]
    PRETRAINED: Any
    """The class of transformers that makes a model with all pretrained weights and no new layer."""

    def arguments(self, data: DataSettings, settings: dict[str, Any]) -> TrainingArguments:
        """The arguments of `TRAINER`; `settings` are those that all tasks share. Raises ValueError as transformers does."""
        ...

    def read(self, data: DataSettings) -> Any:
        """Read and check the examples, before anything expensive.

        The result has a method `summary()`, a dict for the run record: sources, sizes, fingerprints.
        Raises `SliceFineError` with every problem.
        """

    def prepare(self, recipe: Recipe, examples: Any) -> Prepared:
        """Load processor and model, and make the examples ready for them."""
        ...

    def load_base(self, name: str, folder: Path) -> PreTrainedModel:
        """Load the base model `name` with the configuration (labels, dtype) saved in the adapter's `folder`."""
        ...


class StandIns(Protocol):
    """What a smoke test takes in place of the real examples and the real model."""

    def write_some(self, data: DataSettings, examples: Any, count: int, folder: Path) -> dict[str, Any]:
        """Write up to `count` examples of each set into `folder`, as `train.jsonl` and perhaps `validation.jsonl`.

        `examples` are those that the task has read from `data`. Returns the settings that say where the written ones are.
        """
        ...

    def load_processor(self, name: str) -> Any:
        """The processor of the model `name`. Raises OSError or ValueError if it cannot be had."""

    def make_processor(self, config: Any, folder: Path) -> Any:
        """A processor for models with the configuration `config` and the examples in `folder`."""

    def shrink(self, config: Any, processor: Any) -> Any:
        """A configuration of the same kind as `config` with few and small layers, that fits `processor`, or that it is made to fit."""


def get_task(name: str) -> Task:
    """The task called `name`, a key of `TASKS`. Raises `SliceFineError` if a package that it needs is not installed."""
    require_task(name)
    return cast(Task, import_module(TASKS[name]))


def get_stand_ins(task: str) -> StandIns:
    """What a smoke test of `task` takes."""
    return cast(StandIns, import_module(STAND_INS[task]))
