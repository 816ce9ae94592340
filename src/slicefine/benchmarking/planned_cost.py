"""What one method needs: sizes from shapes, and the memory of a step from its graph, all on the meta device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from slicefine.benchmarking.attaching import PEFT_TASKS
from slicefine.benchmarking.planned_model import Subject, logits_in_place, loss_of, prepare
from slicefine.benchmarking.saved_bytes import StepMemory, count, fake
from slicefine.errors import SliceFineError
from slicefine.slicing import COLUMN, ROW, Region, Schedule, Shape, artifact_size
from slicefine.training.recipe import Recipe
from slicefine.tuner import SliceFineConfig, parameter_counts
from slicefine.tuner.inspection import tuned
from slicefine.tuner.targets import find_targets

SLICEFINE, LORA, FULL = "SliceFine", "LoRA", "full"
LORA_RANK = 8
MODULES_TO_SAVE = "modules_to_save"
"""How PEFT names the copies of modules that it trains in full."""
DEEP = 24
"""Layers from which on the graph of a model is not made in full."""
FOREVER = 2**40
"""Optimizer steps after which everything has been trained."""
MOMENTS = 2
"""Numbers that AdamW keeps for each that is trained, in the same dtype."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one method needs. Bytes are on the device, if nothing else is said."""

    method: str
    active: int
    """Parameters trained at a step, heads left out."""
    added: int
    """Parameters that stay in the model beside its own, unless the adapter is merged."""
    heads: int
    """Parameters of new modules, trained in full by every method."""
    weights: int
    """Bytes of the model, new modules included, and of its buffers."""
    masters: int
    """Bytes of trained parameters that are not the model's own: fp32 copies of slices and heads, or an adapter."""
    moments: int
    """Bytes that AdamW keeps between steps."""
    originals: int
    """Bytes on the CPU: the original values of what the run will have trained, for SliceFine."""
    artifact: int
    """Bytes of the tensors of the saved result at the end of the run; like `originals` the most there can be where its length is not
    known."""
    step: StepMemory

    @property
    def device(self) -> int:
        """Bytes at the highest moment of a step."""
        return self.weights + self.masters + self.moments + self.step.peak


def cost(
    of: Subject,
    method: str,
    *,
    gpu: bool,
    steps: int | None = None,
    model: nn.Module | None = None,
    deep: int = DEEP,
) -> Cost:
    """What `method` needs. The layers of a deep model are counted as in `repeated_step_memory`.

    Args:
        steps: Length of the run, which matters for SliceFine alone; None = one that trains all there is to train.
        model: That of the method, on the meta device, if it has been made.
        deep: Layers from which on a model is deep.
    """
    model = attached(of, method) if model is None else model
    step = repeated_step_memory(of, method, gpu=gpu) if of.layers >= deep else None
    trained = {id(p): p for p in model.parameters() if p.requires_grad}
    held = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    masters = {} if method == FULL else trained
    names = of.heads(of.build()) if method == FULL else [MODULES_TO_SAVE]
    heads = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and {*name.split(".")} & {*names})
    of_ours = method == SLICEFINE
    active = parameter_counts(model).active if of_ours else sum(p.numel() for p in trained.values()) - heads
    return Cost(
        method=_title(method, of.recipe),
        active=active,
        added=active if method == LORA else 0,
        heads=heads,
        weights=_bytes(tensor for key, tensor in held.items() if key not in masters),
        masters=_bytes(masters.values()),
        moments=MOMENTS * _bytes(trained.values()),
        originals=_originals(model, steps) if of_ours else 0,
        artifact=_artifact(model, steps) if of_ours else _bytes(trained.values()),
        step=step or step_memory(of, model, gpu=gpu),
    )


def attached(of: Subject, method: str, device: str = "meta") -> nn.Module:
    """A new model, ready to be trained by `method`. LoRA is given the layers that SliceFine is given."""
    model: Any = of.build(device)
    if method == FULL:
        return model.requires_grad_(True)
    ours = SliceFineConfig(**dataclasses.asdict(of.recipe.slice))
    config = ours
    if method == LORA:
        layers = {name: place.module for name, place in find_targets(model, ours).items() if place.is_layer}
        turned = any(isinstance(layer, Conv1D) for layer in layers.values())
        config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, fan_in_fan_out=turned, target_modules=list(layers))
    config.task_type = cast(Any, PEFT_TASKS.get(of.recipe.task))
    config.modules_to_save = [*(of.recipe.slice.modules_to_save or []), *of.heads(model)] or None
    return get_peft_model(model, config)


def _title(method: str, recipe: Recipe) -> str:
    letters = {ROW: "R", COLUMN: "C"}.get(recipe.slice.axis, "RC")
    return {SLICEFINE: f"{SLICEFINE}-{recipe.slice.r}{letters}", LORA: f"{LORA}-r{LORA_RANK}"}.get(method, method)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def _originals(model: nn.Module, steps: int | None) -> int:
    """Bytes of the original rows, columns and biases that are kept at the end of the run, the slice at its end among them."""
    kept = 0
    for _, layer, adapter in tuned(model):
        schedule, shape = layer.slicefine_state[adapter].schedule, layer.shape
        rows, columns = touched(schedule, FOREVER if steps is None else steps + 1, shape)
        bias = shape[0] if adapter in layer.slicefine_bias else 0
        kept += ((rows * shape[1] + columns * shape[0]) * math.prod(shape[2:]) + bias) * layer.dtype.itemsize
    return kept


def _artifact(model: nn.Module, steps: int | None) -> int:
    """Bytes of the tensors in the saved adapter at the end of the run."""
    saved = _bytes(p for name, p in model.named_parameters() if p.requires_grad and f".{MODULES_TO_SAVE}." in name)
    sizes: dict[Any, int] = {}
    for _, layer, adapter in tuned(model):
        schedule, shape, bias = layer.slicefine_state[adapter].schedule, layer.shape, adapter in layer.slicefine_bias
        key = (schedule, shape, layer.dtype, bias)
        if key not in sizes:
            end = FOREVER if steps is None else steps
            sizes[key] = artifact_size(schedule, shape, end, itemsize=layer.dtype.itemsize, bias=bias)
        saved += sizes[key]
    return saved


@lru_cache(maxsize=1024)
def touched(schedule: Schedule, steps: int, shape: Shape) -> tuple[int, int]:
    """Numbers of rows and of columns that `steps` optimizer steps train."""
    region = Region.of(schedule.touched(steps, shape))
    return len(region.rows), len(region.columns)


def step_memory(of: Subject, model: nn.Module, *, gpu: bool) -> StepMemory:
    prepare(model, of.recipe)
    try:
        with fake(model, gpu=gpu), logits_in_place() if gpu else nullcontext():
            loss = loss_of(model, of.recipe, of.inputs())
            accumulating = of.recipe.training.gradient_accumulation_steps > 1
            return count(model, loss, widths=of.widths, padded=of.padded, accumulating=accumulating)
    except RuntimeError as error:
        raise SliceFineError(
            f"The memory of {of.config.model_type} cannot be counted, for its graph does not run on tensors without values (where it depends on "
            f"values, or slices parameters that are no layers, of experts, say): {str(error).splitlines()[0]} Measure a few steps: "
            "`slicefine train` with --training.max_steps 2."
        ) from error


def repeated_step_memory(of: Subject, method: str, *, gpu: bool) -> StepMemory | None:
    """`step_memory` of SliceFine or LoRA from two models with fewer of the same layers; None where layers are not all the same.

    Every further layer, or group of layers of different kinds, adds the same bytes, so a deep model is done in a fraction of the
    time. Not for full tuning: with large gradients, the highest moment of a deep model may be another one.
    """
    groups = of.groups()
    if method == FULL or groups is None:
        return None
    few, group, times = groups
    one, two = (
        step_memory(made, attached(made, method), gpu=gpu)
        for made in (of.with_layers(few), of.with_layers(few + group))
    )

    def extended(first: int, second: int) -> int:
        return first + times * (second - first)

    return StepMemory(
        saved=extended(one.saved, two.saved),
        saved_logits=extended(one.saved_logits, two.saved_logits),
        gradients=extended(one.gradients, two.gradients),
        peak=extended(one.peak, two.peak),
        at_peak={kind: extended(one.at_peak.get(kind, 0), two.at_peak.get(kind, 0)) for kind in two.at_peak},
    )
