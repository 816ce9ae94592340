"""One run from a recipe to a run folder (see `folder.py`).

Everything that can be wrong is found before the folder is made.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from peft import TaskType, get_peft_model
from peft.peft_model import PeftModel
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from transformers import TrainerCallback, TrainerState
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    get_available_reporting_integrations,
)

from slicefine.errors import SliceFineError, did_you_mean, first_line, raise_all
from slicefine.training import folder as folders
from slicefine.training import frozen_limit, history, movement
from slicefine.training import record as records
from slicefine.training.callback import SliceFineCallback
from slicefine.training.checked import CheckedTrainer
from slicefine.training.hub import model_problem
from slicefine.training.precision import bf16_notes
from slicefine.training.preflight import preflight
from slicefine.training.progress import Interrupt, SliceFineProgress, StepTimer
from slicefine.training.recipe import Recipe
from slicefine.training.record import RunRecord
from slicefine.training.tasks import Prepared, Task, get_task
from slicefine.training.trainer import make_arguments, make_trainer, trackers
from slicefine.tuner import SliceFineConfig, parameter_counts


def train(recipe: Recipe, *, resume: bool = False, allow_inexact_resume: bool = False) -> RunRecord:
    """Run a recipe; with `resume`, go on from the last checkpoint in its run folder.

    A checkpoint that has lost a file which decides how the run goes on (optimizer, scheduler, random state) is refused;
    with `allow_inexact_resume` it is used, with a warning of what will differ.

    The first Ctrl-C ends the run after the step at hand, with a checkpoint and the status `"interrupted"`; the second
    raises `KeyboardInterrupt` at once.

    Raises `SliceFineError` for what is wrong with recipe, data, model or run folder, or is found by trying a first batch
    (see `preflight.py`), before the folder is changed; and where a loss or gradient is not finite, with the status
    `"failed"` and a checkpoint of the step before.
    """
    if allow_inexact_resume and not resume:
        raise SliceFineError("--allow_inexact_resume says how to resume; a new run has no use for it. Add --resume.")
    raise_all(recipe.problems() + _setting_problems(recipe), "Recipe")
    recipe = recipe.resolved()
    folder = Path(recipe.output)
    folders.refuse_unwritable(folder)
    checkpoint = folders.checkpoint_to_resume(recipe, folder) if resume else None
    if checkpoint:
        folders.refuse_inexact(checkpoint, allowed=allow_inexact_resume)
    else:
        folders.refuse_used(folder)
    task = get_task(recipe.task)
    config, arguments = _slice_config(recipe), make_arguments(recipe, task, folder)
    examples = task.read(recipe.data)
    saved = RunRecord.read(folder) if checkpoint else None
    if saved:
        folders.refuse_other_data(saved, examples.summary(), folder)

    transformers.set_seed(recipe.training.seed)
    prepared = task.prepare(recipe, examples)
    prepared.notes.extend([*_few_cores(recipe), *bf16_notes(recipe)])
    for note in prepared.notes:
        print(note, file=sys.stderr)
    model = _attach(prepared, config, task)
    timer, interrupt = StepTimer(), Interrupt()
    callbacks = [
        SliceFineCallback(allow_inexact_resume=True),  # what the checkpoint lacks was refused or allowed before
        *_tensorboard(recipe, folder),
        SliceFineProgress(),
        timer,
        interrupt,
    ]
    try:
        trainer = make_trainer(task, prepared, model, arguments, callbacks)
        if checkpoint is None:
            preflight(trainer)
    except BaseException:
        folders.remove_empty(folder)  # Trainer makes its own folder as soon as it exists
        raise
    record = saved or RunRecord(
        task=recipe.task,
        model=recipe.model.name,
        seed=recipe.training.seed,
        started=records.now(),
        data=examples.summary(),
        notes=prepared.notes,
        modules_to_save=_modules_to_save(model),
        planned_steps=planned_steps(len(prepared.train), recipe),
    )
    if checkpoint:
        record.resumed_from.append(folders.step_of(checkpoint))
    record.status, record.ended, record.error = "running", None, None
    record.versions, record.commit, record.hardware = records.versions(), records.commit(), records.hardware()
    record.parameters = dataclasses.asdict(parameter_counts(model, record.planned_steps))

    folder.mkdir(parents=True, exist_ok=True)
    records.write_atomically(folder / folders.RECIPE, recipe.to_yaml())
    record.write(folder)
    try:
        _run(recipe, trainer, prepared, timer, interrupt, record, checkpoint)
    except BaseException as error:
        record.status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        if record.status == "failed":
            record.error = first_line(error)
        raise
    finally:
        record.ended = records.now()
        record.write(folder)
    return record


def planned_steps(examples: int, recipe: Recipe) -> int:
    """Length of the run in optimizer steps, counted as Trainer counts."""
    training = recipe.training
    if training.max_steps > 0:
        return training.max_steps
    batches = math.ceil(examples / training.per_device_train_batch_size)
    return math.ceil(training.num_train_epochs * math.ceil(batches / training.gradient_accumulation_steps))


def _few_cores(recipe: Recipe) -> list[str]:
    asked, cores = recipe.training.dataloader_num_workers, records.usable_cores()
    if asked <= cores:
        return []
    return [f"Processes that prepare batches: {cores}, not {asked}; as many as there are cores."]


def _run(
    recipe: Recipe,
    trainer: CheckedTrainer,
    prepared: Prepared,
    timer: StepTimer,
    interrupt: Interrupt,
    record: RunRecord,
    checkpoint: Path | None,
) -> None:
    """Validate, train, validate and save; fills `record`."""
    folder, model = Path(recipe.output), cast(PeftModel, trainer.model)
    if checkpoint is None:
        record.metrics["before"] = _scores(trainer.evaluate())
        record.write(folder)
    seconds_before = record.timings.get("train_seconds", 0.0)
    began = time.perf_counter()
    try:
        with interrupt.listening():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        seconds = seconds_before + time.perf_counter() - began
        record.timings |= {"train_seconds": round(seconds, 3), **timer.summary(trainer.seconds_waited)}
        record.steps = trainer.state.global_step
        record.moves = recipe.slice_schedule.moves(max(record.steps - 1, 0))  # one after the last step trains nothing
        record.peak_bytes = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        record.parameters = dataclasses.asdict(parameter_counts(model, record.planned_steps))
        history.write(trainer.state, recipe.slice_schedule, folder)
    movement.write(model, folder)
    if interrupt.asked and record.steps < record.planned_steps:
        record.status = "interrupted"
        return
    record.metrics["after"] = _scores(_last_validation(trainer.state) or trainer.evaluate())
    record.artifact_bytes = _save_adapter(model, prepared, folder / folders.ADAPTER)
    record.status = "finished"
    step = record.timings.get("step_seconds_median")
    record.timings["frozen_limit_ratio"] = frozen_limit.measure(trainer, seconds, step) if step else None


def _setting_problems(recipe: Recipe) -> list[str]:
    """What only the installed packages, the file system and the network can tell."""
    known = [*INTEGRATION_TO_CALLBACK, "none"]
    problems = [
        f"`training.report_to` names trackers that transformers knows; got {name!r}.{did_you_mean(name, known)}"
        for name in trackers(recipe)
        if name not in known
    ]
    problems += [
        f"`training.report_to` names {name!r}, which is not installed. Install it, or leave it out."
        for name in trackers(recipe)
        if name in INTEGRATION_TO_CALLBACK and name not in get_available_reporting_integrations()
    ]
    if problem := model_problem(recipe.model.name):
        problems.append(problem)
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        problems.append(
            f"`slicefine train` runs in one process; WORLD_SIZE is {processes}. Start it without torchrun or accelerate "
            "launch, or use SliceFineConfig in a training script of your own."
        )
    return problems


def _slice_config(recipe: Recipe) -> SliceFineConfig:
    return SliceFineConfig(**dataclasses.asdict(recipe.slice))


def _attach(prepared: Prepared, config: SliceFineConfig, task: Task) -> PeftModel:
    """Put slices into the model; new layers, which have no pretrained weight to slice, are trained in full."""
    by_peft = SEQ_CLS_HEAD_NAMES if task.PEFT_TASK_TYPE == TaskType.SEQ_CLS else []
    covered = {*by_peft, *(config.modules_to_save or [])}
    new = [name for name in prepared.new_modules if not covered & set(name.split("."))]
    if new:
        config.modules_to_save = [*(config.modules_to_save or []), *new]
    config.task_type = cast(Any, task.PEFT_TASK_TYPE)  # PEFT takes the name for its enum
    return cast(PeftModel, get_peft_model(prepared.model, config))


def _modules_to_save(model: PeftModel) -> list[str]:
    """The modules trained in full. PEFT's setting lists all usual names of a head, of which a model has one."""
    names = [f".{name}" for name, _ in model.named_modules()]
    wanted = getattr(model.peft_config["default"], "modules_to_save", None) or []
    return sorted(module for module in set(wanted) if any(name.endswith(f".{module}") for name in names))


def _tensorboard(recipe: Recipe, folder: Path) -> list[TrainerCallback]:
    """TensorBoard, writing into the run folder, behind the callback whose values it is to show."""
    if "tensorboard" not in trackers(recipe):
        return []
    tensorboard = TensorBoardCallback()
    tensorboard.logging_dir = str(folder / folders.LOGS)
    return [tensorboard]


def _last_validation(state: TrainerState) -> dict[str, float] | None:
    """The figures of the validation that was made after the last step, if there was one."""
    made = [entry for entry in state.log_history if "eval_loss" in entry and entry["step"] == state.global_step]
    return made[-1] if made else None


def _scores(metrics: dict[str, float]) -> dict[str, float]:
    """The scores among Trainer's validation figures: no speeds, no prefix."""
    speeds = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    named = {key.removeprefix("eval_"): value for key, value in metrics.items() if key.startswith("eval_")}
    return {key: value for key, value in named.items() if key not in speeds}


def _save_adapter(model: PeftModel, prepared: Prepared, folder: Path) -> int:
    """Write `adapter/`, all or nothing; returns the bytes of the adapter's weights and configuration."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        model.save_pretrained(str(temporary))
        size = sum(file.stat().st_size for file in temporary.glob("adapter_*"))
        # With the model's configuration (class, labels, dtype) beside it, the adapter can be loaded without the run.
        prepared.model.config.architectures = [type(prepared.model).__name__]
        prepared.model.config.save_pretrained(temporary)
        prepared.processor.save_pretrained(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return size
