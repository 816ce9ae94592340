"""`slicefine bench speed`, `slicefine bench memory` and `slicefine bench quality`."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
from argparse import ArgumentError
from typing import Any

from jsonargparse import ArgumentParser

from slicefine.benchmarking.methods import METHODS, PATTERNS
from slicefine.benchmarking.models import MODELS
from slicefine.benchmarking.settings import DEVICES, DTYPES, REFERENCES, SWEEPS, Settings
from slicefine.cli import bench_quality
from slicefine.cli.page import write_page
from slicefine.cli.quiet import quiet
from slicefine.errors import did_you_mean
from slicefine.training import schema
from slicefine.training.extras import require_train
from slicefine.training.recipe import Recipe

NAME = "bench"
HELP = "Measure fine-tuning methods side by side: time of a step, memory, scores."
QUALITY = "quality"
BENCHMARKS = {
    "speed": "Time of a training step, of a move, and of inference, all methods on the same batches.",
    "memory": "Bytes saved for backward, gradients, moments, and the peak on a GPU, by method.",
}
NUMBERS = {"int": "whole numbers", "float": "finite numbers"}
"""Type of a flag -> what it takes, in words."""
OF_SPEED = ("rounds", "warmup", "generate")
"""Flags of `speed` alone."""


def add(parser: ArgumentParser) -> None:
    """Add the benchmarks, each with its arguments."""
    commands = parser.add_subcommands(dest="what", required=False, title="benchmarks", metavar="BENCHMARK")
    for name, parsers in _parsers().items():
        commands.add_subcommand(name, parsers, help=BENCHMARKS.get(name, bench_quality.HELP))


def _parsers() -> dict[str, ArgumentParser]:
    made = {}
    for name, text in BENCHMARKS.items():
        made[name] = ArgumentParser(description=text, exit_on_error=False, allow_abbrev=False)
        _add_flags(made[name], timed=name == "speed")
    made[QUALITY] = bench_quality.parser()
    return made


def _add_flags(parser: ArgumentParser, *, timed: bool) -> None:
    parser.add_argument(
        "--models",
        type=str,
        nargs="+",
        metavar="MODEL",
        help=f"Architectures, with random weights: {', '.join(MODELS)}; null = the small ones on a CPU, the others on a GPU",
    )
    parser.add_argument(
        "--methods",
        type=str,
        nargs="+",
        metavar="METHOD",
        help=f"{', '.join(METHODS)}; also {PATTERNS}; null = all that are listed. {' and '.join(REFERENCES)} are measured in any case: "
        "the others are compared with them",
    )
    if timed:
        parser.add_argument(
            "--rounds",
            type=int,
            default=Settings.rounds,
            metavar="N",
            help="Timed rounds; a round is one step of every method",
        )
        parser.add_argument("--warmup", type=int, default=Settings.warmup, metavar="N", help="Untimed rounds before")
        parser.add_argument(
            "--generate",
            type=int,
            default=Settings.generate,
            metavar="N",
            help="Tokens that language models generate when inference is timed; 0 = none",
        )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; null = as torch has it")
    parser.add_argument("--device", type=str, help=f"{' or '.join(DEVICES)}; null = a GPU if there is one")
    parser.add_argument("--dtype", type=str, help=f"{', '.join(DTYPES)}; null = float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--checkpointing", action="store_true", help="Compute activations again in the backward pass")
    parser.add_argument("--compile", action="store_true", help="Run models through torch.compile")
    parser.add_argument(
        "--sweep", type=str, help=f"{', '.join(SWEEPS)}: measure at several values of it, and draw the growth"
    )
    parser.add_argument(
        "--values",
        type=int,
        nargs="+",
        metavar="N",
        help="Values of the sweep; null = 1 to 64 for r, else half, once and twice the model's own",
    )
    parser.add_argument(
        "--equal_parameters",
        type=str,
        metavar="METHOD",
        help="Choose the ranks of the others (those whose name does not give it) so that they train nearest to as many parameters "
        "as METHOD; null = the usual ranks",
    )
    parser.add_argument("--seed", type=int, default=Settings.seed, help="Seed of weights, data and order")
    parser.add_argument(
        "--output", type=str, default=Settings.output, metavar="DIR", help="Folder for the results: JSON, Markdown, SVG"
    )


def explain(error: ArgumentError) -> str | None:
    """What is wrong with what was given, in our words."""
    text = str(error)
    if found := re.search(r"invalid choice: '(.*?)'", text):
        return f"There is no benchmark {found[1]!r}; there are {', '.join(_parsers())}.{did_you_mean(found[1], _parsers())}"
    if found := re.search(r"unrecognized arguments: (\S+)", text):
        word = found[1].partition("=")[0]
        flags = sorted({flag for one in _parsers().values() for flag in re.findall(r"--[\w.-]+", one.format_help())})
        of_speed = " It is a flag of `slicefine bench speed`." if word.removeprefix("--") in OF_SPEED else ""
        own = word.replace("--slice.", "--")  # as recipes and `slicefine train` call it
        near = f" Did you mean {own!r}?" if own in flags else did_you_mean(word, flags)
        return f"There is no argument {word!r} here.{of_speed or near} See --help."
    if found := re.search(
        r"""Parser key "(\w+)".*Expected a <class '(int|float)'>. Got value: (.*)\Z""", text, re.DOTALL
    ):
        return f"`--{found[1]}` takes {NUMBERS[found[2]]}; got {found[3]}."
    return schema.explain(Recipe, error)


def run(given: Any) -> int:
    """Measure, and print the tables; returns 0, or 130 after Ctrl-C."""
    what = given.get("what")
    if what is None:
        parser = ArgumentParser(prog="slicefine bench", description=HELP)
        add(parser)
        parser.print_help()
        return 0
    if what == QUALITY:
        return bench_quality.run(given[what])
    fields = {field.name for field in dataclasses.fields(Settings)}
    values = {name: value for name, value in given[what].items() if name in fields and value is not None}
    for name in ("models", "methods"):
        if name in values:
            values[name] = tuple(part for word in values[name] for part in word.split(",") if part)
    if "values" in values:
        values["values"] = tuple(values["values"])
    settings = Settings(**values)
    require_train()
    quiet()
    from slicefine.benchmarking import bench

    report = bench.run(what, settings, shlex.join(["slicefine", *sys.argv[1:]]))
    print(report.markdown())
    print(f"{report.path} (and .json)", file=sys.stderr)
    write_page(report.path.with_suffix(".json"))
    if report.status == "interrupted":
        print("Interrupted; what was measured is written.", file=sys.stderr)
        return 130
    return 0
