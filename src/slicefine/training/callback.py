"""`SliceFineCallback` for transformers' Trainer: what the slices do, in its logs.

Training does not need it: slices are trained and moved by the optimizer itself.
"""

from __future__ import annotations

import statistics
import warnings
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import GreedyLR, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slicefine.errors import SliceFineError, SliceFineWarning, listed
from slicefine.slicing import Slice
from slicefine.tuner.inspection import active_slices, tuned, unmoved, update_norm, update_norms
from slicefine.tuner.layer import SliceLayer

# The authors' runs make 5 to 10 moves.
GOOD_MOVES = 8
SHOWN_NAMES = 8


class SliceFineCallback(TrainerCallback):
    """Log what the slices do, and warn where they cannot do what was meant.

    Adds to each of Trainer's training logs:

    - `slicefine/moves`: moves made so far;
    - `slicefine/position`: first index of the active slice of the first target;
    - `slicefine/update_norm_mean`, `slicefine/update_norm_max`: over the targets, `||now - original|| / ||original||` of
      the active slice;
    - `slicefine/update_norm/<target>`, in the first log after a move: the same for the slice that has been finished;
    - `slicefine/position/<target>`, in the first log and in the first one after a move: the first index of the active slice.

    Trackers see these values if their callback stands after this one:
    `Trainer(..., callbacks=[SliceFineCallback(), TensorBoardCallback()])` with `report_to="none"`.

    Warns (`SliceFineWarning`) when the run begins if it is too short to train some targets, or for a single move of their
    slices, and when it ends of targets whose slices did not change. Raises `SliceFineError` under FSDP, DeepSpeed and
    `nn.DataParallel`, and when Trainer has resumed from a checkpoint without the state of optimizer and scheduler.

    Args:
        allow_inexact_resume: Let such a run go on, with a new optimizer and the learning rate from its beginning.
    """

    def __init__(self, *, allow_inexact_resume: bool = False) -> None:
        self._allow_inexact_resume = allow_inexact_resume

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        _refuse_unsupported(args)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        _refuse_unsupported(args)
        assert model is not None
        self._layers = tuned_layers(model)
        if not self._allow_inexact_resume:
            _refuse_lost_optimizer(self._layers, state.global_step, lr_scheduler)
        self._moves = _moves(self._layers)
        self._at_move: dict[str, float] = {} if state.global_step else _positions(self._layers)
        _warn_if_too_short(self._layers, steps_to_go=state.max_steps - state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if (moves := _moves(self._layers)) != self._moves:
            self._moves = moves
            self._at_move = _positions(self._layers) | {
                f"slicefine/update_norm/{name}": update_norm(layer, _finished_slice(layer))
                for name, layer in self._layers.items()
                if _finished_slice(layer) != layer.state.active
            }

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or model is None or "loss" not in logs:  # a validation, or the summary at the end
            return
        for layer in self._layers.values():
            layer.check_written()
        norms = update_norms(model).values()
        values = {
            "slicefine/moves": self._moves,
            "slicefine/position": next(iter(active_slices(model).values())).start,
            "slicefine/update_norm_mean": statistics.fmean(norms),
            "slicefine/update_norm_max": max(norms),
            **self._at_move,
        }
        self._at_move = {}
        logs.update(values)
        state.log_history[-1].update(values)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        for layer in self._layers.values():
            layer.check_written()
        still = unmoved(model)
        if still:
            warnings.warn(
                f"Training changed nothing in the slices of {len(still)} of {len(self._layers)} targets: "
                f"{listed(still, SHOWN_NAMES)}. Either no gradient reaches these layers, or the learning "
                f"rate ({args.learning_rate}) is too small for their number format. Leave them out with `exclude_modules`, "
                "raise the learning rate, or load the model in float32.",
                SliceFineWarning,
                stacklevel=2,
            )


def tuned_layers(model: nn.Module) -> dict[str, SliceLayer]:
    """Target name -> its layer. Raises `SliceFineError` if no slicefine adapter is active in `model`."""
    layers = {name: layer for name, layer, _ in tuned(model)}
    if not layers:
        raise SliceFineError(
            "Training needs an active slicefine adapter; that of the model is disabled. Activate it with `set_adapter`."
        )
    return layers


def progress(layers: dict[str, SliceLayer]) -> tuple[int, Any]:
    """Optimizer steps made and the schedule; all layers of an adapter that no depth window lets rest agree on both."""
    states = [layer.state for layer in layers.values()]
    state = next((one for one in states if not one.schedule.rests), states[-1])
    return state.step, state.schedule


def _moves(layers: dict[str, SliceLayer]) -> int:
    step, schedule = progress(layers)
    return schedule.moves(step)


def _positions(layers: dict[str, SliceLayer]) -> dict[str, float]:
    return {f"slicefine/position/{name}": layer.state.active.start for name, layer in layers.items()}


def _finished_slice(layer: SliceLayer) -> Slice:
    state = layer.state
    return state.schedule.slice_at(state.step - 1, layer.shape)


def _refuse_unsupported(args: TrainingArguments) -> None:
    engines = [name for name, used in (("FSDP", args.fsdp), ("DeepSpeed", args.deepspeed)) if used]
    if engines:
        raise SliceFineError(
            f"{' and '.join(engines)} cut the parameters that slices live in, which is not supported yet. Train on one "
            "device or with plain data parallelism (DDP): leave `fsdp` and `deepspeed` out of TrainingArguments."
        )
    if args.n_gpu > 1:
        raise SliceFineError(
            f"Trainer would use nn.DataParallel over {args.n_gpu} GPUs, whose replicas lose the slices. Show it one "
            "GPU (CUDA_VISIBLE_DEVICES=0), or start one process per GPU with torchrun."
        )


def _refuse_lost_optimizer(layers: dict[str, SliceLayer], resumed_at: int, scheduler: Any) -> None:
    """Raise if Trainer has resumed without the state of optimizer and scheduler: it loads both or, without a word, neither.

    A scheduler at its beginning after steps have been made shows it; the optimizer's state does not, as it may be empty by
    right. Schedulers that do not count optimizer steps tell nothing.
    """
    made, _ = progress(layers)
    if not resumed_at or not made or isinstance(scheduler, ReduceLROnPlateau | GreedyLR):
        return
    if getattr(scheduler, "last_epoch", None) == 0:
        raise SliceFineError(
            f"The checkpoint of step {resumed_at} has no optimizer.pt or no scheduler.pt, so Trainer has started with a new "
            "optimizer and the learning rate from its beginning: the run would end differently from one that was never "
            "stopped. Resume from a complete checkpoint (save_only_model=False), or accept the difference with "
            "SliceFineCallback(allow_inexact_resume=True)."
        )


def _warn_if_too_short(layers: dict[str, SliceLayer], steps_to_go: int) -> None:
    """Warn of targets that the run never trains, and of those whose slices never move though they could."""
    step, schedule = progress(layers)
    end, every = step + steps_to_go, schedule.slide_every
    own = {name: layer.state.schedule.own(layer.state.step + steps_to_go) for name, layer in layers.items()}
    windows = {name: layer.state.schedule.window for name, layer in layers.items()}
    untrained = {name: window for name, window in windows.items() if window is not None and not own[name]}
    if untrained:
        window = next(iter(untrained.values()))
        turns = len(window.lowest)
        warnings.warn(
            f"The run ends after {end} optimizer steps, before `depth_window`, {turns} turns of {window.every} steps each, comes to "
            f"{len(untrained)} of {len(layers)} targets: nothing is trained in {listed(untrained, SHOWN_NAMES)}. Set "
            f"depth_every={max(1, end // turns)}, or train longer.",
            SliceFineWarning,
            stacklevel=2,
        )
    movable = [name for name, layer in layers.items() if not layer.state.schedule.confined(layer.shape)]
    # A move after the last step that trains a weight would train nothing.
    still = [name for name in movable if every is not None and name not in untrained and own[name] <= every]
    if not still:
        return
    least = min(own[name] for name in still)
    rested = f", of which `depth_window` leaves {least} to {listed(still, SHOWN_NAMES)}," if least < end else ""
    fitting = max(1, least // GOOD_MOVES)
    warnings.warn(
        f"The run ends after {end} optimizer steps{rested} and the slices move every {every}: {'there ' if rested else ''}they never move, and "
        f"one position of each weight is all that is trained. Set slide_every={fitting} ({max(least - 1, 0) // fitting} "
        "moves; the paper's runs make 5 to 10), train longer, or set slide_every=None (null in a recipe) if this is what you want.",
        SliceFineWarning,
        stacklevel=2,
    )
