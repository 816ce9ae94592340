"""Held-out loss of a small language model tuned to another kind of text: SliceFine, LoRA, full fine-tuning.

Run `python benchmarks/language_model.py` on a quiet machine; takes about twenty minutes on 4 cores.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import importlib.util
import math
import multiprocessing
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _common import Figure, Table, cores, cpu_model, parser, positive, provenance, say, write
from peft import LoraConfig, get_peft_model
from step_time import base_model
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from torch.optim import AdamW
from transformers import get_cosine_schedule_with_warmup

from slicefine import SliceFineConfig, SliceFineWarning
from slicefine.slicing import active_size
from slicefine.tuner.layer import SliceLayer

INTRO = """\
A Llama (hidden {hidden}, intermediate {intermediate}, {layers} layers, {heads} heads, vocabulary {vocab}) is trained from scratch on \
docstrings of {packages} for {pretrain_steps} steps, then tuned for {steps} steps to their source code without docstrings \
and comments: batch {batch} x {tokens} tokens, AdamW, weight decay 0, cosine schedule with 6 % warm-up, gradients clipped to 1, \
fp32, CPU. Every method takes its learning rate from the same grid ({grid}): the one with the lowest loss on the validation text with \
the first seed. The seed decides the order of the text and LoRA's initial values. Losses are of test files that no step and no choice \
has seen, in nats a token; mean, least and greatest over {seeds} seeds. SliceFine moves every {slide_every} steps ({moves} moves), `alternate`, all linear \
layers but the head; r = {equal_r} has as many trainable parameters at a step as LoRA r8, on average over row and column slices."""

PACKAGES = ("scipy", "sklearn", "pandas")
LORA_R = 8
EQUAL_R = 2 * LORA_R
"""LoRA trains r (d_in + d_out) entries, a row slice r d_in, a column slice r d_out."""
NONE, FULL, LORA = "none", "full", "LoRA r8"
PAPER, EQUAL = "SliceFine-5RC", f"SliceFine-{EQUAL_R}RC, LoRA's count"
COUPLED, STAYING = "coupled, LoRA's count", "coupled, LoRA's count, never moving"
WIDE = "coupled, r = 64: a step takes as long"


def files_of(package: str) -> list[Path]:
    """Source files of an installed package, tests apart, in a fixed, mixed order."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"The texts are those of installed packages; {package} is missing: pip install -e '.[dev]'")
    root = Path(spec.origin).parent
    found = [path for path in root.rglob("*.py") if "tests" not in path.parts]
    return sorted(found, key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest())


def texts_of(path: Path) -> tuple[str, str]:
    """The docstrings of a file, and its code without docstrings and comments."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return "", ""
    docstrings = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring is not None:
                docstrings.append(docstring)
                node.body = node.body[1:] or [ast.Pass()]
    return "\n\n".join(docstrings), ast.unparse(tree)


@dataclass(frozen=True)
class Texts:
    """Token ids: docstrings to learn from first, and code in three parts that share no file."""

    docstrings: Tensor
    train: Tensor
    validation: Tensor
    test: Tensor


def read_texts(options: argparse.Namespace) -> Texts:
    """Read and tokenize; the byte-level BPE is trained on the training parts of both kinds of text."""
    parts: dict[str, list[str]] = {"docstrings": [], "train": [], "validation": [], "test": []}
    for package in PACKAGES:
        for number, path in enumerate(files_of(package)):
            docstrings, code = texts_of(path)
            parts["docstrings"].append(docstrings)
            parts[("validation", "test")[number % 10] if number % 10 < 2 else "train"].append(code)
    tokenizer = ByteLevelBPETokenizer()
    joined = {name: "\n\n".join(texts) for name, texts in parts.items()}
    tokenizer.train_from_iterator(
        [joined["docstrings"], joined["train"]], vocab_size=options.vocab, show_progress=False
    )
    return Texts(**{name: torch.tensor(tokenizer.encode(text).ids) for name, text in joined.items()})


def train(model: Any, text: Tensor, options: argparse.Namespace, *, steps: int, lr: float, seed: int) -> None:
    """`steps` optimizer steps on windows drawn from `text`, int64 `(length,)`."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW(trained, lr=lr, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(0.06 * steps), steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        starts = torch.randint(len(text) - options.tokens, (options.batch,), generator=generator)
        batch = text[starts[:, None] + torch.arange(options.tokens)]
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def loss_on(model: Any, text: Tensor, options: argparse.Namespace) -> float:
    """Mean loss over `options.windows` windows spread evenly over `text`, nats a token."""
    model.eval()
    starts = torch.linspace(0, len(text) - options.tokens - 1, options.windows).long()
    windows = text[starts[:, None] + torch.arange(options.tokens)]
    return statistics.fmean(float(model(input_ids=w, labels=w).loss) for w in windows.split(32))


def sliced(r: int, options: argparse.Namespace, **settings: Any) -> Callable[[Any], Any]:
    """Attach SliceFine with rank `r`, alternating unless `settings` say otherwise."""
    usual = {"axis": "alternate", "slide_every": options.slide_every, "task_type": "CAUSAL_LM"}
    config = SliceFineConfig(r=r, **usual | settings)
    return lambda model: get_peft_model(model, config)


def methods(options: argparse.Namespace) -> dict[str, Callable[[Any], Any]]:
    """What is compared, by name: a function that makes a pretrained model trainable."""
    lora = LoraConfig(r=LORA_R, lora_alpha=2 * LORA_R, target_modules="all-linear", task_type="CAUSAL_LM")
    return {
        PAPER: sliced(5, options),
        EQUAL: sliced(EQUAL_R, options),
        COUPLED: sliced(coupled_r(options), options, axis="coupled"),
        STAYING: sliced(coupled_r(options), options, axis="coupled", slide_every=None),
        WIDE: sliced(min(64, options.hidden), options, axis="coupled"),
        LORA: lambda model: get_peft_model(model, lora),
        FULL: lambda model: model,
    }


def coupled_r(options: argparse.Namespace) -> int:
    """The rank at which coupled slices train as many entries as LoRA: a feature has a row or a column in each of seven weights."""
    of_lora = LORA_R * (11 * options.hidden + 3 * options.intermediate)
    return min(options.hidden, round(of_lora / (7 * options.hidden)))


def trainable_entries(model: Any, options: argparse.Namespace) -> int:
    """Entries that a step trains; for slices the mean of a step on rows and one on columns."""
    if not any(isinstance(module, SliceLayer) for module in model.modules()):
        return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    layers = [module for module in model.modules() if isinstance(module, SliceLayer)]
    placed = [(layer.slicefine_state["default"].schedule, layer.shape) for layer in layers]
    sizes = [
        active_size(schedule, shape, step) for schedule, shape in placed for step in (0, schedule.slide_every or 0)
    ]
    return sum(sizes) // 2


def ablations(options: argparse.Namespace) -> dict[str, Callable[[Any], Any]]:
    """Settings of SliceFine at LoRA's count, each changed alone."""
    every = options.slide_every
    changes: dict[str, dict[str, Any]] = {
        f"slide_every {max(1, every // 8)}": {"slide_every": max(1, every // 8)},
        f"slide_every {max(1, every // 4)}": {"slide_every": max(1, every // 4)},
        f"slide_every {max(1, every // 2)}": {"slide_every": max(1, every // 2)},
        f"slide_every {2 * every}": {"slide_every": 2 * every},
        f"slide_every {4 * every}": {"slide_every": 4 * every},
        "random order": {"order": "random"},
        "rows alone": {"axis": "row"},
        "columns alone": {"axis": "column"},
        "rows alone, never moving": {"axis": "row", "slide_every": None},
        "columns alone, never moving": {"axis": "column", "slide_every": None},
    }
    return {f"{EQUAL}: {name}": sliced(EQUAL_R, options, **change) for name, change in changes.items()} | {
        "SliceFine-15C": sliced(15, options, axis="column")  # LoRA's count, as the default shapes are wider than high
    }


@dataclass(frozen=True)
class Run:
    """One tuned model."""

    method: str
    lr: float
    seed: int
    trainable: int
    validation: float
    test: float


def tune(options: argparse.Namespace, folder: Path, job: tuple[str, float, int]) -> Run:
    """Tune a copy of the pretrained model; in a process of its own, on one thread."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", SliceFineWarning)  # narrow weights of very small models
    method, lr, seed = job
    texts: Texts = torch.load(folder / "texts.pt", weights_only=False)
    model = base_model(options)
    model.load_state_dict(torch.load(folder / "model.pt"))
    torch.manual_seed(seed)
    model = (methods(options) | ablations(options))[method](model)
    trainable = trainable_entries(model, options)
    train(model, texts.train, options, steps=options.steps, lr=lr, seed=seed)
    return Run(
        method, lr, seed, trainable, loss_on(model, texts.validation, options), loss_on(model, texts.test, options)
    )


@dataclass(frozen=True)
class Results:
    """All runs of the benchmark."""

    before: dict[str, float]
    """Losses of the pretrained model."""
    grid: list[Run]
    """Every learning rate, first seed."""
    chosen: list[Run]
    """The learning rate chosen, every seed."""
    ablations: list[Run]
    """First seed, learning rates around the one chosen for `EQUAL`."""


def run_all(options: argparse.Namespace, folder: Path) -> Results:
    """Pretrain, then make all runs."""
    texts = read_texts(options)
    say(f"{len(texts.docstrings):,} tokens of docstrings, {len(texts.train):,} of code")
    model = base_model(options)
    train(model, texts.docstrings, options, steps=options.pretrain_steps, lr=3e-3, seed=options.seed)
    before = {"validation": loss_on(model, texts.validation, options), "test": loss_on(model, texts.test, options)}
    say(f"pretrained; loss on code {before['test']:.3f}")
    torch.save(texts, folder / "texts.pt")
    torch.save(model.state_dict(), folder / "model.pt")

    first, *others = range(options.seed, options.seed + options.seeds)
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        work = functools.partial(tune, options, folder)

        def finish(jobs: list[tuple[str, float, int]]) -> list[Run]:
            done = []
            for run in pool.map(work, jobs):
                done.append(run)
                say(f"{len(done)} of {len(jobs)}: {run.method}, lr {run.lr:g}, seed {run.seed}: {run.test:.4f}")
            return done

        grid = finish([(method, lr, first) for method in methods(options) for lr in options.lr])
        best = {
            method: min((run for run in grid if run.method == method), key=lambda run: run.validation)
            for method in methods(options)
        }
        chosen = list(best.values()) + finish([(m, run.lr, seed) for m, run in best.items() for seed in others])
        rates = [best[EQUAL].lr * factor for factor in (0.5, 1, 2)]
        changed = finish([(m, lr, first) for m in ablations(options) for lr in rates]) if options.ablations else []
    return Results(before, grid, chosen, changed)


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--processes", type=positive, default=cores(), help="runs at the same time, each on one thread")
    made.add_argument("--seeds", type=positive, default=3, help="seeds of each method at its learning rate")
    made.add_argument("--lr", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3, 1e-2, 3e-2], help="learning rates")
    made.add_argument("--pretrain-steps", type=positive, default=3000, help="optimizer steps on docstrings")
    made.add_argument("--steps", type=positive, default=800, help="optimizer steps on code")
    made.add_argument("--slide-every", type=positive, default=100, help="optimizer steps per position")
    made.add_argument("--ablations", action="store_true", help="also change one setting of SliceFine at a time")
    made.add_argument("--batch", type=positive, default=8, help="sequences")
    made.add_argument("--tokens", type=positive, default=128, help="tokens a sequence")
    made.add_argument("--windows", type=positive, default=256, help="sequences that a loss is measured on")
    made.add_argument("--layers", type=positive, default=4, help="decoder layers")
    made.add_argument("--hidden", type=positive, default=128, help="width of the model")
    made.add_argument("--intermediate", type=positive, default=344, help="width of the MLP")
    made.add_argument("--heads", type=positive, default=4, help="attention heads")
    made.add_argument("--vocab", type=positive, default=2048, help="tokens in the vocabulary")
    options = made.parse_args(arguments)
    torch.set_num_threads(options.processes)
    made_by = provenance(
        ["benchmarks/language_model.py", *(sys.argv[1:] if arguments is None else arguments)],
        threads=options.processes,
        seed=options.seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        results = run_all(options, Path(folder))

    rows = [{"method": NONE, "trainable": 0, "test loss": results.before["test"]}]
    losses = {}
    for method in methods(options):
        runs = [run for run in results.chosen if run.method == method]
        losses[method] = [run.test for run in runs]
        rows.append(
            {
                "method": method,
                "trainable": runs[0].trainable,
                "learning rate": runs[0].lr,
                "test loss": statistics.fmean(losses[method]),
                "min": min(losses[method]),
                "max": max(losses[method]),
                "perplexity": math.exp(statistics.fmean(losses[method])),
            }
        )
    write(
        options.output,
        theme="language-model",
        hardware=cpu_model(),
        intro=INTRO.format(
            **vars(options) | {"grid": ", ".join(f"{lr:g}" for lr in options.lr)},
            packages=", ".join(PACKAGES),
            moves=(options.steps - 1) // options.slide_every,
            equal_r=EQUAL_R,
        ),
        figures=[
            Figure(
                name=f"test loss, {EQUAL} / {LORA}",
                value=statistics.fmean(losses[EQUAL]) / statistics.fmean(losses[LORA]),
                low=min(losses[EQUAL]) / statistics.fmean(losses[LORA]),
                high=max(losses[EQUAL]) / statistics.fmean(losses[LORA]),
                at_most=max(losses[LORA]) / statistics.fmean(losses[LORA]),
            ),
        ],
        tables=[
            Table(title="Held-out loss after tuning", rows=_alike(rows)),
            Table(
                title="The grid, first seed: validation loss",
                rows=_by_rate(results.grid),
            ),
            Table(title="Every run at its learning rate", rows=[vars(run) for run in results.chosen]),
            *(
                [Table(title="One setting changed, first seed: validation loss", rows=_by_rate(results.ablations))]
                if results.ablations
                else []
            ),
        ],
        made_by=made_by,
    )


def _by_rate(runs: list[Run]) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for run in runs:
        rows.setdefault(run.method, {"method": run.method})[f"lr {run.lr:g}"] = run.validation
    return list(rows.values())


def _alike(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return [{key: row.get(key) for key in keys} for row in rows]


if __name__ == "__main__":
    main()
