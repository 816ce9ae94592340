"""Tasks by name, one module each.

To add a task, write its module with what `Task` asks for and name it in `TASKS`. Modules are imported when a run needs
them, so that names can be checked without torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from pathlib import Path

    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from slicefine.training.checked import CheckedTrainer
    from slicefine.training.recipe import DataSettings, Recipe

TASKS = {
    "text-classification": "slicefine.training.tasks.text_classification",
    "causal-lm": "slicefine.training.tasks.causal_lm",
}


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """All that a trainer needs for one run."""

    model: PreTrainedModel
    """The pretrained model, with new layers where the task needs them."""
    tokenizer: PreTrainedTokenizerBase
    """Saved beside the adapter."""
    train: Dataset
    """Training examples, ready for `collator`."""
    validation: Dataset
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

    PEFT_TASK_TYPE: str
    """PEFT's name of the task; it decides the class of the PEFT model."""
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
        """Load tokenizer and model, and make the examples ready for them."""
        ...

    def load_base(self, name: str, folder: Path) -> PreTrainedModel:
        """Load the base model `name` with the configuration (labels, dtype) saved in the adapter's `folder`."""
        ...


def get_task(name: str) -> Task:
    """The task called `name`, a key of `TASKS`."""
    return cast(Task, import_module(TASKS[name]))
