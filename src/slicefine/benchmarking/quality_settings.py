"""What `slicefine bench quality` is told. Read and checked without torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slicefine.benchmarking.methods import FROZEN, KINDS, METHODS, Method, method, sizeless, too_few
from slicefine.benchmarking.suite import LEAST_STEPS, QualityTask, place_problems, settable
from slicefine.benchmarking.variants import Variant, problems, unused, variants
from slicefine.errors import SliceFineError, did_you_mean, raise_all
from slicefine.training.folder import refuse_unwritable
from slicefine.training.record import usable_cores

TRAINED = tuple(name for name in METHODS if not method(name).speed_only)
"""Names of the methods that are compared where nothing else is asked for."""


@dataclass(frozen=True, kw_only=True)
class QualitySettings:
    """Raises `SliceFineError` that lists all problems at once."""

    suite: str
    """Folder of data sets, or YAML file."""
    methods: tuple[str, ...] = TRAINED
    learning_rates: tuple[float, ...] | None = None
    """Grid of every method; None = a grid of four for each kind of method."""
    extend: int = 0
    """By how many rates, one after another, a grid goes on beyond the end where its best rate lies."""
    seeds: int = 3
    """Final runs of every method on every task, with seeds from `seed` on."""
    seed: int = 0
    """The first seed, with which learning rates are chosen."""
    steps: int = 500
    """Optimizer steps of a final run, of tasks that do not say it themselves."""
    grid_steps: int | None = None
    """Optimizer steps of a run that chooses a learning rate; None = half of `steps`."""
    evaluations: int = 8
    """How often a final run is scored on the examples that choose."""
    held_out: float = 0.1
    """Share of the training examples that choose, where a task has no split for it."""
    rounds: int = 9
    """Timed rounds of one step of every method; 0 = no times."""
    processes: int | None = None
    """Runs at the same time; None = one for every two cores, one on a GPU."""
    threads: int | None = None
    """CPU threads of each run; None = its share of the cores."""
    equal_parameters: str | None = None
    """A method: the ranks of those that may have any are chosen so that they train nearest to as many parameters."""
    ablations: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Setting of the methods that slide -> values to try; every combination is a row of its own."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Settings of all recipes, by dotted key."""
    cells: str = "runs/quality"
    """Folder for finished runs: none is made twice."""
    output: str = "runs/bench"
    """Folder for the results."""
    board: str | None = None
    """Folder for results in the fields of PEFT's public comparison; None = none."""

    def __post_init__(self) -> None:
        found = []
        for name, least in (
            ("seeds", 1),
            ("steps", LEAST_STEPS),
            ("grid_steps", 1),
            ("extend", 0),
            ("evaluations", 1),
            ("processes", 1),
            ("threads", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                found.append(f"`--{name}` is at least {least}; got {value}.")
        if self.rounds < 0:
            found.append(f"`--rounds` is at least 0; got {self.rounds}.")
        if not 0 < self.held_out < 1:
            found.append(f"`--held_out` lies between 0 and 1, ends excluded; got {self.held_out}.")
        if self.grid_steps is not None and self.grid_steps > self.steps:
            found.append(f"`--grid_steps` is at most `--steps`, {self.steps}; got {self.grid_steps}.")
        if not (self.seed >= 0 and self.seed + self.seeds <= 2**32):
            found.append(
                f"`--seed` is at least 0, and the last of `--seeds` below 2**32; got {self.seed} and {self.seeds} seeds."
            )
        found += [
            f"`--learning_rates` are above 0 and finite; got {rate}."
            for rate in self.learning_rates or ()
            if not 0 < rate < math.inf
        ]
        if self.learning_rates is not None and len(set(self.learning_rates)) < len(self.learning_rates):
            found.append("`--learning_rates` names one twice.")
        if self.extend and self.learning_rates is not None and len(self.learning_rates) == 1:
            found.append(
                f"`--extend {self.extend}` goes on by the factor between two rates; `--learning_rates` has one."
            )
        methods: dict[str, Method] = {}
        for name in (*self.methods, *([self.equal_parameters] if self.equal_parameters else [])):
            try:
                one = methods[name] = method(name)
            except SliceFineError as error:
                found.append(str(error))
                continue
            if one.speed_only:
                why = "it trains nothing" if one.kind == FROZEN else "it is there to be timed"
                found.append(f"`--methods`: {one.name} has no quality, {why}. See `slicefine bench speed`.")
        if self.equal_parameters in methods and not methods[self.equal_parameters].speed_only:
            found += sizeless(self.equal_parameters)
        if not self.methods:
            found.append("`--methods` names at least one.")
        found += problems(dict(self.ablations))
        if all(name in methods for name in self.methods):
            found += unused(dict(self.ablations), self.known_methods)
            found += too_few(self.rounds, self.known_methods) if self.rounds else []
        known = settable()
        found += [
            f"There is no setting {key!r} here.{did_you_mean(key, known)}" for key in self.overrides if key not in known
        ]
        found += place_problems(Path(self.suite))
        found += [
            f"`{flag}` is a folder; {path} is a file."
            for flag, path in self.folders.items()
            if path.exists() and not path.is_dir()
        ]
        raise_all(found, "slicefine bench quality")

    @property
    def folders(self) -> dict[str, Path]:
        """Flag -> folder that is written."""
        named = {"--cells": self.cells, "--output": self.output, "--board": self.board}
        return {flag: Path(value) for flag, value in named.items() if value is not None}

    def refuse_unwritable(self) -> None:
        """Raise `SliceFineError` for every folder in which nothing can be made."""
        found = []
        for flag, path in self.folders.items():
            try:
                refuse_unwritable(path, flag)
            except SliceFineError as error:
                found.append(str(error))
        raise_all(found, "slicefine bench quality")

    @property
    def known_methods(self) -> list[Method]:
        """The methods, at the ranks of their names."""
        return [method(name) for name in self.methods]

    def steps_of(self, task: QualityTask) -> int:
        """Optimizer steps of a final run on `task`."""
        return task.steps or self.steps

    def steps_of_grid(self, task: QualityTask) -> int:
        """Steps of a run that chooses: half of a final run, or as large a share of it as `grid_steps` is of `steps`."""
        if task.grid_steps is not None:
            return task.grid_steps
        steps = self.steps_of(task)
        return max(1, steps // 2 if self.grid_steps is None else round(steps * self.grid_steps / self.steps))

    def variants(self, methods: Sequence[Method]) -> list[Variant]:
        """`methods` with every combination of the ablations' values."""
        return variants(methods, dict(self.ablations))

    def rates(self, one: Method, task: QualityTask) -> tuple[float, ...]:
        """The learning rates that a method may choose from on `task`."""
        grid = self.learning_rates or KINDS[one.kind].learning_rates
        return grid if task.rate_scale == 1 else tuple(_rounded(rate * task.rate_scale) for rate in grid)

    def ladder(self, one: Method, task: QualityTask) -> tuple[float, ...]:
        """`rates` in order, with all by which `extend` may make them go on."""
        found = sorted(self.rates(one, task))
        for _ in range(self.extend if len(found) > 1 else 0):
            found = [_rounded(found[0] ** 2 / found[1]), *found, _rounded(found[-1] ** 2 / found[-2])]
        return tuple(found)

    def beyond(self, one: Method, task: QualityTask, tried: Collection[float], best: float) -> float | None:
        """The rate that follows on the end of `tried` where `best` lies; None if it lies within, or the grid went on for long enough."""
        ladder = self.ladder(one, task)
        place = ladder.index(best)
        next_to = [ladder[at] for at in (place - 1, place + 1) if 0 <= at < len(ladder) and ladder[at] not in tried]
        return next_to[0] if next_to and len(tried) < len(self.rates(one, task)) + self.extend else None

    def at_once(self, *, gpu: bool) -> tuple[int, int]:
        """Processes, and threads of each."""
        cores = usable_cores()
        processes = self.processes or (1 if gpu else max(1, cores // 2))
        return processes, self.threads or max(1, cores // processes)


def _rounded(rate: float) -> float:
    """0.0003, and not 0.00030000000000000003"""
    return float(f"{rate:.6g}")
