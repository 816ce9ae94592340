"""Attaching a method to a model: all methods get the same matrices, and the modules that are new for the task are trained in full."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from peft import AdaLoraConfig, HRAConfig, LoraConfig, PrefixTuningConfig, ShiraConfig, VeraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from slicefine.benchmarking.masks import diagonal_blocks, diagonal_size, random_places, train_masked
from slicefine.benchmarking.methods import (
    ADALORA,
    BLOCK_MASK,
    FROZEN,
    FULL,
    HEAD_ONLY,
    HRA,
    LORA,
    PREFIX,
    RANDOM_MASK,
    ROCOFT,
    SHIRA,
    SLICEFINE,
    SPLIT_COLUMNS,
    SPLIT_ROWS,
    VERA,
    Method,
)
from slicefine.benchmarking.models import CAUSAL_LM, TEXT
from slicefine.benchmarking.split_weight import SplitLinear
from slicefine.errors import SliceFineError, listed, raise_all
from slicefine.slicing import ALTERNATE, COLUMN, COUPLED, ROW, active_size
from slicefine.tuner import SliceFineConfig, parameter_counts
from slicefine.tuner.base_layers import Place
from slicefine.tuner.config import ALL_LINEAR, block_of
from slicefine.tuner.coupling import find_couplings
from slicefine.tuner.depth import find_stack
from slicefine.tuner.targets import find_targets

PEFT_TASKS = {CAUSAL_LM: "CAUSAL_LM", TEXT: "SEQ_CLS"}
"""Task -> PEFT's name for it; PEFT has none for images and video."""
PREFIXES = {LORA: "lora_", ADALORA: "lora_", VERA: "vera_", HRA: "hra_", SHIRA: "shira_", PREFIX: "prompt_encoder"}
MOST = 2**20
"""The largest rank that is tried for a number of parameters."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Numbers of parameters, exact."""

    active: int
    """Trained at a step, without the head."""
    head: int
    """Trained in full in modules that are new for the task; the same for all methods that train anything."""
    added: int
    """In the adapted model and not in the base model, until the adapter is merged."""
    total: int
    """Of the base model."""


@dataclass(kw_only=True)
class Attached:
    """A model that is ready to be trained by a method."""

    method: Method
    model: nn.Module
    """What is called: `model(**batch).loss`."""
    counts: Counts
    norms: int = 0
    """Parameters of normalisations among the active ones, trained in full beside slices."""
    after_step: Callable[[int], None] | None = None
    """To be called after `optimizer.step()` and before the gradients go, with the number of the step, from 0."""

    @property
    def trainable(self) -> list[nn.Parameter]:
        """What the optimizer gets."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def optimizer(self, learning_rate: float) -> torch.optim.AdamW | None:
        """Trainer's own, fused AdamW, without decay, which would shrink pretrained weights; None if there is nothing to train."""
        return (
            torch.optim.AdamW(self.trainable, lr=learning_rate, weight_decay=0.0, fused=True)
            if self.trainable
            else None
        )


def find_places(model: nn.Module, heads: Sequence[str] = ()) -> dict[str, Place]:
    """Name -> weight of every linear layer but the output layer and those in `heads`: what every method is given."""
    found = find_targets(model, SliceFineConfig(target_modules=ALL_LINEAR))
    return {name: place for name, place in found.items() if not _within(name, heads)}


def find_norms(model: nn.Module) -> list[str]:
    """Names of the normalisations: their gains, and biases, are vectors as wide as what they normalise."""
    return [
        name
        for name, module in model.named_modules()
        if "Norm" in type(module).__name__ and any(p.dim() == 1 for p in module.parameters(recurse=False))
    ]


def _within(name: str, heads: Sequence[str]) -> bool:
    return any(f".{head}." in f".{name}." for head in heads)


def adapter_size(method: Method, model: nn.Module, places: Mapping[str, Place], heads: Sequence[str] = ()) -> int:
    """Parameters that `method` trains in `places` of `model` at its first step, heads left out; from shapes alone."""
    r = method.r or 0
    rows, columns = (sum(place.shape[dim] for place in places.values()) for dim in (0, 1))
    if method.axis == COUPLED:
        config = SliceFineConfig(r=r, axis=COUPLED, couplings=find_couplings(model, places))
        return sum(active_size(config.schedule_of(name), place.shape, 0) for name, place in places.items())
    if method.kind in (SLICEFINE, ROCOFT):
        return r * (rows if method.axis == COLUMN else columns)
    if method.kind == PREFIX:
        config = cast(Any, model.config).get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return r * 2 * config.num_hidden_layers * heads * size
    if method.kind == FULL:
        return sum(p.numel() for name, p in model.named_parameters() if not _within(name, heads))
    if method.kind == BLOCK_MASK:
        return sum(diagonal_size(place.shape, r) for place in places.values())
    return {
        LORA: r * (rows + columns),
        ADALORA: _first_rank(r) * (rows + columns + len(places)),
        VERA: rows + r * len(places),
        HRA: r * columns,
        SHIRA: r * (rows + columns),
        RANDOM_MASK: r * columns,
        SPLIT_ROWS: r * columns,
        SPLIT_COLUMNS: r * rows,
    }.get(method.kind, 0)


def _first_rank(r: int) -> int:
    return r + r // 2


def equal_in_size(method: Method, size: int, model: nn.Module, places: Mapping[str, Place]) -> Method:
    """`method` with the rank that brings what it trains nearest to `size` parameters; itself if its name gives its rank, or none will do."""
    if not method.sizable or why_not(method.of_rank(1), model, places) is not None:
        return method

    def size_at(r: int) -> int:
        return adapter_size(method.of_rank(r), model, places)

    above = bisect_left(range(1, MOST), size, key=size_at) + 1
    below = max(1, above - 1 - (method.kind == HRA))
    return method.of_rank(min(below, above, key=lambda r: abs(size_at(r) - size)))


def sized(methods: Sequence[Method], reference: Method, model: nn.Module, heads: Sequence[str] = ()) -> list[Method]:
    """`methods` with ranks that bring what they train nearest to what `reference` does; `reference` itself as it is."""
    places = find_places(model, heads)
    size = adapter_size(reference, model, places, heads)
    found = [one if one == reference else equal_in_size(one, size, model, places) for one in methods]
    return list(dict.fromkeys(found))


def why_not(method: Method, model: nn.Module, places: Mapping[str, Place], heads: Sequence[str] = ()) -> str | None:
    """Why `method` cannot be attached to `model`, in a sentence; None if nothing speaks against it."""
    if method.kind == HEAD_ONLY and not heads:
        return "the model has no new head: the output layer of a language model is pretrained"
    if method.kind == PREFIX:
        if not (hasattr(model, "can_generate") and cast(Any, model).can_generate()):
            return (
                f"prefix tuning needs a decoder with a cache of keys and values, which {type(model).__name__} has not"
            )
        if getattr(model, "is_activation_checkpointing", False):
            return "prefix tuning does not work with activation checkpointing, which drops the cache of keys and values"
    if method.kind in (FROZEN, FULL, HEAD_ONLY, PREFIX):
        return None
    if not places:
        return f"{type(model).__name__} has no linear layer beside its head"
    if method.kind in (HRA, SHIRA, SPLIT_ROWS, SPLIT_COLUMNS):
        others = [name for name, place in places.items() if not isinstance(place.module, nn.Linear)]
        if others:
            return f"{method.kind} takes nn.Linear alone; {listed(others)} are of transformers' Conv1D"
    return _too_wide(method, places)


def _too_wide(method: Method, places: Mapping[str, Place]) -> str | None:
    r = method.r or 0
    for name, place in places.items():
        rows, columns = place.shape
        if method.kind == SHIRA and r * (rows + columns) > rows * columns:
            return f"{r} x ({rows} + {columns}) weights are more than {name} of shape {place.shape} has"
        sliced = {SPLIT_ROWS: ROW, SPLIT_COLUMNS: COLUMN, RANDOM_MASK: ROW, BLOCK_MASK: ALTERNATE}.get(
            method.kind, method.axis
        )
        widest = {ROW: rows, COLUMN: columns, None: r}.get(sliced, min(rows, columns))
        if r > widest:
            return f"r = {r} is more than the {widest} {sliced if sliced in (ROW, COLUMN) else 'row'}s of {name}"
    return None


def attach(
    method: Method,
    model: nn.Module,
    *,
    task: str,
    heads: Sequence[str] = (),
    slide_every: int | None = 500,
    total_steps: int = 1000,
    seed: int = 0,
    depth_every: int = 25,
    slice_settings: Mapping[str, Any] | None = None,
    norms: bool = False,
) -> Attached:
    """Make `model` ready to be trained by `method`; the model is changed in place.

    Args:
        task: One of `models.BUILT_BY`.
        heads: Names of modules that are new for the task, trained in full.
        slide_every: Optimizer steps per position of the slices of SliceFine; None = they do not move.
        total_steps: Length of the run in optimizer steps, for the schedule of AdaLoRA.
        seed: Seed of random masks.
        depth_every: Optimizer steps of each turn of a depth window.
        slice_settings: Further settings of `SliceFineConfig`, for methods with slices.
        norms: Whether those train normalisations as well, in full.

    Raises `SliceFineError` with the reason if the method cannot be attached.
    """
    places = find_places(model, heads)
    reason = why_not(method, model, places, heads)
    if reason is not None:
        raise SliceFineError(reason)
    total = sum(parameter.numel() for parameter in model.parameters())
    if method.kind in _OUR_OWN:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(method.kind != FROZEN and _within(name, heads))
        active = _OUR_OWN[method.kind](method, model, places, seed)
        return _attached(method, model, heads, total=total, active=active)

    try:
        config = _config(method, places, slide_every=slide_every, total_steps=total_steps, seed=seed)
        if method.has_slices:
            config = dataclasses.replace(config, **slice_settings or {})
        beside = [name for name in find_norms(model) if not _within(name, heads)] if norms and method.has_slices else []
        if method.window is not None:
            config.depth_window, config.depth_every = _lowest(method.window, model, places), depth_every
        config.task_type = PEFT_TASKS.get(task)
        if heads or beside:
            config.modules_to_save = [*heads, *beside]
        adapted = get_peft_model(cast(Any, model), config)
    except (ValueError, TypeError, NotImplementedError, AttributeError) as error:  # PEFT's, and ours
        raise SliceFineError(str(error)) from error
    if method.has_slices:
        more = sum(p.numel() for name in beside for p in model.get_submodule(name).parameters() if p.requires_grad)
        active = parameter_counts(adapted).active + more
        return _attached(method, adapted, heads, total=total, active=active, norms=more)
    for name, parameter in adapted.named_parameters():
        if ".ranknum." in name:  # AdaLoRA's count of ranks, which PEFT trains on the meta device, and there alone
            parameter.requires_grad_(False)
    added = sum(p.numel() for name, p in adapted.named_parameters() if PREFIXES[method.kind] in name)
    if method.kind != ADALORA:
        return _attached(method, adapted, heads, total=total, added=added)
    # AdaLoRA's model adds a term to the loss; without a task, PEFT calls the base model past it.
    inner: Any = adapted.base_model
    _add_no_term_in_evaluations(inner)
    called = adapted if config.task_type else inner
    return _attached(method, called, heads, total=total, added=added, after_step=inner.update_and_allocate)


def _add_no_term_in_evaluations(tuner: Any) -> None:
    """Let AdaLoRA's model give the loss of the task alone where it is judged, as all others do."""
    with_term = tuner.forward
    tuner.forward = lambda *given, **more: (with_term if tuner.training else tuner.model)(*given, **more)


def _lowest(turns: int, model: nn.Module, places: Mapping[str, Place]) -> list[int]:
    """The lowest block of each turn of a depth window, evenly over the depth, the first block the first."""
    stack, problems = find_stack(model, places)
    raise_all(problems, "A depth window")
    blocks = sorted({block for name in places if (block := block_of(name, stack)) is not None})
    if turns > len(blocks):
        raise SliceFineError(f"{turns} turns of a depth window are more than the {len(blocks)} blocks of {stack}")
    return [blocks[turn * len(blocks) // turns] for turn in range(turns)]


def _config(
    method: Method, places: Mapping[str, Place], *, slide_every: int | None, total_steps: int, seed: int
) -> Any:
    """The settings that `methods.KINDS` has in words."""
    r, targets = method.r, list(places)
    assert r is not None
    turned = any(isinstance(place.module, Conv1D) for place in places.values())
    if method.kind in (SLICEFINE, ROCOFT):
        every = slide_every if method.kind == SLICEFINE else None
        assert method.axis is not None
        return SliceFineConfig(r=r, axis=method.axis, slide_every=every, target_modules=targets)
    if method.kind == LORA:
        return LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=0.0, fan_in_fan_out=turned, target_modules=targets)
    if method.kind == ADALORA:
        return AdaLoraConfig(
            target_r=r,
            init_r=_first_rank(r),
            tinit=total_steps // 25,
            tfinal=total_steps // 10,
            total_step=total_steps,
            fan_in_fan_out=turned,
            target_modules=targets,
        )
    if method.kind == VERA:
        return VeraConfig(r=r, fan_in_fan_out=turned, target_modules=targets)
    if method.kind == PREFIX:
        return PrefixTuningConfig(num_virtual_tokens=r)
    if method.kind == HRA:
        return HRAConfig(r=r, target_modules=targets)
    # Said outright, what torch does anyway: otherwise it warns in the first step.
    torch.sparse.check_sparse_tensor_invariants.disable()
    config = ShiraConfig(r=r, random_seed=seed, target_modules=targets)
    if any(place.stored.is_meta for place in places.values()):
        config.mask_fn = _first_weights
    return config


def _first_weights(base_layer: nn.Module, r: int, random_seed: int | None = None, **_: Any) -> torch.Tensor:
    """As many weights as SHiRA takes, no matter which: on the meta device none can be found by their values."""
    rows, columns = cast(nn.Linear, base_layer).weight.shape
    return (torch.arange(rows * columns) < r * (rows + columns)).view(rows, columns)


def _attached(
    method: Method,
    model: nn.Module,
    heads: Sequence[str],
    *,
    total: int,
    active: int | None = None,
    added: int = 0,
    norms: int = 0,
    after_step: Callable[[int], None] | None = None,
) -> Attached:
    """`active`: None = all that is trainable, heads left out."""
    trained = [(_within(name, heads), p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    head = sum(count for is_head, count in trained if is_head)
    rest = sum(count for is_head, count in trained if not is_head)
    counts = Counts(active=rest if active is None else active, head=head, added=added, total=total)
    return Attached(method=method, model=model, counts=counts, norms=norms, after_step=after_step)


def _frozen(method: Method, model: nn.Module, places: Mapping[str, Place], seed: int) -> None:
    # For a model of images these are the outputs of the patches: in every model the first block's input.
    cast(Any, model).enable_input_require_grads()


def _full(method: Method, model: nn.Module, places: Mapping[str, Place], seed: int) -> None:
    model.requires_grad_(True)


def _head_only(method: Method, model: nn.Module, places: Mapping[str, Place], seed: int) -> None:
    """Heads want gradients already."""


def _random_mask(method: Method, model: nn.Module, places: Mapping[str, Place], seed: int) -> int:
    assert method.r is not None
    counts = [method.r * place.shape[1] for place in places.values()]
    for number, (place, count) in enumerate(zip(places.values(), counts, strict=True)):
        weight = cast(nn.Parameter, place.stored)
        train_masked(weight, random_places(weight.shape, count, seed=seed * len(places) + number))
    return sum(counts)


def _block_mask(method: Method, model: nn.Module, places: Mapping[str, Place], seed: int) -> int:
    assert method.r is not None
    for place in places.values():
        weight = cast(nn.Parameter, place.stored)
        train_masked(weight, diagonal_blocks(weight.shape, method.r))
    return sum(diagonal_size(place.shape, method.r) for place in places.values())


def _split(axis: str, method: Method, model: nn.Module, places: Mapping[str, Place], seed: int) -> None:
    assert method.r is not None
    for name, place in places.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, SplitLinear(cast(nn.Linear, place.module), axis, method.r))


_OUR_OWN: dict[str, Callable[..., int | None]] = {
    FROZEN: _frozen,
    FULL: _full,
    HEAD_ONLY: _head_only,
    RANDOM_MASK: _random_mask,
    BLOCK_MASK: _block_mask,
    SPLIT_ROWS: partial(_split, ROW),
    SPLIT_COLUMNS: partial(_split, COLUMN),
}
"""Kind -> what makes the model ready where PEFT does not; returns how many parameters are trained, None where all that want a gradient are."""
