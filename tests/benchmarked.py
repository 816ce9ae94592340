"""Models of the benchmark's architectures, made tinier still."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from classifiers import reviews, text_model, write_table

from slicefine.benchmarking import bench
from slicefine.benchmarking.models import MODELS, Architecture
from slicefine.benchmarking.quality_settings import QualitySettings
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


def quality_of(folder: Path, **usual: Any) -> Callable[..., QualitySettings]:
    """Makes settings of short runs on a suite of one set, `words`, whose model is beside it; `usual` are those of all."""
    text_model(folder / "model")
    write_table(folder / "sets/words/train.jsonl", reviews(range(20)))
    write_table(folder / "sets/words/test.jsonl", reviews(range(100, 110)))
    always = {
        "suite": str(folder / "sets"),
        "learning_rates": (1e-3,),
        "seeds": 1,
        "steps": 8,
        "rounds": 0,
        "cells": str(folder / "cells"),
        "output": str(folder / "out"),
        "overrides": {"model.name": str(folder / "model"), "data.max_length": 16},
    }
    return lambda **changes: QualitySettings(**always | usual | changes)


def run(what: str, given: Settings) -> tuple[Report, dict[str, Any]]:
    report = bench.run(what, given, "slicefine bench")
    return report, json.loads(report.path.with_suffix(".json").read_text())


def rows_of(record: dict[str, Any], title: str) -> list[dict[str, Any]]:
    (rows,) = (table["rows"] for table in record["tables"] if table["title"] == title)
    return rows
