"""`slicefine plan MODEL [RECIPE] [--memory 24GiB] [--section.setting ...]`."""

from __future__ import annotations

import json
import re
from argparse import ArgumentError
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from slicefine.benchmarking.models import MODELS
from slicefine.cli.page import write_page
from slicefine.cli.quiet import quiet
from slicefine.errors import SliceFineError, did_you_mean
from slicefine.training import schema
from slicefine.training.extras import require_train
from slicefine.training.folder import refuse_unwritable
from slicefine.training.recipe import Recipe
from slicefine.training.shipped import find, shipped

if TYPE_CHECKING:
    from slicefine.benchmarking.planning import Plan

NAME = "plan"
FILE = "plan.json"
HELP = (
    "Say what a run will cost, in parameters and memory, before anything but the model's configuration is downloaded."
)
DEVICES = ("gpu", "cpu")


def add(parser: ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.usage = (
        "slicefine plan MODEL [RECIPE] [--memory 24GiB] [--examples N] [--output DIR] [--section.setting VALUE ...]"
    )
    parser.add_argument(
        "of.model",  # `model` is the section of `--model.dtype`
        type=str,
        metavar="MODEL",
        help=f"Model of the hub (its config.json alone is read), folder, a recipe, whose model is taken, or one of {', '.join(MODELS)}",
    )
    parser.add_argument(
        "recipe", type=str, nargs="?", metavar="RECIPE", help="YAML file, or a name that `slicefine recipes` lists"
    )
    parser.add_argument("--memory", type=str, metavar="SIZE", help="Memory of the device, e.g. 24GiB or 80GB")
    parser.add_argument("--device", type=str, default="gpu", help=f"Whose kernels are used: {' or '.join(DEVICES)}")
    parser.add_argument(
        "--examples", type=int, metavar="N", help="Training examples, for the length of the run; null = not known"
    )
    parser.add_argument(
        "--output",
        type=str,
        metavar="DIR",
        help="Folder for plan.json, with all numbers, sizes in bytes, and report.html; null = none",
    )
    schema.add_arguments(parser, Recipe, [key for key in schema.settings(Recipe) if "." in key])
    parser.add_argument(
        "--task", type=str, help="What the model learns; null = as the recipe or the model's class says"
    )


def explain(error: ArgumentError) -> str | None:
    """What is wrong with the value of a flag, in our words."""
    if re.search(r"argument --memory.*expected one argument", str(error)):  # also where it is given as -3GiB
        return "`--memory` is a number with a unit, above 0: --memory 24GiB."
    found = re.search(r'Parser key "examples".*(?:Got|Given) value: (.*)\Z', str(error), re.DOTALL)
    return f"`--examples` is a whole number; got {found[1]}." if found else schema.explain(Recipe, error)


def run(given: Any) -> int:
    """Plan and print; returns 0."""
    problems = _problems(given)
    if problems:
        raise SliceFineError(" ".join(problems))
    require_train()
    quiet()
    if given.get("output"):
        refuse_unwritable(Path(given.output))
    from slicefine.benchmarking.planning import parse_memory
    from slicefine.benchmarking.planning_report import as_dict, text

    memory = None if given.get("memory") is None else parse_memory(given.memory)
    made = _plan(given, memory)
    print(text(made))
    if given.get("output"):
        _write(Path(given.output), as_dict(made))
    return 0


def _write(folder: Path, content: dict[str, Any]) -> None:
    from slicefine.training.record import write_atomically

    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / FILE, json.dumps(content, indent=2) + "\n")
    write_page(folder)


def _problems(given: Any) -> list[str]:
    found = []
    if (device := given.get("device", DEVICES[0])) not in DEVICES:
        near = did_you_mean(device, DEVICES)
        found.append(f"`--device` is {' or '.join(DEVICES)}; got {device!r}.{near}")
    if given.get("examples") is not None and given.examples < 1:
        found.append(f"`--examples` is at least 1; got {given.examples}.")
    if "model.name" in vars(given.as_flat()) and (given.get("recipe") or not _is_recipe(given.of.model)):
        found.append("`--model.name` is what MODEL says already. Leave it out.")
    if given.get("output") and Path(given.output).is_file():
        found.append(f"`--output` is a folder; {given.output} is a file.")
    return found


def _plan(given: Any, memory: int | None) -> Plan:
    from slicefine.benchmarking.planned_config import guess_task, read_config
    from slicefine.benchmarking.planning import plan

    overrides = {key: value for key, value in vars(given.as_flat()).items() if key in schema.settings(Recipe)}
    model, named = given.of.model, given.get("recipe")
    if named is not None:
        recipe = Recipe.load(find(named), overrides | {"model.name": model})
        config = read_config(model)
    elif _is_recipe(model):
        recipe = Recipe.load(find(model), overrides)
        config = read_config(recipe.model.name)
    else:
        config = read_config(model)
        recipe = _without_recipe(overrides, guess_task(config, model) if "task" not in overrides else None, model)
    return plan(recipe, config, examples=given.get("examples"), memory=memory, device=given.get("device", DEVICES[0]))


def _is_recipe(name: str) -> bool:
    return name in shipped() or Path(name).suffix in (".yaml", ".yml")


def _without_recipe(overrides: dict[str, Any], task: str | None, model: str) -> Recipe:
    """The settings given and the defaults of the rest; what a plan has no use for is made up."""
    from slicefine.errors import raise_all

    unused = {"output": "run"} | ({} if "data.name" in overrides else {"data.train": "examples.jsonl"})
    recipe = Recipe.from_flat(unused | ({} if task is None else {"task": task}) | overrides | {"model.name": model})
    raise_all(recipe.problems(), "Settings")
    return recipe
