"""Losses of batches, their mean over all labels, and gradients with respect to weights that want none otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from slicefine.analysis.portions import LABELS, rows
from slicefine.analysis.subject import Batch
from slicefine.errors import SliceFineError

Loss = Callable[[Batch], Tensor]
"""Mean loss of a batch, a scalar in fp32."""
IGNORED = -100


def labels_in(batch: Batch) -> int:
    """How many labels there are to predict, at least 1: of a language model tokens, otherwise examples."""
    labels = batch.get(LABELS)
    return rows(batch) if labels is None else max(int((labels != IGNORED).sum()), 1)


def value(loss: Loss, batch: Batch) -> float:
    """The loss as a number."""
    with torch.no_grad():
        return float(loss(batch))


def gradients(loss: Loss, weights: Sequence[Tensor], batch: Batch) -> tuple[float, list[Tensor]]:
    """The loss and its gradients with respect to `weights`; zeros for a weight that it does not depend on."""
    with wanted(weights), torch.enable_grad():
        found = loss(batch)
        each = torch.autograd.grad(found, weights, allow_unused=True) if found.requires_grad else [None] * len(weights)
    return float(found.detach()), [torch.zeros_like(w) if g is None else g for g, w in zip(each, weights, strict=True)]


def refuse_not_finite(loss: float) -> None:
    """Raise `SliceFineError` if the loss at the start of trials and runs is not finite."""
    if not math.isfinite(loss):
        raise SliceFineError(
            f"What is trained is judged by a finite loss; before any step it is {loss}. Look for NaN in the weights and in the data."
        )


def mean_value(loss: Loss, batches: Sequence[Batch]) -> float:
    """Mean loss over all labels of `batches`."""
    counts = list(map(labels_in, batches))
    return sum(count * value(loss, batch) for count, batch in zip(counts, batches, strict=True)) / sum(counts)


def mean_gradients(loss: Loss, weights: Sequence[Tensor], batches: Sequence[Batch]) -> tuple[float, list[Tensor]]:
    """Mean loss over all labels of `batches`, and its gradients in fp32."""
    counts = list(map(labels_in, batches))
    totals, mean = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights], 0.0
    for count, batch in zip(counts, batches, strict=True):
        share = count / sum(counts)
        found, each = gradients(loss, weights, batch)
        mean += share * found
        for total, gradient in zip(totals, each, strict=True):
            total.add_(gradient, alpha=share)
    return mean, totals


@contextmanager
def wanted(weights: Sequence[Tensor]) -> Iterator[None]:
    """Let `weights`, which are leaves, want gradients for a while."""
    before = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight, was in zip(weights, before, strict=True):
            weight.requires_grad_(was)
