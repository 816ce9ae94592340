"""Time of a training step by method, cost of a move, and extra bytes while training: Llama shapes, fp32, CPU.

Run `python benchmarks/step_time.py` on a quiet machine; takes a few minutes. Absolute times are this machine's alone,
so targets are set for ratios within the run.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from _common import Figure, Table, cores, cpu_model, parser, positive, provenance, say, spread, write
from _memory import Storages, alive, size, state_of, storages, without
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.optim import AdamW
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from slicefine import SliceFineConfig
from slicefine.benchmarking.timing import keep_freed_memory

INTRO = """\
One training step (forward, backward, AdamW, zero_grad) of a Llama model with random weights: hidden {hidden}, \
intermediate {intermediate}, {layers} layers, {heads} heads, vocabulary {vocab}, batch {batch} x {tokens} tokens, \
fp32, sdpa attention, CPU, {threads} threads. The vocabulary of the default shapes gives the head the share of the \
multiply-adds that it has in LLaMA-3.2-3B, about a tenth.

Every variant has a model of its own with the same weights, built before the clock starts and alive throughout, and \
freed memory stays with the process, so none pays page faults for what another left behind. A round is one step of \
each on the same batch, in an order shuffled anew for every round, so none always follows the same neighbour. \
{warmup} untimed rounds, then {rounds} timed ones; Python's garbage collector runs between steps only. "x / y" is the \
ratio of the medians; its min and max are over the ratios within one round. "frozen limit": no trainable weight and no \
optimizer, the embeddings want a gradient, so backward flows through all activations.

A move: the time of `optimizer.step()` with `slide_every=1`, where every layer moves, less the time without a move, \
over the median training step of the same variant. Extra bytes: every storage alive in Python after {moves} moves, \
between backward and `optimizer.step()`, that was not alive with the base model alone; batch and outputs are gone by \
then."""

FROZEN = "frozen limit"
LORA = "LoRA r8 all-linear"
AXES = ("row", "column", "alternate")
RANKS = (1, 5, 16)
NEVER, EVERY_STEP = 10**9, 1


def slicefine_name(axis: str, r: int) -> str:
    """The name of a SliceFine variant in the tables."""
    return f"SliceFine {axis} r{r}"


def base_model(options: argparse.Namespace) -> LlamaForCausalLM:
    """A new model; the same weights on every call."""
    torch.manual_seed(options.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=options.hidden,
            intermediate_size=options.intermediate,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            num_key_value_heads=options.heads,
            vocab_size=options.vocab,
            max_position_embeddings=options.tokens,
            use_cache=False,
            attn_implementation="sdpa",
        )
    ).train()


def with_slices(axis: str, r: int, slide_every: int = NEVER) -> Callable[[PreTrainedModel], Any]:
    """Attach SliceFine to a model; by default its slices do not move."""
    return lambda model: get_peft_model(
        model, SliceFineConfig(r=r, axis=axis, slide_every=slide_every, task_type="CAUSAL_LM")
    )


def with_lora(model: PreTrainedModel) -> Any:
    """Attach the LoRA that the targets compare with."""
    return get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"))


class Variant:
    """A model, its optimizer, and the seconds its steps took."""

    def __init__(self, name: str, model: Any) -> None:
        self.name = name
        self.model = model
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = AdamW(self.trainable, lr=1e-4, weight_decay=0.0) if self.trainable else None
        self.seconds: list[float] = []

    def loss(self, batch: Tensor) -> Tensor:
        """Loss on `batch`, int64 `(batch, tokens)`."""
        if self.optimizer is not None:
            return self.model(input_ids=batch, labels=batch).loss
        embedded = self.model.get_input_embeddings()(batch).requires_grad_()
        return self.model(inputs_embeds=embedded, labels=batch).loss

    def step(self, batch: Tensor) -> float:
        """One training step; returns its seconds."""
        start = time.perf_counter()
        self.loss(batch).backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return time.perf_counter() - start


def step_variants(options: argparse.Namespace) -> list[Variant]:
    """All methods, each on a model of its own."""
    methods = {
        FROZEN: lambda model: model.requires_grad_(False),
        **{slicefine_name(axis, r): with_slices(axis, r) for axis in AXES for r in RANKS},
        LORA: with_lora,
        "full": lambda model: model,
    }
    return [Variant(name, attach(base_model(options))) for name, attach in methods.items()]


def batches(options: argparse.Namespace) -> Iterator[Tensor]:
    """Random tokens, without end."""
    generator = torch.Generator().manual_seed(options.seed)
    while True:
        yield torch.randint(options.vocab, (options.batch, options.tokens), generator=generator)


def time_steps(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every timed step, by variant; entry number i of each list is from round i."""
    variants = step_variants(options)
    shuffler = random.Random(options.seed)
    source = batches(options)
    gc.disable()
    try:
        for round_number in range(-options.warmup, options.rounds):
            batch = next(source)
            for variant in shuffler.sample(variants, len(variants)):
                gc.collect()
                seconds = variant.step(batch)
                if round_number >= 0:
                    variant.seconds.append(seconds)
            say(f"round {round_number + 1} of {options.rounds}" if round_number >= 0 else "warm-up round")
    finally:
        gc.enable()
    return {variant.name: variant.seconds for variant in variants}


@dataclass(frozen=True)
class Ratio:
    """Ratio of two medians, with the least and greatest ratio within one round."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, above: Sequence[float], below: Sequence[float]) -> Ratio:
        within = [a / b for a, b in zip(above, below, strict=True)]
        return cls(statistics.median(above) / statistics.median(below), min(within), max(within))

    def figure(self, name: str, **target: float | None) -> Figure:
        return Figure(name=name, value=self.value, low=self.low, high=self.high, **target)


def step_rows(seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """One row a variant: milliseconds, and ratios to the frozen limit and to LoRA."""
    rows = []
    for name, own in seconds.items():
        median, low, high = (1e3 * value for value in spread(own))
        limit, lora = Ratio.of(own, seconds[FROZEN]), Ratio.of(own, seconds[LORA])
        rows.append(
            {
                "variant": name,
                "median ms": median,
                "min ms": low,
                "max ms": high,
                "/ frozen limit": limit.value,
                "/ frozen limit, min": limit.low,
                "/ frozen limit, max": limit.high,
                "/ LoRA": lora.value,
                "/ LoRA, min": lora.low,
                "/ LoRA, max": lora.high,
            }
        )
    return rows


def step_figures(seconds: dict[str, list[float]], threads: int) -> list[Figure]:
    """Every ratio that a target is set for, and the same ratio of the variants that have none."""
    against_lora = 1.30 if threads >= 4 else 1.20 if threads >= 2 else None
    found = []
    for axis in AXES:
        for r in RANKS:
            name = slicefine_name(axis, r)
            limit = 1.05 if axis != "alternate" and r in (1, 5) else None
            found.append(Ratio.of(seconds[name], seconds[FROZEN]).figure(f"{name} / frozen limit", at_most=limit))
    for axis in AXES:
        for r in RANKS:
            name = slicefine_name(axis, r)
            found.append(Ratio.of(seconds[LORA], seconds[name]).figure(f"{LORA} / {name}", at_least=against_lora))
    for axis in AXES:
        wide, thin = slicefine_name(axis, 16), slicefine_name(axis, 1)
        found.append(Ratio.of(seconds[wide], seconds[thin]).figure(f"{wide} / r1", at_most=1.05))
    return found


@dataclass
class Moving:
    """Seconds of `optimizer.step()` of one configuration, moving at every step and never moving."""

    axis: str
    r: int
    models: dict[int, Variant]
    seconds: dict[int, list[float]] = field(default_factory=lambda: {NEVER: [], EVERY_STEP: []})


def time_moves(options: argparse.Namespace) -> list[Moving]:
    """Time `optimizer.step()` with and without a move, interleaved; few tokens, as the batch has no part in a move."""
    measured = []
    for axis in AXES:
        for r in (RANKS[0], RANKS[-1]):
            models = {
                every: Variant("", with_slices(axis, r, every)(base_model(options))) for every in (NEVER, EVERY_STEP)
            }
            measured.append(Moving(axis, r, models))
    source = batches(options)
    gc.disable()
    try:
        for round_number in range(-options.warmup, 3 * options.rounds):
            batch = next(source)[:1, :8]
            for moving in measured:
                for every, variant in moving.models.items():
                    variant.loss(batch).backward()
                    start = time.perf_counter()
                    variant.optimizer.step()
                    seconds = time.perf_counter() - start
                    variant.optimizer.zero_grad()
                    if round_number >= 0:
                        moving.seconds[every].append(seconds)
            gc.collect()
    finally:
        gc.enable()
    return measured


def move_figures(measured: list[Moving], steps: dict[str, list[float]]) -> tuple[list[Figure], list[dict[str, Any]]]:
    """Moving every slice once over one training step; and the times behind it."""
    figures, rows = [], []
    for moving in measured:
        name = slicefine_name(moving.axis, moving.r)
        step = statistics.median(steps[name])
        still = statistics.median(moving.seconds[NEVER])
        median, low, high = ((seconds - still) / step for seconds in spread(moving.seconds[EVERY_STEP]))
        figures.append(
            Figure(name=f"moving every slice / training step, {name}", value=median, low=low, high=high, at_most=1.0)
        )
        rows.append(
            {
                "variant": name,
                "optimizer.step() without a move, ms": 1e3 * still,
                "with a move, ms": 1e3 * statistics.median(moving.seconds[EVERY_STEP]),
                "training step, ms": 1e3 * step,
            }
        )
    return figures, rows


def extra_bytes(axis: str, options: argparse.Namespace, r: int = 1) -> dict[str, Any]:
    """Bytes alive beside the base model after `options.moves` moves, by part, and over the bytes of its weights."""
    before = alive()
    base = base_model(options)
    weights = state_of(base)
    variant = Variant("", with_slices(axis, r, 2)(base))
    source = batches(options)
    for _ in range(2 * options.moves + 1):  # the last step makes no move: a move drops the moments
        variant.step(next(source)[:1, :8])
    variant.loss(next(source)[:1, :8]).backward()

    left = without(alive(), before, weights)
    parts: dict[str, Storages] = {
        "masters": storages(variant.trainable),
        "gradients": storages(p.grad for p in variant.trainable if p.grad is not None),
        "moments": storages(t for s in variant.optimizer.state.values() for t in s.values() if isinstance(t, Tensor)),
    }
    row: dict[str, Any] = {"variant": slicefine_name(axis, r), "weights KiB": size(weights) / 1024}
    for part, found in parts.items():
        row[f"{part} KiB"] = size(found) / 1024
    row["originals and all else KiB"] = size(without(left, *parts.values())) / 1024
    row["extra KiB"] = sum(value for key, value in row.items() if key.endswith(" KiB") and key != "weights KiB")
    row["/ weights"] = row["extra KiB"] / row["weights KiB"]
    return row


def add_model(made: argparse.ArgumentParser) -> None:
    """Add the options of the model, its batches and its threads."""
    made.add_argument("--threads", type=positive, default=cores(), help="CPU threads")
    made.add_argument("--batch", type=positive, default=8, help="sequences")
    made.add_argument("--tokens", type=positive, default=256, help="tokens a sequence")
    made.add_argument("--layers", type=positive, default=6, help="decoder layers")
    made.add_argument("--hidden", type=positive, default=512, help="width of the model")
    made.add_argument("--intermediate", type=positive, default=1408, help="width of the MLP")
    made.add_argument("--heads", type=positive, default=8, help="attention heads")
    made.add_argument("--vocab", type=positive, default=4096, help="tokens in the vocabulary")


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--rounds", type=positive, default=9, help="timed rounds; a round is one step of every variant")
    made.add_argument("--warmup", type=positive, default=2, help="untimed rounds before")
    add_model(made)
    made.add_argument("--moves", type=positive, default=10, help="moves before extra bytes are counted")
    options = made.parse_args(arguments)
    torch.set_num_threads(options.threads)
    made_by = provenance(
        ["benchmarks/step_time.py", *(sys.argv[1:] if arguments is None else arguments)],
        threads=options.threads,
        seed=options.seed,
        freed_memory_kept=keep_freed_memory(),
    )
    seconds = time_steps(options)
    say("moves")
    moves, move_rows = move_figures(time_moves(options), seconds)
    say("extra bytes")
    extra = [extra_bytes(axis, options) for axis in AXES]
    extra_figures = [
        Figure(name=f"extra bytes / weights, {row['variant']}", value=row["/ weights"], at_most=0.05) for row in extra
    ]
    write(
        options.output,
        theme="step-time",
        hardware=f"{cpu_model()} {options.threads} threads",
        intro=INTRO.format(**vars(options)),
        figures=[*step_figures(seconds, options.threads), *moves, *extra_figures],
        tables=[
            Table(title="Training step", rows=step_rows(seconds)),
            Table(title="Moving every slice once", rows=move_rows),
            Table(title=f"Extra bytes while training, after {options.moves} moves", rows=extra),
            Table(title="Every timed step, ms", rows=_raw(seconds)),
        ],
        made_by=made_by,
    )


def _raw(seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    return [
        {"variant": name, **{f"round {number}": 1e3 * value for number, value in enumerate(own, 1)}}
        for name, own in seconds.items()
    ]


if __name__ == "__main__":
    main()
