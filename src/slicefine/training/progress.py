"""Callbacks of `slicefine train`: the progress bar, the time of a step, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import nn
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slicefine.training.callback import progress, tuned_layers


class SliceFineProgress(ProgressCallback):
    """Trainer's progress bar, with the loss and the moves made and planned in place of printed logs."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        assert model is not None
        self._layers = tuned_layers(model)
        self._loss = float("nan")
        if self.training_bar is not None:
            self.training_bar.set_description("train")
            # After a resume the bar begins where the run stopped, and the time left is that of the steps left.
            self.training_bar.initial = self.training_bar.n = self.current_step = state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is None or not logs:
            return
        self._loss = logs.get("loss", self._loss)
        step, schedule = progress(self._layers)
        planned = schedule.moves(
            step + state.max_steps - state.global_step - 1
        )  # one after the last step trains nothing
        made = min(schedule.moves(step), planned)
        self.training_bar.set_postfix_str(f"loss {self._loss:.4g}, moves {made}/{planned}")


class StepTimer(TrainerCallback):
    """Seconds of each optimizer step: forward, backward and update, without validation and checkpoints."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._started)

    def summary(self, waited: float) -> dict[str, float]:
        """Times for the record. `waited`: seconds, outside of these steps, in which they stood still for want of data."""
        if not self.seconds:
            return {}
        return {
            "step_seconds_mean": round(statistics.fmean(self.seconds), 6),
            "step_seconds_median": round(statistics.median(self.seconds), 6),
            "data_wait_share": round(waited / (waited + sum(self.seconds)), 4),
        }


class Interrupt(TrainerCallback):
    """Ctrl-C, or the SIGTERM of a scheduler, ends the run after the step at hand, with a checkpoint; a second one at once."""

    asked = False

    def __init__(self) -> None:
        self._process = os.getpid()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals over, where Python lets us: in the main thread."""
        try:
            before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a process that prepares batches has inherited this handler
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.asked = True
        for again in (signal.SIGINT, signal.SIGTERM):
            signal.signal(again, signal.default_int_handler)
        print("\nStopping after this step, with a checkpoint. Ctrl-C again stops at once.", file=sys.stderr)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Trainer ends the epoch when it is told to stop. Validating draws random numbers: a run that is to go on as if it had
        # never been stopped validates where an epoch really ends, before its checkpoint, and nowhere else.
        if (
            self.asked and control.should_training_stop
        ):  # and not asked since the step ended: then the next step is the last
            ended = state.epoch is not None and float(state.epoch).is_integer()
            control.should_evaluate = control.should_evaluate and ended
            control.should_save = ended
