"""A new head, fitted to what the frozen model gives: where trials of slices start from. Our choice; the paper has no such step.

With a head of random weights, a loss falls first of all by what the head learns, and while it is frozen at random the features below cannot
be judged: a slice would be rewarded for serving a head that knows nothing. So the head is fitted first, by the same protocol for every model,
and "a slice lowers the loss" means: below what the best head makes of the features as they are.

The loss of some training examples is lowered in full batches by L-BFGS, under a penalty on the squared distance from where the head began.
The penalty is lessened by and by, and kept where the loss of other training examples was least; without it, a head of hundreds of weights for
each class has soon learned the examples by heart. Held-out examples have no part in it. Language models have no new head, and start as
they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slicefine.analysis.losses import mean_gradients, mean_value, refuse_not_finite
from slicefine.analysis.resumed import Resumed, stack_of
from slicefine.analysis.subject import Batch, Subject

PENALTIES = tuple(10.0**-power for power in range(2, 9))
"""On the squared distance, summed over all weights: from what hardly lets the head move to what leaves it free."""


def head_of(subject: Subject, model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the new modules of `model`."""
    return [parameter for name in subject.new_modules for parameter in model.get_submodule(name).parameters()]


def tune_head(
    subject: Subject, model: nn.Module, fitted: Sequence[Batch], watched: Sequence[Batch], *, iterations: int
) -> dict[str, Any]:
    """Fit the new modules of `model` in place, and nothing else; does nothing where there are none.

    Args:
        fitted: Training examples whose loss is lowered.
        watched: Other training examples, by whose loss the penalty is chosen.
        iterations: Of L-BFGS for each penalty.

    Returns the `penalty`, and the loss of `watched` `before` and `after`; None where there is no head, or none that is better.
    """
    head = head_of(subject, model)
    if not head:
        return {"penalty": None, "before": None, "after": None}
    resumed = Resumed(subject, model, stack_of(model, subject.places), head)
    began = [parameter.detach().float().clone() for parameter in head]
    masters = [values.clone() for values in began]  # fp32 of a head in bf16

    def show(values: Sequence[Tensor]) -> None:
        for parameter, value in zip(head, values, strict=True):
            parameter.data.copy_(value)

    def fit(penalty: float) -> None:
        def closure() -> float:
            show(masters)
            loss, gradients = mean_gradients(resumed.loss, head, fitted)
            for master, start, gradient in zip(masters, began, gradients, strict=True):
                loss += penalty * float((master - start).square().sum())
                master.grad = gradient.add_(master - start, alpha=2 * penalty)
            return loss

        torch.optim.LBFGS(masters, max_iter=iterations, history_size=20, line_search_fn="strong_wolfe").step(closure)
        show(masters)

    chosen, kept = None, began
    try:
        before = best = mean_value(resumed.loss, watched)
        refuse_not_finite(before)
        for penalty in PENALTIES:
            fit(penalty)
            loss = mean_value(resumed.loss, watched)
            if loss < best:
                best, chosen, kept = loss, penalty, [master.clone() for master in masters]
            elif chosen is not None or not math.isfinite(loss):
                break
    finally:
        show(kept)
    return {"penalty": chosen, "before": before, "after": best}
