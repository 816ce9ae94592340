"""How far `slicefine plan` is off: bytes saved for backward, counted without values, against those of a real step.

Run `python benchmarks/planning.py`; takes about three minutes, and can share the machine: bytes do not depend on time.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import median
from typing import Any

import torch
from _common import Figure, Table, cpu_model, parser, positive, provenance, say, write
from _memory import kept_for_backward
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import MixtralConfig

from slicefine.benchmarking.planned_config import guess_task, read_config
from slicefine.benchmarking.planned_cost import FULL, LORA, SLICEFINE, attached, cost, step_memory
from slicefine.benchmarking.planned_model import Subject, loss_of, prepare, subject
from slicefine.benchmarking.planning import parse_memory, plan
from slicefine.training.recipe import Recipe

INTRO = """\
Planned: counted on fake tensors, on the CPU's kernels, as `slicefine plan --device cpu` does. Real: the same model with random \
weights, trained for one step on the CPU. Saved: what autograd's `saved_tensors_hooks` see, unique storages, parameters and buffers left \
out. Peak: the most that is allocated at once in forward and backward beside the model, as PyTorch's profiler sees its allocator; \
unlike the plan it has the workspaces that operations of the CPU make for themselves (convolutions in their backward pass, most of \
all in bf16).

Batch {batch}, texts of {tokens} tokens, of which all but the longest in a batch are padded; small models of the architectures that \
`slicefine bench` knows, and a Mixtral whose experts are trained too, r = 5, LoRA of rank 8. "bf16": weights in bfloat16 and autocast."""

EXPERTS = "mixtral-small"
"""A mixture of experts, which `slicefine bench` has none of: 8 experts, 2 for a token."""
METHODS = {"rows": (SLICEFINE, "row"), "columns": (SLICEFINE, "column"), "LoRA": (LORA, "row"), "full": (FULL, "row")}
SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"model.dtype": "bfloat16", "training.bf16": True},
    "checkpointing": {"training.activation_checkpointing": True},
    "eager attention": {"model.attn_implementation": "eager"},
}
MODELS = (
    "llama-3.2-3b-small",
    "gemma-3-12b-small",
    "deepseek-r1-8b-small",
    "roberta-base-small",
    "vit-base-small",
    "videomae-base-small",
    EXPERTS,
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, how it is trained, and with which settings."""

    model: str
    method: str
    setting: str

    def subject(self, options: argparse.Namespace) -> tuple[Subject, str]:
        """What is planned, and the method in the planner's word."""
        method, axis = METHODS[self.method]
        config = _mixtral() if self.model == EXPERTS else read_config(self.model)
        experts = {"slice.target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
        flat = (experts if self.model == EXPERTS else {}) | {
            "task": guess_task(config, self.model),
            "model.name": self.model,
            "model.dtype": "float32",
            "data.train": "none",
            "output": "none",
            "data.max_length": options.tokens,
            "slice.axis": axis,
            "training.per_device_train_batch_size": options.batch,
        }
        return subject(Recipe.from_flat(flat | SETTINGS[self.setting]), config), method


def _mixtral() -> MixtralConfig:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}
    return MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=8, vocab_size=4096)


def measured(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """One row: planned and real bytes, and how far they are apart."""
    of, method = case.subject(options)
    planned = step_memory(of, attached(of, method), gpu=False)
    model = attached(of, method, "cpu")
    prepare(model, of.recipe)
    batch = of.inputs()
    if of.padded:
        batch["attention_mask"][1:, options.tokens // 2 :] = 0
    loss = loss_of(model, of.recipe, batch)
    saved = kept_for_backward(model, loss).saved
    before = sum(tensor.nbytes for tensor in batch.values() if tensor.is_floating_point())
    peak = before + peak_of_allocator(model, loss)
    del model, loss, batch
    gc.collect()
    return {
        "model": case.model,
        "method": case.method,
        "settings": case.setting,
        "planned saved, bytes": planned.saved,
        "real saved, bytes": saved,
        "error saved, %": 100 * (planned.saved / saved - 1),
        "planned peak, bytes": planned.peak,
        "real peak, bytes": peak,
        "error peak, %": 100 * (planned.peak / peak - 1),
    }


def peak_of_allocator(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """The most bytes that forward and backward have allocated at once; what was there before, inputs say, left out."""
    model.zero_grad()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        loss().backward()
    model.zero_grad()
    # The profiler's public tables have sums over operations, not the order of allocations.
    events: Any = profiled.profiler.kineto_results.events()
    made = sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in made))


def large(options: argparse.Namespace) -> dict[str, Any]:
    """What it takes to plan a large model that does not fit, with all that would make it fit."""
    flat = {
        "task": "causal-lm",
        "model.name": options.large,
        "data.train": "none",
        "output": "none",
        "data.max_length": 768,
        "training.bf16": True,
        "training.per_device_train_batch_size": 4,
        "training.max_steps": 1000,
    }
    began = time.process_time()
    made = plan(Recipe.from_flat(flat), read_config(options.large), memory=parse_memory("24GiB"))
    seconds = time.process_time() - began
    whole = time.process_time()
    of = subject(made.recipe, read_config(options.large))
    graph = cost(of, SLICEFINE, gpu=True, deep=10**9).step
    return {
        "model": options.large,
        "parameters": made.counts.total,
        "plan, s": seconds,
        "its graph in full, s": time.process_time() - whole,
        "saved by few layers / by all": made.costs[0].step.saved / graph.saved,
        "peak by few layers / by all": made.costs[0].step.peak / graph.peak,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__.splitlines()[0])
    made.add_argument(
        "--models", nargs="+", default=list(MODELS), help=f"models that slicefine bench knows, and {EXPERTS}"
    )
    made.add_argument("--large", default="gemma-3-12b", help="the model whose planning is timed")
    made.add_argument("--batch", type=positive, default=4, help="texts, images or clips")
    made.add_argument("--tokens", type=positive, default=128, help="tokens in the longest text")
    made.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="threads of torch")
    options = made.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    big = large(options)
    say(f"{big['model']}: {big['plan, s']:.1f} s")
    rows = []
    for model in options.models:
        for setting in SETTINGS:
            for method in METHODS:
                rows.append(measured(Case(model=model, method=method, setting=setting), options))
                say(f"{model}, {setting}, {method}: {rows[-1]['error saved, %']:.3f} %")
    write(
        options.output,
        theme="planning",
        hardware=cpu_model(),
        intro=INTRO.format(**vars(options)),
        figures=[
            Figure(
                name="largest error of saved bytes",
                value=max(abs(r["error saved, %"]) for r in rows),
                unit="%",
                at_most=3.0,
            ),
            Figure(
                name="median error of the peak",
                value=median(abs(r["error peak, %"]) for r in rows),
                unit="%",
                at_most=5.0,
            ),
            Figure(name="largest error of the peak", value=max(abs(r["error peak, %"]) for r in rows), unit="%"),
            Figure(name=f"plan of {big['model']}, seconds of one core", value=big["plan, s"], unit="s", at_most=20.0),
        ],
        tables=[Table(title="Planned and real", rows=rows), Table(title="A large model", rows=[big])],
        made_by=provenance(
            ["benchmarks/planning.py", *(sys.argv[1:] if arguments is None else arguments)],
            threads=options.threads,
            seed=options.seed,
        ),
    )


if __name__ == "__main__":
    main()
