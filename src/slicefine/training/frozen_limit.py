"""How near a run's training step is to the frozen limit: the same step with nothing trainable."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from slicefine.training.checked import CheckedTrainer

ROUNDS = 5
SHARE = 0.02
"""Of the time of a run, at most, that is spent on this."""


def measure(trainer: CheckedTrainer, seconds: float, step_seconds: float) -> dict[str, float] | None:
    """Time of forward and backward pass over that of the frozen limit: median, least and greatest of `ROUNDS` interleaved ones.

    Both passes are over the run's first batch; the update, about a hundredth of a step, is left out, for it would change the model.
    None where it would take more than `SHARE` of the run, or gradients cannot be made to flow from the input embeddings of the model on.

    Args:
        trainer: Of a run that has ended.
        seconds: How long the run has trained.
        step_seconds: How long one step took.
    """
    if 2 * (ROUNDS + 1) * step_seconds > SHARE * seconds:
        return None
    try:
        return _measured(trainer)
    except (
        Exception
    ):  # a figure beside the run, which has ended well: some models (Swin, BART) take no gradient where they begin
        return None
    finally:
        trainer.model.zero_grad()
        trainer.model.eval()


def _measured(trainer: CheckedTrainer) -> dict[str, float]:
    dataset: Any = trainer.train_dataset
    size = min(trainer.args.per_device_train_batch_size, len(dataset))
    batch = trainer.data_collator([dataset[number] for number in range(size)])
    embeddings = trainer.model.get_input_embeddings()
    trainer.model.train()
    ratios = []
    for number in range(ROUNDS + 1):  # the first one warms up
        own = _seconds(trainer, batch)
        with _frozen(trainer.model, embeddings):
            limit = _seconds(trainer, batch)
        if number:
            ratios.append(own / limit)
    return {"median": statistics.median(ratios), "least": min(ratios), "greatest": max(ratios)}


def _seconds(trainer: CheckedTrainer, batch: dict[str, Any]) -> float:
    _wait()
    began = time.perf_counter()
    trainer.trial_loss(dict(batch)).backward()
    _wait()
    return time.perf_counter() - began


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


@contextmanager
def _frozen(model: nn.Module, embeddings: nn.Module) -> Iterator[None]:
    """Within this context nothing is trainable, and gradients flow through all activations."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handle = embeddings.register_forward_hook(lambda _module, _args, output: output.requires_grad_(True))
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
