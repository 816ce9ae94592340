"""Models of the benchmark's architectures, made tinier still."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from slicefine.benchmarking import bench
from slicefine.benchmarking.models import MODELS, Architecture
from slicefine.benchmarking.results import Report
from slicefine.benchmarking.settings import Settings

METHODS = ("full", "head-only", "SliceFine-2R", "SliceFine-2C", "LoRA-r2", "prefix-r3")

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "image_size": 16,
    "patch_size": 8,
    "num_frames": 4,
}


def tiny(name: str) -> Architecture:
    """The architecture `name` with 2 layers, 32 wide, and a batch of 2."""
    of = MODELS[name]
    sizes = {key: TINY.get(key, value) for key, value in of.sizes.items()}
    return dataclasses.replace(of, sizes=sizes, batch=2, length=of.length and 16)


def settings(tmp_path: Path, **given: Any) -> Settings:
    usual = {
        "models": ("llama-3.2-3b-small",),
        "methods": METHODS,
        "rounds": 2,
        "warmup": 1,
        "generate": 3,
        "device": "cpu",
        "output": str(tmp_path / "out"),
    }
    return Settings(**usual | given)


def run(what: str, given: Settings) -> tuple[Report, dict[str, Any]]:
    report = bench.run(what, given, "slicefine bench")
    return report, json.loads(report.path.with_suffix(".json").read_text())


def rows_of(record: dict[str, Any], title: str) -> list[dict[str, Any]]:
    (rows,) = (table["rows"] for table in record["tables"] if table["title"] == title)
    return rows
