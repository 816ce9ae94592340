"""Of the stand-in for PEFT's MetaMathQA comparison: settings and data. That this file is found beside `run.py` is a part of the test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SENTENCES = ["the answer is true", "is the answer false", "the correct answer is true", "true is the correct answer"]


def read_settings(experiment: Path) -> dict[str, Any]:
    """The defaults, updated by those of the experiment; what it gives replaces a whole entry."""
    parts = experiment.parts
    if len(parts) != 3 or parts[0] != "experiments":
        raise ValueError(f"An experiment is experiments/<method>/<name>; got {experiment}")
    defaults = json.loads((HERE / "default_training_params.json").read_text())
    own = experiment / "training_params.json"
    given = json.loads(own.read_text()) if own.exists() else {}
    if unknown := given.keys() - defaults.keys():
        raise TypeError(f"unknown settings: {unknown}")
    return defaults | given


def batches(tokenizer: Any, size: int, count: int) -> list[dict[str, list[list[int]]]]:
    """Sentences of unequal length, as they come."""
    rows = [SENTENCES[i % len(SENTENCES)] for i in range(size * count)]
    return [dict(tokenizer(rows[start : start + size])) for start in range(0, len(rows), size)]
