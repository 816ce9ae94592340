"""`slicefine analyze MODEL [RECIPE] [--section.setting ...]`."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from slicefine.analysis.settings import BALANCE, STAGES, AnalysisSettings
from slicefine.cli.page import say, write_page
from slicefine.cli.quiet import quiet
from slicefine.training import schema
from slicefine.training.extras import require_train
from slicefine.training.recipe import Recipe
from slicefine.training.shipped import find
from slicefine.training.tasks import TASKS

if TYPE_CHECKING:
    from slicefine.analysis.record import AnalysisRecord

NAME = "analyze"
HELP = "Test the winning-slice hypothesis on a model and a task: spectra, task energy, winners, and the rank to choose."

SETTINGS = [key for key in schema.settings(Recipe) if key.startswith(("data.", "model.")) and key != "model.name"]
"""Settings of a recipe that an analysis has a use for."""


def add(parser: ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.usage = (
        "slicefine analyze MODEL [RECIPE] [--output DIR] [--quick] [--stages STAGE ...] [--section.setting VALUE ...]"
    )
    parser.add_argument(
        "of.model",  # `model` is the section of `--model.dtype`
        type=str,
        metavar="MODEL",
        help="Folder with config.json and safetensors files, or a model of the hub",
    )
    parser.add_argument(
        "recipe",
        type=str,
        nargs="?",
        metavar="RECIPE",
        help="YAML file, or a name that `slicefine recipes` lists: the task and its examples; without it and without --data.train, the spectra alone",
    )
    parser.add_argument(
        "--output",
        type=str,
        default=AnalysisSettings.output,
        metavar="DIR",
        help="Folder for analysis.json and report.html; an analysis that was stopped goes on in it",
    )
    parser.add_argument(
        "--stages", type=str, nargs="+", metavar="STAGE", help=f"Of {', '.join(STAGES)}; null = all that can be run"
    )
    parser.add_argument(
        "--quick", action="store_true", help="Fewer examples, slices and steps in every stage: a first look"
    )
    parser.add_argument(
        "--untrained",
        action="store_true",
        help="Analyse a twin of the model with random weights, for which the hypothesis should fail",
    )
    parser.add_argument("--groups", type=int, default=AnalysisSettings.groups, metavar="N", help="Groups of a weight")
    parser.add_argument(
        "--draws",
        type=int,
        default=AnalysisSettings.draws,
        metavar="N",
        help="Random draws of each null of the spectra",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        default=list(AnalysisSettings.ranks),
        metavar="R",
        help="Ranks of the slices that are tried",
    )
    parser.add_argument("--seed", type=int, default=AnalysisSettings.seed, help="Of all that is drawn")
    parser.add_argument(
        "--task",
        type=str,
        help=f"What the examples are for, without a recipe: {', '.join(TASKS)}; null = what the model is most likely for",
    )
    schema.add_arguments(parser, Recipe, SETTINGS)


def explain(error: Any) -> str | None:
    """What is wrong with the value of a flag, in our words. All of ours that are no texts are whole numbers."""
    found = re.search(r'Parser key "(groups|draws|ranks|seed)".*(?:Got|Given) value: (.*)\Z', str(error), re.DOTALL)
    return f"`--{found[1]}` takes whole numbers; got {found[2]}." if found else schema.explain(Recipe, error)


def run(given: Any) -> int:
    """Analyse, and print the verdicts; returns 0, 1 if a stage failed, or 130 after Ctrl-C."""
    flat = vars(given.as_flat())
    recipe_wanted = flat.get("recipe") is not None or any(flat.get(key) for key in ("data.train", "data.name"))
    settings = _settings(flat, recipe_wanted)
    require_train()
    quiet()
    from slicefine.analysis.run import analyze

    model = given.of.model
    recipe = _recipe(flat, model) if recipe_wanted else None
    record = analyze(settings, model, recipe, shlex.join(["slicefine", *sys.argv[1:]]))
    if record.status == "interrupted":
        say("Interrupted; the same command goes on with the stages that are not finished.")
    print(text(record))
    if recipe is None:
        say("The other stages need examples: name a recipe, or --data.train FILE.")
    write_page(settings.output)
    return 130 if record.status == "interrupted" else int(bool(record.failed))


def _settings(flat: dict[str, Any], with_examples: bool) -> AnalysisSettings:
    names = {field.name for field in dataclasses.fields(AnalysisSettings)}
    values = {name: value for name, value in flat.items() if name in names and value is not None}
    for name in ("stages", "ranks"):
        if name in values:
            values[name] = tuple(part for word in values[name] for part in str(word).split(",") if part)
    if "ranks" in values:
        values["ranks"] = tuple(int(rank) for rank in values["ranks"])
    if not with_examples:
        values.setdefault("stages", (BALANCE,))
    return AnalysisSettings(**values)


def _recipe(flat: dict[str, Any], model: str) -> Recipe:
    """The recipe named, or the settings given, for the model."""
    overrides = {key: value for key, value in flat.items() if key in (*SETTINGS, "task")}
    overrides |= {"model.name": model, "output": AnalysisSettings.output}
    if flat.get("recipe") is not None:
        return Recipe.load(find(flat["recipe"]), overrides)
    if "task" not in overrides:
        from slicefine.benchmarking.planned_config import guess_task, read_config

        overrides["task"] = guess_task(read_config(model), model)
    return Recipe.of({}, overrides, "Settings")


def text(record: AnalysisRecord) -> str:
    """The verdicts, one under the other."""
    lines = [f"{record.model['name']}{' with random weights' if record.untrained else ''}", ""]
    for verdict in record.verdicts:
        lines += [
            f"{verdict['property']}: {verdict['verdict']}",
            f"  {verdict['words']}",
            f"  {verdict['threshold']}",
            "",
        ]
    lines += [f"The stage {stage} failed: {why}" for stage, why in record.failed.items()]
    if advice := record.stages.get("advice"):
        lines += [f"advice: {advice['words']}", ""]
    return "\n".join(lines).rstrip()
