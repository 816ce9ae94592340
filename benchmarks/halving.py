"""Settings of slices chosen by successive halving: many in short runs, the better half in runs twice as long, until one is left.

Run `python benchmarks/halving.py --suite SUITE --model FOLDER`; with MiniLM on three sets about 40 minutes on one core. SUITE is a
file or folder as `slicefine bench quality` takes it. Every finished run is kept in `--cells`: one that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _common import Figure, Table, cores, cpu_model, parser, positive, provenance, say, write

from slicefine.benchmarking.cells import Cell, Cells, Outcome
from slicefine.benchmarking.fitting import Job
from slicefine.benchmarking.methods import method
from slicefine.benchmarking.processes import in_processes
from slicefine.benchmarking.quality import attempt, decisive, model_fingerprint
from slicefine.benchmarking.quality_examples import judging
from slicefine.benchmarking.suite import QualityTask, load_suite
from slicefine.benchmarking.variants import CARRIED, EIGHTH, RESET, Variant

INTRO = """\
{candidates} settings of slices, {each} of each of {shapes}, which train nearly as many parameters at a step; the other settings are drawn at random (seed {seed}). All are \
trained on every task for {steps} steps of {batch} examples; the half with the lower losses on examples held out of the training examples goes on to new runs twice as long, and \
so on in {rungs} rungs. A loss counts as its ratio to the least of its task and rung, and a setting by the geometric mean over the tasks: one setting and one learning rate for all{scaled}. {reference} chose among the rates {rates} in the same \
way, apart from the slices. The examples that judge were not looked at."""
SHAPES = ("SliceFine-24S", "SliceFine-16RC", "SliceFine-16R", "SliceFine-16C")
"""For MiniLM: all train 0.33 to 0.34 million parameters, as LoRA r8 does."""
SPACE: dict[str, tuple[Any, ...]] = {
    "slide_every": (None, EIGHTH, "sixteenth"),
    "order": ("sweep", "random"),
    "bias": ("none", "slicefine_only"),
    "moments": (RESET, CARRIED),
    "rewarm": (0, 12),
}
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
MOST = (
    len(RATES)
    * len(SPACE["bias"])
    * (1 + math.prod(len(SPACE[name]) for name in ("order", "moments", "rewarm")) * (len(SPACE["slide_every"]) - 1))
)
"""Settings of a shape that there are."""


@dataclass(frozen=True)
class Candidate:
    """A setting with its learning rate. Steps of `variant` are those of a run of the last rung."""

    variant: Variant
    rate: float

    @property
    def name(self) -> str:
        return f"{self.variant.name}, learning rate {self.rate:g}"

    def rate_on(self, task: QualityTask) -> float:
        """`rate` with the scale of the task's rates."""
        return float(f"{self.rate * task.rate_scale:.6g}")


def drawn(shapes: Sequence[str], each: int, last_steps: int, seed: int) -> list[Candidate]:
    """`each` different settings of every shape. What only a move has is not set where there is none."""
    draw = random.Random(seed)
    found: dict[Candidate, None] = {}
    for shape in shapes:
        before = len(found)
        while len(found) < before + each:
            values = {name: draw.choice(choices) for name, choices in SPACE.items()}
            if values["slide_every"] is None:
                values = {"slide_every": None, "bias": values["bias"]}
            elif values["slide_every"] == "sixteenth":
                values["slide_every"] = max(1, last_steps // 16)
            found[Candidate(Variant(method=method(shape), **values), draw.choice(RATES))] = None
    return list(found)


def ratios(losses: dict[Candidate, list[float]]) -> dict[Candidate, float]:
    """The geometric mean over the tasks of a loss over the least; infinite for what diverged. `losses`: one for each task."""
    least = [min(of_task) for of_task in zip(*losses.values(), strict=True)]
    return {
        one: math.inf if not all(map(math.isfinite, of)) else statistics.geometric_mean([a / b for a, b in zip(of, least, strict=True)])
        for one, of in losses.items()
    }  # fmt: skip


@dataclass(frozen=True)
class Ranked:
    """What became of a candidate in a rung."""

    candidate: Candidate
    losses: list[float]
    mean: float
    goes_on: bool


class Runs:
    """Makes runs, and keeps them."""

    def __init__(self, tasks: list[QualityTask], cells: Cells, *, last_steps: int, seed: int, processes: int) -> None:
        self._tasks, self._cells, self._last, self._seed, self._processes = tasks, cells, last_steps, seed, processes
        self._models = {task.name: model_fingerprint(task.recipe.model.name) for task in tasks}
        self._sources = {task.name: judging(task)[0] for task in tasks}

    def losses(self, candidates: Sequence[Candidate], steps: int) -> dict[Candidate, list[float]]:
        """The loss of every candidate on every task after `steps`; infinite where it diverged."""
        found: dict[tuple[Candidate, str], float] = {}
        owners = {self._cell(one, task, steps): one for one in candidates for task in self._tasks}
        missing = []
        for one in candidates:
            for task in self._tasks:
                cell = self._cell(one, task, steps)
                job = self._job(one, task, steps)
                kept = self._cells.read(cell, self._decisive(job))
                if kept is None:
                    missing.append((cell, job))
                else:
                    found[one, task.name] = _loss(kept)
        made = in_processes(attempt, missing, processes=self._processes, threads=1)
        for number, ((cell, job), result) in enumerate(made, 1):
            if isinstance(result, str):
                raise SystemExit(f"{cell.words}: {result}")
            self._cells.keep(cell, self._decisive(job), result)
            found[owners[cell], cell.task] = _loss(result)
            say(f"{number} of {len(missing)}: {cell.words}: {_loss(result):.4f}")
        return {one: [found[one, task.name] for task in self._tasks] for one in candidates}

    def _cell(self, one: Candidate, task: QualityTask, steps: int) -> Cell:
        of = {"method": one.variant.name, "learning_rate": one.rate_on(task), "seed": self._seed}
        return Cell(task=task.name, steps=steps, final=False, **of)

    def _job(self, one: Candidate, task: QualityTask, steps: int) -> Job:
        run = {"learning_rate": one.rate_on(task), "seed": self._seed, "steps": steps, "final_steps": self._last}
        return Job(task=task, variant=one.variant, evaluations=1, final=False, **run)

    def _decisive(self, job: Job) -> dict[str, Any]:
        return decisive(job, self._models[job.task.name], self._sources[job.task.name]) | {"last_steps": self._last}


def _loss(outcome: Outcome) -> float:
    return math.inf if outcome.loss is None else outcome.loss


def halved(
    runs: Runs, left: list[Candidate], options: argparse.Namespace
) -> tuple[Candidate, list[float], list[tuple[str, list[Ranked]]]]:
    """The best candidate, its losses in the last rung, and all rungs with their titles."""
    rungs: list[tuple[str, list[Ranked]]] = []
    for rung in range(options.rungs):
        steps = options.steps * 2**rung
        losses = runs.losses(left, steps)
        means = ratios(losses)
        order = sorted(left, key=means.__getitem__)
        left = order[: math.ceil(len(order) / 2)] if rung + 1 < options.rungs else []
        ranked = [Ranked(one, losses[one], means[one], one in left) for one in order]
        rungs.append((f"{steps} steps: losses on the examples that choose", ranked))
        say(f"best after {steps} steps: {order[0].name}")
    best = rungs[-1][1][0]
    return best.candidate, best.losses, rungs


def _row(one: Ranked, tasks: Sequence[QualityTask]) -> dict[str, Any]:
    losses = {task.name: _finite(loss) for task, loss in zip(tasks, one.losses, strict=True)}
    named = {"setting": one.candidate.variant.name, "learning rate": f"{one.candidate.rate:g}"}
    return named | losses | {"loss / least, mean": _finite(one.mean), "goes on": "yes" if one.goes_on else ""}


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else "diverged"


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--suite", required=True, help="folder or YAML file with the tasks")
    made.add_argument("--model", required=True, help="pretrained model: a folder or a name of the hub")
    made.add_argument("--shapes", nargs="+", default=list(SHAPES), help="slices, as methods are called")
    made.add_argument("--reference", default="LoRA-r8", help="method whose rates are halved beside them")
    made.add_argument("--each", type=positive, default=4, help="settings of every shape")
    made.add_argument("--steps", type=positive, default=100, help="optimizer steps of the first rung")
    made.add_argument("--rungs", type=positive, default=3, help="each has half the settings and twice the steps")
    made.add_argument("--batch", type=positive, default=8, help="examples a step")
    made.add_argument("--held-out", type=float, default=0.04, help="share of the training examples that chooses")
    made.add_argument("--processes", type=positive, default=cores(), help="runs at the same time, each on one thread")
    made.add_argument("--cells", type=Path, default=Path("runs/halving"), help="folder of finished runs")
    options = made.parse_args(arguments)
    if options.each > MOST:
        made.error(f"a shape has {MOST} settings; got --each {options.each}")
    made_by = provenance(
        ["benchmarks/halving.py", *(sys.argv[1:] if arguments is None else arguments)], threads=1, seed=options.seed
    )
    overrides = {
        "model.name": options.model,
        "training.bf16": True,
        "training.per_device_train_batch_size": options.batch,
    }
    tasks = load_suite(options.suite, overrides, held_out=options.held_out)
    of_their_own = [task.name for task in tasks if task.steps or task.grid_steps]
    if of_their_own:
        made.error(
            f"--steps and --rungs decide how long runs are: no `steps` and `grid_steps` for {', '.join(of_their_own)} in {options.suite}"
        )
    last_steps = options.steps * 2 ** (options.rungs - 1)
    runs = Runs(tasks, Cells(options.cells), last_steps=last_steps, seed=options.seed, processes=options.processes)
    torch.set_num_threads(1)

    reference = [Candidate(Variant(method=method(options.reference)), rate) for rate in RATES]
    _, of_reference, _ = halved(runs, reference, options)
    best, of_best, rungs = halved(runs, drawn(options.shapes, options.each, last_steps, options.seed), options)
    write(
        options.output,
        theme="halving",
        hardware=cpu_model(),
        intro=INTRO.format(
            **{**vars(options), "shapes": ", ".join(options.shapes)}
            | {
                "scaled": "".join(
                    f" ({task.rate_scale:g} times it on {task.name})" for task in tasks if task.rate_scale != 1
                )
            }
            | {"candidates": len(options.shapes) * options.each, "rates": ", ".join(f"{rate:g}" for rate in RATES)}
        ),
        figures=[
            Figure(
                name=f"loss, {best.name} / {options.reference}, {task.name}, last rung",
                value=ours / theirs,
                at_most=1.0,
            )
            for task, ours, theirs in zip(tasks, of_best, of_reference, strict=True)
            if math.isfinite(ours) and math.isfinite(theirs)
        ],
        tables=[Table(title=title, rows=[_row(one, tasks) for one in ranked]) for title, ranked in rungs],
        made_by=made_by,
    )


if __name__ == "__main__":
    main()
