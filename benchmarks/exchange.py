"""Disabling, enabling and switching adapters: time over a training step, exactness, and memory over many moves.

Run `python benchmarks/exchange.py` on a quiet machine; takes about two minutes.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from _common import Figure, Table, cpu_model, parser, positive, provenance, say, spread, write
from _memory import alive, size
from peft import get_peft_model
from step_time import Variant, add_model, base_model, batches
from torch import nn

from slicefine import SliceFineConfig
from slicefine.benchmarking.timing import keep_freed_memory

INTRO = """\
The model of the step-time benchmark: hidden {hidden}, intermediate {intermediate}, {layers} layers, vocabulary {vocab}, batch \
{batch} x {tokens} tokens, fp32, CPU, {threads} threads; r = {r}, axis alternate, random weights.

Disable + enable: every layer of an adapter that has made {moves} moves gives the original values back to its weight and takes \
the trained ones again; over the median training step of the same model, interleaved, {rounds} rounds. \
Switches: two adapters trained over {moves} moves each take turns {switches} times; every weight, master and stored value \
is compared bit by bit with a copy made before. Memory: bytes of all tensors alive in Python after 200 and after {long} more moves \
of a small model (hidden 32) whose every row and column has been touched by then."""


def trained(options: argparse.Namespace) -> Variant:
    """A model with a slicefine adapter that has made `options.moves` moves."""
    config = SliceFineConfig(r=options.r, axis="alternate", slide_every=1, task_type="CAUSAL_LM")
    variant = Variant("SliceFine", get_peft_model(base_model(options), config))
    source = batches(options)
    for _ in range(options.moves):
        variant.step(next(source)[:1, :8])
    return variant


def time_exchanges(options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Seconds of training steps, and of disabling and enabling all layers."""
    variant = trained(options)
    source, steps, exchanges = batches(options), [], []
    tuner = variant.model.base_model
    gc.disable()
    try:
        for round_number in range(-options.warmup, options.rounds):
            gc.collect()
            seconds = variant.step(next(source))
            start = time.perf_counter()
            tuner.disable_adapter_layers()
            tuner.enable_adapter_layers()
            exchange = time.perf_counter() - start
            if round_number >= 0:
                steps.append(seconds)
                exchanges.append(exchange)
    finally:
        gc.enable()
    return steps, exchanges


def differing_after_switches(options: argparse.Namespace) -> int:
    """Entries of the state dict whose bits differ after two adapters have taken turns `options.switches` times."""
    variant = trained(options)
    model: Any = variant.model
    model.add_adapter("other", SliceFineConfig(r=options.r + 1, axis="alternate", slide_every=1))
    model.set_adapter("other")
    source, optimizer = batches(options), torch.optim.SGD(_trainable(model), lr=1e-2)
    for _ in range(options.moves):
        variant.loss(next(source)[:1, :8]).backward()
        optimizer.step()
        optimizer.zero_grad()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for number in range(options.switches):
        model.set_adapter("other" if number % 2 else "default")
        if number % 100 == 99:
            say(f"switch {number + 1} of {options.switches}")
    model.set_adapter("other")
    after = model.state_dict()
    return len(before.keys() ^ after.keys()) + sum(not torch.equal(before[name], after[name]) for name in before)


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def memory_over_moves(options: argparse.Namespace) -> tuple[int, int]:
    """Bytes of all tensors alive after 200 moves, and after `options.long` more."""
    small = argparse.Namespace(
        **vars(options) | {"hidden": 32, "intermediate": 48, "heads": 2, "layers": 2, "vocab": 64}
    )
    config = SliceFineConfig(r=2, axis="alternate", slide_every=1, task_type="CAUSAL_LM")
    variant = Variant("", get_peft_model(base_model(small), config))
    source, held = batches(small), []
    for moves in (200, options.long):
        for _ in range(moves):
            variant.step(next(source)[:1, :8])
        held.append(size(alive()))
    return held[0], held[1]


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--rounds", type=positive, default=9, help="timed rounds")
    made.add_argument("--warmup", type=positive, default=2, help="untimed rounds before")
    add_model(made)
    made.add_argument("--r", type=positive, default=5, help="rank: rows or columns in a slice")
    made.add_argument("--moves", type=positive, default=10, help="moves of each adapter before it is exchanged")
    made.add_argument("--switches", type=positive, default=1000, help="switches between two adapters")
    made.add_argument("--long", type=positive, default=1000, help="moves over which memory must not grow")
    options = made.parse_args(arguments)
    torch.set_num_threads(options.threads)
    made_by = provenance(
        ["benchmarks/exchange.py", *(sys.argv[1:] if arguments is None else arguments)],
        threads=options.threads,
        seed=options.seed,
        freed_memory_kept=keep_freed_memory(),
    )
    steps, exchanges = time_exchanges(options)
    step = statistics.median(steps)
    median, low, high = (seconds / step for seconds in spread(exchanges))
    say("switches")
    differing = differing_after_switches(options)
    say("memory")
    early, late = memory_over_moves(options)
    write(
        options.output,
        theme="exchange",
        hardware=f"{cpu_model()} {options.threads} threads",
        intro=INTRO.format(**vars(options)),
        figures=[
            Figure(name="disable + enable / training step", value=median, low=low, high=high, at_most=0.1),
            Figure(name=f"tensors that differ after {options.switches} switches", value=differing, at_most=0),
            Figure(name=f"tensor bytes after {options.long} more moves / before", value=late / early, at_most=1.0),
        ],
        tables=[
            Table(
                title="Every round, ms",
                rows=[
                    {"round": number, "training step": 1e3 * a, "disable + enable": 1e3 * b}
                    for number, (a, b) in enumerate(zip(steps, exchanges, strict=True), 1)
                ],
            ),
        ],
        made_by=made_by,
    )


if __name__ == "__main__":
    main()
