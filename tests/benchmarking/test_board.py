"""Our results in the form of PEFT's public comparison."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from slicefine import SliceFineConfig, SliceFineError
from slicefine.benchmarking import board
from slicefine.benchmarking.attaching import Counts

HUB = {"sha": None, "created_at": None}
LOOK = (
    "step", "valid accuracy", "train loss", "train samples", "train time", "eval time", "tokens / sec", "mem allocated avg",
    "mem reserved avg", "elapsed time",
)  # fmt: skip
LAST = ("step", "test accuracy", "train loss", "train samples", "train total tokens", "forgetting")
FIELDS: dict[str, Any] = {
    "run_info": {
        "created_at", "total_time", "experiment_name", "peft_branch", "peft_worktree_is_dirty", "train_config",
        "peft_config", "error_msg",
    },
    "run_info.train_config": {
        "model_id", "dtype", "max_seq_length", "batch_size", "batch_size_eval", "max_steps", "eval_steps", "compile", "use_gc",
        "query_template", "seed", "grad_norm_clip", "optimizer_type", "optimizer_kwargs", "lr_scheduler", "use_amp",
        "autocast_adapter_dtype", "generation_kwargs", "attn_implementation", "init_kv_cache_prefix",
    },
    "train_info": {
        "accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th", "train_time",
        "file_size", "num_trainable_params", "num_total_params", "status", "metrics",
    },
    "meta_info": {"model_info", "dataset_info", "package_info", "system_info", "pytorch_info"},
    "meta_info.model_info": {"sha", "created_at"},
    "meta_info.package_info": {
        f"{package}-{what}"
        for package in ("transformers", "peft", "datasets", "bitsandbytes", "torch")
        for what in ("version", "commit-hash")
    },
    "meta_info.system_info": {"system", "release", "version", "machine", "processor", "accelerator"},
}  # fmt: skip
"""As in PEFT's `results/supertuning--llama-3.2-3B-s974-topk.json` of 2026-09-15."""


def facts(**more: Any) -> board.Facts:
    given: dict[str, Any] = {
        "method": "SliceFine-5RC",
        "experiment": "MiniLM-sst2-seed0",
        "created": "2026-11-24T10:00:00+00:00",
        "status": "success",
        "train_config": {
            "model_id": "MiniLM",
            "seed": 0,
            "max_steps": 640,
            "optimizer_kwargs": {"lr": 1e-3, "weight_decay": 0.0},
        },
        "peft_config": SliceFineConfig(r=5, target_modules={"value", "query"}).to_dict(),
        "counts": Counts(active=105_600, head=770, added=126_720, total=22_713_216),
        "machine": board.Machine(
            versions={"torch": "2.13.0", "peft": "0.21.2", "slicefine": "0.1.0"}, hardware={"gpu": None}
        ),
    }
    return board.Facts(**given | more)


FULL: dict[str, Any] = {
    "validations": [
        board.Validation(
            step=320, accuracy=0.5, train_loss=0.7, train_samples=5120, train_seconds=9.0, eval_seconds=1.0,
            tokens_per_second=100.0, allocated_bytes=10.0, reserved_bytes=12.0, elapsed_seconds=10.5,
        ),
        board.Validation(step=640, accuracy=0.6),
    ],
    "test": board.FinalTest(step=640, accuracy=0.8, train_loss=0.5, train_samples=10240, train_tokens=99, forgetting=0.1),
    "total_seconds": 30.0, "train_seconds": 18.0, "peak_bytes": 20, "mean_bytes": 12, "bytes_99th": 19, "artifact_bytes": 7,
    "datasets": {"sst2": None, "gsm8k": {"sha": "a", "created_at": "b"}}, "model_info": {"sha": "c", "created_at": "d"},
}  # fmt: skip


@pytest.mark.parametrize("more", [{}, FULL], ids=["little is known", "all is known"])
def test_a_result_has_the_fields_of_the_board(more: dict[str, Any]) -> None:
    result = board.record(facts(**more))
    assert list(result) == ["run_info", "train_info", "meta_info"]
    for path, keys in FIELDS.items():
        part: Any = result
        for key in path.split("."):
            part = part[key]
        assert set(part) == keys, path
    assert all(value.keys() == HUB.keys() for value in result["meta_info"]["dataset_info"].values())
    assert [tuple(entry) for entry in result["train_info"]["metrics"]] == ([LOOK, LOOK, LAST] if more else [])


def test_what_was_not_measured_is_null() -> None:
    result = board.record(facts())
    known = {
        "run_info.created_at", "run_info.experiment_name", "run_info.error_msg", "run_info.train_config.model_id", "run_info.train_config.seed",
        "run_info.train_config.max_steps", "run_info.train_config.optimizer_kwargs.lr", "run_info.train_config.optimizer_kwargs.weight_decay",
        "train_info.num_trainable_params", "train_info.num_total_params", "train_info.status", "train_info.metrics",
        "meta_info.package_info.torch-version", "meta_info.package_info.peft-version",
    }  # fmt: skip
    result["run_info"]["peft_config"] = None
    assert {path for path, value in flat(result).items() if value is not None} == known


def flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {path: value}
    return {k: v for key, inner in value.items() for k, v in flat(inner, f"{path}.{key}" if path else key).items()}


def test_what_was_measured_is_where_the_board_has_it() -> None:
    result = flat(board.record(facts(**FULL)))
    assert {key: result[f"train_info.{key}"] for key in sorted(FIELDS["train_info"] - {"metrics"})} == {
        "accelerator_memory_max": 20,
        "accelerator_memory_reserved_99th": 19,
        "accelerator_memory_reserved_avg": 12,
        "file_size": 7,
        "num_total_params": 22_713_216 + 126_720,
        "num_trainable_params": 105_600 + 770,
        "status": "success",
        "train_time": 18.0,
    }
    look, _, last = result["train_info.metrics"]
    assert list(look.values()) == [320, 0.5, 0.7, 5120, 9.0, 1.0, 100.0, 10.0, 12.0, 10.5]
    assert list(last.values()) == [640, 0.8, 0.5, 10240, 99, 0.1]
    assert result["run_info.total_time"] == 30.0
    assert result["meta_info.model_info.sha"] == "c"
    assert result["meta_info.dataset_info.gsm8k.created_at"] == "b"
    assert result["meta_info.dataset_info.sst2.sha"] is None


def test_this_machine_is_described() -> None:
    meta = board.record(facts(machine=board.Machine.here()))["meta_info"]
    assert meta["package_info"]["torch-version"] == torch.__version__
    assert meta["package_info"]["bitsandbytes-version"] is None
    assert meta["system_info"]["system"] == sys.platform.capitalize()
    assert meta["system_info"]["accelerator"] == (torch.cuda.get_device_name() if torch.cuda.is_available() else None)
    assert meta["pytorch_info"].startswith("PyTorch built with")


def test_a_setting_that_the_board_does_not_know_is_refused() -> None:
    with pytest.raises(SliceFineError, match=r"no setting 'max_step'.*max_steps"):
        board.record(facts(train_config={"max_step": 640}))


def test_the_file_is_named_as_the_board_names_it(tmp_path: Path) -> None:
    of = facts(experiment="sentence-transformers/MiniLM-sst2", test=board.FinalTest(step=640, train_loss=float("nan")))
    path = board.write(tmp_path / "board", of)
    assert path.name == "SliceFine-5RC--sentence-transformers--MiniLM-sst2.json"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    read = json.loads(path.read_text())
    assert read == board.record(of)
    assert read["run_info"]["experiment_name"] == "SliceFine-5RC/sentence-transformers--MiniLM-sst2"
    assert read["run_info"]["peft_config"]["peft_type"] == "SLICEFINE"
    assert read["run_info"]["peft_config"]["target_modules"] == ["query", "value"]
    assert read["train_info"]["metrics"][0]["train loss"] is None, "JSON has no NaN"
