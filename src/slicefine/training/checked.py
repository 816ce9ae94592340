"""Trainers that stop at NaN or Inf, before the optimizer makes it part of the weights, and that evaluations do not disturb."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slicefine.errors import SliceFineError, listed
from slicefine.training.random_state import RandomState

SHOWN = 3
MENDING = (
    "Lower `training.learning_rate`, clip more (`training.max_grad_norm`), or choose another `model.dtype` (float16 "
    "overflows where bfloat16 does not), in a new run."
)


class NotFiniteError(SliceFineError):
    """A loss or a gradient is NaN or Inf."""


class CheckedTrainer(Trainer):
    """A Trainer whose every step is checked between the backward pass and the clipping of gradients.

    The check is one norm over all gradients (a fused kernel) and one number read back from the device. It cannot wait for
    the callback before the optimizer step: clipping by a norm that is NaN has made every gradient NaN by then, and the
    layer it came from could not be named.
    """

    model: Any  # never None here, as Trainer's annotation allows

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._last_good = _LastGood()
        self.add_callback(self._last_good)
        self.add_callback(_Epoch())
        self.seconds_waited = 0.0
        """Time in which training stood still until its next batches were there."""

    def trial_loss(self, batch: dict[str, Any]) -> Tensor:
        """The loss of a batch as a training step computes it, without counting it as one."""
        with self.compute_loss_context_manager():
            return cast(Tensor, self.compute_loss(self.model, self._prepare_inputs(batch)))

    def own_problems(self) -> list[str]:
        """What is wrong with training such examples on such a model, beside what holds for all tasks; for the pre-flight."""
        return []

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; the time is taken."""
        began = time.perf_counter()
        try:
            return super().get_batch_samples(*args, **kwargs)
        finally:
            self.seconds_waited += time.perf_counter() - began

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """As Trainer's. Raises `NotFiniteError` that names step and layer, after a checkpoint of the step before."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not all_finite(model, loss):
            problem = not_finite(self, inputs, loss)
            raise NotFiniteError(f"Step {self.state.global_step + 1}: {problem} {self._keep_last_good()} {MENDING}")
        return loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's. What a loader draws is given back: how often a run is evaluated does not change what it trains."""
        with RandomState.now().restored():
            return super().evaluation_loop(*args, **kwargs)

    def _keep_last_good(self) -> str:
        """Make a checkpoint of the state after the last step, unless there is one; returns what was done."""
        step = self.state.global_step
        if step == 0:
            return "Nothing has been trained yet."
        place = Path(str(self.args.output_dir)) / f"checkpoint-{step}"
        if not place.is_dir():
            self.model.zero_grad()
            with self._last_good.random_state.restored():
                self._save_checkpoint(self.model, trial=None)
        return f"The optimizer was not run; {place} has the state after step {step}, the last good one."


class _LastGood(TrainerCallback):
    """Remembers the random state that a checkpoint of the last finished step would hold.

    Trainer resumes an epoch that has begun right before the next step, one that has not before its batches are drawn.
    """

    random_state: RandomState
    _at = -1

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._remember(state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step != self._at:
            self._remember(state.global_step)

    def _remember(self, step: int) -> None:
        self._at, self.random_state = step, RandomState.now()


class _Epoch(TrainerCallback):
    """Tells a data set that wants to know it which epoch begins: in a resumed one, accelerate does not."""

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if hasattr(train_dataloader.dataset, "set_epoch"):
            train_dataloader.dataset.set_epoch(int(state.epoch or 0))


def all_finite(model: nn.Module, loss: Tensor) -> bool:
    """Whether the loss and the norm of all gradients together are finite."""
    norm = torch.nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None)
    return bool(torch.isfinite(norm + loss.detach().to(norm.device)))


def not_finite(trainer: CheckedTrainer, batch: dict[str, Any], loss: Tensor) -> str:
    """Say what is not finite in a step whose backward pass is done, and where it begins."""
    if not bool(torch.isfinite(loss)):
        where = _first_not_finite(trainer, batch)
        begins = (
            f"the first layer whose output is not finite is {where}"
            if where
            else "the outputs of all layers are finite"
        )
        return f"the loss is {loss.item()}; {begins}."
    layers = [
        layer_of(name)
        for name, parameter in trainer.model.named_parameters()
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())
    ]
    if not layers:
        return f"all gradients are finite, but the norm of all of them together is not (loss {loss.item():.4g})."
    # Gradients come from the loss, so what is bad in one layer is bad in those before it.
    first = list(dict.fromkeys(reversed(layers)))
    return (
        f"the loss is {loss.item():.4g}, and the gradient is NaN or Inf in {len(first)} layers, from the loss on: "
        f"{listed(first, SHOWN)}."
    )


def _first_not_finite(trainer: CheckedTrainer, batch: dict[str, Any]) -> str | None:
    """The layer in which a forward pass of `batch` first gives NaN or Inf."""
    found: list[str] = []

    def hook(name: str, output: Any) -> None:
        tensors = output if isinstance(output, tuple | list) else [output]
        floats = [tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.is_floating_point()]
        if not found and not all(bool(torch.isfinite(tensor).all()) for tensor in floats):
            found.append(name)

    # Modules are done in order, those inside of others first.
    handles = [
        module.register_forward_hook(lambda _module, _args, output, name=name: hook(layer_of(name), output))
        for name, module in trainer.model.named_modules()
    ]
    try:
        with torch.no_grad():
            trainer.trial_loss(dict(batch))
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def layer_of(name: str) -> str:
    """The name, in the base model, of the layer that a parameter or module of the adapted model belongs to."""
    name = name.removeprefix("base_model.model.")
    for part in (".slicefine_weight", ".slicefine_bias", ".base_layer", ".modules_to_save"):
        name = name.partition(part)[0]
    return name.removesuffix(".weight").removesuffix(".bias")
