"""One batch, forward and back and one optimizer step, before a long run begins: does it train what it is to train?

What is found: labels or tokens out of range, nothing to learn in the batch, a loss or gradient that is NaN or Inf, slices
that no gradient reaches, weights that a step does not change. Nothing is left behind: weights, parameters, positions,
buffers and random state are bit for bit what they were.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from slicefine.errors import SHOWN, SliceFineWarning, listed, raise_all
from slicefine.kernel import vectors
from slicefine.training.callback import tuned_layers
from slicefine.training.checked import CheckedTrainer, all_finite, not_finite
from slicefine.training.checkpointing import enable_checkpointing
from slicefine.training.random_state import RandomState
from slicefine.tuner.layer import SliceLayer

IGNORED = -100
"""A label that torch's losses pass over."""


def preflight(trainer: CheckedTrainer) -> None:
    """Try the first batch of training examples. Raises `SliceFineError` with what would go wrong, layer by layer.

    Warns (`SliceFineWarning`) of slices whose gradient is exactly zero. Costs little more than a training step.
    """
    dataset: Any = trainer.train_dataset
    size = min(trainer.args.per_device_train_batch_size, len(dataset))
    before = RandomState.now()
    try:
        batch = trainer.data_collator([dataset[number] for number in range(size)])
        raise_all(_batch_problems(trainer, batch), "Pre-flight, first batch")
        with _unchanged(trainer.model):
            raise_all(trainer.own_problems(), "Pre-flight")
            raise_all(_step_problems(trainer, batch), "Pre-flight, first step")
    finally:
        before.restore()


def _batch_problems(trainer: CheckedTrainer, batch: dict[str, Tensor]) -> list[str]:
    """What is wrong with tokens and labels: found here, and not by an assertion on a GPU."""
    model: Any = trainer.model
    problems = []
    tokens, labels = batch.get("input_ids"), batch["labels"]
    embedding = None if tokens is None else model.get_input_embeddings()  # models of images may have none
    if tokens is not None and isinstance(embedding, nn.Embedding) and int(tokens.max()) >= embedding.num_embeddings:
        problems.append(
            f"token {int(tokens.max())} is out of range; the model knows {embedding.num_embeddings} tokens. The tokenizer is "
            "not that of the model."
        )
    if labels.is_floating_point():
        return problems
    counted = labels[labels != IGNORED]
    if not counted.numel():
        return [*problems, f"no label counts: all {labels.numel()} are {IGNORED}, so there is nothing to learn."]
    head = model.get_output_embeddings()
    classes = head.weight.shape[0] if labels.dim() > 1 and head is not None else model.config.num_labels
    for bad in {int(counted.min()), int(counted.max())}:
        if not 0 <= bad < classes:
            problems.append(f"label {bad} is out of range; the model has {classes} outputs, 0 to {classes - 1}.")
    return problems


def _step_problems(trainer: CheckedTrainer, batch: dict[str, Tensor]) -> list[str]:
    layers = {name: layer for name, layer in tuned_layers(trainer.model).items() if not layer.state.resting}
    if trainer.args.activation_checkpointing:  # as Trainer does when training begins
        enable_checkpointing(trainer.model, trainer.args.activation_checkpointing_kwargs)
    with _calls(trainer.model, layers) as called:
        loss = trainer.trial_loss(dict(batch))
    if loss.requires_grad:
        loss.backward()
    gradients = {name: _masters(layer)[0].grad for name, layer in layers.items()}
    unreached = [name for name, gradient in gradients.items() if gradient is None]
    if unreached:
        return _unreached_problems(trainer, unreached, called)
    reached = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    if not all_finite(trainer.model, loss):
        return [not_finite(trainer, batch, loss)]
    zero = [name for name, gradient in reached.items() if not bool(gradient.any())]
    if len(zero) == len(layers):
        return ["the gradient of every slice is exactly zero: nothing would be learned. Is the loss a constant?"]
    if zero:
        warnings.warn(
            f"On the first batch the gradient of {len(zero)} of {len(layers)} slices is exactly zero: {listed(zero, SHOWN)}. Rows that "
            "are never active (ReLU), experts that were not chosen and attention over a single token do this; slices that never "
            "change are named again when the run ends.",
            SliceFineWarning,
            stacklevel=3,
        )
    still = [name for name in _unchanged_by_a_step(trainer, layers) if name not in zero]
    if not still:
        return []
    return [
        f"a step of the optimizer at the peak learning rate ({trainer.args.learning_rate}) does not change the weight of "
        f"{len(still)} of {len(layers)} targets: {listed(still, SHOWN)}. The learning rate is too small for the number format: raise "
        "it, or load the model in float32."
    ]


def _unreached_problems(trainer: CheckedTrainer, unreached: list[str], called: set[str]) -> list[str]:
    """Why no gradient reaches these slices, as far as it can be told from what was called."""
    causes: dict[str, list[str]] = {}
    for name in unreached:
        if name not in called and name.rpartition(".")[0] in called:
            cause = (
                "the layer was not called, though the module around it was: a fused kernel that uses the weight itself "
                "bypasses the layer's forward, or the module does not use it. Switch the kernel off, or leave the layer "
                "out with `slice.exclude_modules`"
            )
        elif name not in called:
            cause = (
                "the model never calls the layer for such examples (the vision part of a model that reads text, say). "
                "Leave it out with `slice.exclude_modules`"
            )
        elif trainer.args.activation_checkpointing:
            cause = (
                "the layer was called, and the checkpoint around it has no input that wants a gradient: frozen inputs "
                "under activation checkpointing. Call `model.enable_input_require_grads()`, use checkpointing with "
                "use_reentrant=False, or set `training.activation_checkpointing` to false"
            )
        else:
            cause = (
                "the layer was called, and the loss does not depend on its output: the output is unused, detached or "
                "computed under no_grad. Leave the layer out with `slice.exclude_modules`"
            )
        causes.setdefault(cause, []).append(name)
    return [f"no gradient reaches {listed(names, SHOWN)}: {cause}." for cause, names in causes.items()]


@contextmanager
def _calls(model: nn.Module, layers: dict[str, SliceLayer]) -> Iterator[set[str]]:
    """The names of those targets, and of the modules right around them, that are called within this context."""
    called: set[str] = set()
    wanted = {*layers, *(name.rpartition(".")[0] for name in layers)}
    with ExitStack() as stack:
        for full_name, module in model.named_modules():
            name = full_name.removeprefix("base_model.model.")
            if name in wanted:
                hook = module.register_forward_pre_hook(lambda _module, _args, name=name: called.add(name))
                stack.callback(hook.remove)
        yield called


def _unchanged_by_a_step(trainer: CheckedTrainer, layers: dict[str, SliceLayer]) -> list[str]:
    """Targets of which one step of the run's optimizer changes no bit. The steps are made, and count."""
    before = {name: _active_values(layer) for name, layer in layers.items()}
    places = {name: layer.state.active for name, layer in layers.items()}
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(trainer.args)
    masters = [master for layer in layers.values() for master in _masters(layer)]
    kind(masters, **settings | {"weight_decay": 0.0}).step()
    return [
        name
        for name, layer in layers.items()
        if torch.equal(vectors(layer.matrix, places[name].axis)[[*places[name].indices]], before[name])
    ]


def _masters(layer: SliceLayer) -> list[nn.Parameter]:
    adapter: Any = layer.installed
    return [held[adapter] for held in (layer.slicefine_weight, layer.slicefine_bias) if adapter in held]


def _active_values(layer: SliceLayer) -> Tensor:
    """A copy of the rows or columns of the weight that the next step trains."""
    piece = layer.state.active
    return vectors(layer.matrix.detach(), piece.axis)[[*piece.indices]]


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """After this context the model is, bit by bit, what it was before: for one optimizer step of the slices at most.

    A step writes the active slice and the bias of a target; all else that it changes is in the target's state dict.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    kept = []
    for layer in tuned_layers(model).values():
        weight = layer.matrix
        state = {name: value.clone() for name, value in layer.state_dict().items() if name.startswith("slicefine_")}
        kept.append((layer, weight, layer.state.active, _active_values(layer), state))
    model.train()
    try:
        yield
    finally:
        model.zero_grad()
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for layer, weight, piece, values, state in kept:
                vectors(weight, piece.axis)[[*piece.indices]] = values
                if (bias := f"slicefine_bias.{layer.installed}") in state:
                    cast(Tensor, layer.place.bias).copy_(state[bias])
                # The weight itself: a layer takes no position without values, and copying a tensor to itself is free.
                layer.load_state_dict(state | {layer.weight_key: layer.place.stored}, strict=False)
            for buffer, value in buffers:
                buffer.copy_(value)
