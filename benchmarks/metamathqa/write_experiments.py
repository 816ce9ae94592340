"""Write the folders that PEFT's MetaMathQA comparison runs, under `experiments/` beside this file.

    python benchmarks/metamathqa/write_experiments.py

`docs/board.md` says what they are for. What is in `adapter_config.json` is what `save_pretrained` writes, so the folders are
written by this script and not by hand; a test compares them with it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slicefine import SliceFineConfig

FOLDER = Path(__file__).parent / "experiments" / "slicefine"
STEPS = 5000
"""Optimizer steps of a run there."""
EIGHTH = STEPS // 8
"""Eight positions in a run: the paper's runs make 5 to 10 moves."""

EXPERIMENTS: dict[str, tuple[dict[str, Any], float]] = {
    # 80 columns of q_proj (3072 x 3072) and v_proj (1024 x 3072) in 28 layers are 80 * (3072 + 1024) * 28 = 9,175,040 parameters,
    # to the last one as many as LoRA of rank 32 has there, 32 * (3072 + 3072 + 3072 + 1024) * 28. No number of rows gives that.
    # The learning rate is that of SHiRA there, which trains as many single weights of the same matrices.
    "llama-3.2-3B-rank80-columns": (
        {"r": 80, "axis": "column", "slide_every": EIGHTH, "target_modules": ["q_proj", "v_proj"]},
        3e-4,
    ),
    # The paper's own variant; learning rate as in recipes/llama-3.2-3b-math.yaml.
    "llama-3.2-3B-5RC-all-linear": (
        {"r": 5, "axis": "alternate", "slide_every": EIGHTH, "target_modules": "all-linear"},
        1e-3,
    ),
}
"""Name of the experiment -> settings of `SliceFineConfig`, learning rate."""


def write(folder: Path) -> None:
    """Write every experiment into a folder of its own in `folder`."""
    for name, (settings, learning_rate) in EXPERIMENTS.items():
        SliceFineConfig(**settings, task_type="CAUSAL_LM").save_pretrained(str(folder / name))
        # The defaults there decay by 0.1, and what is given here replaces all of them: torch's own decay is 0.01.
        training = {"optimizer_kwargs": {"lr": learning_rate, "weight_decay": 0.0}}
        (folder / name / "training_params.json").write_text(json.dumps(training, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(FOLDER)
