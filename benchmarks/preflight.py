"""The pre-flight of `slicefine train`, and its check of every step, over a training step.

Run `python benchmarks/preflight.py` on a quiet machine; takes about a minute.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _common import Figure, Table, cpu_model, parser, positive, provenance, say, write
from peft import get_peft_model
from step_time import Ratio, add_model, base_model, batches
from transformers import TrainingArguments

from slicefine import SliceFineConfig
from slicefine.benchmarking.timing import keep_freed_memory
from slicefine.training.checked import CheckedTrainer, all_finite
from slicefine.training.preflight import preflight

INTRO = """\
The model of the step-time benchmark: hidden {hidden}, intermediate {intermediate}, {layers} layers, vocabulary {vocab}, batch \
{batch} x {tokens} tokens, fp32, CPU, {threads} threads; r = {r}, axis alternate, random weights.

A training step: `training_step` of the trainer (forward, backward, check), `optimizer.step()` with moves left out, `zero_grad()`. \
Pre-flight: all of it, on a batch of the same size, with a move in its step and everything put back. Check: whether loss and \
gradients are finite, as made in every step of a run. Interleaved, {warmup} untimed rounds, then {rounds} timed ones; a ratio is \
that of the medians, its min and max are over the ratios within one round. "First": the one before everything else in the \
process, as in a run."""


def make_trainer(options: argparse.Namespace, slide_every: int, folder: str) -> CheckedTrainer:
    """A trainer over random tokens."""
    config = SliceFineConfig(r=options.r, axis="alternate", slide_every=slide_every, task_type="CAUSAL_LM")
    rows = [{"input_ids": row, "labels": row} for row in next(batches(options))]
    arguments = TrainingArguments(
        output_dir=folder,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=1e-4,
        per_device_train_batch_size=options.batch,
    )
    model: Any = get_peft_model(base_model(options), config)
    return CheckedTrainer(model=model, args=arguments, train_dataset=rows)  # pyright: ignore[reportArgumentType]


def timed(action: Callable[[], Any]) -> float:
    """Seconds of one call."""
    gc.collect()
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def time_all(options: argparse.Namespace, folder: str) -> tuple[float, dict[str, list[float]]]:
    """Seconds of the first pre-flight, and of all three in every timed round."""
    tried, trained = make_trainer(options, 1, folder), make_trainer(options, 10**9, folder)
    optimizer = trained.create_optimizer()
    batch = trained.data_collator([trained.train_dataset[number] for number in range(options.batch)])
    trained.current_gradient_accumulation_steps = 1  # set by Trainer's own loop
    losses: list[torch.Tensor] = []

    def step() -> None:
        losses[:] = [trained.training_step(trained.model, dict(batch))]
        optimizer.step()
        optimizer.zero_grad()

    def check() -> None:
        assert all_finite(trained.model, losses[0])

    seconds: dict[str, list[float]] = {"training step": [], "pre-flight": [], "check": []}
    gc.disable()
    try:
        first = timed(lambda: preflight(tried))
        for round_number in range(-options.warmup, options.rounds):
            made = {"training step": timed(step), "pre-flight": timed(lambda: preflight(tried))}
            trained.trial_loss(dict(batch)).backward()
            made["check"] = timed(check)
            trained.model.zero_grad()
            if round_number >= 0:
                for name, value in made.items():
                    seconds[name].append(value)
            say(f"round {round_number + 1} of {options.rounds}" if round_number >= 0 else "warm-up round")
    finally:
        gc.enable()
    return first, seconds


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--rounds", type=positive, default=9, help="timed rounds")
    made.add_argument("--warmup", type=positive, default=2, help="untimed rounds before")
    add_model(made)
    made.add_argument("--r", type=positive, default=5, help="rank: rows or columns in a slice")
    options = made.parse_args(arguments)
    torch.set_num_threads(options.threads)
    made_by = provenance(
        ["benchmarks/preflight.py", *(sys.argv[1:] if arguments is None else arguments)],
        threads=options.threads,
        seed=options.seed,
        freed_memory_kept=keep_freed_memory(),
    )
    with tempfile.TemporaryDirectory() as folder:
        first, seconds = time_all(options, folder)
    steps = seconds["training step"]
    write(
        options.output,
        theme="preflight",
        hardware=f"{cpu_model()} {options.threads} threads",
        intro=INTRO.format(**vars(options)),
        figures=[
            Ratio.of(seconds["pre-flight"], steps).figure("pre-flight / training step", at_most=3.0),
            Figure(name="first pre-flight / training step", value=first / sorted(steps)[len(steps) // 2], at_most=3.0),
            Ratio.of(seconds["check"], steps).figure("check / training step"),
        ],
        tables=[
            Table(
                title="Every round, ms",
                rows=[
                    {"round": number, **{name: 1e3 * value for name, value in zip(seconds, values, strict=True)}}
                    for number, values in enumerate(zip(*seconds.values(), strict=True), 1)
                ],
            ),
        ],
        made_by=made_by,
    )


if __name__ == "__main__":
    main()
