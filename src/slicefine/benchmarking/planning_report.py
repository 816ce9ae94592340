"""A plan as text for people, and as a dictionary for machines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from slicefine.benchmarking.planned_cost import Cost
from slicefine.benchmarking.planning import CPU, GPU, OUTSIDE, Change, Plan
from slicefine.benchmarking.saved_bytes import StepMemory

FORMAT = 1
"""Of the dictionary; raised when a key changes its meaning."""

NOT_COUNTED = "not counted"
AT_MOST = "At most: originals and artifact of a run in which every weight is trained in the end. Its length makes them exact: --examples or --training.max_steps."
NOTE = "Counted for the longest batch; what is assumed, and what is not counted: docs/planning.md."


def as_dict(plan: Plan) -> dict[str, Any]:
    """All numbers of a plan; sizes in bytes."""
    return {
        "format": FORMAT,
        "recipe": plan.recipe.flat(),
        "architecture": plan.model,
        "device": GPU if plan.gpu else CPU,
        "attention": plan.attention,
        "padded": plan.padded,
        "parameters": {
            "active": plan.counts.active,
            "touched": plan.counts.touched,
            "planned": plan.counts.planned,
            "added": plan.counts.added,
            "total": plan.counts.total,
            "modules_to_save": plan.counts.modules_to_save,
        },
        "turns": [{"lowest": turn.lowest, "active": turn.active} for turn in plan.turns],
        "steps": plan.steps,
        "moves": plan.moves,
        "fewest_moves": plan.fewest_moves,
        "targets": plan.targets,
        "coverage": plan.coverage,
        "lora_rank": plan.lora_rank,
        "notes": plan.notes,
        "methods": [_method(plan, cost) for cost in plan.costs],
        "memory": plan.memory,
        "set_aside": OUTSIDE[GPU if plan.gpu else CPU],
        "changes": [_change(change) for change in plan.changes],
        "smallest": None if plan.smallest is None else _change(plan.smallest),
    }


def _method(plan: Plan, cost: Cost) -> dict[str, Any]:
    step = cost.step
    return {
        "method": cost.method,
        "active": cost.active,
        "added": cost.added,
        "heads": cost.heads,
        "artifact": cost.artifact,
        "weights": cost.weights,
        "masters": cost.masters,
        "moments": cost.moments,
        "gradients": step and step.gradients,
        "originals_on_cpu": cost.originals,
        "saved_for_backward": step and step.saved,
        "of_which_logits": step and step.saved_logits,
        "logits": step and step.logits,
        "step": step and step.peak,
        "step_at_its_peak": step and step.at_peak,
        "device": cost.device,
        "fits": None if plan.memory is None or cost.device is None else plan.fits(cost.device),
    }


def _change(change: Change) -> dict[str, Any]:
    return {"settings": change.settings, "device": change.device}


def text(plan: Plan) -> str:
    """The plan in tables and sentences."""
    bounded = [AT_MOST] if _is_bound(plan) else []
    return "\n".join([*_head(plan), "", *_table(plan), "", *bounded, *_verdict(plan), *plan.notes, NOTE])


def _head(plan: Plan) -> list[str]:
    recipe, counts = plan.recipe, plan.counts
    training, data = recipe.training, recipe.data
    each = {
        "text-classification": f"{data.max_length} tokens",
        "causal-lm": f"{data.max_length} tokens",
        "image-classification": "images",
        "video-classification": "clips",
    }[recipe.task]
    extras = [
        "bf16 autocast" if training.bf16 else "no autocast",
        "activation checkpointing" if training.activation_checkpointing else "no checkpointing",
        f"{plan.attention} attention" + (" with a mask" if plan.padded else ""),
    ]
    length = (
        f"{plan.steps:,} steps" if plan.steps is not None else "length not known (--examples or --training.max_steps)"
    )
    planned = "not known" if counts.planned is None else f"{counts.planned:,}"
    lines = [
        f"{'model':<12} {recipe.model.name} ({plan.model}), {counts.total:,} parameters, {recipe.task}",
        f"{'batch':<12} {training.per_device_train_batch_size} x {each}, accumulation {training.gradient_accumulation_steps}, {', '.join(extras)}, "
        f"{'GPU' if plan.gpu else 'CPU'}",
        f"{'slices':<12} {str(recipe.slice_schedule).replace('None', 'null')}, {plan.targets} weights",
        f"{'parameters':<12} {counts.active:,} active{' at most' if plan.turns else ''}, {counts.touched:,} touched, {planned} planned, {counts.added} added"
        + (f"; {counts.modules_to_save:,} in new modules, trained in full" if counts.modules_to_save else ""),
        *_turns(plan),
        f"{'run':<12} {length}"
        + ("" if plan.moves is None else f", {_moves(plan)} moves")
        + ("" if plan.coverage is None else f", {plan.coverage:.2%} of these weights trained in the end"),
    ]
    if plan.lora_rank is not None:
        dropped = (
            "; heads and biases have to be left out" if counts.modules_to_save or recipe.slice.bias != "none" else ""
        )
        lines.append(f"{'as LoRA':<12} rank {plan.lora_rank} when exported{dropped}")
    elif plan.lora_refused is not None:
        lines.append(f"{'as LoRA':<12} not exported: PEFT attaches none to these weights, see below")
    elif plan.steps is not None:
        lines.append(f"{'as LoRA':<12} not exported: slices are in more than linear layers")
    return lines


def _turns(plan: Plan) -> list[str]:
    """The most is needed in the turn with the lowest block, so memory and the rest are said of it."""
    if not plan.turns:
        return []
    each = ", ".join(f"{turn.active:,} active from block {turn.lowest}" for turn in plan.turns)
    mean = sum(turn.active for turn in plan.turns) // len(plan.turns)
    return [f"{'turns':<12} {each}; {mean:,} in the mean; {plan.recipe.slice.depth_every} steps each"]


def _moves(plan: Plan) -> str:
    return f"{plan.moves}" if plan.fewest_moves == plan.moves else f"{plan.fewest_moves} to {plan.moves}"


def _is_bound(plan: Plan) -> bool:
    """Whether sizes are the most there can be: the slices move, and nobody knows how often."""
    return plan.steps is None and plan.recipe.slice.slide_every is not None


def _table(plan: Plan) -> list[str]:
    at_most = " at most" if _is_bound(plan) else ""
    costs = plan.costs

    def of_step(cost: Cost, bytes_of: Callable[[StepMemory], int]) -> str:
        return NOT_COUNTED if cost.step is None else size(bytes_of(cost.step))

    rows: list[tuple[str, list[str]]] = [
        ("", [cost.method for cost in costs]),
        ("active parameters", [f"{cost.active:,}" for cost in costs]),
        ("weights", [size(cost.weights) for cost in costs]),
        ("masters, adapters (trained)", [size(cost.masters) for cost in costs]),
        ("AdamW's moments", [size(cost.moments) for cost in costs]),
        ("gradients", [of_step(cost, lambda step: step.gradients) for cost in costs]),
        ("saved for backward", [of_step(cost, lambda step: step.saved - step.saved_logits) for cost in costs]),
        ("logits", [of_step(cost, lambda step: step.logits) for cost in costs]),
        ("all of a step, at its peak", [of_step(cost, lambda step: step.peak) for cost in costs]),
        ("device, at its peak", [NOT_COUNTED if cost.device is None else size(cost.device) for cost in costs]),
        (f"originals, on the CPU{at_most}", [size(cost.originals) for cost in costs]),
        (f"artifact{at_most}", [size(cost.artifact) for cost in costs]),
    ]
    first = max(len(name) for name, _ in rows)
    widths = [max(len(cells[i]) for _, cells in rows) for i in range(len(costs))]
    return [
        f"{name:<{first}}  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for name, cells in rows
    ]


def _verdict(plan: Plan) -> list[str]:
    outside = OUTSIDE[GPU if plan.gpu else CPU]
    aside = f", {size(outside)} of it set aside for what is no tensor" if outside else ""
    if plan.memory is None:
        return [
            f"Give the memory of the device to know whether it fits: --memory 24GiB{aside and ' (' + aside[2:] + ')'}."
        ]
    ours = plan.costs[0]
    if ours.device is None:
        return [f"Whether {ours.method} fits in {size(plan.memory)} is not known."]
    names = [cost.method for cost in plan.costs if cost.device is not None and plan.fits(cost.device)]
    lines = [
        f"In {size(plan.memory)}{aside}: {', '.join(names) + ' fit' + 's' * (len(names) == 1) if names else 'nothing fits'}."
    ]
    if plan.fits(ours.device):
        return lines
    if plan.smallest is not None:
        return [
            *lines,
            f"No batch, checkpointing or axis makes {ours.method} fit: with {_settings(plan.smallest)} it still needs "
            f"{size(plan.smallest.device)}{' beside that' if aside else ''}, {size(ours.weights)} of them weights.",
        ]
    return [*lines, f"{ours.method} fits with", *(f"  {_settings(c)}  ({size(c.device)})" for c in plan.changes)]


def _settings(change: Change) -> str:
    return " ".join(f"--{key} {str(value).lower()}" for key, value in change.settings.items())


def size(count: int) -> str:
    """Bytes in the unit that suits them: `"21.92 GiB"`."""
    value, units = float(count), ("bytes", "KiB", "MiB", "GiB")
    unit = 0
    while value >= 1024 and unit < len(units) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.2f} {units[unit]}" if unit else f"{count} bytes"
