"""The flags of `slicefine bench quality`."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from typing import Any

from jsonargparse import ArgumentParser

from slicefine.benchmarking.methods import PATTERNS
from slicefine.benchmarking.quality_settings import TRAINED, QualitySettings
from slicefine.benchmarking.suite import LEAST_STEPS, settable
from slicefine.benchmarking.variants import CHOICES, EIGHTH
from slicefine.cli.page import write_page
from slicefine.cli.quiet import quiet
from slicefine.training import schema
from slicefine.training.extras import require_train
from slicefine.training.recipe import Recipe

HELP = "Scores of fine-tuning methods on a suite of tasks: learning rates chosen, several seeds, resumable."
ABLATIONS = ("r", "axis", "order", "slide_every", "bias", "norms", "moments", "rewarm")


def parser() -> ArgumentParser:
    """The parser of the command."""
    made = ArgumentParser(description=HELP, exit_on_error=False, allow_abbrev=False)
    made.add_argument(
        "--suite",
        type=str,
        metavar="FILE_OR_DIR",
        help="Folder with a folder for each task, in which are `train` and `test` or `validation` (.jsonl, .csv, ... or folders of images or "
        "clips); or a YAML file that names tasks with their recipes",
    )
    made.add_argument(
        "--methods",
        type=str,
        nargs="+",
        metavar="METHOD",
        help=f"{', '.join(TRAINED)}; also {PATTERNS}; null = all that are listed",
    )
    made.add_argument(
        "--learning_rates",
        type=float,
        nargs="+",
        metavar="RATE",
        help="Grid of every method, before `rate_scale` of a task; null = four for each kind of method, by what is usual for it",
    )
    made.add_argument(
        "--extend",
        type=int,
        default=QualitySettings.extend,
        metavar="N",
        help="By how many rates, one after another, a grid goes on beyond the end where its best rate lies",
    )
    made.add_argument(
        "--seeds", type=int, default=QualitySettings.seeds, metavar="N", help="Final runs of each method on each task"
    )
    made.add_argument(
        "--seed", type=int, default=QualitySettings.seed, help="The first seed, with which learning rates are chosen"
    )
    made.add_argument(
        "--steps",
        type=int,
        default=QualitySettings.steps,
        metavar="N",
        help=f"Optimizer steps of a final run, at least {LEAST_STEPS}, where the suite does not say it",
    )
    made.add_argument(
        "--grid_steps",
        type=int,
        metavar="N",
        help="Optimizer steps of a run that chooses; as large a share on tasks with `steps` of their own; null = half of --steps",
    )
    made.add_argument(
        "--evaluations",
        type=int,
        default=QualitySettings.evaluations,
        metavar="N",
        help="Scores in the course of a final run, on the examples that choose",
    )
    made.add_argument(
        "--held_out",
        type=float,
        default=QualitySettings.held_out,
        metavar="SHARE",
        help="Share of the training examples that choose, where a task has no split for it; they are not trained on",
    )
    made.add_argument(
        "--rounds",
        type=int,
        default=QualitySettings.rounds,
        metavar="N",
        help="Timed rounds, before all else, of a step of every method; 0 = no times",
    )
    made.add_argument(
        "--processes", type=int, metavar="N", help="Runs at the same time; null = one for every two cores, one on a GPU"
    )
    made.add_argument("--threads", type=int, metavar="N", help="CPU threads of a run; null = its share of the cores")
    made.add_argument(
        "--equal_parameters",
        type=str,
        metavar="METHOD",
        help="Choose the ranks of the others (those whose name does not give it) so that they train nearest to as many parameters "
        "as METHOD; null = the usual ranks",
    )
    made.add_argument(
        "--cells",
        type=str,
        default=QualitySettings.cells,
        metavar="DIR",
        help="Folder of finished runs; none is made twice",
    )
    made.add_argument(
        "--output",
        type=str,
        default=QualitySettings.output,
        metavar="DIR",
        help="Folder for the results: JSON, Markdown, SVG",
    )
    made.add_argument(
        "--board",
        type=str,
        metavar="DIR",
        help="Folder for each final run in the fields of PEFT's public comparison; null = none",
    )
    group = made.add_argument_group("ablations: every combination of the values is tried for the methods that slide")
    group.add_argument("--r", type=int, nargs="+", metavar="N", help="Ranks; null = as the method's name says")
    group.add_argument(
        "--axis", type=str, nargs="+", help=f"{', '.join(CHOICES['axis'])}; null = as the method's name says"
    )
    group.add_argument("--order", type=str, nargs="+", help=f"{', '.join(CHOICES['order'])}; null = sweep")
    group.add_argument(
        "--slide_every",
        type=str,
        nargs="+",
        metavar="STEPS",
        help=f"Steps per position in a final run (a run that chooses makes as many moves), `{EIGHTH}` of the run, or `null` for none; "
        f"default: {EIGHTH}",
    )
    group.add_argument("--bias", type=str, nargs="+", help=f"{', '.join(CHOICES['bias'])}; null = none")
    group.add_argument(
        "--norms",
        type=str,
        nargs="+",
        help=f"{', '.join(CHOICES['norms'])}: the gains of normalisations, and their biases; null = frozen",
    )
    group.add_argument(
        "--moments",
        type=str,
        nargs="+",
        help=f"{', '.join(CHOICES['moments'])}: the optimizer's moments at a move; null = reset",
    )
    group.add_argument(
        "--rewarm",
        type=int,
        nargs="+",
        metavar="STEPS",
        help="Steps after a move in which updates grow to their full size; null = 0",
    )
    schema.add_arguments(made, Recipe, settable())
    return made


def run(given: Any) -> int:
    """Compare, and print the tables; returns 0, or 130 after Ctrl-C."""
    settings = settings_of(given)
    require_train()
    quiet()
    from slicefine.benchmarking import quality_report

    report = quality_report.run(settings, shlex.join(["slicefine", *sys.argv[1:]]))
    if report.status == "finished":
        print(report.markdown())
    print(f"{report.path} (and .json)", file=sys.stderr)
    write_page(report.path.with_suffix(".json"))
    if report.status == "finished":
        return 0
    print(
        f"Interrupted; what is finished is in {settings.cells}: the same command goes on with the rest. (Times of steps are measured anew "
        "unless all were; `--rounds 0` leaves them out.)",
        file=sys.stderr,
    )
    return 130


def settings_of(given: Any) -> QualitySettings:
    """The settings. Raises `SliceFineError` with every problem."""
    from slicefine.errors import SliceFineError

    flat = vars(given.as_flat())
    if flat.get("suite") is None:
        raise SliceFineError(
            "slicefine bench quality: `--suite` is missing: a folder of data sets or a YAML file. See --help."
        )
    fields = {field.name for field in dataclasses.fields(QualitySettings)} - {"ablations", "overrides"}
    values = {name: value for name, value in flat.items() if name in fields and value is not None}
    if "methods" in values:
        values["methods"] = tuple(part for word in values["methods"] for part in word.split(",") if part)
    if "learning_rates" in values:
        values["learning_rates"] = tuple(values["learning_rates"])
    ablations = {name: [_value(name, one) for one in flat[name]] for name in ABLATIONS if flat.get(name) is not None}
    overrides = {key: flat[key] for key in settable() if key in flat}
    return QualitySettings(**values, ablations=ablations, overrides=overrides)


def _value(name: str, given: Any) -> Any:
    if name != "slide_every":
        return given
    return None if given in ("null", "None", None) else int(given) if given.isdecimal() else given
