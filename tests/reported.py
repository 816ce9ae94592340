"""Records of every kind, made by hand: a MiniLM of six blocks, with figures such as runs of it have."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

EVIL = "<script>alert(1)</script>"
"""What an untrusted name may be."""
MODEL = "/models/all-MiniLM-L6-v2"
VERSIONS = {"python": "3.11.7", "slicefine": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0", "peft": "0.21.2"}
HARDWARE = {"cpu": "Intel(R) Xeon(R) Processor", "cores": 2, "threads": 2, "gpu": None}
COMMIT = {"hash": "b81bf03d4c0f5e0c7e0a9d61b2b7b5a7c1d2e3f4", "modified": False}
KINDS = {
    "attention.self.query": (384, 384),
    "attention.self.key": (384, 384),
    "attention.self.value": (384, 384),
    "attention.output.dense": (384, 384),
    "intermediate.dense": (1536, 384),
    "output.dense": (384, 1536),
}
CLASSES = ["abbreviation", "entity", "description", "human", "location", "number"]
RECIPE = """\
task: text-classification
model:
  name: /models/all-MiniLM-L6-v2
  dtype: auto
data:
  train: /data/trec/train.jsonl
  validation: /data/trec/validation.jsonl
  max_length: 64
output: /runs/trec
slice:
  r: 5
  axis: alternate
  slide_every: 80
  order: sweep
  seed: 0
training:
  learning_rate: 0.003
  max_steps: 640
  seed: 42
"""


def names() -> list[tuple[str, int | None, tuple[int, int]]]:
    """Name, block and shape of each weight."""
    found: list[tuple[str, int | None, tuple[int, int]]] = [
        (f"bert.encoder.layer.{block}.{kind}", block, shape) for block in range(6) for kind, shape in KINDS.items()
    ]
    return [*found, ("bert.pooler.dense", None, (384, 384))]


def write(folder: Path, name: str, content: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


# ---------------------------------------------------------------- training


def record(**changes: Any) -> dict[str, Any]:
    return {
        "status": "finished",
        "task": "text-classification",
        "model": MODEL,
        "seed": 42,
        "started": "2026-11-29T20:01:12+00:00",
        "ended": "2026-11-29T20:06:40+00:00",
        "versions": VERSIONS,
        "commit": COMMIT,
        "hardware": HARDWARE,
        "data": {
            "train": {"source": "/data/trec/train.jsonl", "examples": 4906, "fingerprint": "sha256:1f0c" + 30 * "ab"},
            "validation": {
                "source": "/data/trec/validation.jsonl",
                "examples": 546,
                "fingerprint": "sha256:77aa" + 30 * "cd",
            },
            "classes": CLASSES,
        },
        "error": None,
        "notes": ["The head is new: 6 classes.", "3 texts were cut at 64 tokens."],
        "modules_to_save": ["classifier"],
        "parameters": {
            "active": 105600,
            "touched": 799200,
            "planned": 799200,
            "added": 0,
            "total": 22715526,
            "modules_to_save": 2310,
        },
        "steps": 640,
        "planned_steps": 640,
        "moves": 7,
        "resumed_from": [],
        "metrics": {
            "before": {"loss": 1.8213, "accuracy": 0.1923, "f1_macro": 0.0921},
            "after": {"loss": 0.2414, "accuracy": 0.9304, "f1_macro": 0.9182},
        },
        "timings": {
            "train_seconds": 192.4,
            "step_seconds_mean": 0.274,
            "step_seconds_median": 0.268,
            "data_wait_share": 0.012,
            "frozen_limit_ratio": {"median": 1.034, "least": 1.012, "greatest": 1.071},
        },
        "artifact_bytes": 3412992,
        **changes,
    }


def history(
    steps: int = 640, *, every: int = 5, moves_every: int = 80, seed: int = 0, end: float = 0.16
) -> dict[str, Any]:
    draw = random.Random(seed)
    log: list[dict[str, Any]] = []
    moves = list(range(moves_every, steps, moves_every))
    for step in [1, *range(every, steps + 1, every)]:
        done = step / steps
        warm = min(1.0, step / (0.06 * steps))
        inside = (step % moves_every) / moves_every
        loss = end + 1.65 * math.exp(-5.2 * done) + draw.gauss(0, 0.05) * (1.2 - done)
        log.append(
            {
                "step": step,
                "epoch": done * 3,
                "loss": max(0.02, loss),
                "grad_norm": 1 + draw.random(),
                "learning_rate": 0.003 * warm * (0.5 + 0.5 * math.cos(math.pi * done)),
                "slicefine/moves": (step - 1) // moves_every,
                "slicefine/update_norm_mean": 0.16 * math.sqrt(inside + 0.02) * (1.1 - 0.6 * done),
                "slicefine/update_norm_max": 0.42 * math.sqrt(inside + 0.02) * (1.1 - 0.6 * done),
            }
        )
        if step % moves_every == 0:
            log.append(
                {
                    "step": step,
                    "eval_loss": 0.235 + 1.5 * math.exp(-5 * done),
                    "eval_accuracy": 0.9304 - 0.72 * math.exp(-6 * done),
                    "eval_f1_macro": 0.9182 - 0.8 * math.exp(-5.4 * done),
                    "eval_runtime": 1.2,
                }
            )
    log.append({"step": steps, "train_runtime": 192.4, "train_loss": 0.4})
    return {"version": 1, "log": log, "moves": moves}


def slices(blocks: int = 6, seed: int = 0) -> dict[str, Any]:
    draw = random.Random(seed)
    found = []
    for name, block, (d_out, d_in) in names():
        if block is not None and block >= blocks:
            continue
        depth = 0.4 if block is None else 0.35 + block / 6
        share = 1 - (1 - 20 / d_out) * (1 - 20 / d_in)
        found.append(
            {
                "name": name,
                "shape": [d_out, d_in],
                "block": block,
                "axis": "column",
                "active": [[15, 5]],
                "touched": {"row": [[0, 20]], "column": [[0, 20]]},
                "update": 0.11 * depth * (0.7 + 0.6 * draw.random()),
                "share": share,
            }
        )
    return {"version": 1, "step": 640, "weights": found}


def memory() -> dict[str, Any]:
    parts = {
        "weights": 90862104,
        "masters": 431640,
        "moments": 863280,
        "gradients": 431640,
        "saved for backward": 158334976,
        "logits": 384,
        "originals": 3196800,
    }
    return {"version": 1, "parts": parts, "peak_bytes": 268435456, "device": "cpu"}


def training(folder: Path, **changes: Any) -> Path:
    """A run folder with everything in it."""
    write(folder, "record.json", record(**changes))
    write(folder, "history.json", history())
    write(folder, "slices.json", slices())
    write(folder, "memory.json", memory())
    write(folder, "recipe.yaml", RECIPE)
    return folder


# ---------------------------------------------------------------- evaluations


def session(**counts: Any) -> dict[str, Any]:
    return {
        "started": "2026-11-29T20:10:00+00:00",
        "ended": "2026-11-29T20:10:09+00:00",
        "batch_size": 32,
        "seconds": 8.7,
        "versions": VERSIONS,
        "commit": COMMIT,
        "hardware": HARDWARE,
        **counts,
    }


def classification_results(**changes: Any) -> dict[str, Any]:
    counts = {
        "abbreviation": (9, 8),
        "entity": (94, 79),
        "description": (138, 136),
        "human": (65, 63),
        "location": (81, 78),
        "number": (113, 108),
    }
    confusion = {label: {label: right} for label, (_, right) in counts.items()}
    confusion["entity"] |= {"description": 9, "location": 4, "human": 2}
    confusion["number"] |= {"description": 4, "entity": 1}
    confusion["location"] |= {"entity": 3}
    confusion["human"] |= {"entity": 2}
    confusion["description"] |= {"entity": 2}
    confusion["abbreviation"] |= {"description": 1}
    return {
        "status": "finished",
        "suite": None,
        "model": "runs/trec",
        "base": MODEL,
        "weights": "sha256:0a1b2c",
        "dtype": "float32",
        "data": "/data/trec/test.jsonl",
        "limit": None,
        "contamination": {
            "sources": ["/data/trec/train.jsonl"],
            "tasks": ["test.jsonl"],
            "rows": {},
            "questions": {},
            "examples": [],
        },
        "tasks": {
            "test.jsonl": {
                "metrics": {"accuracy": 0.944, "f1_macro": 0.9312},
                "examples": 500,
                "right": 472,
                "accuracy": 0.944,
                "interval": [0.9202, 0.961],
                "classes": {
                    label: {"examples": total, "right": right, "accuracy": right / total}
                    for label, (total, right) in counts.items()
                },
                "confusion": confusion,
                "asked": 500,
            }
        },
        "average": 0.9376,
        "sessions": [session(batches=16, examples=500, examples_per_second=57.5)],
        "task": "text-classification",
        "classes": CLASSES,
        "sets": {
            "test.jsonl": {
                "title": "test.jsonl",
                "source": "/data/trec/test.jsonl",
                "fingerprint": "sha256:9",
                "examples": 500,
                "notes": [],
            }
        },
        **changes,
    }


def predictions(count: int = 40) -> str:
    draw, lines = random.Random(1), []
    for row in range(1, count + 1):
        label, given = draw.choice(CLASSES), draw.choice(CLASSES)
        lines.append(
            {
                "task": "test.jsonl",
                "row": row,
                "place": f"/data/trec/test.jsonl:{row}",
                "label": label,
                "predicted": given,
                "score": round(0.4 + 0.6 * draw.random(), 4),
            }
        )
    return "".join(json.dumps(line) + "\n" for line in lines)


def classification(folder: Path, **changes: Any) -> Path:
    """The folder of an evaluation of a classifier."""
    write(folder, "results.json", classification_results(**changes))
    write(folder, "predictions.jsonl", predictions())
    return folder


def generation_results(**changes: Any) -> dict[str, Any]:
    tasks = {
        "multiarith": (600, 551),
        "gsm8k": (1319, 612),
        "addsub": (395, 333),
        "singleeq": (508, 451),
        "svamp": (1000, 588),
    }
    intervals = {
        "multiarith": [0.8935, 0.9382],
        "gsm8k": [0.4372, 0.491],
        "addsub": [0.8037, 0.8753],
        "singleeq": [0.8576, 0.9129],
        "svamp": [0.5572, 0.6181],
    }
    return {
        "status": "finished",
        "suite": "math",
        "model": "runs/llama-3.2-3b-math",
        "base": "meta-llama/Llama-3.2-3B",
        "weights": "sha256:55",
        "dtype": "bfloat16",
        "data": "test-sets",
        "limit": None,
        "contamination": None,
        "tasks": {
            name: {
                "questions": asked,
                "right": right,
                "accuracy": right / asked,
                "interval": intervals[name],
                "unanswered": 3,
                "empty": 0,
                "cut": 11,
                "asked": asked,
            }
            for name, (asked, right) in tasks.items()
        },
        "average": sum(right / asked for asked, right in tasks.values()) / 5,
        "sessions": [session(answers=3822, generated_tokens=611000, tokens_per_second=1432.0, seconds=426.7)],
        "engine": "generate",
        "max_new_tokens": 256,
        "num_beams": 1,
        **changes,
    }


def answers() -> str:
    prompt = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nRobin has 9 boxes with 12 apples each. She gives 3 boxes to a neighbour, and 7 apples of another to her "
        "brother. How many apples has she left?\n\n### Response:\n"
    )
    output = (
        "Robin has 9 boxes.\nShe gives 3 away, so 6 are left: 6 x 12 = 72.\nShe gives 7 more: 72 - 7 = 65.\n" * 3
        + "The answer is 72."
    )
    made = [
        {
            "task": task,
            "row": row,
            "prompt": prompt,
            "prompt_tokens": 80,
            "output": output,
            "output_tokens": 60,
            "ended": row != 3,
            "answer": None if row == 2 else "72",
            "gold": "65",
            "right": row == 5,
        }
        for task in ("gsm8k", "svamp", "addsub")
        for row in range(1, 6)
    ]
    return "".join(json.dumps(line) + "\n" for line in made)


def generation(folder: Path, **changes: Any) -> Path:
    """The folder of an evaluation of generated answers."""
    write(folder, "results.json", generation_results(**changes))
    write(folder, "answers.jsonl", answers())
    return folder


# ---------------------------------------------------------------- analyses


def _spectrum(decay: float, spread: float) -> dict[str, list[float]]:
    across = [number / 31 for number in range(32)]
    mean = [(1 - math.exp(-decay * x)) / (1 - math.exp(-decay)) for x in across]
    return {
        "x": across,
        "mean": mean,
        "low": [y - spread * math.sin(math.pi * x) for x, y in zip(across, mean, strict=True)],
        "high": [y + spread * math.sin(math.pi * x) for x, y in zip(across, mean, strict=True)],
        "shuffled": [(1 - math.exp(-1.4 * x)) / (1 - math.exp(-1.4)) for x in across],
    }


def balance(*, untrained: bool = False) -> dict[str, Any]:
    draw, weights = random.Random(7), []
    for name, block, shape in names():
        axes = ["row", "column", *(["head"] if "self" in name or "attention.output" in name else [])]
        for axis in axes:
            base = 0.0021 if untrained else {"row": 0.011, "column": 0.016, "head": 0.062}[axis]
            rho = base * math.exp(draw.gauss(0, 0.5)) * (1 + 0.2 * (block or 0))
            weights.append(
                {
                    "name": name,
                    "shape": list(shape),
                    "axis": axis,
                    "groups": 12 if axis == "head" else 8,
                    "rho": rho,
                    "energy_spread": 3 * rho,
                    "decay_distance": rho / 2,
                    "null_permuted": {
                        "rho": 0.0052 * math.exp(draw.gauss(0, 0.15)),
                        "energy_spread": 0.01,
                        "decay_distance": 0.002,
                    },
                    "null_shuffled": {
                        "rho": 0.0019 * math.exp(draw.gauss(0, 0.1)),
                        "energy_spread": 0.004,
                        "decay_distance": 0.001,
                    },
                    "stable_rank": {"mean": 11.2 + draw.random(), "least": 9.1, "greatest": 14.0},
                    "effective_rank": {"mean": 38.5 + draw.random(), "least": 36.0, "greatest": 41.2},
                    "profiles": _spectrum(1.5 if untrained else 2.2 + 0.3 * (block or 0), 0.004 if untrained else rho),
                    "note": "",
                }
            )
    summary = {
        axis: {
            "rho_median": 0.0022 if untrained else value,
            "rho_greatest": 3.1 * value,
            "rho_shuffled_median": 0.0019,
            "rho_permuted_median": 0.0052,
            "energy_spread_median": 3 * value,
            "decay_distance_median": value / 2,
        }
        for axis, value in (("row", 0.0163), ("column", 0.0231), ("head", 0.0874))
    }
    return {
        "groups": 8,
        "definition": "\u03c1 is the root mean square, over groups and eigenvalues, of the difference between a group's spectrum and the mean of all, over the mean energy. The definition is ours: the poster gives none.",
        "poster": 0.001,
        "weights": weights,
        "summary": summary,
        "skipped": [{"name": "classifier", "why": "it has 6 rows, fewer than the 8 groups"}],
    }


def _layer(number: int, *, untrained: bool = False) -> dict[str, Any]:
    k90 = 4 + number if untrained else 148 - 14 * number

    def curve(k: float) -> list[list[float]]:
        points = sorted({round(1.18**at) for at in range(37)} | {384})
        return [[point, 1 - math.exp(-2.3 * (point / k) ** 0.7)] for point in points if point <= 384]

    def form(k: int) -> dict[str, Any]:
        return {"k": {"0.8": k // 2, "0.9": k, "0.95": min(384, 2 * k)}, "cumulative": curve(k)}

    return {
        "name": f"layer {number}",
        "dimension": 384,
        "samples": 6112,
        "truncated": False,
        "variance": {"with": form(k90), "without": form(k90 + 18)},
        "outliers": [12, 223],
        "participation_ratio": 30.5 - number,
    }


def energy() -> dict[str, Any]:
    return {
        "examples": 256,
        "tokens": 6112,
        "definitions": {"k": "The least number of directions that hold this share of the variance."},
        "skipped": [],
        "layers": [_layer(number) for number in range(7)],
        "untrained": [_layer(number, untrained=True) for number in range(7)],
        "ntk": {
            "examples": 64,
            "axis": "row",
            "r": 1,
            "eigenvalues": [math.exp(-0.42 * number) + 0.004 / (number + 1) for number in range(64)],
            "k": {"0.8": 4, "0.9": 7, "0.95": 10},
            "effective_rank": 6.3,
            "trace_share_of_full": 0.0046,
            "alignment_with_full": 0.93,
            "alignment_with_labels": 0.41,
            "by_rank": [
                {"r": r, "axis": axis, "effective_rank": 6.0 + r / 4, "alignment_with_full": 0.9 + r / 400}
                for r in (1, 5, 16)
                for axis in ("row", "column")
            ],
            "why_no_full": "",
            "full": {"eigenvalues": [math.exp(-0.3 * number) for number in range(64)], "effective_rank": 8.1},
            "untrained": {"eigenvalues": [math.exp(-0.9 * number) for number in range(64)], "effective_rank": 2.2},
        },
        "summary": {
            "k90_median": 106,
            "dimension": 384,
            "share": 106 / 384,
            "untrained_share": 7 / 384,
            "ntk_effective_rank": 6.3,
        },
    }


def winners() -> dict[str, Any]:
    draw, trials, rows = random.Random(3), [], []
    for model, least in (("pretrained", 0.02), ("untrained", 0.004)):
        for choice in ("random", "mask", "magnitude", "gradient"):
            for axis in ("row", "column"):
                for r in (1, 5, 16):
                    factor = {"random": 1.0, "mask": 1.05, "magnitude": 1.1, "gradient": 1.9}[choice] * math.sqrt(r)
                    drops = []
                    for trial in range(12):
                        gradient = 0.05 * factor * math.exp(draw.gauss(0, 0.5))
                        change = -least * factor * math.exp(draw.gauss(0, 0.6)) + 0.004 * draw.gauss(0, 1)
                        drops.append(-change)
                        trials.append(
                            {
                                "model": model,
                                "choice": choice,
                                "name": "bert.encoder.layer.2.output.dense",
                                "layer": trial % 6,
                                "axis": axis,
                                "r": r,
                                "start": trial,
                                "parameters": 384 * r,
                                "gradient": gradient,
                                "gradient_share": min(1.0, gradient),
                                "loss_before": 1.79,
                                "loss_after": 1.79 * (1 + change),
                                "change": change,
                                "wins": change < -0.02,
                            }
                        )
                    won = sum(drop > 0.02 for drop in drops)
                    share = won / 12
                    rows.append(
                        {
                            "model": model,
                            "choice": choice,
                            "axis": axis,
                            "r": r,
                            "trials": 12,
                            "winners": won,
                            "share": share,
                            "interval": [max(0.0, share - 0.2), min(1.0, share + 0.18)],
                            "median_drop": sorted(drops)[6],
                        }
                    )
    return {
        "margin": 0.02,
        "steps": 20,
        "learning_rates": [0.001, 0.01],
        "trials": trials,
        "rows": rows,
        "summary": {
            "share_by_rank": {"1": [0.58, 0.39, 0.76], "5": [0.92, 0.74, 0.98], "16": [1.0, 0.86, 1.0]},
            "share_untrained": {"1": [0.08, 0.02, 0.26], "5": [0.17, 0.07, 0.36], "16": [0.33, 0.18, 0.53]},
            "choice_matters": {"random": 0.031, "mask": 0.033, "magnitude": 0.035, "gradient": 0.061},
        },
    }


def _curve(end: float, steps: int = 60) -> list[list[float]]:
    return [[step, end + (1.79 - end) * math.exp(-4 * step / steps)] for step in range(0, steps + 1, 5)]


def together() -> dict[str, Any]:
    runs = []
    for axis in ("row", "column"):
        for r in (1, 5, 16):
            for layers in (1, 2, 3, 6):
                share = (0.36 if axis == "row" else 0.33) * (1 + math.log2(r) / 8) * layers**0.45
                runs.append(
                    {
                        "layers": layers,
                        "layer_indices": list(range(0, 6, 6 // layers))[:layers],
                        "r": r,
                        "axis": axis,
                        "moves": 7 if layers == 6 and r == 5 else 0,
                        "active": 3168 * r * layers,
                        "loss_after": 1.79 - share * 1.4,
                        "share_of_full_drop": share,
                        "curve": _curve(1.79 - share * 1.4),
                    }
                )
    return {
        "steps": 60,
        "baseline": "the loss of training the head alone",
        "learning_rate": {"slices": 0.005, "full": 0.0001},
        "full": {"loss_before": 1.79, "loss_after": 0.39, "curve": _curve(0.39)},
        "head_only": {"loss_before": 1.79, "loss_after": 1.52, "curve": _curve(1.52)},
        "runs": runs,
        "summary": {"best_share": 1.21, "r1_all_layers_share": 0.81, "smallest_r_within_10_percent": 5},
    }


def advice() -> dict[str, Any]:
    return {
        "r": 5,
        "axis": "row",
        "moves": 7,
        "slide_every": "an eighth of the run",
        "reasons": [
            "92 % of random slices of r = 5 win alone, and 58 % of those of r = 1.",
            "90 % of the kernel of the gradients are in 7 directions.",
            "Rows reach 3 points more of the drop of full tuning than columns.",
        ],
        "check": [
            {"r": r, "axis": "row", "curve": _curve(end), "loss_after": end}
            for r, end in ((1, 0.94), (5, 0.61), (16, 0.58))
        ],
        "confirmed": True,
        "words": "r = 5 is as good as r = 16 within 5 % of the loss, and r = 1 is not.",
    }


def verdicts() -> list[dict[str, Any]]:
    return [
        {
            "property": "Spectral balance",
            "verdict": "fails",
            "figure": 0.0163,
            "threshold": "at most 0.01 over rows and columns",
            "words": "Groups of rows differ eight times as much as those of a matrix with the same entries shuffled.",
            "poster": "\u03c1 near 0.001",
        },
        {
            "property": "Task energy",
            "verdict": "holds partly",
            "figure": 0.276,
            "threshold": "90 % of the variance in at most 25 % of the directions",
            "words": "The later layers hold it, the first three do not.",
            "poster": "high explained variance in few directions",
        },
        {
            "property": "Local winners",
            "verdict": "holds",
            "figure": 0.92,
            "threshold": "at least 90 % of random slices of r = 5 win",
            "words": "Nearly every slice lowers the loss alone; in the untrained twin few do.",
            "poster": "any sufficiently wide slice wins",
        },
        {
            "property": "r = 1 suffices",
            "verdict": "fails",
            "figure": 0.58,
            "threshold": "at least 90 % of random slices of r = 1 win",
            "words": "A little more than half of them do.",
            "poster": "r = 1 often suffices",
        },
        {
            "property": "Global winner",
            "verdict": "not measured",
            "figure": None,
            "threshold": "at least 90 % of the drop of full tuning",
            "words": "",
            "poster": "a few slices come near full tuning",
        },
    ]


def analysis_content(**changes: Any) -> dict[str, Any]:
    return {
        "kind": "analysis",
        "version": 1,
        "status": "finished",
        "model": {
            "name": MODEL,
            "class": "BertForSequenceClassification",
            "parameters": 22715526,
            "fingerprint": "sha256:ab12",
        },
        "untrained": False,
        "task": "text-classification",
        "data": {"train": {"source": "/data/trec/train.jsonl", "examples": 4906}},
        "settings": {
            "output": "runs/analysis",
            "stages": ["balance", "energy", "winners", "global", "advice"],
            "quick": False,
            "groups": 8,
            "ranks": [1, 5, 16],
            "seed": 0,
        },
        "started": "2026-11-29T21:00:00+00:00",
        "ended": "2026-11-29T21:08:11+00:00",
        "versions": VERSIONS,
        "commit": COMMIT,
        "hardware": HARDWARE,
        "command": "slicefine analyze /models/all-MiniLM-L6-v2 --data /data/trec",
        "seconds": {"balance": 38.2, "energy": 84.5, "winners": 221.3, "global": 101.7, "advice": 45.0},
        "stages": {
            "balance": balance(),
            "energy": energy(),
            "winners": winners(),
            "global": together(),
            "advice": advice(),
        },
        "verdicts": verdicts(),
        **changes,
    }


def analysis(folder: Path, **changes: Any) -> Path:
    """The folder of an analysis."""
    write(folder, "analysis.json", analysis_content(**changes))
    return folder


# ---------------------------------------------------------------- benchmarks and plans


def _provenance(**settings: Any) -> dict[str, Any]:
    return {
        "command": "slicefine bench speed --models vit-base-small",
        "seed": 0,
        "started": "2026-11-29T18:00:00+00:00",
        "commit": COMMIT,
        "hardware": HARDWARE,
        "system": "Linux-6.18",
        "versions": VERSIONS,
        "settings": {"seed": 0, "device": "cpu", "rounds": 9, "methods": None, **settings},
    }


def speed_content(**changes: Any) -> dict[str, Any]:
    times = {
        "frozen-limit": (231.0, 1.0, 1.0, 1.0),
        "full": (338.2, 1.464, 1.43, 1.52),
        "head-only": (98.4, 0.426, 0.41, 0.44),
        "SliceFine-1R": (236.9, 1.026, 1.004, 1.06),
        "SliceFine-5R": (238.4, 1.032, 1.01, 1.07),
        "SliceFine-5C": (241.2, 1.044, 1.02, 1.09),
        "SliceFine-5RC": (240.1, 1.039, 1.01, 1.08),
        "LoRA-r8": (283.5, 1.227, 1.19, 1.27),
        "VeRA": (312.0, 1.351, 1.3, 1.41),
        "random-mask": (402.3, 1.742, 1.69, 1.81),
    }
    rows: list[dict[str, Any]] = [
        {
            "method": name,
            "active": 105600,
            "head": 51300,
            "added": 0,
            "median ms": ms,
            "min ms": ms * 0.98,
            "max ms": ms * 1.05,
            "/ frozen-limit": ratio,
            "/ frozen-limit, min": low,
            "/ frozen-limit, max": high,
            "/ LoRA-r8": ms / 283.5,
            "tokens/s": 32 / ms * 1000,
            "not measured": "",
        }
        for name, (ms, ratio, low, high) in times.items()
    ]
    empty = dict.fromkeys(rows[0])
    rows.append({**empty, "method": "prefix", "not measured": "prefix tuning needs a decoder"})
    targets = [
        {
            "figure": "step / frozen-limit, SliceFine-5R",
            "target": "at most 1.05",
            "value": 1.032,
            "min": 1.01,
            "max": 1.07,
            "verdict": "met",
        },
        {
            "figure": "throughput / LoRA-r8",
            "target": "at least 1.2",
            "value": 1.18,
            "min": 1.14,
            "max": 1.21,
            "verdict": "**missed**",
        },
    ]
    return {
        "version": 1,
        "theme": "speed",
        "status": "finished",
        "intro": 'One training step (forward, backward, AdamW, gradients dropped) of models with random weights, float32, on a CPU.\n\n"/ x": the median over that of x.',
        "provenance": _provenance(),
        "tables": [
            {
                "title": "vit-base-small: training step",
                "rows": rows,
                "note": "Batches of 32 inputs. Measured together.",
            },
            {"title": "vit-base-small: targets", "rows": targets, "note": "The verdict is on the median."},
        ],
        "raw": [],
        **changes,
    }


def quality_content(**changes: Any) -> dict[str, Any]:
    scores = {
        "head-only": "67.6 ± 0.4",
        "SliceFine-5R": "84.9 ± 0.7",
        "SliceFine-5RC": "85.3 ± 0.6",
        "LoRA-r8": "87.0 ± 0.5",
        "full": "88.2 ± 0.3",
        "SHiRA": None,
    }
    rows = [
        {
            "method": name,
            "#TTPs (active)": 105600,
            "touched": 799200,
            "added": 0,
            "sst2, accuracy": score,
            "trec, accuracy": score,
            "Avg.": score,
            "not measured": "" if score else "too little memory",
        }
        for name, score in scores.items()
    ]
    return {
        "version": 1,
        "theme": "quality",
        "status": "finished",
        "intro": "Pretrained models are tuned to each task for 640 optimizer steps.",
        "provenance": _provenance(steps=640, seeds=3),
        "tables": [{"title": "Scores", "rows": rows, "note": "Mean ± standard deviation over 3 seeds."}],
        "raw": [],
        **changes,
    }


def benchmark(
    folder: Path, content: dict[str, Any] | None = None, name: str = "speed-xeon-20261129-180000.json"
) -> Path:
    """The file of a benchmark."""
    return write(folder, name, speed_content() if content is None else content)


def plan_content(**changes: Any) -> dict[str, Any]:
    def method(
        name: str, active: int, weights: int, masters: int, moments: int, peak: dict[str, int], *, fits: bool | None
    ) -> dict[str, Any]:
        step = sum(peak.values())
        return {
            "method": name,
            "active": active,
            "added": 0,
            "heads": 0,
            "artifact": 222822400,
            "weights": weights,
            "masters": masters,
            "moments": moments,
            "gradients": peak.get("gradients", 0),
            "originals_on_cpu": 163577856,
            "saved_for_backward": peak["activations"],
            "of_which_logits": 0,
            "logits": peak["logits"],
            "step": step,
            "step_at_its_peak": peak,
            "device": weights + masters + moments + step,
            "fits": fits,
        }

    gib = 2**30
    return {
        "format": 1,
        "recipe": {
            "task": "causal-lm",
            "output": "run",
            "model.name": "google/gemma-3-12b-pt",
            "slice.r": 5,
            "slice.axis": "alternate",
            "training.seed": 42,
            "training.per_device_train_batch_size": 4,
        },
        "architecture": "gemma3",
        "device": "gpu",
        "attention": "sdpa",
        "padded": True,
        "parameters": {
            "active": 9277440,
            "touched": 0,
            "planned": 81703680,
            "added": 0,
            "total": 12187325040,
            "modules_to_save": 0,
        },
        "steps": 3720,
        "moves": 7,
        "targets": 336,
        "coverage": 0.0076,
        "lora_rank": 40,
        "notes": [],
        "methods": [
            method(
                "SliceFine-5RC",
                9277440,
                24374650080,
                59475968,
                118951936,
                {"activations": 25404325888, "logits": 133955584, "gradients": 0, "temporary": 41943040},
                fits=False,
            ),
            method(
                "LoRA-r8",
                32735232,
                24374650080,
                130940928,
                261881856,
                {"activations": 28550627328, "logits": 133955584, "gradients": 0, "temporary": 41943040},
                fits=False,
            ),
            method(
                "full",
                12187325040,
                24374650080,
                0,
                48749300160,
                {"activations": 9000000000, "logits": 133955584, "gradients": 24374650080, "temporary": 93000000},
                fits=False,
            ),
        ],
        "memory": 40 * gib,
        "set_aside": gib,
        "changes": [
            {"settings": {"training.activation_checkpointing": True}, "device": 25168592077},
            {
                "settings": {"training.per_device_train_batch_size": 2, "training.gradient_accumulation_steps": 2},
                "device": 36560912384,
            },
        ],
        "smallest": None,
        **changes,
    }


def plan(folder: Path, **changes: Any) -> Path:
    """The folder of a plan."""
    write(folder, "plan.json", plan_content(**changes))
    return folder


MAKE = {
    "training": training,
    "classification": classification,
    "generation": generation,
    "analysis": analysis,
    "benchmark": benchmark,
    "plan": plan,
}
"""Kind -> what writes an example of it into a folder; returns what to name."""
