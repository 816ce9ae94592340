"""Accuracy of a small ViT tuned from some digits to others, on PNG files: SliceFine, LoRA, full fine-tuning, the head alone.

Run `python benchmarks/image_transfer.py`; takes about five minutes. A run that was stopped goes on where it was: every finished cell is
kept in `--cells`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from _cells import Cell, Outcome, chosen, commit_of, commits, interval, kept, resampled
from _common import Figure, Table, cpu_model, parser, positive, provenance, say, write
from classification import trained_entries
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score
from torch.optim import AdamW
from transformers import (
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    get_cosine_schedule_with_warmup,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from slicefine import SliceFineWarning
from slicefine.training.recipe import Recipe
from slicefine.training.run import train
from slicefine.training.tasks import Prepared, get_task

INTRO = """\
The digits of scikit-learn (8 x 8 grey) as PNG files in class folders. A ViT (hidden {hidden}, intermediate {intermediate}, {layers} layers, {heads} heads, \
images scaled to 16 x 16, patches of 4 x 4) is trained from scratch on {known} for {pretrain_steps} steps, and saved without its head, with its image \
processor (Pillow). It is then tuned to {new} for {steps} steps of {batch} images: AdamW, weight decay 0, cosine schedule with 6 % warm-up, \
gradients clipped to 1, fp32, CPU. SliceFine goes all the way of `slicefine train`, and what is judged is the saved adapter, loaded again; the others \
are trained by transformers' Trainer on what the same code made of the same files. Every method trains the head in full, and takes its learning rate \
from the same grid ({grid}): the one with the lowest loss on the validation images with the first seed. Test images decided nothing. \
Mean, least and greatest over {seeds} seeds; `low` and `high` are the ends of the 95 % bootstrap interval over the test images. SliceFine moves \
every eighth of the run, `alternate`, all linear layers but the head. Active: entries trained at a step; touched: by the end; neither counts \
the head."""

KNOWN, NEW = range(5), range(5, 10)
SPLITS = {"train": 0.6, "validation": 0.2, "test": 0.2}
SLICES, LORA, FULL, HEAD = "SliceFine-5RC", "LoRA r8", "full", "head only"
TASK = "image-classification"


def write_images(folder: Path, classes: Sequence[int], seed: int) -> dict[str, int]:
    """Write `folder/<split>/<digit>/<number>.png`; returns the number of images of each split."""
    digits = load_digits()
    mixed = np.random.default_rng(seed).permutation(len(digits.target))
    sizes = dict.fromkeys(SPLITS, 0)
    for digit in classes:
        numbers = [int(number) for number in mixed if digits.target[number] == digit]
        ends = np.cumsum([round(share * len(numbers)) for share in SPLITS.values()])
        for split, part in zip(SPLITS, np.split(np.array(numbers), ends[:-1]), strict=True):
            (folder / split / str(digit)).mkdir(parents=True)
            sizes[split] += len(part)
            for number in part:
                pixels = (digits.images[number] * 15.9375).astype(np.uint8)  # of 0 to 16
                Image.fromarray(pixels).save(folder / split / str(digit) / f"{number}.png")
    return sizes


def pretrain(options: argparse.Namespace, images: Path, folder: Path) -> float:
    """Train the ViT, save it with its processor but without its head, and return its accuracy on the test images."""
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    torch.manual_seed(options.seed)
    model = ViTForImageClassification(
        ViTConfig(
            image_size=16,
            patch_size=4,
            hidden_size=options.hidden,
            intermediate_size=options.intermediate,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            num_labels=len(KNOWN),
        )
    )

    def read(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        files = sorted((images / split).rglob("*.png"))
        pixels = processor([Image.open(file).convert("RGB") for file in files], return_tensors="pt")["pixel_values"]
        return pixels, torch.tensor([int(file.parent.name) - KNOWN[0] for file in files])

    pixels, labels = read("train")
    optimizer = AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(0.06 * options.pretrain_steps), options.pretrain_steps)
    for _ in range(options.pretrain_steps):
        drawn = torch.randint(len(labels), (32,))
        model(pixel_values=pixels[drawn], labels=labels[drawn]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval().vit.save_pretrained(folder)
    processor.save_pretrained(folder)
    pixels, labels = read("test")
    with torch.no_grad():
        return float(accuracy_score(labels, model(pixel_values=pixels).logits.argmax(-1)))


def recipe_of(options: argparse.Namespace, folder: Path, output: Path, cell: Cell) -> Recipe:
    """The run of a cell; methods other than SliceFine take all but the slices from it."""
    return Recipe.from_flat(
        {
            "task": TASK,
            "model.name": str(folder / "pretrained"),
            "data.train": str(folder / "new"),
            "data.validation": "test" if cell.final else "validation",
            "slice.r": 5,
            "slice.slide_every": max(1, options.steps // 8),
            "training.learning_rate": cell.lr,
            "training.max_steps": options.steps,
            "training.eval_steps": options.steps,
            "training.save_steps": options.steps,
            "training.per_device_train_batch_size": options.batch,
            "training.seed": cell.seed,
            "training.report_to": "none",
            "output": str(output),
        }
    )


def lora(model: Any) -> Any:
    # Without modules_to_save, "all-linear" would put LoRA into the new head too, and leave its values as they fell.
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", modules_to_save=["classifier"])
    return get_peft_model(model, config)


def head_alone(model: Any) -> Any:
    model.base_model.requires_grad_(False)
    return model


OTHERS: dict[str, Callable[[Any], Any]] = {LORA: lora, FULL: lambda model: model, HEAD: head_alone}
METHODS = (SLICES, *OTHERS)


def trainer_of(recipe: Recipe, prepared: Prepared, model: Any) -> Trainer:
    """Transformers' own trainer with the settings of the recipe."""
    arguments = dataclasses.asdict(recipe.training) | {
        "eval_strategy": "no",
        "save_strategy": "no",
        "label_names": ["labels"],
    }
    return Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=recipe.output, use_cpu=True, disable_tqdm=True, remove_unused_columns=False, **arguments
        ),
        train_dataset=prepared.train,
        data_collator=prepared.collator,
    )


def tune(options: argparse.Namespace, folder: Path, cell: Cell) -> Outcome:
    """Make one run."""
    task = get_task(TASK)
    with tempfile.TemporaryDirectory() as output, contextlib.redirect_stdout(sys.stderr):
        recipe = recipe_of(options, folder, Path(output) / "run", cell)
        transformers.set_seed(cell.seed)
        prepared = task.prepare(recipe, task.read(recipe.data))
        if cell.method == SLICES:
            record = train(recipe)
            adapter = Path(recipe.output) / "adapter"
            model = PeftModel.from_pretrained(task.load_base(recipe.model.name, adapter), str(adapter))
            counts, seconds = record.parameters, record.timings["train_seconds"]
            active, touched = counts["active"] or 0, counts["touched"] or 0
        else:
            model = OTHERS[cell.method](prepared.model)
            active, touched = trained_entries(model, options.steps)
            start = time.perf_counter()
            trainer_of(recipe, prepared, model).train()
            seconds = time.perf_counter() - start
        logits, labels, scores = trainer_of(recipe, prepared, model).predict(prepared.validation)
    predicted = np.argmax(logits, axis=-1).tolist()
    outcome = Outcome(active, touched, scores["test_loss"], predicted, labels.tolist(), seconds / 60)
    if cell.method == SLICES:
        assert record.metrics["after"]["accuracy"] == outcome.score(accuracy_score), "the saved adapter is another"
    return outcome


def run_all(options: argparse.Namespace, folder: Path, commit: str) -> tuple[dict[Cell, Outcome], dict[Cell, Outcome]]:
    """Every learning rate with the first seed on the validation images; the chosen ones with every seed on the test images."""
    deciding = {name: value for name, value in vars(options).items() if name not in ("cells", "output", "seeds", "lr")}

    def finish(cells: list[Cell]) -> dict[Cell, Outcome]:
        done = {}
        for cell in cells:
            done[cell] = kept(options.cells, cell, deciding, commit, functools.partial(tune, options, folder, cell))
            score = done[cell].score(accuracy_score)
            say(f"{len(done)} of {len(cells)}: {cell.method}, lr {cell.lr:g}, seed {cell.seed}: {score:.3f}")
        return done

    grid = finish([Cell("digits", name, lr, options.seed, final=False) for name in METHODS for lr in options.lr])
    seeds = range(options.seed, options.seed + options.seeds)
    return grid, finish([Cell(*key, lr, seed, final=True) for key, lr in chosen(grid).items() for seed in seeds])


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--cells", type=Path, default=Path("runs/image-transfer"), help="where finished runs are kept")
    made.add_argument("--threads", type=positive, default=1, help="CPU threads")
    made.add_argument("--seeds", type=positive, default=3, help="seeds of each method at its learning rate")
    rates = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0]
    made.add_argument("--lr", type=float, nargs="+", default=rates, help="learning rates")
    made.add_argument("--pretrain-steps", type=positive, default=600, help="optimizer steps on the first digits")
    made.add_argument("--steps", type=positive, default=400, help="optimizer steps on the others")
    made.add_argument("--batch", type=positive, default=16, help="images a step")
    made.add_argument("--layers", type=positive, default=4, help="layers")
    made.add_argument("--hidden", type=positive, default=64, help="width of the model")
    made.add_argument("--intermediate", type=positive, default=256, help="width of the MLP")
    made.add_argument("--heads", type=positive, default=4, help="attention heads")
    options = made.parse_args(arguments)
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", SliceFineWarning)  # narrow weights of a very small model
    made_by = provenance(
        ["benchmarks/image_transfer.py", *(sys.argv[1:] if arguments is None else arguments)],
        threads=options.threads,
        seed=options.seed,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        known = write_images(folder / "known", KNOWN, options.seed)
        new = write_images(folder / "new", NEW, options.seed)
        before = pretrain(options, folder / "known", folder / "pretrained")
        say(f"pretrained; accuracy on the first digits {before:.3f}")
        grid, final = run_all(options, folder, commit_of(made_by))

    runs = {method: [outcome for cell, outcome in final.items() if cell.method == method] for method in METHODS}
    rates = chosen(grid)
    rows, draws, means = [], {}, {}
    for method, outcomes in runs.items():
        scores = [outcome.score(accuracy_score) for outcome in outcomes]
        draws[method] = resampled(outcomes, accuracy_score, resamples=1000)
        means[method] = statistics.fmean(scores)
        low, high = interval(draws[method])
        rows.append(
            {
                "method": method,
                "active": outcomes[0].active,
                "touched": outcomes[0].touched,
                "learning rate": rates["digits", method],
                "accuracy": means[method],
                "min": min(scores),
                "max": max(scores),
                "low": low,
                "high": high,
                "loss": statistics.fmean(outcome.loss for outcome in outcomes),
            }
        )
    figures = []
    for method in (SLICES, FULL, HEAD):
        low, high = interval(draws[method] - draws[LORA])
        figures.append(
            Figure(name=f"accuracy, {method} - {LORA}", value=means[method] - means[LORA], low=low, high=high)
        )
    losses = [
        {"method": method}
        | {f"lr {cell.lr:g}": outcome.loss for cell, outcome in grid.items() if cell.method == method}
        for method in METHODS
    ]
    write(
        options.output,
        theme="image-transfer",
        hardware=cpu_model(),
        intro=INTRO.format(
            **vars(options),
            grid=", ".join(f"{lr:g}" for lr in options.lr),
            known=f"{KNOWN[0]} to {KNOWN[-1]} ({known['train']} images; accuracy {before:.3f} on {known['test']} others)",
            new=f"{NEW[0]} to {NEW[-1]} ({new['train']} images to train, {new['validation']} to validate, {new['test']} to test)",
        ),
        figures=figures,
        tables=[
            Table(title="Test images", rows=rows),
            Table(title="The grid, first seed: validation loss", rows=losses),
            Table(
                title="Every run at its learning rate",
                rows=[
                    {"method": c.method, "seed": c.seed, "accuracy": o.score(accuracy_score), "loss": o.loss}
                    for c, o in final.items()
                ],
            ),
        ],
        made_by=made_by | commits(grid, final),
    )


if __name__ == "__main__":
    main()
