"""Results in the form of PEFT's public comparison of methods on MetaMathQA.

One JSON file a run, with the fields of the files in `method_comparison/MetaMathQA/results` of PEFT's repository, as its runs wrote them
in September 2026. What was not measured is null, never a guess; nothing else is added.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slicefine.errors import did_you_mean, raise_all
from slicefine.training.record import hardware, versions, write_atomically

if TYPE_CHECKING:
    from slicefine.benchmarking.attaching import Counts

TRAIN_CONFIG = (
    "model_id", "dtype", "max_seq_length", "batch_size", "batch_size_eval", "max_steps", "eval_steps", "compile", "use_gc",
    "query_template", "seed", "grad_norm_clip", "optimizer_type", "optimizer_kwargs", "lr_scheduler", "use_amp",
    "autocast_adapter_dtype", "generation_kwargs", "attn_implementation", "init_kv_cache_prefix",
)  # fmt: skip
"""What a training configuration there consists of."""
SYSTEM = ("system", "release", "version", "machine", "processor")
PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where a run was made."""

    versions: Mapping[str, str]
    """As `slicefine.training.record.versions()`."""
    hardware: Mapping[str, Any]
    """As `slicefine.training.record.hardware()`."""
    system: Mapping[str, str] = field(default_factory=dict)
    """Of Python's `platform`: system, release, version, machine, processor."""
    pytorch: str | None = None
    """What torch says of how it was built."""

    @classmethod
    def here(cls) -> Machine:
        """This one."""
        import torch

        return cls(
            versions=versions(),
            hardware=hardware(),
            system={name: getattr(platform, name)() for name in SYSTEM},
            pytorch=torch.__config__.show(),
        )


@dataclass(frozen=True, kw_only=True)
class Validation:
    """A look at the validation set in the course of training."""

    step: int
    """Optimizer steps made."""
    accuracy: float | None = None
    """0 to 1; None where a task is scored by something else, which has no field."""
    train_loss: float | None = None
    """Mean over the steps since the last look."""
    train_samples: int | None = None
    """Examples trained on since the beginning."""
    train_seconds: float | None = None
    """Of the steps since the last look."""
    eval_seconds: float | None = None
    tokens_per_second: float | None = None
    """In training."""
    allocated_bytes: float | None = None
    """On the GPU after a step, mean since the last look."""
    reserved_bytes: float | None = None
    """The same, as torch had reserved."""
    elapsed_seconds: float | None = None
    """Since training began."""


@dataclass(frozen=True, kw_only=True)
class FinalTest:
    """The score on the test set after training."""

    step: int
    accuracy: float | None = None
    train_loss: float | None = None
    train_samples: int | None = None
    train_tokens: int | None = None
    """Tokens trained on, padding left out."""
    forgetting: float | None = None
    """Loss on other text after training, less that before."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a run; what is not given was not measured."""

    method: str
    """As in our tables, `SliceFine-5RC`."""
    experiment: str
    """What sets the run apart from others of the method: model, task, seed."""
    created: str
    """When it began: UTC, ISO 8601."""
    status: Literal["success", "canceled", "failed"]
    """`canceled` is also what ran out of memory there."""
    error: str = ""
    train_config: Mapping[str, Any]
    """Any of `TRAIN_CONFIG`; what is left out is null."""
    peft_config: Mapping[str, Any] | None
    """`PeftConfig.to_dict()`; None where PEFT has no part in it. Readers of the board take that for full fine-tuning."""
    validations: Sequence[Validation] = ()
    test: FinalTest | None = None
    total_seconds: float | None = None
    """With loading, validation and test."""
    train_seconds: float | None = None
    """Without validation."""
    peak_bytes: int | None = None
    """The most that torch had reserved on the GPU, less what it had before the model was loaded; allocated is less."""
    mean_bytes: int | None = None
    """The same after a step, mean over all steps."""
    bytes_99th: int | None = None
    """The same, 99th percentile."""
    artifact_bytes: int | None = None
    """`adapter_model.safetensors`; for full fine-tuning, the weights."""
    counts: Counts
    datasets: Mapping[str, Mapping[str, str] | None] = field(default_factory=dict)
    """Name of a data set -> its `sha` and `created_at` on the hub, or None if it is not from there."""
    model_info: Mapping[str, str] = field(default_factory=dict)
    """`sha` and `created_at` of the base model on the hub."""
    machine: Machine

    @property
    def name(self) -> str:
        """`<method>/<experiment>`, as the board names experiments."""
        return f"{self.method}/{self.experiment.replace('/', '--')}"


def record(facts: Facts) -> dict[str, Any]:
    """The result of a run, ready for `json.dumps`.

    Raises `SliceFineError` if the training configuration has a setting that the board does not know.
    """
    unknown = [key for key in facts.train_config if key not in TRAIN_CONFIG]
    raise_all(
        [f"There is no setting {key!r}.{did_you_mean(key, TRAIN_CONFIG)}" for key in unknown],
        "The board's training configuration",
    )
    return _plain(
        {
            "run_info": {
                "created_at": facts.created,
                "total_time": facts.total_seconds,
                "experiment_name": facts.name,
                "peft_branch": None,  # a released package has none
                "peft_worktree_is_dirty": None,
                "train_config": {key: facts.train_config.get(key) for key in TRAIN_CONFIG},
                "peft_config": facts.peft_config,
                "error_msg": facts.error,
            },
            "train_info": {
                "accelerator_memory_reserved_avg": facts.mean_bytes,
                "accelerator_memory_max": facts.peak_bytes,
                "accelerator_memory_reserved_99th": facts.bytes_99th,
                "train_time": facts.train_seconds,
                "file_size": facts.artifact_bytes,
                # There, all that wants a gradient, heads among it, and all that is in the model while it is trained.
                "num_trainable_params": facts.counts.active + facts.counts.head,
                "num_total_params": facts.counts.total + facts.counts.added,
                "status": facts.status,
                "metrics": [_validation(look) for look in facts.validations]
                + ([_test(facts.test)] if facts.test else []),
            },
            "meta_info": {
                "model_info": _on_the_hub(facts.model_info),
                "dataset_info": {name: _on_the_hub(found or {}) for name, found in facts.datasets.items()},
                "package_info": _packages(facts.machine.versions),
                "system_info": {name: facts.machine.system.get(name) for name in SYSTEM}
                | {"accelerator": facts.machine.hardware.get("gpu")},
                "pytorch_info": facts.machine.pytorch,
            },
        }
    )


def write(folder: Path, facts: Facts) -> Path:
    """Write the result of a run into `folder`, under the name that the board would give it; returns the file."""
    path = folder / f"{facts.name.replace('/', '--')}.json"
    text = json.dumps(record(facts), indent=2, allow_nan=False)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text + "\n")
    return path


def _validation(look: Validation) -> dict[str, Any]:
    return {
        "step": look.step,
        "valid accuracy": look.accuracy,
        "train loss": look.train_loss,
        "train samples": look.train_samples,
        "train time": look.train_seconds,
        "eval time": look.eval_seconds,
        "tokens / sec": look.tokens_per_second,
        "mem allocated avg": look.allocated_bytes,
        "mem reserved avg": look.reserved_bytes,
        "elapsed time": look.elapsed_seconds,
    }


def _test(test: FinalTest) -> dict[str, Any]:
    return {
        "step": test.step,
        "test accuracy": test.accuracy,
        "train loss": test.train_loss,
        "train samples": test.train_samples,
        "train total tokens": test.train_tokens,
        "forgetting": test.forgetting,
    }


def _on_the_hub(found: Mapping[str, str]) -> dict[str, str | None]:
    return {"sha": found.get("sha"), "created_at": found.get("created_at")}


def _packages(found: Mapping[str, str]) -> dict[str, str | None]:
    info: dict[str, str | None] = {}
    for name in PACKAGES:
        # Of an installed package the board notes no commit either.
        info |= {f"{name}-version": found.get(name), f"{name}-commit-hash": None}
    return info


def _plain(value: Any) -> Any:
    """What JSON has: sets become sorted lists, enums their values, and numbers that are not finite null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(_plain(inner) for inner in value)
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return getattr(value, "value", value)
