"""One run of a comparison: a method trains a task's model with the trainer that `slicefine train` uses, and is judged."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch import nn
from transformers import EvalPrediction, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slicefine.benchmarking.ablations import CarriedMoments, Rewarm, slices_of
from slicefine.benchmarking.attaching import Attached, attach
from slicefine.benchmarking.cells import Outcome
from slicefine.benchmarking.methods import MASKS
from slicefine.benchmarking.models import TEXT
from slicefine.benchmarking.suite import QualityTask
from slicefine.benchmarking.timing import release
from slicefine.benchmarking.variants import CARRIED, TRAINED, Variant
from slicefine.errors import SliceFineError
from slicefine.training.checked import CheckedTrainer, NotFiniteError
from slicefine.training.checkpointing import enable_checkpointing
from slicefine.training.metrics import Scores
from slicefine.training.progress import StepTimer
from slicefine.training.recipe import DataSettings, Recipe
from slicefine.training.record import commit, hardware, now, versions
from slicefine.training.tasks import Prepared, get_task
from slicefine.training.trainer import make_arguments, make_trainer
from slicefine.tuner import parameter_counts

JUDGE = "judge"
"""Begins the names of Trainer's figures for the examples that judge, which are no part of the curve."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that decides a run."""

    task: QualityTask
    variant: Variant
    learning_rate: float
    seed: int
    steps: int
    final_steps: int
    """Length of a final run: shorter ones have as many moves."""
    evaluations: int
    """How often the examples that choose are scored, the last time after the last step."""
    final: bool
    depth_every: int = 25
    """Optimizer steps of each turn of a depth window."""


def fit(job: Job) -> Outcome:
    """Train and judge. A loss, a gradient or an output that is not finite is an outcome; all else that goes wrong is raised."""
    transformers.utils.logging.set_verbosity_error()
    release()  # what the last run of this process has left: its memory is none of this one's
    prepared = prepare(job.task.recipe, job.seed)
    attached = attach_to(prepared, job)
    transformers.set_seed(
        job.seed
    )  # some methods have drawn initial values; batches and dropout are to be the same for all
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(job, prepared, attached, Path(folder))
        timer = StepTimer()
        trainer.add_callback(timer)
        diverged = None
        try:
            trainer.train()
            judged = _judge(trainer, job, prepared) if job.final else _last(_curve(trainer))
            if not math.isfinite(judged["loss"]):
                raise NotFiniteError(
                    f"The loss of the examples that {'judge' if job.final else 'choose'} is {judged['loss']}."
                )
        except NotFiniteError as error:
            diverged = str(error).partition(". ")[0].rstrip(".")  # without what to do about it in a run of one's own
            judged = {"loss": None, "scores": {}}
    counts = attached.counts
    return Outcome(
        active=counts.active,
        touched=_touched(attached, job.steps),
        head=counts.head,
        added=counts.added,
        total=counts.total,
        steps=trainer.state.global_step,
        curve=_curve(trainer),
        seconds=round(sum(timer.seconds), 3),
        peak_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        reserved_bytes=torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None,
        peft_config=_settings_of(attached),
        diverged=diverged,
        made={"at": now(), "commit": commit(), "machine": {"hardware": hardware(), "versions": versions()}},
        **judged,
    )


def prepare(recipe: Recipe, seed: int) -> Prepared:
    """Model and examples; a new head is drawn with `seed`. Texts to judge by are in the order of their lengths: less padding."""
    transformers.set_seed(seed)
    examples = _examples(recipe.task, json.dumps(dataclasses.asdict(recipe.data)))
    prepared = get_task(recipe.task).prepare(recipe, examples)
    if recipe.training.activation_checkpointing:  # now: there are methods that cannot be attached to such a model
        enable_checkpointing(prepared.model)
    validation = _by_length(prepared.validation) if recipe.task == TEXT else prepared.validation
    return dataclasses.replace(prepared, validation=validation, compute_metrics=_of_finite(prepared.compute_metrics))


@functools.lru_cache(maxsize=16)
def _examples(task: str, data: str) -> Any:
    return get_task(task).read(DataSettings(**json.loads(data)))


def _of_finite(scores: Scores | None) -> Scores | None:
    """`scores`, which may refuse outputs that are not finite, or make something of them."""
    if scores is None:
        return None

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        if not np.isfinite(_outputs(prediction.predictions)).all():
            raise NotFiniteError("The outputs of the model are not finite.")
        return scores(prediction)

    return compute


def _outputs(predictions: Any) -> np.ndarray[Any, Any]:
    return np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions)


def _by_length(examples: Any) -> Any:
    lengths = [len(tokens) for tokens in examples["input_ids"]]
    return examples.select(sorted(range(len(lengths)), key=lengths.__getitem__))


def misfit(variant: Variant, recipe: Recipe) -> str | None:
    """Why the method cannot be trained by the recipe, whatever the model; None if it can."""
    decay = recipe.training.weight_decay
    if decay and variant.method.kind in MASKS:
        return f"weight decay ({decay:g}) would change the weights that are not of the mask, too"
    return None


def attach_to(prepared: Prepared, job: Job) -> Attached:
    """The method on the model. Raises `SliceFineError` with the reason if it cannot be."""
    if why := misfit(job.variant, job.task.recipe):
        raise SliceFineError(why)
    return attach(
        job.variant.method,
        prepared.model,
        task=job.task.recipe.task,
        heads=prepared.new_modules,
        slide_every=job.variant.every(job.steps, job.final_steps),
        total_steps=job.steps,
        seed=job.seed,
        depth_every=job.depth_every,
        slice_settings=job.variant.slice_settings,
        norms=job.variant.norms == TRAINED,
    )


def trainer_of(job: Job, prepared: Prepared, attached: Attached, folder: Path) -> CheckedTrainer:
    """The trainer of the task, with what the method wants done after a step."""
    recipe, model = job.task.recipe, attached.model
    task = get_task(recipe.task)
    changes: dict[str, Any] = {"train_sampling_strategy": "group_by_length"} if recipe.task == TEXT else {}
    arguments = make_arguments(
        recipe,
        task,
        folder,
        max_steps=job.steps,
        learning_rate=job.learning_rate,
        seed=job.seed,
        data_seed=job.seed,
        report_to="none",
        save_strategy="no",
        eval_strategy="steps",
        eval_steps=max(1, job.steps // job.evaluations),
        logging_steps=job.steps,
        **changes,
    )
    callbacks: list[TrainerCallback] = []
    if attached.after_step is not None:
        callbacks.append(_AfterStep(attached))
    callbacks += _of_ablation(job, model)
    return make_trainer(task, prepared, cast(Any, model), arguments, callbacks)


def _of_ablation(job: Job, model: nn.Module) -> list[TrainerCallback]:
    every = job.variant.every(job.steps, job.final_steps)
    if every is None or not job.variant.method.has_slices:
        return []
    made: list[TrainerCallback] = []
    if job.variant.moments == CARRIED:
        made.append(CarriedMoments(slices_of(model)))
    if job.variant.rewarm:
        steps = job.variant.rewarmed(job.steps, job.final_steps)
        made.append(Rewarm(slices_of(model), steps=steps, slide_every=every))
    return made


class _AfterStep(TrainerCallback):
    def __init__(self, attached: Attached) -> None:
        self._attached = attached

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._attached.after_step is not None
        self._attached.after_step(state.global_step)


def _judge(trainer: CheckedTrainer, job: Job, prepared: Prepared) -> dict[str, Any]:
    """Loss, scores and predictions of the examples that nothing was chosen on."""
    test = prepare(job.task.judging, job.seed).validation
    if prepared.compute_metrics is None:
        return _last([_as_named(trainer.evaluate(cast(Any, test), metric_key_prefix=JUDGE), job.steps)])
    # One order for all seeds: with this setting Trainer shuffles what it evaluates, too. Predictions are compared one by one.
    trainer.args.train_sampling_strategy = "random"
    found = trainer.predict(cast(Any, test), metric_key_prefix=JUDGE)
    outputs = _outputs(found.predictions)
    predicted = np.argmax(outputs, axis=-1) if outputs.shape[-1] > 1 else outputs[:, 0]
    labels = np.asarray(found.label_ids)
    judged = _last([_as_named(found.metrics or {}, job.steps)])
    return judged | {"predicted": predicted.tolist(), "labels": labels.tolist()}


def _as_named(judged: Mapping[str, float], step: int) -> dict[str, float]:
    figures = {f"eval_{key.removeprefix(f'{JUDGE}_')}": value for key, value in judged.items()}
    return _named(figures | {"step": step})


def _curve(trainer: CheckedTrainer) -> list[dict[str, float]]:
    return [_named(entry) for entry in trainer.state.log_history if "eval_loss" in entry]


def _named(metrics: Mapping[str, float]) -> dict[str, float]:
    """The loss and the scores among Trainer's figures, and the step."""
    others = ("epoch", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    named = {key.removeprefix("eval_"): value for key, value in metrics.items() if key.startswith("eval_")}
    return {"step": metrics["step"]} | {key: value for key, value in named.items() if key not in others}


def _last(curve: list[dict[str, float]]) -> dict[str, Any]:
    last = curve[-1]
    return {"loss": last["loss"], "scores": {key: value for key, value in last.items() if key not in ("step", "loss")}}


def _settings_of(attached: Attached) -> dict[str, Any] | None:
    config = getattr(attached.model, "peft_config", {}).get("default")
    # What JSON has no form for, PEFT's enums and sets, is written as text.
    return None if config is None else json.loads(json.dumps(config.to_dict(), default=_plain))


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _touched(attached: Attached, steps: int) -> int:
    if not attached.method.has_slices:
        return attached.counts.active
    counts = parameter_counts(attached.model, steps)
    assert counts.planned is not None
    return counts.planned + attached.norms
