"""What a run will cost, before anything but the configuration of its model is downloaded.

Numbers of parameters and the sizes of what is kept are exact, from shapes. Activations, gradients and the highest moment are
counted on the real graph (`saved_bytes.py`). SliceFine, LoRA and full tuning are planned side by side.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import re
import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn

from slicefine.benchmarking.planned_config import whole
from slicefine.benchmarking.planned_cost import (
    FULL,
    LORA,
    SLICEFINE,
    Cost,
    UncountedError,
    attached,
    cost,
    touched,
)  # fmt: skip
from slicefine.benchmarking.planned_model import Subject, subject
from slicefine.errors import SliceFineError, SliceFineWarning
from slicefine.slicing import COLUMN, ParameterCounts
from slicefine.training.checkpointing import can_checkpoint
from slicefine.training.recipe import Recipe
from slicefine.training.run import planned_steps
from slicefine.training.threads import cpu_threads
from slicefine.tuner import parameter_counts
from slicefine.tuner.base_layers import LINEAR_LAYERS
from slicefine.tuner.inspection import tuned
from slicefine.tuner.layer import SliceLayer

GPU, CPU = "gpu", "cpu"
DEVICES = (GPU, CPU)
OUTSIDE = {GPU: 2**30, CPU: 0}
"""Bytes set aside for what is no tensor: the CUDA context, workspaces of libraries, and some fragmentation."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """Another way to train, and what it needs."""

    settings: dict[str, Any]
    """Those of the recipe that differ, by dotted key."""
    device: int


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A turn of a depth window."""

    lowest: int
    """Index of the lowest block that is trained."""
    active: int
    """Parameters trained at its steps, slices at their first position."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will cost."""

    recipe: Recipe
    model: str
    """Architecture, in transformers' word."""
    gpu: bool
    attention: str
    """How it is computed, by transformers' names."""
    padded: bool
    """Whether texts of a batch are taken to differ in length, so that attention has a mask."""
    counts: ParameterCounts
    """Active: the most of all turns of a depth window."""
    turns: list[Turn]
    """Of a depth window, in their order; none without one."""
    steps: int | None
    """Length of the run; None where it is not known."""
    moves: int | None
    fewest_moves: int | None
    """Of the slices that rest the longest below a depth window, or that are as wide as their weight; else `moves`."""
    targets: int
    """Weights that are sliced."""
    coverage: float | None
    """Share of the entries of these weights that the run will have trained."""
    lora_rank: int | None
    """Greatest rank of the run exported as LoRA; None where its length is not known, and for slices that no LoRA can hold."""
    lora_refused: str | None
    """Why PEFT attaches no LoRA to these weights, so that none can be exported."""
    costs: list[Cost]
    """SliceFine, LoRA, full; without those two that cannot be counted for this model, see `notes`."""
    notes: list[str]
    """What a reader has to know of this plan."""
    memory: int | None
    """Bytes of the device."""
    changes: list[Change]
    """What would make it fit, evaluated; empty if it fits or no memory is given."""
    smallest: Change | None
    """Where no change makes it fit, the one that needs least."""

    def fits(self, needed: int) -> bool:
        """Whether so many bytes of tensors fit, beside what is no tensor."""
        return self.memory is None or needed + OUTSIDE[GPU if self.gpu else CPU] <= self.memory


def parse_memory(text: str) -> int:
    """Bytes of `"24GiB"`, `"80 GB"` (10**9) or `"512MiB"`. Raises `SliceFineError` for anything else."""
    units = {
        "KB": 10**3,
        "MB": 10**6,
        "GB": 10**9,
        "TB": 10**12,
        "KIB": 2**10,
        "MIB": 2**20,
        "GIB": 2**30,
        "TIB": 2**40,
    }
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * units[found[2].upper()]) if found else 0
    if size < 1:
        number = re.fullmatch(r"\d+(?:\.\d+)?", text.strip())
        fix = f"Write {text.strip()}GiB." if number else "Write 24GiB (2**30 bytes each) or 24GB (10**9), say."
        raise SliceFineError(f"`--memory` is a number with a unit, above 0; got {text!r}. {fix}")
    return size


@cpu_threads(1)  # 18 s of CPU for gemma-3-12b; on two busy cores 103 with two threads, which wait for one another
def plan(
    recipe: Recipe, config: Any, *, examples: int | None = None, memory: int | None = None, device: str = GPU
) -> Plan:
    """Plan the run of `recipe`.

    Args:
        config: Of its model, see `planned_config.read_config`.
        examples: Training examples, for the length of the run; not needed where `training.max_steps` is given.
        memory: Bytes of the device.
        device: `"gpu"` or `"cpu"`: whose kernels are used.

    Raises `SliceFineError` for settings that do not fit the model, and for a model whose graph depends on values.
    """
    gpu = device == GPU
    steps = run_length(recipe, examples)
    config = whole(recipe, config)
    of = subject(recipe, config)
    model = attached(of, SLICEFINE)
    layers = tuned(model)
    # A slice that stays has trained after one step what it trains in any number of them.
    stays = recipe.slice.slide_every is None and recipe.slice.depth_window is None
    length = 1 if steps is None and stays else steps
    counts = parameter_counts(model, length)
    biases = sum(
        layer.slicefine_bias[a].numel()
        for _, layer, a in layers
        if a in layer.slicefine_bias and layer.slicefine_state[a].schedule.own(length or 0)
    )
    shapes = [layer.shape for _, layer, _ in layers]
    linear = all(layer.place.is_layer and isinstance(layer.place.module, LINEAR_LAYERS) for _, layer, _ in layers)
    schedules = [layer.slicefine_state[a].schedule for _, layer, a in layers]
    both = list(zip(schedules, shapes, strict=True))
    ranks = [min(sum(touched(schedule, length, shape)), *shape[:2]) for schedule, shape in both] if length else []
    last = max((length or 0) - 1, 0)
    moves = [0 if schedule.confined(shape) else schedule.moves(last) for schedule, shape in both]
    costs, notes, lora_refused = _costs(of, model, gpu=gpu, steps=steps)
    made = Plan(
        recipe=recipe,
        model=of.config.model_type,
        gpu=gpu,
        attention=of.attention,
        padded=of.padded,
        counts=dataclasses.replace(counts, active=costs[0].active),
        turns=_turns(layers, recipe.slice.depth_window or []),
        steps=steps,
        moves=None if length is None else max(moves),
        fewest_moves=None if length is None else min(moves),
        targets=len(layers),
        coverage=((counts.planned or 0) - biases) / sum(map(math.prod, shapes)) if length else None,
        lora_rank=max(ranks, default=None) if linear and not lora_refused else None,
        lora_refused=lora_refused,
        costs=costs,
        notes=notes,
        memory=memory,
        changes=[],
        smallest=None,
    )
    needed = costs[0].device
    return made if needed is None or made.fits(needed) else _with_changes(made, config, needed)


def _costs(of: Subject, model: nn.Module, *, gpu: bool, steps: int | None) -> tuple[list[Cost], list[str], str | None]:
    """Of SliceFine, which `model` is, LoRA and full tuning; what is to be said of them; and why LoRA cannot be attached, if so."""
    notes, refused, counted = [], None, True
    try:
        costs = [cost(of, SLICEFINE, gpu=gpu, steps=steps, model=model)]
    except UncountedError as error:  # all the rest is exact all the same
        notes.append(str(error))
        counted = False
        costs = [cost(of, SLICEFINE, gpu=gpu, steps=steps, model=model, counted=False)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SliceFineWarning)  # said when SliceFine was attached
        for method in (LORA, FULL):
            try:
                costs.append(cost(of, method, gpu=gpu, counted=counted))
            except SliceFineError as error:
                notes.append(f"There is no column for {method}. {error}")
                if method == LORA and not isinstance(error, UncountedError):
                    refused = str(error)
    return costs, notes, refused


def _turns(layers: list[tuple[str, SliceLayer, str]], window: list[int]) -> list[Turn]:
    active = [0] * len(window)
    for _, layer, adapter in layers:
        schedule, shape = layer.slicefine_state[adapter].schedule, layer.shape
        size = schedule.slice_at(0, shape).size(shape)
        size += layer.slicefine_bias[adapter].numel() if adapter in layer.slicefine_bias else 0
        for number in range(len(window)):
            active[number] += size if schedule.window is None or schedule.window.turns[number] else 0
    return [Turn(lowest=lowest, active=count) for lowest, count in zip(window, active, strict=True)]


def run_length(recipe: Recipe, examples: int | None) -> int | None:
    """Optimizer steps of the run; None if neither they nor the number of examples are given."""
    if examples is None and recipe.training.max_steps < 1:
        return None
    return planned_steps(examples or 0, recipe)


# ---------------------------------------------------------------- what would make it fit


def _with_changes(made: Plan, config: Any, needed: int) -> Plan:
    """`made`, which needs `needed` bytes and does not fit, with the changes that make it fit. Each is evaluated as the run itself was."""
    training = made.recipe.training
    column = {} if made.recipe.slice.axis == COLUMN else {"slice.axis": COLUMN}
    can = can_checkpoint(Subject(config=config, recipe=made.recipe).build())
    checkpointing = {"training.activation_checkpointing": True} if can and not training.activation_checkpointing else {}
    batches = _smaller_batches(made, config, {}, needed)
    both = column | checkpointing
    least = _changed(made, config, both) if both else Change(settings={}, device=needed)
    if made.fits(least.device):  # else neither alone does
        single = [least] if len(both) == 1 else [_changed(made, config, change) for change in (column, checkpointing)]
        fitting = [change for change in single if made.fits(change.device)] or [least]
        return dataclasses.replace(made, changes=fitting + batches)
    if not batches:
        batches = _smaller_batches(made, config, both, least.device)
    if batches:
        return dataclasses.replace(made, changes=batches)
    return dataclasses.replace(made, smallest=_changed(made, config, both | _batch(made.recipe, 1)))


def _changed(made: Plan, config: Any, settings: dict[str, Any]) -> Change:
    recipe = Recipe.from_flat(made.recipe.flat() | settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SliceFineWarning)  # said of the plan itself already
        of = Subject(config=config, recipe=recipe)
        needed = cost(of, SLICEFINE, gpu=made.gpu, deep=0).device
    assert needed is not None  # it was counted for the plan itself
    return Change(settings=settings, device=needed)


def _batch(recipe: Recipe, size: int) -> dict[str, Any]:
    """A smaller batch, which divides the present one, with as many examples in an optimizer step."""
    training = recipe.training
    if size == training.per_device_train_batch_size:
        return {}
    times = training.per_device_train_batch_size // size
    return {
        "training.per_device_train_batch_size": size,
        "training.gradient_accumulation_steps": training.gradient_accumulation_steps * times,
    }


def _smaller_batches(made: Plan, config: Any, settings: dict[str, Any], needed: int) -> list[Change]:
    """The largest batch that fits along with other changed `settings`, which need `needed` at the batch of the recipe."""
    fixed = made.costs[0].fixed
    assert made.memory is not None
    batch = made.recipe.training.per_device_train_batch_size
    share = (made.memory - OUTSIDE[GPU if made.gpu else CPU] - fixed) / max(1, needed - fixed)
    # No part of a step shrinks faster than the batch, so larger ones need no evaluation. Some shrink slower, or not at all.
    sizes = [size for size in range(batch - 1, 0, -1) if batch % size == 0 and size <= batch * share]
    tried: dict[int, Change] = {}

    def fits(size: int) -> bool:
        tried[size] = _changed(made, config, settings | _batch(made.recipe, size))
        return made.fits(tried[size].device)

    if not sizes:
        return []
    first = 0 if fits(sizes[0]) else bisect.bisect_left(sizes, True, lo=1, key=fits)
    return [tried[sizes[first]]] if first < len(sizes) else []
