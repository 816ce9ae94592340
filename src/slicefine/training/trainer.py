"""From a recipe to the trainer of its task."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from slicefine.errors import SliceFineError
from slicefine.training import folder as folders
from slicefine.training import record as records
from slicefine.training.checked import CheckedTrainer
from slicefine.training.interrupts import not_swallowed
from slicefine.training.recipe import Recipe
from slicefine.training.tasks import Prepared, Task


@not_swallowed()
def make_trainer(
    task: Task,
    prepared: Prepared,
    model: nn.Module,
    arguments: TrainingArguments,
    callbacks: list[TrainerCallback],
) -> CheckedTrainer:
    """The trainer of the task. Raises `SliceFineError` if it refuses the recipe."""
    try:
        trainer = task.TRAINER(
            model=cast(Any, model),  # Trainer takes a PeftModel; its annotation does not say so
            args=arguments,
            train_dataset=prepared.train,
            eval_dataset=prepared.validation,
            processing_class=prepared.processor,
            data_collator=prepared.collator,
            compute_metrics=prepared.compute_metrics,
            callbacks=callbacks,
        )
    except SliceFineError:
        raise
    except ValueError as error:
        raise SliceFineError(f"{task.TRAINER.__name__} refuses the recipe: {error}") from error
    trainer.remove_callback(PrinterCallback)  # Trainer's stand-in for the bar that `disable_tqdm` takes away
    return trainer


def make_arguments(recipe: Recipe, task: Task, folder: Path, **changes: Any) -> TrainingArguments:
    """What the trainer is told, checkpoints going to `folder`; `changes` win. Raises `SliceFineError` if transformers refuses it."""
    others = [name for name in trackers(recipe) if name != "tensorboard"]
    settings = dataclasses.asdict(recipe.training) | {
        "report_to": others or "none",
        "output_dir": str(folder / folders.CHECKPOINTS),
        "eval_strategy": "epoch" if recipe.training.eval_steps is None else "steps",
        "save_strategy": "epoch" if recipe.training.save_steps is None else "steps",
        "logging_first_step": True,
        "label_names": ["labels"],
        "dataloader_num_workers": min(recipe.training.dataloader_num_workers, records.usable_cores()),
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": torch.accelerator.is_available(),
        "disable_tqdm": True,
    }
    try:
        return task.arguments(recipe.data, settings | changes)
    except ValueError as error:  # bf16 on a GPU that cannot, say
        raise SliceFineError(f"`training`: transformers refuses these settings: {error}") from error


def trackers(recipe: Recipe) -> list[str]:
    """Where logs go, by the names that transformers knows."""
    names = recipe.training.report_to
    return [names] if isinstance(names, str) else names
