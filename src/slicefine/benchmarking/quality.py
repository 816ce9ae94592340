"""`slicefine bench quality`: learning rates are chosen, every method is run with every seed, and what came of it is written."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import huggingface_hub
import torch
import transformers

from slicefine.benchmarking import quality_examples, quality_timing
from slicefine.benchmarking.attaching import sized
from slicefine.benchmarking.cells import Cell, Cells, Outcome
from slicefine.benchmarking.fitting import Job, fit, misfit, prepare
from slicefine.benchmarking.methods import ADALORA, REFERENCE, Method, method
from slicefine.benchmarking.processes import in_processes
from slicefine.benchmarking.quality_progress import Progress
from slicefine.benchmarking.quality_settings import QualitySettings
from slicefine.benchmarking.suite import QualityTask, load_suite
from slicefine.benchmarking.timing import Measured, reason
from slicefine.benchmarking.variants import Variant, unmoved
from slicefine.errors import SliceFineError, by_text, raise_all
from slicefine.training.hub import model_problem
from slicefine.training.precision import bf16_notes
from slicefine.training.record import versions
from slicefine.training.tasks import Prepared

OF_MODEL = (".safetensors", ".bin", ".json", ".txt", ".model", ".jinja")
"""Endings of the files of a model: weights, configuration, tokenizer, its template of a chat."""


@dataclass(kw_only=True)
class Comparison:
    """All that was found, as far as it is."""

    settings: QualitySettings
    tasks: list[QualityTask]
    variants: dict[str, list[Variant]]
    """Task -> methods, the same for all."""
    sources: dict[str, dict[str, Any]]
    """Task -> where its examples come from, and how many there are."""
    models: dict[str, str] = field(default_factory=dict)
    """Task -> fingerprint of its pretrained model."""
    seen: dict[str, int | None] = field(default_factory=dict)
    """Task -> how many of the examples that judge are trained on, or choose; None where that is not looked for."""
    rates: dict[tuple[str, str], float] = field(default_factory=dict)
    """Task and method -> the learning rate chosen."""
    grid: dict[Cell, Outcome] = field(default_factory=dict)
    final: dict[Cell, Outcome] = field(default_factory=dict)
    failed: dict[tuple[str, str], str] = field(default_factory=dict)
    """Task and method -> why there is no result."""
    ended: dict[tuple[str, str], str] = field(default_factory=dict)
    """Task and method -> the run beyond its grid that failed, and why: the grid does not go on."""
    timed: dict[str, Measured] = field(default_factory=dict)
    """Task -> seconds of training steps, all methods interleaved."""
    interrupted: bool = False

    def possible(self, task: str) -> list[Variant]:
        """The methods that have not failed on a task."""
        return [one for one in self.variants[task] if (task, one.name) not in self.failed]

    def by_seed(self, task: str, variant: str) -> dict[int, Outcome]:
        """Seed -> final run of a method on a task, in the order of seeds."""
        cells = sorted((c for c in self.final if (c.task, c.method) == (task, variant)), key=lambda c: c.seed)
        return {cell.seed: self.final[cell] for cell in cells}

    def of(self, task: str, variant: str) -> list[Outcome]:
        """The final runs of a method on a task."""
        return list(self.by_seed(task, variant).values())


class Listener(Protocol):
    """Told whenever something was found."""

    def __call__(self, found: Comparison) -> None: ...


def compare(settings: QualitySettings, changed: Listener) -> Comparison:
    """Make every run that was not made before; what is finished is kept when Ctrl-C, or a failure of one method, ends the rest.

    Raises `SliceFineError` before the first run for what is wrong with suite, data, models or kept files.
    """
    tasks = load_suite(settings.suite, settings.overrides, held_out=settings.held_out)
    found = _Plan(settings, tasks).comparison()
    runs = _Runs(settings, found, changed)
    runs.refuse_unreadable()
    runs.announce()
    try:
        if settings.rounds:
            _time(settings, found)
            changed(found)
        wanted = list(runs.of_grid())
        while wanted:
            runs.make(wanted)
            _choose(found)
            wanted = list(runs.beyond_grid())
        runs.make(list(runs.of_final()))
    except KeyboardInterrupt:
        found.interrupted = True
    finally:
        runs.progress.close()
    changed(found)
    return found


class _Plan:
    """What is read before the first run: examples, models, and the sizes of methods that are to be equal."""

    def __init__(self, settings: QualitySettings, tasks: list[QualityTask]) -> None:
        self._settings, self._tasks = settings, tasks

    def comparison(self) -> Comparison:
        found = Comparison(settings=self._settings, tasks=self._tasks, variants={}, sources={})
        problems = []
        fingerprint = functools.cache(model_fingerprint)  # tasks share a model, whose files are large
        places = functools.cache(model_problem)
        unreachable = {task.name: problem for task in self._tasks if (problem := places(task.recipe.model.name))}
        problems += by_text(unreachable)
        for task in self._tasks:
            final, grid = self._settings.steps_of(task), self._settings.steps_of_grid(task)
            if grid > final:
                problems.append(
                    f"Task {task.name}: `grid_steps` is at most the steps of a final run, {final}; got {grid}."
                )
            problems += [f"Task {task.name}: {problem}" for problem in unmoved(dict(self._settings.ablations), final)]
            if task.name in unreachable:
                continue
            try:
                found.sources[task.name], found.seen[task.name] = quality_examples.judging(task)
                # Whether the model loads shows here, and not in every run.
                prepared = prepare(task.recipe, self._settings.seed)
                found.models[task.name] = fingerprint(task.recipe.model.name)
                found.variants[task.name] = self._settings.variants(self._methods(prepared))
            except SliceFineError as error:
                problems.append(f"Task {task.name}: {error}")
        names = {tuple(one.name for one in of_task) for of_task in found.variants.values()}
        if len(names) > 1:  # a method would be a row of another name for each of them
            problems.append(
                f"`--equal_parameters {self._settings.equal_parameters}` chooses other ranks for other models: "
                f"{'; '.join(', '.join(of_task) for of_task in sorted(names))}. Compare tasks of one model, or name the ranks."
            )
        raise_all(problems, "slicefine bench quality")
        for task in self._tasks:
            for variant in found.variants[task.name]:
                if why := misfit(variant, task.recipe):
                    found.failed[task.name, variant.name] = why
        return found

    def _methods(self, prepared: Prepared) -> list[Method]:
        methods = self._settings.known_methods
        if self._settings.equal_parameters is None:
            return methods
        reference = method(self._settings.equal_parameters)
        compared = [one for one in methods if one == method(REFERENCE)]  # what others are compared with stays as it is
        return list(dict.fromkeys([*compared, *sized(methods, reference, prepared.model, prepared.new_modules)]))


def model_fingerprint(name: str) -> str:
    """Of the pretrained model called `name`, which has been loaded: of the files of a folder that decide what it is; of one on the hub, the commit."""
    if not Path(name).is_dir():
        snapshot = huggingface_hub.try_to_load_from_cache(name, "config.json")
        return Path(str(snapshot)).parent.name  # a commit has a folder of its own
    digest = hashlib.sha256()
    for path in sorted(Path(name).iterdir()):
        if path.suffix in OF_MODEL and path.is_file():
            with path.open("rb") as file:
                digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def _time(settings: QualitySettings, found: Comparison) -> None:
    cells = Cells(Path(settings.cells))
    _, threads = settings.at_once(gpu=torch.cuda.is_available())
    for task in found.tasks:
        variants, model = found.possible(task.name), found.models[task.name]
        measured = quality_timing.measured(cells, task, model, variants, settings, threads)
        found.timed[task.name] = measured
        if measured.interrupted:
            raise KeyboardInterrupt


def _choose(found: Comparison) -> None:
    """The learning rate with the lowest loss on the examples that choose, by task and method."""
    best: dict[tuple[str, str], tuple[float, float]] = {}
    for cell, outcome in found.grid.items():
        loss = math.inf if outcome.loss is None or not math.isfinite(outcome.loss) else outcome.loss
        key = (cell.task, cell.method)
        best[key] = min(best.get(key, (math.inf, math.inf)), (loss, cell.learning_rate))
    for key, (loss, rate) in best.items():
        if math.isfinite(loss):
            found.rates[key] = rate
        else:
            found.failed.setdefault(key, "it diverged at every learning rate of its grid")


class _Runs:
    """Makes runs, tells of each, and keeps it."""

    def __init__(self, settings: QualitySettings, found: Comparison, changed: Listener) -> None:
        self._settings, self._found, self._changed = settings, found, changed
        self._cells = Cells(Path(settings.cells))
        self._variants = {task.name: found.possible(task.name) for task in found.tasks}
        self.progress = Progress(self._planned_steps())

    def refuse_unreadable(self) -> None:
        """Raise `SliceFineError` for every kept run that this comparison may need and cannot read."""
        problems = []
        for cell, job in self._of_any_rate():
            try:
                self._cells.read(cell, self._decisive(job))
            except SliceFineError as error:
                problems.append(str(error))
        raise_all(problems, "slicefine bench quality")

    def announce(self) -> None:
        """Say how much there is to do, before any of it."""
        settings, grid = self._settings, list(self.of_grid())
        kept = sum(self._cells.path(cell, self._decisive(job)).is_file() for cell, job in grid)
        timed = (
            f"; before them {settings.rounds} timed rounds of each method on each task, unless kept"
            if settings.rounds
            else ""
        )
        for note in next(filter(None, (bf16_notes(task.recipe) for task in self._found.tasks)), []):
            self.progress.say(note)
        for (task, name), why in self._found.failed.items():
            self.progress.say(f"{task}, {name}: {why}")
        least = "at least " if settings.extend else ""
        self.progress.say(
            f"{least}{len(grid)} runs choose learning rates ({kept} are there already), {self._final_runs()} are final; "
            f"{least}{self._planned_steps():,} steps in all, those of kept runs among them{timed}"
        )

    def _final_runs(self) -> int:
        return sum(map(len, self._variants.values())) * self._settings.seeds

    def _planned_steps(self) -> int:
        """Of all runs."""
        return sum(cell.steps for cell, _ in self.of_grid()) + self._final_steps()

    def _final_steps(self) -> int:
        settings = self._settings
        return sum(
            settings.seeds * settings.steps_of(task) * len(self._variants[task.name]) for task in self._found.tasks
        )

    def of_grid(self) -> Iterator[tuple[Cell, Job]]:
        """Every learning rate, the first seed."""
        for task in self._found.tasks:
            for variant in self._variants[task.name]:
                for rate in self._settings.rates(variant.method, task):
                    yield self._run(task, variant, rate, self._settings.seed, final=False)

    def beyond_grid(self) -> Iterator[tuple[Cell, Job]]:
        """One more learning rate for each method whose best lies at an end of what it has tried."""
        settings, found = self._settings, self._found
        for task in found.tasks:
            for variant in self._variants[task.name]:
                key = (task.name, variant.name)
                best = found.rates.get(key)
                tried = {cell.learning_rate for cell in found.grid if (cell.task, cell.method) == key}
                rate = best and settings.beyond(variant.method, task, tried, best)
                if rate and key not in found.failed and key not in found.ended:
                    cell, job = self._run(task, variant, rate, settings.seed, final=False)
                    self.progress.add(cell.steps)
                    yield cell, job

    def of_final(self) -> Iterator[tuple[Cell, Job]]:
        """Every seed, at the learning rate chosen; seed by seed, so that what is there after Ctrl-C can be compared."""
        settings, rates = self._settings, self._found.rates
        chosen = [
            self._run(task, variant, rates[task.name, variant.name], seed, final=True)
            for seed in range(settings.seed, settings.seed + settings.seeds)
            for task in self._found.tasks
            for variant in self._variants[task.name]
            if (task.name, variant.name) in rates
        ]
        self.progress.leave_out(self._final_steps() - sum(cell.steps for cell, _ in chosen))
        yield from chosen

    def _of_any_rate(self) -> Iterator[tuple[Cell, Job]]:
        """Every run that the comparison may come to."""
        settings = self._settings
        for task in self._found.tasks:
            for variant in self._variants[task.name]:
                for rate in settings.ladder(variant.method, task):
                    yield self._run(task, variant, rate, settings.seed, final=False)
                    for seed in range(settings.seed, settings.seed + settings.seeds):
                        yield self._run(task, variant, rate, seed, final=True)

    def _run(self, task: QualityTask, variant: Variant, rate: float, seed: int, *, final: bool) -> tuple[Cell, Job]:
        final_steps = self._settings.steps_of(task)
        steps = final_steps if final else self._settings.steps_of_grid(task)
        job = Job(
            task=task,
            variant=variant,
            learning_rate=rate,
            seed=seed,
            steps=steps,
            final_steps=final_steps,
            evaluations=self._settings.evaluations if final else 1,
            final=final,
        )
        cell = Cell(task=task.name, method=variant.name, learning_rate=rate, seed=seed, steps=steps, final=final)
        return cell, job

    def make(self, wanted: Sequence[tuple[Cell, Job]]) -> None:
        """Make those runs of `wanted` that were not made before."""
        missing = []
        for cell, job in wanted:
            kept = self._cells.read(cell, self._decisive(job))
            if kept is None:
                missing.append((cell, job))
            else:
                self._note(cell, kept)
                self.progress.leave_out(cell.steps)
        processes, threads = self._settings.at_once(gpu=torch.cuda.is_available())
        made = in_processes(attempt, missing, processes=processes, threads=threads, wanted=self._still_wanted)
        with contextlib.closing(made):
            for (cell, job), result in made:
                if isinstance(result, str):
                    self._fail(cell, result)
                    continue
                self._cells.keep(cell, self._decisive(job), result)
                self._note(cell, result)
                loss = f"loss {result.loss:.4f}" if result.loss is not None else "diverged"
                scores = ", ".join([loss, *(f"{name} {value:.4f}" for name, value in result.scores.items())])
                self.progress.made(cell.steps, f"{cell.words}: {scores}")
                self._changed(self._found)

    def _still_wanted(self, run: tuple[Cell, Job]) -> bool:
        wanted = (run[0].task, run[0].method) not in self._found.failed
        if not wanted:
            self.progress.leave_out(run[0].steps)
        return wanted

    def _note(self, cell: Cell, outcome: Outcome) -> None:
        (self._found.final if cell.final else self._found.grid)[cell] = outcome

    def _fail(self, cell: Cell, why: str) -> None:
        self.progress.leave_out(cell.steps)
        key = (cell.task, cell.method)
        if not cell.final and key in self._found.rates:  # beyond a grid, which stands
            self.progress.say(f"{cell.words}: {why}; the grid ends before it")
            self._found.ended[key] = f"{cell.learning_rate:g}: {why}"
            self._changed(self._found)
            return
        if key not in self._found.failed:
            self.progress.say(f"{cell.task}, {cell.method}: {why}")
        self._found.failed.setdefault(key, why)
        self._changed(self._found)

    def _decisive(self, job: Job) -> dict[str, Any]:
        return decisive(job, self._found.models[job.task.name], self._found.sources[job.task.name])


def decisive(job: Job, model: str, sources: dict[str, Any]) -> dict[str, Any]:
    """What decides a run beside its cell: the recipe, the model and the examples by content, and the versions.

    `model`: its fingerprint; `sources`: of the examples, as `quality_examples.judging` has them.
    """
    recipe = {
        key: value
        for key, value in job.task.recipe.flat().items()
        if not key.startswith("slice.") and key not in ("output", "data.train", "training.dataloader_num_workers")
    }
    recipe |= {
        "training.learning_rate": None,
        "training.seed": None,
        "data.validation": _unless_text(recipe["data.validation"]),
    }
    # Kept runs of AdaLoRA in which its own term was a part of the loss that judges are not those of today.
    loss = {"loss": "of the task"} if job.variant.method.kind == ADALORA else {}
    rewarmed = job.variant.rewarmed(job.steps, job.final_steps)
    return (
        loss
        | ({"rewarm": rewarmed} if rewarmed else {})
        | {
            "recipe": recipe,
            "model": model,
            "examples": _contents(sources),
            "slide_every": job.variant.every(job.steps, job.final_steps) if job.variant.method.has_slices else None,
            "evaluations": job.evaluations,
            "versions": {name: versions()[name] for name in ("torch", "transformers", "peft", "slicefine")},
        }
    )


def _unless_text(validation: float | str | None) -> float | None:
    return None if isinstance(validation, str) else validation


def _contents(sources: dict[str, Any]) -> list[Any]:
    """What tells examples from others: not where they lie, but what they are."""
    return [
        {
            name: {key: one[key] for key in ("fingerprint", "examples")} if isinstance(one, dict) else one
            for name, one in read.items()
        }
        for read in sources.values()
    ]


def attempt(run: tuple[Cell, Job]) -> Outcome | str:
    """What a run gave, or in a line why it could not be made; for a process of its own."""
    transformers.utils.logging.disable_progress_bar()
    _quiet_maps()
    try:
        return fit(run[1])
    except Exception as error:  # a method that fails in any way is a row with the reason
        return reason(error)


def _quiet_maps() -> None:
    import datasets

    datasets.disable_progress_bars()
