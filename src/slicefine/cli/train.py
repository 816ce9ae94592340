"""`slicefine train RECIPE [--slice.r 5 ...] [--resume [--allow_inexact_resume]] [--smoke]`."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from slicefine.cli.page import say, write_page
from slicefine.cli.quiet import quiet
from slicefine.errors import SliceFineError, first_line, listed
from slicefine.training import schema
from slicefine.training.extras import require_train
from slicefine.training.recipe import Recipe
from slicefine.training.shipped import find

if TYPE_CHECKING:
    from slicefine.training.record import RunRecord

NAME = "train"
HELP = "Fine-tune a model as a recipe says; every setting of the recipe can be given as a flag."

SHOWN_CLASSES = 8
MUCH_WAITING = 0.2
"""Share of the time of all steps, from which on a hint is given."""


def add(parser: ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.usage = "slicefine train RECIPE [--smoke | --resume [--allow_inexact_resume]] [--section.setting VALUE ...]"
    parser.add_argument(
        "recipe",
        type=str,
        metavar="RECIPE",
        help="YAML file, a name that `slicefine recipes` lists, or a run folder, for the recipe in it",
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="Try the recipe in a minute: a tiny random model of the same architecture, few rows, four steps, a temporary folder",
    )
    parser.add_argument("--resume", action="store_true", help="Go on from the last checkpoint of the run in `output`")
    parser.add_argument(
        "--allow_inexact_resume",
        action="store_true",
        help="Resume even if the checkpoint has lost its optimizer, scheduler or random state; the result will differ",
    )
    schema.add_arguments(parser, Recipe)


def explain(error: ArgumentError) -> str | None:
    """What is wrong with the value of a flag, in our words."""
    return schema.explain(Recipe, error)


def run(given: Any) -> int:
    """Train; returns 0, or 130 after Ctrl-C."""
    overrides = {key: value for key, value in vars(given.as_flat()).items() if key in schema.settings(Recipe)}
    recipe = Recipe.load(_file(given.recipe), overrides)
    require_train()
    quiet()
    if given.get("smoke"):
        return _smoke(recipe, bool(given.get("resume")))
    from slicefine.training.run import train

    record = train(
        recipe,
        resume=bool(given.get("resume")),
        allow_inexact_resume=bool(given.get("allow_inexact_resume")),
    )
    print(summary(record, recipe.output))
    if record.status == "finished":
        _count_memory(recipe, record)
    write_page(recipe.output)
    return 130 if record.status == "interrupted" else 0


def _count_memory(recipe: Recipe, record: RunRecord) -> None:
    from slicefine.benchmarking import run_memory

    try:
        run_memory.write(recipe.resolved(), record)
    except Exception as error:  # the run is finished and saved; a model that cannot be planned has no memory by part
        say(f"The report has no memory by part: {first_line(error)}.")


def _file(name: str) -> Path:
    """The recipe `name`: a run folder stands for the one in it."""
    inside = Path(name) / "recipe.yaml"
    return inside if inside.is_file() else find(name)


def _smoke(recipe: Recipe, resume: bool) -> int:
    import shutil
    import tempfile

    from slicefine.training.smoke import smoke

    if resume:
        raise SliceFineError("--smoke begins a run of its own; it cannot be resumed. Leave out --smoke or --resume.")
    folder = Path(tempfile.mkdtemp(prefix="slicefine-smoke-"))
    try:
        print("", *smoke(recipe, folder), sep="\n")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return 0


def summary(record: RunRecord, output: str) -> str:
    """What a run came to, in a few lines."""
    if record.status == "interrupted":
        return (
            f"Interrupted after step {record.steps} of {record.planned_steps}. Go on with: "
            f"slicefine train {output}/recipe.yaml --resume"
        )
    scores = [
        f"{name:<12} {before:.4g} -> {record.metrics['after'][name]:.4g}"
        for name, before in record.metrics.get("before", {}).items()
        if name in record.metrics["after"]
    ]
    classes: list[str] = record.data.get("classes", [])
    counts: Mapping[str, int | None] = record.parameters
    waited = record.timings.get("data_wait_share", 0.0)
    hint = f"{waited:.0%} of the time of steps was spent waiting for data: raise --training.dataloader_num_workers"
    return "\n".join(
        [
            *scores,
            *([f"{'classes':<12} {len(classes)}: {listed(classes, SHOWN_CLASSES)}"] if classes else []),
            f"{'parameters':<12} {counts['active']:,} active, {counts['touched']:,} touched, {counts['added']} added",
            f"{'steps':<12} {record.steps}, {record.moves} moves, {record.timings.get('train_seconds', 0):.1f} s",
            *([f"{'waiting':<12} {hint}"] if waited > MUCH_WAITING else []),
            f"{'adapter':<12} {record.artifact_bytes or 0:,} bytes, {output}/adapter",
            f"{'next':<12} slicefine export {output} --as merged MODEL_FOLDER",
        ]
    )
