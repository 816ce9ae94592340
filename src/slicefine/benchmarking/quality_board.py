"""Final runs of `slicefine bench quality` as results of PEFT's public comparison: see `board.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slicefine.benchmarking import board
from slicefine.benchmarking.attaching import Counts
from slicefine.benchmarking.cells import Cell, Outcome
from slicefine.benchmarking.quality import Comparison
from slicefine.benchmarking.suite import QualityTask

ACCURACY = "accuracy"


def write(folder: Path, found: Comparison) -> list[Path]:
    """One file a final run; returns them."""
    tasks = {task.name: task for task in found.tasks}
    return [board.write(folder, facts(found, tasks[cell.task], cell, outcome)) for cell, outcome in found.final.items()]


def facts(found: Comparison, task: QualityTask, cell: Cell, outcome: Outcome) -> board.Facts:
    """What the run has of what the board asks for. A task that is not scored by accuracy has none."""
    machine = outcome.made.get("machine", {})
    return board.Facts(
        method=cell.method,
        experiment=f"{cell.task}-seed{cell.seed}",
        created=outcome.made.get("at", ""),
        status="success" if outcome.diverged is None else "failed",
        error=outcome.diverged or "",
        train_config=_train_config(found, task, cell),
        peft_config=outcome.peft_config,
        validations=[
            board.Validation(step=int(point["step"]), accuracy=point.get(ACCURACY)) for point in outcome.curve
        ],
        test=board.FinalTest(step=outcome.steps, accuracy=outcome.scores.get(ACCURACY)),
        train_seconds=outcome.seconds,
        peak_bytes=outcome.reserved_bytes,
        counts=Counts(active=outcome.active, head=outcome.head, added=outcome.added, total=outcome.total),
        machine=board.Machine(versions=machine.get("versions", {}), hardware=machine.get("hardware", {})),
    )


def _train_config(found: Comparison, task: QualityTask, cell: Cell) -> dict[str, Any]:
    model, data, training = task.recipe.model, task.recipe.data, task.recipe.training
    return {
        "model_id": model.name,
        "dtype": model.dtype,
        "max_seq_length": data.max_length if task.recipe.task in ("text-classification", "causal-lm") else None,
        "batch_size": training.per_device_train_batch_size * training.gradient_accumulation_steps,
        "batch_size_eval": training.per_device_eval_batch_size,
        "max_steps": cell.steps,
        "eval_steps": max(1, cell.steps // found.settings.evaluations),
        "compile": False,
        "use_gc": training.activation_checkpointing,
        "seed": cell.seed,
        "grad_norm_clip": training.max_grad_norm,
        "optimizer_type": "AdamW",
        "optimizer_kwargs": {"lr": cell.learning_rate, "weight_decay": training.weight_decay},
        "lr_scheduler": training.lr_scheduler_type,
        "use_amp": training.bf16,
        "attn_implementation": model.attn_implementation,
    }
