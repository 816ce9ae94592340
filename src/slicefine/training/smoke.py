"""A recipe tried in a minute: everything as it says, but for a tiny model, few examples and four steps.

The model has the architecture of the real one, from its configuration where that can be had, and random weights. What
depends on the kind of examples is in `StandIns`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig

from slicefine.errors import SliceFineError, did_you_mean, listed, raise_all
from slicefine.training.hub import model_problem
from slicefine.training.recipe import Recipe, SliceSettings
from slicefine.training.run import train
from slicefine.training.tasks import StandIns, get_stand_ins, get_task

ROWS, STEPS, EVERY = 64, 4, 2
SHOWN_CLASSES = 8


def smoke(recipe: Recipe, folder: Path) -> list[str]:
    """Run the smoke test of `recipe` in the empty folder `folder`; returns what was done, line by line.

    Raises `SliceFineError` for whatever is wrong with recipe or data; all examples are checked, `ROWS` are trained on.
    """
    raise_all(recipe.problems(), "Recipe")
    recipe = recipe.resolved()
    task = get_task(recipe.task)
    stand_ins = get_stand_ins(recipe.task)
    examples = task.read(recipe.data)
    settings = stand_ins.write_some(recipe.data, examples, ROWS, folder)
    processor, config, model_said, processor_said = _pretrained(recipe, stand_ins, folder)
    made = folder / "model"
    torch.manual_seed(recipe.training.seed)
    model = task.PRETRAINED.from_config(stand_ins.shrink(config, processor))
    model.save_pretrained(made)
    processor.save_pretrained(made)
    try:
        record = train(Recipe.from_flat(recipe.flat() | settings | _overrides(recipe, folder, made)))
    except SliceFineError as error:
        raise SliceFineError(str(error).replace(str(made), recipe.model.name)) from error
    losses = [record.metrics[when]["loss"] for when in ("before", "after")]
    sizes = examples.summary()
    classes: list[str] = sizes.get("classes", [])
    counted = ", ".join(f"{sizes[name]['examples']:,} for {name}" for name in ("train", "validation"))
    return [
        f"{'recipe':<10} fits together; what it takes and learns at full size is not known from this",
        f"{'model':<10} a tiny {config.model_type} ({sum(p.numel() for p in model.parameters()):,} random weights), {model_said}",
        f"{'processor':<10} {processor_said}",
        f"{'data':<10} all examples read and checked ({counted}); up to {ROWS} of each used",
        *([f"{'classes':<10} {len(classes)}: {listed(classes, SHOWN_CLASSES)}"] if classes else []),
        f"{'run':<10} {record.status}: {record.steps} steps, moves: {record.moves}, validation loss {losses[0]:.4g} -> {losses[1]:.4g}",
        f"{'folder':<10} {folder}",
    ]


def _overrides(recipe: Recipe, folder: Path, model: Path) -> dict[str, Any]:
    """The settings that make a run small."""
    training = recipe.training
    return {
        "model.name": str(model),
        "data.subset": None,
        "data.train_split": "train",
        "output": str(folder / "run"),
        "slice.slide_every": None if recipe.slice.slide_every is None else EVERY,
        "slice.layers_to_transform": None,  # of the tiny model's blocks there are two
        "slice.layers_pattern": None,
        "slice.depth_window": None,
        "slice.depth_every": SliceSettings.depth_every,
        "slice.depth_stack": None,
        "training.max_steps": STEPS,
        "training.per_device_train_batch_size": min(4, training.per_device_train_batch_size),
        "training.per_device_eval_batch_size": min(8, training.per_device_eval_batch_size),
        "training.gradient_accumulation_steps": min(2, training.gradient_accumulation_steps),
        "training.eval_steps": None,
        "training.save_steps": None,
        "training.logging_steps": 1,
        "training.dataloader_num_workers": 0,
        "training.report_to": "none",
    }


def _pretrained(recipe: Recipe, stand_ins: StandIns, folder: Path) -> tuple[Any, Any, str, str]:
    """Processor and configuration, and where each is from: those of the model, or stand-ins."""
    name, architecture = recipe.model.name, recipe.model.architecture
    if model_problem(name) is None:
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
            return (
                stand_ins.load_processor(name),
                config,
                f"as the configuration of {name} says",
                f"that of {name}",
            )
        except SliceFineError:  # it is there and cannot be used
            raise
        except (OSError, ValueError):  # not there, not public, or unknown to this version
            pass
    if architecture is None:
        raise SliceFineError(
            f"A smoke test needs the configuration and tokenizer or processor of {name}, which cannot be had here, or the name of its "
            "architecture: set `model.architecture` (llama, say)."
        )
    if architecture not in CONFIG_MAPPING:
        near = did_you_mean(architecture, CONFIG_MAPPING)
        raise SliceFineError(f"`model.architecture` is a model_type of transformers; got {architecture!r}.{near}")
    config = AutoConfig.for_model(architecture)
    said = f"the architecture that the recipe names: the configuration of {name} cannot be had here"
    return stand_ins.make_processor(config, folder), config, said, "made for these examples, for the same reason"
