"""Time of a training step of convolutional networks by method, over the frozen limit: fp32, CPU.

Run `python benchmarks/conv_step_time.py` on a quiet machine; takes a few minutes. Absolute times are this machine's alone,
so targets are set for ratios within the run.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _common import Figure, Table, cores, cpu_model, parser, positive, provenance, say, spread, write
from peft import get_peft_model
from step_time import FROZEN, NEVER, Ratio, Variant, slicefine_name
from torch import Tensor, nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

from slicefine import SliceFineConfig
from slicefine.benchmarking.timing import keep_freed_memory

INTRO = """\
One training step (forward, backward, AdamW, zero_grad) of two networks with random weights, {blocks} blocks in each of \
four stages, batch {batch} x {pixels} x {pixels} pixels, fp32, CPU, {threads} threads: ResNet (bottlenecks of 1x1 and 3x3 \
convolutions, batch norm, {width} channels after the first convolution, as in ResNet-50 by default) and ConvNeXt (depthwise \
7x7 convolutions and linear layers, half as many more, as in ConvNeXt-T by default). Slices in every convolution and \
linear layer but the head and, for columns, layers with no more than r of them (the image's three, the one of depthwise \
convolutions).

Every variant has a model of its own with the same weights, built before the clock starts and alive throughout, and \
freed memory stays with the process. A round is one step of each variant of a network on the same batch, in an order \
shuffled anew for every round. {warmup} untimed rounds, then {rounds} timed ones; Python's garbage collector runs between \
steps only. "x / y" is the ratio of the medians; its min and max are over the ratios within one round. "frozen limit": no \
trainable weight and no optimizer, the output of the first convolution wants a gradient, so backward flows through all \
activations but not into the image."""

AXES = ("row", "column")
RANKS = (1, 5)
FULL = "full"


class ImageVariant(Variant):
    """As for a language model; a batch is `(batch, 3, pixels, pixels)`, and all images are of class 0."""

    def loss(self, batch: Tensor) -> Tensor:
        return self.model(pixel_values=batch, labels=batch.new_zeros(len(batch), dtype=torch.int64)).loss


def resnet(options: argparse.Namespace) -> PreTrainedModel:
    """A new ResNet; the same weights on every call."""
    torch.manual_seed(options.seed)
    sizes = [options.width * 4 * 2**stage for stage in range(4)]
    config = ResNetConfig(embedding_size=options.width, hidden_sizes=sizes, depths=[options.blocks] * 4, num_labels=10)
    return ResNetForImageClassification(config).train()


def convnext(options: argparse.Namespace) -> PreTrainedModel:
    """A new ConvNeXt; the same weights on every call."""
    torch.manual_seed(options.seed)
    sizes = [3 * options.width // 2 * 2**stage for stage in range(4)]
    config = ConvNextConfig(hidden_sizes=sizes, depths=[options.blocks] * 4, num_labels=10)
    return ConvNextForImageClassification(config).train()


NETWORKS: dict[str, tuple[Callable[[argparse.Namespace], PreTrainedModel], str]] = {
    "ResNet": (resnet, "resnet.embedder.embedder.convolution"),
    "ConvNeXt": (convnext, "convnext.embeddings.patch_embeddings"),
}
"""What builds a network, and the name of its first convolution."""


def frozen(model: PreTrainedModel, stem: str) -> PreTrainedModel:
    """`model` with no trainable weight, whose activations want gradients from the first convolution, `stem`, on."""
    model.requires_grad_(False)
    model.get_submodule(stem).register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    return model


def with_slices(model: PreTrainedModel, axis: str, r: int) -> Any:
    """`model` with slices that do not move."""
    counted = 0 if axis == "row" else 1
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
        and not name.startswith("classifier")
        and module.weight.shape[counted] > r
    ]
    return get_peft_model(model, SliceFineConfig(target_modules=targets, r=r, axis=axis, slide_every=NEVER))


def variants_of(network: str, options: argparse.Namespace) -> list[Variant]:
    """All methods, each on a model of its own."""
    build, stem = NETWORKS[network]
    models = {FROZEN: frozen(build(options), stem)}
    models |= {slicefine_name(axis, r): with_slices(build(options), axis, r) for axis in AXES for r in RANKS}
    models[FULL] = build(options)
    return [ImageVariant(name, model) for name, model in models.items()]


def time_steps(network: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every timed step, by variant; entry number i of each list is from round i."""
    variants = variants_of(network, options)
    shuffler = random.Random(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    gc.disable()
    try:
        for round_number in range(-options.warmup, options.rounds):
            batch = torch.randn(options.batch, 3, options.pixels, options.pixels, generator=generator)
            for variant in shuffler.sample(variants, len(variants)):
                gc.collect()
                seconds = variant.step(batch)
                if round_number >= 0:
                    variant.seconds.append(seconds)
            done = f"round {round_number + 1} of {options.rounds}" if round_number >= 0 else "warm-up round"
            say(f"{network}: {done}")
    finally:
        gc.enable()
    return {variant.name: variant.seconds for variant in variants}


def figures_of(network: str, seconds: dict[str, list[float]]) -> list[Figure]:
    """Every variant over the frozen limit; slices have a target."""
    return [
        Ratio.of(own, seconds[FROZEN]).figure(f"{network}, {name} / {FROZEN}", at_most=None if name == FULL else 1.05)
        for name, own in seconds.items()
        if name != FROZEN
    ]


def row(network: str, name: str, seconds: Sequence[float]) -> dict[str, Any]:
    """The milliseconds of one variant."""
    median, low, high = (1e3 * value for value in spread(seconds))
    return {"network": network, "variant": name, "median ms": median, "min ms": low, "max ms": high}


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--rounds", type=positive, default=9, help="timed rounds; a round is one step of every variant")
    made.add_argument("--warmup", type=positive, default=2, help="untimed rounds before")
    made.add_argument("--threads", type=positive, default=cores(), help="CPU threads")
    made.add_argument("--batch", type=positive, default=16, help="images")
    made.add_argument("--pixels", type=positive, default=224, help="width and height of an image")
    made.add_argument(
        "--width",
        type=positive,
        default=64,
        help="channels after the first convolution of ResNet; ConvNeXt has half as many more",
    )
    made.add_argument("--blocks", type=positive, default=2, help="blocks in each of the four stages")
    options = made.parse_args(arguments)
    torch.set_num_threads(options.threads)
    made_by = provenance(
        ["benchmarks/conv_step_time.py", *(sys.argv[1:] if arguments is None else arguments)],
        threads=options.threads,
        seed=options.seed,
        freed_memory_kept=keep_freed_memory(),
    )
    measured = {network: time_steps(network, options) for network in NETWORKS}
    of_all = [(network, name, own) for network, seconds in measured.items() for name, own in seconds.items()]
    write(
        options.output,
        theme="conv-step-time",
        hardware=f"{cpu_model()} {options.threads} threads",
        intro=INTRO.format(**vars(options)),
        figures=[figure for network, seconds in measured.items() for figure in figures_of(network, seconds)],
        tables=[
            Table(title="Training step", rows=[row(*one) for one in of_all]),
            Table(
                title="Every timed step, ms",
                rows=[
                    {"network": network, "variant": name} | {f"round {i}": 1e3 * s for i, s in enumerate(own, 1)}
                    for network, name, own in of_all
                ],
            ),
        ],
        made_by=made_by,
    )


if __name__ == "__main__":
    main()
