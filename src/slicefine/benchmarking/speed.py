"""Time of a training step, of a move, and of inference, by method."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slicefine.benchmarking.attaching import PREFIXES, Attached, Counts
from slicefine.benchmarking.counting import needed
from slicefine.benchmarking.methods import SLICEFINE, Method
from slicefine.benchmarking.models import CAUSAL_LM
from slicefine.benchmarking.results import Row
from slicefine.benchmarking.settings import REFERENCES, Settings
from slicefine.benchmarking.setups import NEVER, Setup
from slicefine.benchmarking.timing import (
    TOGETHER,
    Build,
    Measured,
    Ratio,
    Run,
    measure,
    refuse_too_large,
    release,
    seconds_of,
)
from slicefine.errors import SliceFineError

LEARNING_RATE = 1e-4
EVERY_STEP = 1
PROMPT = 32
"""Tokens before those that are generated."""
BASE, ADAPTED, EXPORTED = "base", "adapted", "exported"
MOVE = "a move / training step"

INTRO = """\
One training step (forward, backward, AdamW, gradients dropped) of models with random weights and batches of random inputs, {dtype}, on {device}\
{threads}{checkpointing}{compile}. Every method has a model of its own with the same weights. "Together": all are built before the clock starts and stay alive; a round \
is one step of each on the same batch, in an order shuffled anew for every round, so that what slows the machine down slows all alike and none always \
follows the same neighbour; freed memory stays with the process. "In turns", where they do not fit into memory together: each is alone in memory for half of the rounds, \
then again in the reverse order. All in one process; Python's garbage collector runs between steps only. {warmup} untimed rounds, then {rounds} timed ones. \
"/ x": the median over that of x; its min and max are over the ratios within a round. A depth window does other work in every round: for it a round is a whole cycle \
of its turns, the mean of as many rounds, and so it is for what it is compared with. "frozen-limit": no trainable weight and no optimizer, \
gradients flow through all activations. Slices move once, halfway, so that those that alternate are measured along both axes. \
"base" and "exported" models: written to files and loaded by transformers alone, exported slices merged before."""


class Step:
    """A model that is trained by a method, a step at a time."""

    def __init__(
        self, setup: Setup, method: Method, counts: dict[str, Counts], *, slide_every: int, total_steps: int = 1000
    ) -> None:
        self._setup = setup
        self._attached: Attached = setup.attach(method, slide_every=slide_every, total_steps=total_steps)
        self._optimizer = self._attached.optimizer(LEARNING_RATE)
        self._steps = 0
        counts[method.name] = self._attached.counts

    def __call__(self, number: int) -> float:
        """One step on the batch of round `number`; returns its seconds."""
        batch = self._setup.batch(number)
        return seconds_of(lambda: self._train(batch), self._setup.device)

    def _train(self, batch: dict[str, Any]) -> None:
        self.backward(batch)
        self.update()
        self._steps += 1

    def backward(self, batch: dict[str, Any]) -> None:
        """Forward and backward. Raises `SliceFineError` if they do not reach what is to be trained."""
        self._attached.model(**batch).loss.backward()
        if not self._steps and self._optimizer and all(p.grad is None for p in self._attached.trainable):
            raise SliceFineError("no gradient reaches what it trains")

    def update(self) -> None:
        """What comes after the backward pass."""
        if self._optimizer is None:
            return
        self._optimizer.step()
        if self._attached.after_step is not None:
            self._attached.after_step(self._steps)
        self._optimizer.zero_grad()


class Update(Step):
    """The same, with the clock on `optimizer.step()` alone."""

    def __call__(self, number: int) -> float:
        """As `Step`; returns the seconds of the update."""
        self.backward(self._setup.batch(number))
        return seconds_of(self.update, self._setup.device)


class Inference:
    """A model that computes outputs, or continues texts.

    Args:
        method: None = the base.
        form: `ADAPTED`: as it is trained, adapter and all. `BASE` and `EXPORTED`: as they are served, written by `save_pretrained` and loaded by
            transformers alone; exported slices are merged before.
        folder: Where these are written to, if they have not been yet.
        generate: Tokens; 0 = a forward pass.
    """

    def __init__(self, setup: Setup, method: Method | None, form: str, *, folder: Path, generate: int) -> None:
        self._setup, self._generate = setup, generate
        self._model: nn.Module = self._made(setup.eager(), method, form, folder).eval()
        if setup.compile and not generate:  # the cache of keys and values grows: every token would be compiled anew
            self._model.compile()

    @staticmethod
    def _made(setup: Setup, method: Method | None, form: str, folder: Path) -> Any:
        if form == ADAPTED:
            assert method is not None
            return setup.attach(method, slide_every=NEVER).model
        place = folder / form
        if not place.exists():
            made: Any = setup.base() if method is None else setup.attach(method, slide_every=NEVER).model
            setup.save(made if method is None else made.merge_and_unload(), place)
            del made
            release()  # room for what is loaded
        return setup.load(place)

    def __call__(self, number: int) -> float:
        """One forward pass, or one generation, on the batch of round `number`; returns its seconds."""
        batch = self._setup.batch(number)
        batch.pop("labels")
        with torch.no_grad():
            if not self._generate:
                return seconds_of(lambda: self._model(**batch), self._setup.device)
            tokens = batch["input_ids"][:, :PROMPT]
            model: Any = self._model
            run = functools.partial(
                model.generate,
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=self._generate,
                min_new_tokens=self._generate,
                do_sample=False,
                pad_token_id=0,
            )
            return seconds_of(run, self._setup.device)


def steps(setup: Setup, methods: Sequence[Method], settings: Settings, *, together: bool) -> tuple[list[Row], Measured]:
    """Times of a training step by method, with ratios to the references; and every single time."""
    per_build = settings.rounds if together else settings.rounds - settings.rounds // 2
    halfway = settings.warmup + (per_build + 1) // 2
    total = 2 * (settings.warmup + per_build)  # AdaLoRA cuts ranks meanwhile, as it does in most of a training run
    counts: dict[str, Counts] = {}

    def build(one: Method) -> Run:
        if setup.device == "cpu" and not together:
            refuse_too_large(needed(setup, one).total, setup.device)
        return Step(setup, one, counts, slide_every=halfway, total_steps=total)

    builds: dict[str, Build] = {one.name: functools.partial(build, one) for one in methods}
    turns = {one.name: one.turns for one in methods}
    measured = _measure(builds, settings, together, f"{setup.of.name}, steps", turns)
    return [_step_row(one, counts, measured, setup) for one in methods], measured


def _measure(
    builds: dict[str, Build], settings: Settings, together: bool, title: str, turns: dict[str, int] | None = None
) -> Measured:
    return measure(
        builds,
        rounds=settings.rounds,
        warmup=settings.warmup,
        seed=settings.seed,
        together=together,
        title=title,
        turns=turns,
    )


def _step_row(method: Method, counts: dict[str, Counts], measured: Measured, setup: Setup) -> Row:
    count, own = counts.get(method.name), measured.cycles(method.name, method.turns)
    row: Row = {
        "method": method.name,
        "active": count and count.active,
        "head": count and count.head,
        "added": count and count.added,
        **_milliseconds(own),
    }
    for reference in REFERENCES:
        row |= _ratio(own, measured.cycles(reference, method.turns), reference, measured.arrangement)
    of = setup.of
    units, word = (of.batch * of.length, "tokens/s") if of.length else (of.batch, "examples/s")
    row[word] = units / statistics.median(own) if own else None
    row["not measured"] = "" if own else measured.reason(method.name)
    return row


def _milliseconds(seconds: Sequence[float] | None) -> Row:
    if not seconds:
        return {"median ms": None, "min ms": None, "max ms": None}
    return {
        "median ms": 1e3 * statistics.median(seconds),
        "min ms": 1e3 * min(seconds),
        "max ms": 1e3 * max(seconds),
    }


def _ratio(own: Sequence[float] | None, of: Sequence[float] | None, name: str, arrangement: str) -> Row:
    """Within a round, two are compared only where they ran in the same one."""
    ratio = Ratio.of(own, of) if own and of else None
    within = ratio if arrangement == TOGETHER else None
    return {
        f"/ {name}": ratio and ratio.value,
        f"/ {name}, min": within and within.low,
        f"/ {name}, max": within and within.high,
    }


def moves(
    setup: Setup, methods: Sequence[Method], settings: Settings, step_rows: Sequence[Row], *, together: bool
) -> tuple[list[Row], Measured]:
    """Time of moving every slice once: `optimizer.step()` that moves, less one that does not, over a training step.

    On batches of one: the batch has no part in a move.
    """
    setup = dataclasses.replace(setup, of=setup.of.resized("batch", 1), compile=False)
    sliding = [one for one in methods if one.kind == SLICEFINE]
    names = {(one.name, every): f"{one.name}, {every}" for one in sliding for every in (NEVER, EVERY_STEP)}
    builds: dict[str, Build] = {
        names[one.name, every]: functools.partial(Update, setup, one, {}, slide_every=every)
        for one in sliding
        for every in (NEVER, EVERY_STEP)
    }
    measured = _measure(builds, settings, together, f"{setup.of.name}, moves")
    median = {row["method"]: row["median ms"] for row in step_rows}
    rows = []
    for one in sliding:
        still, moving = (measured.seconds.get(names[one.name, every]) for every in (NEVER, EVERY_STEP))
        step = median.get(one.name)
        if still and moving and step:
            without, with_move = (1e3 * statistics.median(seconds) for seconds in (still, moving))
            within = [1e3 * (b - a) / step for a, b in zip(still, moving, strict=False)]
            in_rounds = measured.arrangement == TOGETHER
            rows.append(
                {
                    "method": one.name,
                    "optimizer.step() ms": without,
                    "with a move, ms": with_move,
                    MOVE: (with_move - without) / step,
                    f"{MOVE}, min": min(within) if in_rounds else None,
                    f"{MOVE}, max": max(within) if in_rounds else None,
                }
            )
    return rows, measured


def inference(
    setup: Setup, methods: Sequence[Method], settings: Settings, *, generate: int, together: bool
) -> tuple[list[Row], Measured]:
    """Time of a forward pass, or of generating `generate` tokens: the base, models with adapters, and slices exported.

    What is exported is the same model whatever the method, so the first method with slices stands for all.
    """
    first = next((one for one in methods if one.has_slices), None)
    forms: list[tuple[Method | None, str]] = [(None, BASE), *([(first, EXPORTED)] if first else [])]
    forms += [(one, ADAPTED) for one in methods if one.has_slices or one.kind in PREFIXES]
    names = {form: BASE if form[0] is None else f"{form[0].name}, {form[1]}" for form in forms}
    what = "generation" if generate else "forward"
    Path(settings.output).mkdir(parents=True, exist_ok=True)
    # Where results go there is room for a model more likely than in the system's own folder, which may be in memory.
    with tempfile.TemporaryDirectory(prefix=".exported-", dir=settings.output, ignore_cleanup_errors=True) as folder:
        builds: dict[str, Build] = {
            name: functools.partial(Inference, setup, *form, folder=Path(folder), generate=generate)
            for form, name in names.items()
        }
        measured = _measure(builds, settings, together, f"{setup.of.name}, {what}")
    rows = []
    for name in names.values():
        own = measured.seconds.get(name)
        row = {"model": name, **_milliseconds(own)}
        row |= _ratio(own, measured.seconds.get(BASE), BASE, measured.arrangement)
        rows.append(row | {"not measured": "" if own else measured.reason(name)})
    return rows, measured


def generates(setup: Setup) -> bool:
    """Whether the model continues texts."""
    return setup.of.task == CAUSAL_LM
