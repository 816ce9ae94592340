"""Short training runs from one start: slices as SliceFine trains them, all weights, or a new head alone; each with its best learning rate.

The runs see the same batches in the same order, in eval mode (no dropout), with AdamW without weight decay, gradients clipped to a norm of 1
and a learning rate that falls to zero in a straight line. New heads are trained along in full in every run, as SliceFine does.

A learning rate is chosen by the loss, after the last step, of training examples that were in none of the steps, and not by the held-out ones, by
which the runs are judged.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from slicefine.analysis.losses import mean_value, refuse_not_finite
from slicefine.analysis.material import Material
from slicefine.analysis.resumed import list_of
from slicefine.analysis.subject import Batch, Subject
from slicefine.analysis.tuned_head import head_of
from slicefine.errors import SliceFineError
from slicefine.tuner import SliceFineConfig, parameter_counts
from slicefine.tuner.config import ALL_LINEAR

CLIP = 1.0
Curve = list[list[float]]
"""`[optimizer steps, held-out loss]`"""
Prepare = Callable[[PreTrainedModel], nn.Module]
"""Makes what is trained of a copy of the start: all that wants gradients."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """A short run."""

    rate: float
    """Learning rate at its start."""
    curve: Curve
    """Begins with the loss at the start."""
    choosing: float
    """Loss, at the end, of the examples by which a rate is chosen; inf if it or the held-out loss is not finite."""
    active: int
    """Entries of slices that a step trains; 0 where none are."""

    @property
    def loss_after(self) -> float:
        """Held-out loss at the end."""
        return self.curve[-1][1]

    def summary(self) -> dict[str, object]:
        """As JSON values."""
        return {
            "learning_rate": self.rate,
            "loss_before": self.curve[0][1],
            "loss_after": self.loss_after,
            "curve": self.curve,
        }


class ShortRuns:
    """Runs that start alike.

    Args:
        start: The model to start from, its head fitted; it stays as it is.
        data: Its examples; there is a batch for every step.
        points: How many times a run is judged on the way and at its end.
        tell: Called after every run.
    """

    def __init__(
        self, subject: Subject, start: PreTrainedModel, data: Material, *, points: int, tell: Callable[[], None]
    ) -> None:
        if subject.new_modules and start.dtype == torch.float16:
            raise SliceFineError(
                "Short runs train the new head in the dtype of the weights, and in float16 the least numbers of AdamW are zero; got float16. Set "
                "--model.dtype bfloat16 or float32."
            )
        self._subject, self._start, self._data, self._tell = subject, start, data, tell
        self._judged = {round(point * self.steps / points) for point in range(1, points + 1)}
        self.before = self._mean(start, data.held_out)
        """Held-out loss at the start."""
        refuse_not_finite(self.before)

    @property
    def steps(self) -> int:
        """Of a run."""
        return len(self._data.train)

    def best(self, prepare: Prepare, rates: Sequence[float]) -> Course:
        """The run with the best of `rates`. Raises `SliceFineError` if the loss is not finite with any of them."""
        courses = [self._run(prepare(copy.deepcopy(self._start)), rate) for rate in rates]
        best = min(courses, key=lambda course: course.choosing)
        if not math.isfinite(best.choosing):
            raise SliceFineError(
                f"A short run needs a learning rate with which the loss stays finite; none of {list(rates)} is one, from a held-out loss of "
                f"{self.before:.4g} on. Look for NaN in the weights and in the data."
            )
        return best

    def _run(self, model: nn.Module, rate: float) -> Course:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        curve: Curve = [[0, self.before]]
        active = parameter_counts(model).active if isinstance(model, PeftModel) else 0
        for step, batch in enumerate(self._data.train):
            optimizer.param_groups[0]["lr"] = rate * (1 - step / self.steps)
            self._subject.loss(model, batch).backward()
            torch.nn.utils.clip_grad_norm_(trained, CLIP)
            optimizer.step()
            optimizer.zero_grad()
            if step + 1 in self._judged:
                curve.append([step + 1, self._mean(model, self._data.held_out)])
        choosing = self._mean(model, self._data.choosing)
        finite = all(math.isfinite(loss) for loss in (choosing, *(loss for _, loss in curve)))
        self._tell()
        return Course(rate=rate, curve=curve, choosing=choosing if finite else math.inf, active=active)

    def _mean(self, model: nn.Module, batches: Sequence[Batch]) -> float:
        return mean_value(lambda batch: self._subject.loss(model, batch), batches)


def slices(
    subject: Subject, *, r: int, axis: str, slide_every: int | None = None, blocks: Sequence[int] | None = None
) -> Prepare:
    """Train a slice of every weight as SliceFine does, or of those in some `blocks`, and the new head."""

    def prepare(model: PreTrainedModel) -> nn.Module:
        pattern = list_of(subject.places)
        config = SliceFineConfig(
            r=r,
            axis=axis,
            slide_every=slide_every,
            target_modules=ALL_LINEAR,
            layers_to_transform=None if blocks is None else list(blocks),
            layers_pattern=None if blocks is None or pattern is None else [pattern.rpartition(".")[2]],
            modules_to_save=subject.new_modules or None,
        )
        return get_peft_model(model, config).eval()

    return prepare


def everything(model: PreTrainedModel) -> nn.Module:
    """Train all weights, in fp32: rounded to fewer bits they would not take up small steps, as slices do in their fp32 masters."""
    return model.float().requires_grad_(True)


def head_alone(subject: Subject) -> Prepare:
    """Train the new head."""

    def prepare(model: PreTrainedModel) -> nn.Module:
        for parameter in head_of(subject, model):
            parameter.requires_grad_(True)
        return model

    return prepare
