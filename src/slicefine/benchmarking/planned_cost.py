"""What one method needs: sizes from shapes, and the memory of a step from its graph, all on the meta device."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import transformers_weight_conversion
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from slicefine.benchmarking.attaching import PEFT_TASKS
from slicefine.benchmarking.fake_tensors import fake
from slicefine.benchmarking.longer_models import with_more_layers
from slicefine.benchmarking.methods import Method
from slicefine.benchmarking.planned_couplings import planned_couplings
from slicefine.benchmarking.planned_model import Subject, logits_in_place, loss_of, prepare
from slicefine.benchmarking.saved_bytes import StepMemory, count
from slicefine.errors import SliceFineError, SliceFineWarning, first_line
from slicefine.slicing import COUPLED, Region, Schedule, Shape, artifact_size
from slicefine.training.recipe import Recipe
from slicefine.tuner import SliceFineConfig, parameter_counts
from slicefine.tuner.inspection import tuned
from slicefine.tuner.targets import find_targets, weight_name

SLICEFINE, LORA, FULL = "SliceFine", "LoRA", "full"
LORA_RANK = 8
MODULES_TO_SAVE = "modules_to_save"
"""How PEFT names the copies of modules that it trains in full."""
DEEP = 24
"""Layers from which on the graph of a model is not made in full."""
UNLIKE = 4
"""At the beginning of a model fewer layers than these may be of another kind, unsaid by `layer_types`: dense ones before experts, say."""
FOREVER = 2**40
"""Optimizer steps after which everything has been trained."""
MOMENTS = 2
"""Numbers that AdamW keeps for each that is trained, in the same dtype."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one method needs. Bytes are on the device, if nothing else is said."""

    method: str
    active: int
    """Parameters trained at a step, heads left out; the most of all turns of a depth window."""
    added: int
    """Parameters that stay in the model beside its own, unless the adapter is merged."""
    heads: int
    """Parameters of new modules, trained in full by every method."""
    weights: int
    """Bytes of the model, new modules included, and of its buffers."""
    masters: int
    """Bytes of trained parameters that are not the model's own: fp32 copies of slices and heads, or an adapter."""
    moments: int
    """Bytes that AdamW keeps between steps: of all that gets a gradient; where a step is not counted, of all that is trained."""
    originals: int
    """Bytes on the CPU: the original values of what the run will have trained, for SliceFine."""
    artifact: int
    """Bytes of the tensors of the saved result at the end of the run; like `originals` the most there can be where its length is not
    known."""
    step: StepMemory | None
    """None where the graph of the model does not tell it."""

    @property
    def fixed(self) -> int:
        """Bytes that are there in every moment of a step."""
        return self.weights + self.masters + self.moments

    @property
    def device(self) -> int | None:
        """Bytes at the highest moment of a step; None where it is not known."""
        return None if self.step is None else self.fixed + self.step.peak


class UncountedError(SliceFineError):
    """The graph of a model does not run on tensors without values."""


def cost(
    of: Subject,
    method: str,
    *,
    gpu: bool,
    steps: int | None = None,
    model: nn.Module | None = None,
    deep: int = DEEP,
    counted: bool = True,
) -> Cost:
    """What `method` needs, of a depth window in the turn that needs most. The layers of a deep model are counted as in `repeated_step_memory`.

    Args:
        steps: Length of the run, which matters for SliceFine alone; None = one that trains all there is to train.
        model: That of the method, on the meta device, if it has been made.
        deep: Layers from which on a model is deep.
        counted: Whether a step is counted; if not, `step` is None.

    Raises `SliceFineError` if the method cannot be attached, and `UncountedError` if a step cannot be counted.
    """
    model = attached(of, method) if model is None else model
    busiest, busy = of, model
    if method == SLICEFINE and of.recipe.slice.depth_window is not None:
        busiest = of.in_full
        busy = attached(busiest, method)
    step = repeated_step_memory(busiest, method, busy, gpu=gpu) if counted and of.layers >= deep else None
    if counted and step is None:
        step = step_memory(busiest, busy, gpu=gpu)
    trained = {id(p): p for p in model.parameters() if p.requires_grad}
    held = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    masters = {} if method == FULL else trained
    names = of.heads(of.build()) if method == FULL else [MODULES_TO_SAVE]
    heads = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and {*name.split(".")} & {*names})
    of_ours = method == SLICEFINE
    active = parameter_counts(busy).active if of_ours else sum(p.numel() for p in trained.values()) - heads
    return Cost(
        method=_title(method, of.recipe),
        active=active,
        added=active if method == LORA else 0,
        heads=heads,
        weights=_bytes(tensor for key, tensor in held.items() if key not in masters),
        masters=_bytes(masters.values()),
        moments=MOMENTS * (_bytes(trained.values()) if step is None else step.reached),
        originals=_originals(model, steps) if of_ours else 0,
        artifact=_artifact(model, steps) if of_ours else _bytes(trained.values()),
        step=step,
    )


def attached(of: Subject, method: str, device: str = "meta") -> nn.Module:
    """A new model, ready to be trained by `method`. LoRA is given the weights that SliceFine is given."""
    model: Any = of.build(device)
    if method == FULL:
        return model.requires_grad_(True)
    ours = SliceFineConfig(**dataclasses.asdict(of.recipe.slice))
    config = ours
    if method == LORA:
        places = find_targets(model, ours)
        config = LoraConfig(
            r=LORA_RANK,
            lora_alpha=2 * LORA_RANK,
            fan_in_fan_out=any(isinstance(place.module, Conv1D) for place in places.values()),
            target_modules=[name for name, place in places.items() if place.is_layer],
            target_parameters=[weight_name(name, place) for name, place in places.items() if not place.is_layer],
        )
    config.task_type = cast(Any, PEFT_TASKS.get(of.recipe.task))
    config.modules_to_save = [*(of.recipe.slice.modules_to_save or []), *of.heads(model)] or None
    if config is ours and ours.axis == COUPLED and device == "meta":
        ours.couplings = planned_couplings(of, model, ours)
    # Names of layers are those of the model, and not of one of transformers 4, for which PEFT would take `gate_proj` of a mixture.
    as_named = patch.object(
        transformers_weight_conversion, "convert_peft_config_for_transformers", lambda *_, **__: None
    )
    try:
        with as_named:
            return get_peft_model(model, config, low_cpu_mem_usage=device == "meta")
    except SliceFineError:
        raise
    except (ValueError, TypeError, NotImplementedError) as error:
        raise SliceFineError(
            f"PEFT does not attach {method} to {of.config.model_type}: {first_line(error)}."
        ) from error


def _title(method: str, recipe: Recipe) -> str:
    own = Method(kind=SLICEFINE, r=recipe.slice.r, axis=recipe.slice.axis).name
    return {SLICEFINE: own, LORA: f"{LORA}-r{LORA_RANK}"}.get(method, method)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def _originals(model: nn.Module, steps: int | None) -> int:
    """Bytes of the original rows, columns and biases that are kept at the end of the run, the slice at its end among them."""
    kept = 0
    for _, layer, adapter in tuned(model):
        schedule, shape = layer.slicefine_state[adapter].schedule, layer.shape
        rows, columns = _kept(schedule, FOREVER if steps is None else steps, shape)
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
def _kept(schedule: Schedule, steps: int, shape: Shape) -> tuple[int, int]:
    """Numbers of rows and of columns whose originals are kept after `steps` optimizer steps."""
    region = Region.of([*schedule.touched(steps, shape), schedule.slice_at(steps, shape)])
    return len(region.rows), len(region.columns)


@lru_cache(maxsize=1024)
def touched(schedule: Schedule, steps: int, shape: Shape) -> tuple[int, int]:
    """Numbers of rows and of columns that `steps` optimizer steps train."""
    region = Region.of(schedule.touched(steps, shape))
    return len(region.rows), len(region.columns)


def step_memory(of: Subject, model: nn.Module, *, gpu: bool) -> StepMemory:
    """Of `model`, which is `of` with a method attached. Raises `UncountedError` where its graph cannot run without values."""
    prepare(model, of.recipe)
    try:
        with fake(model, gpu=gpu), logits_in_place() if gpu else nullcontext():
            loss = loss_of(model, of.recipe, of.inputs())
            accumulating = of.recipe.training.gradient_accumulation_steps > 1
            return count(model, loss, widths=of.widths, padded=of.padded, accumulating=accumulating)
    except SliceFineError:
        raise
    except Exception as error:  # of the model's own code, which may raise anything
        raise UncountedError(
            f"The memory of {of.config.model_type} cannot be counted, for its graph does not run on tensors without values (where it depends on "
            f"values, say): {first_line(error)}. Measure a few steps: `slicefine train` with --training.max_steps 2."
        ) from error


def repeated_step_memory(of: Subject, method: str, model: nn.Module, *, gpu: bool) -> StepMemory | None:
    """`step_memory` of SliceFine or LoRA from models of few layers; None where layers are not the same, or of few kinds.

    So a deep model is done in a fraction of the time. Not for full tuning: gradients of an embedding and an output layer, which are of no
    layer, are large, and come at moments of their own.

    Args:
        model: That of the method, on the meta device, with all layers.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SliceFineWarning)  # said of the model with all layers
        found = None if method == FULL else _shorter(of, method, model)
        if found is None:
            return None
        base, longer, added = found
        start = step_memory(base, attached(base, method), gpu=gpu)
        steps = {first: step_memory(more, attached(more, method), gpu=gpu) for first, more in longer.items()}
    return with_more_layers(
        start, [steps[first] for first in added], accumulating=of.recipe.training.gradient_accumulation_steps > 1
    )


def _shorter(of: Subject, method: str, model: nn.Module) -> tuple[Subject, dict[int, Subject], list[int]] | None:
    """A model of few layers; for each kind of layers one with one more of it; and the kinds of those that `model` has beside, in their order.

    A kind is called by the number of its first layer.
    """
    kinds = of.kinds
    for lead in range(UNLIKE):
        # One of each kind that follows, in their order at the end.
        last = [kind for place, kind in enumerate(kinds) if place >= lead and kind not in kinds[place + 1 :]]
        base = kinds[:lead] + last
        if of.layers < 2 * (len(base) + 1):
            return None
        added = [kinds.index(kind) for place, kind in enumerate(kinds) if place >= lead and kind in kinds[place + 1 :]]
        longer = {first: of.with_layers([*kinds[:lead], kinds[first], *last]) for first in dict.fromkeys(added)}
        try:
            small = _parameters(attached(of.with_layers(base), method))
            sizes = {first: _parameters(attached(more, method)) for first, more in longer.items()}
        except SliceFineError:
            continue  # settings name what a model of few layers lacks
        if torch.equal(
            _parameters(model), small + sum((sizes[first] - small for first in added), torch.zeros_like(small))
        ):
            return of.with_layers(base), longer, added
    return None


def _parameters(model: nn.Module) -> Tensor:
    """Numbers of parameters, and of those that are trained, int64 `(2,)`."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return torch.tensor([sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)])
