"""What is wrong with the values of a recipe, as far as it can be told without reading anything."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from slicefine.errors import did_you_mean, pattern_problems
from slicefine.training.data import SUFFIXES
from slicefine.training.named import NAMED
from slicefine.training.schema import Setting
from slicefine.training.tasks import TASKS

if TYPE_CHECKING:
    from slicefine.training.recipe import Recipe

Settings = Mapping[str, Setting]
AUGMENTATIONS = ("crop", "flip", "color")
_MEDIA = ("image-classification", "video-classification")
_CLASSIFICATION = ("text-classification", *_MEDIA)
# A setting that a task would pass over is refused.
_OF_TASKS = {
    "data.text": ("text-classification", "causal-lm"),
    "data.max_length": ("text-classification", "causal-lm"),
    "data.text_pair": ("text-classification",),
    "data.label": _CLASSIFICATION,
    "data.label_kind": ("text-classification",),
    "data.image": ("image-classification",),
    "data.video": ("video-classification",),
    "data.on_error": _MEDIA,
    "data.augmentation": _MEDIA,
    "data.num_frames": ("video-classification",),
    "data.format": ("causal-lm",),
    "data.packing": ("causal-lm",),
    "data.packing_strategy": ("causal-lm",),
    "data.fully_cut": ("causal-lm",),
}

_COLUMNS = {
    "text-classification": ("data.text", "data.text_pair", "data.label"),
    "image-classification": ("data.image", "data.label"),
    "video-classification": ("data.video", "data.label"),
}
_AT_LEAST = {
    "data.max_length": 1,
    "data.num_frames": 1,
    "training.per_device_train_batch_size": 1,
    "training.per_device_eval_batch_size": 1,
    "training.gradient_accumulation_steps": 1,
    "training.warmup_steps": 0,
    "training.weight_decay": 0,
    "training.max_grad_norm": 0,
    "training.eval_steps": 1,
    "training.save_steps": 1,
    "training.save_total_limit": 1,
    "training.logging_steps": 1,
    "training.seed": 0,
    "training.dataloader_num_workers": 0,
}


def problems(recipe: Recipe, settings: Settings, *, task_known: bool) -> list[str]:
    """One sentence for each problem of the values of `recipe`, whose `settings` these are by dotted key.

    `task_known`: False if the task is a stand-in, by which no other setting can be judged.
    """
    found = []
    values = recipe.flat()
    if recipe.task not in TASKS:
        found.append(f"`task` is one of {', '.join(TASKS)}; got {recipe.task!r}.{did_you_mean(recipe.task, TASKS)}")
    for key, least in _AT_LEAST.items():
        if values[key] is not None and not values[key] >= least:
            found.append(f"`{key}` is at least {least}; got {values[key]}.")
    if values["training.seed"] >= 2**32:
        found.append(f"`training.seed` is below 2**32; got {values['training.seed']}.")
    for key in ("training.learning_rate", "training.num_train_epochs"):
        if not values[key] > 0:
            found.append(f"`{key}` is above 0; got {values[key]}.")
    if recipe.training.max_steps < 1 and recipe.training.max_steps != -1:
        found.append(f"`training.max_steps` is at least 1, or -1 for none; got {recipe.training.max_steps}.")
    fraction = recipe.data.validation
    if isinstance(fraction, str) and fraction.lower() in ("none", "null"):
        found.append("`data.validation` cannot be left out. Use a small fraction, such as 0.01.")
    if isinstance(fraction, int | float) and not 0 < fraction < 1:
        found.append(f"`data.validation` as a fraction lies between 0 and 1, ends excluded; got {fraction}.")
    if isinstance(fraction, str) and re.fullmatch(r"\d+(\.\d+)? ?%", fraction):
        found.append(
            f"`data.validation` as a fraction is a number between 0 and 1; got {fraction!r}. Write "
            f"{float(fraction.rstrip(' %')) / 100:g}."
        )
    for key in (
        "model.name",
        "data.train",
        "data.validation",
        "data.text",
        "data.label",
        "data.image",
        "data.video",
        "output",
    ):
        if values[key] == "":
            found.append(f"`{key}` is empty: {settings[key].help}.")
    if recipe.data.train and Path(recipe.data.train).suffix.lower() in SUFFIXES:
        found += [
            f"`data.{name}` is for data sets of the hub; {recipe.data.train} is a file. Leave it out."
            for name in ("subset", "train_split")
            if values[f"data.{name}"] != settings[f"data.{name}"].default
        ]
    defaults = {key: setting.default for key, setting in settings.items()}
    if task_known and recipe.task in TASKS:
        found += [
            f"`{key}` is for {', '.join(tasks)}; this is {recipe.task}. Leave it out."
            for key, tasks in _OF_TASKS.items()
            if recipe.task not in tasks and values[key] != defaults[key]
        ]
    if recipe.data.name:
        found += _name_problems(recipe, recipe.data.name, settings) if task_known else []
    elif recipe.data.train is None:
        found.append(
            f"`data.train` is missing: {settings['data.train'].help}. Give it, or the name of a data set as `data.name`: "
            f"{', '.join(NAMED)}."
        )
    if unknown := [name for name in recipe.data.augmentation or () if name not in AUGMENTATIONS]:
        found.append(
            f"`data.augmentation` names {', '.join(AUGMENTATIONS)}; got {', '.join(map(repr, unknown))}."
            f"{did_you_mean(unknown[0], AUGMENTATIONS)}"
        )
    keys = [key for key in _COLUMNS.get(recipe.task, ()) if values[key]]
    if len({values[key] for key in keys}) < len(keys):
        named = " and ".join(f"`{key}`" for key in keys)
        found.append(f"{named} are different columns; got {', '.join(values[key] for key in keys)}.")
    if recipe.data.packing_strategy != defaults["data.packing_strategy"] and not recipe.data.packing:
        found.append("`data.packing_strategy` says how to pack, and `data.packing` is false. Set it to true.")
    for name in ("target_modules", "exclude_modules"):
        found += pattern_problems(f"slice.{name}", getattr(recipe.slice, name))
    # The schedule names its settings without their section.
    return found + [problem.replace("`", "`slice.", 1) for problem in recipe.slice_schedule.problems()]


def _name_problems(recipe: Recipe, name: str, settings: Settings) -> list[str]:
    """What is wrong with `data.name`, and with settings that are to mean something else than it does."""
    data = recipe.data
    if name not in NAMED:
        return [f"`data.name` is one of {', '.join(NAMED)}; got {name!r}.{did_you_mean(name, NAMED)}"]
    named = NAMED[name]
    if named.task != recipe.task:
        return [
            f"`data.name` {name} is a data set for {named.task}; this is {recipe.task}. Set `task` to {named.task}."
        ]
    found = []
    if data.label_kind != named.label_kind and data.label_kind != settings["data.label_kind"].default:
        found.append(f"`data.label_kind` of {name} is {named.label_kind}; got {data.label_kind}. Leave it out.")
    if not data.by_name:
        if "text_pair" in named.columns and data.text_pair is None:
            found.append(
                f"`data.text_pair` is missing: {name} is of pairs of texts. Name the columns of both, as on the hub: "
                f"--data.text {named.columns['text']} --data.text_pair {named.columns['text_pair']}"
            )
        return found
    if named.hub is None:
        found.append(
            f"`data.name` {name} is not on the hub in a form that can be read. Set `data.train` to a folder or table of it."
        )
    found += [
        f"`data.{key}` of {name} is {'null' if value is None else value}; got {given!r}. Leave it out, or set `data.train` as well."
        for key, value in named.settings.items()
        if key not in ("train", "validation")
        and (given := getattr(data, key)) not in (value, settings[f"data.{key}"].default)
    ]
    return found
