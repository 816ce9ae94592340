"""Seconds of a training step on a task's own batches, all methods interleaved: what `bench quality` turns steps into time by.

The times of the runs themselves would compare methods that had other neighbours on the machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from slicefine.benchmarking.attaching import Attached
from slicefine.benchmarking.cells import VERSION, Cells, file_of
from slicefine.benchmarking.fitting import Job, attach_to, prepare, trainer_of
from slicefine.benchmarking.methods import FULL, method
from slicefine.benchmarking.models import TEXT
from slicefine.benchmarking.quality_settings import QualitySettings
from slicefine.benchmarking.setups import ROOM
from slicefine.benchmarking.suite import QualityTask
from slicefine.benchmarking.timing import (
    OUT_OF_MEMORY,
    Build,
    Measured,
    free_bytes,
    keep_freed_memory,
    measure,
    seconds_of,
)
from slicefine.benchmarking.variants import Variant
from slicefine.errors import SliceFineError
from slicefine.training.checked import NotFiniteError, all_finite
from slicefine.training.record import commit, hardware, now, versions, write_atomically
from slicefine.training.threads import cpu_threads

WARMUP = 2
HOW = "batches of every length, the longest first, by the loss and the checks of the trainer, on a heap that has grown"
"""Times that were measured in another way are measured again."""
LOOKED_AT = 500
"""Batches among which those that are timed are found."""
COPIES = 4
"""Weights, gradients and two moments: what a method may keep of every weight."""
LEARNING_RATE = 1e-4


def measured(
    cells: Cells, task: QualityTask, model: str, variants: Sequence[Variant], settings: QualitySettings, threads: int
) -> Measured:
    """Seconds of `settings.rounds` steps of every method; kept with the runs, and not measured again.

    `model`: fingerprint of the pretrained model.
    """
    known = {
        "task": task.name,
        "recipe": task.recipe.flat(),
        "model": model,
        "methods": [one.name for one in variants],
        "rounds": settings.rounds,
        "threads": threads,
        "hardware": hardware() | {"threads": threads},
        "versions": versions(),
        "measured": HOW,
    }
    path = cells.folder / file_of(f"{task.name}-times", known)
    if path.is_file():
        return _read(path)
    found = _measure(task, variants, settings, threads)
    if not found.interrupted and OUT_OF_MEMORY not in found.failed.values():  # which may be free the next time
        cells.folder.mkdir(parents=True, exist_ok=True)
        made = {"at": now(), "commit": commit()}
        content = {"version": VERSION, "settings": known, "measured": dataclasses.asdict(found), "made": made}
        write_atomically(path, json.dumps(content) + "\n")
    return found


def _read(path: Path) -> Measured:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["version"]
        if version == VERSION:
            return Measured(**content["measured"])
    except (ValueError, TypeError, KeyError) as error:
        raise SliceFineError(
            f"{path} is not the file of measured times ({error}). Remove it, and they are measured again."
        ) from error
    raise SliceFineError(
        f"{path} is of version {version}; this slicefine reads version {VERSION}. Use another `--cells` folder, or remove the file, and "
        "times are measured again."
    )


def _measure(task: QualityTask, variants: Sequence[Variant], settings: QualitySettings, threads: int) -> Measured:
    with cpu_threads(threads):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu":
            keep_freed_memory()
        batches = _batches(task, settings, device)
        builds: dict[str, Build] = {
            one.name: functools.partial(_Step, task, one, settings, batches, device) for one in variants
        }
        weights = sum(p.numel() * p.element_size() for p in prepare(task.recipe, settings.seed).model.parameters())
        room = free_bytes(device)
        together = room is None or COPIES * weights * len(builds) <= ROOM * room
        return measure(
            builds,
            rounds=settings.rounds,
            warmup=WARMUP,
            seed=settings.seed,
            together=together,
            title=f"{task.name}, time of a step",
            turns={one.name: one.method.turns for one in variants},
        )


def _batches(task: QualityTask, settings: QualitySettings, device: str) -> list[dict[str, Any]]:
    """Batches of training, as many as the rounds take; the same for all methods.

    Texts come by length, the longest first, so that the first batches are not like all others: of the first `LOOKED_AT` those are
    taken that lie evenly in their order by size, and come in an order of their own: the longest ones first, so that in the untimed rounds
    memory grows to what the others need. They are timed last.
    """
    needed = settings.rounds * task.recipe.training.gradient_accumulation_steps
    prepared = prepare(task.recipe, settings.seed)
    job = _job(task, Variant(method=method(FULL)), settings)
    with tempfile.TemporaryDirectory() as folder:
        loader = trainer_of(job, prepared, attach_to(prepared, job), Path(folder)).get_train_dataloader()
        seen = list(itertools.islice(loader, max(needed, LOOKED_AT) if task.recipe.task == TEXT else needed))
    if task.recipe.task == TEXT:
        seen.sort(key=lambda batch: batch["input_ids"].shape[1])
        seen = [seen[(2 * at + 1) * len(seen) // (2 * needed)] for at in range(needed)]
        longest = seen[needed - min(needed, WARMUP * task.recipe.training.gradient_accumulation_steps) :]
        rest = seen[: needed - len(longest)]
        random.Random(settings.seed).shuffle(rest)
        seen = [*longest, *rest]
    return [
        {key: value.to(device) for key, value in dict(batch).items() if isinstance(value, torch.Tensor)}
        for batch in seen
    ]


def _job(task: QualityTask, variant: Variant, settings: QualitySettings) -> Job:
    steps = 2 * (settings.rounds + WARMUP)
    return Job(
        task=task,
        variant=variant,
        learning_rate=LEARNING_RATE,
        seed=settings.seed,
        steps=steps,
        final_steps=steps,
        evaluations=1,
        final=False,
        depth_every=1,
    )


class _Step:
    """A model that is trained by a method, a step at a time, by the loss of its trainer: TRL's is not that of the model."""

    def __init__(
        self, task: QualityTask, variant: Variant, settings: QualitySettings, batches: list[dict[str, Any]], device: str
    ) -> None:
        prepared = prepare(task.recipe, settings.seed)
        prepared.model.to(device)  # pyright: ignore[reportArgumentType] -- transformers' annotation of `to` has no strings
        job = _job(task, variant, settings)
        self._attached: Attached = attach_to(prepared, job)
        with tempfile.TemporaryDirectory() as folder:
            self._trainer = trainer_of(job, prepared, self._attached, Path(folder))
        self._attached.model.train()
        self._optimizer = self._attached.optimizer(LEARNING_RATE)
        self._batches, self._device, self._steps = batches, device, 0
        self._training = task.recipe.training

    def __call__(self, number: int) -> float:
        of_step = self._training.gradient_accumulation_steps
        batches = [self._batches[at % len(self._batches)] for at in range(number * of_step, (number + 1) * of_step)]
        return seconds_of(lambda: self._train(batches), self._device)

    def _train(self, batches: list[dict[str, Any]]) -> None:
        for batch in batches:
            autocast = torch.autocast(self._device, torch.bfloat16) if self._training.bf16 else contextlib.nullcontext()
            with autocast:
                loss = cast(torch.Tensor, self._trainer.compute_loss(cast(Any, self._attached.model), dict(batch)))
            (loss / len(batches)).backward()
            if not all_finite(self._attached.model, loss):
                raise NotFiniteError("the loss, or a gradient, is NaN or Inf")
        assert self._optimizer is not None
        if self._training.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self._attached.trainable, self._training.max_grad_norm)
        self._optimizer.step()
        if self._attached.after_step is not None:
            self._attached.after_step(self._steps)
        self._optimizer.zero_grad()
        self._steps += 1
