"""Bytes kept for backward, a layer, by method: LLaMA-3.2-3B shapes in bf16, counted on the meta device.

On the meta device tensors have shapes and no data, so the figures are exact, need no GPU, and do not vary: one run is
enough. Run `python benchmarks/saved_activations.py`; takes about a minute.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _common import Figure, Table, parser, positive, provenance, write
from _memory import Kept, kept_for_backward
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from slicefine import SliceFineConfig

INTRO = """\
Bytes kept from forward to backward by one decoder layer, as the model with {more} layers less the model with {fewer}, \
where nothing but the layer differs. LLaMA-3.2-3B shapes (hidden {hidden}, intermediate {intermediate}, {heads} heads, \
{kv_heads} key/value heads, head size {head}, vocabulary {vocab}, tied), bf16, {batch} x {tokens} tokens, causal \
attention without padding, no dropout, no checkpointing, on the meta device. "saved": unique storages that autograd \
saves, seen by `saved_tensors_hooks`, parameters and buffers left out. "stashed": every other tensor that forward made \
and that is still alive in Python after it (autograd contexts, modules, closures). Ratios are of their sum. Backward \
runs on what was counted.

Two kernels of `scaled_dot_product_attention`: "math" is what it runs on the meta device, and keeps the fp32 attention \
matrix, the same for every method; "fused" (flash) is what a GPU runs, and keeps query, key, value, output and one \
number per query. "frozen limit": no trainable weight, the embeddings want a gradient. LoRA as PEFT makes it by \
default, adapters in fp32 on a bf16 model, and with `autocast_adapter_dtype=False`, adapters in bf16."""

LORA_ALL = "LoRA r8 all-linear"
FROZEN = "frozen limit"


def fused_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **_: Any
) -> tuple[Tensor, None]:
    """Attention by the operator that `scaled_dot_product_attention` picks on a GPU; the meta device would pick another.

    Shapes `(batch, heads, tokens, head)` to `(batch, tokens, heads, head)`.
    """
    attended = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True)[0]
    return attended.transpose(1, 2).contiguous(), None


# Under names of our own transformers builds no mask, as for training data without padding: its search for packed
# sequences reads the position ids, which have no values on the meta device. A name with "flash" in it is looked up
# elsewhere, hence "fused".
KERNELS = {"math": sdpa_attention_forward, "fused": fused_attention_forward}
for _name, _kernel in KERNELS.items():
    AttentionInterface.register(_name, _kernel)


def _frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


def _slicefine(axis: str, r: int) -> Callable[[nn.Module], nn.Module]:
    return lambda model: get_peft_model(model, SliceFineConfig(r=r, axis=axis, task_type="CAUSAL_LM"))


def _lora(r: int, targets: str | list[str], autocast: bool = True) -> Callable[[nn.Module], nn.Module]:
    def attach(model: nn.Module) -> nn.Module:
        # A new configuration for every model: PEFT writes the names it has found into it.
        config = LoraConfig(r=r, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM")
        return get_peft_model(model, config, autocast_adapter_dtype=autocast)

    return attach


METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {
    FROZEN: _frozen,
    "SliceFine columns r5": _slicefine("column", 5),
    "SliceFine rows r5": _slicefine("row", 5),
    "SliceFine alternate r5 (while on rows)": _slicefine("alternate", 5),
    "LoRA r32 q,v": _lora(32, ["q_proj", "v_proj"]),
    LORA_ALL: _lora(8, "all-linear"),
    "LoRA r8 all-linear, bf16 adapters": _lora(8, "all-linear", autocast=False),
    "full": lambda model: model,
}


def kept(method: str, kernel: str, layers: int, options: argparse.Namespace) -> Kept:
    """What one training step of a model with `layers` layers keeps for backward."""
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        head_dim=options.head,
        vocab_size=options.vocab,
        tie_word_embeddings=True,
        attn_implementation=kernel,
    )
    with torch.device("meta"):
        base = LlamaForCausalLM(config).to(torch.bfloat16)
        tokens = torch.zeros(options.batch, options.tokens, dtype=torch.long)
    model = METHODS[method](base).train()

    inputs = {"input_ids": tokens}
    if method == FROZEN:
        inputs = {"inputs_embeds": base.get_input_embeddings()(tokens).requires_grad_()}
    return kept_for_backward(model, lambda: model(**inputs, labels=tokens, use_cache=False).loss)


def measure(kernel: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a method: MiB a layer, ratios, and the MiB of the whole model."""
    rows = []
    for method in METHODS:
        one, two = (kept(method, kernel, layers, options) for layers in (options.layers - 1, options.layers))
        mib = 2**20
        rows.append(
            {
                "method": method,
                "MiB a layer": (two.total - one.total) / mib,
                "saved MiB a layer": (two.saved - one.saved) / mib,
                "stashed MiB a layer": (two.stashed - one.stashed) / mib,
                "stashed MiB, model": two.stashed / mib,
                f"MiB, model of {options.layers} layers": two.total / mib,
            }
        )
    by_method = {row["method"]: row["MiB a layer"] for row in rows}
    for row in rows:
        row["/ frozen limit"] = row["MiB a layer"] / by_method[FROZEN]
        row["/ LoRA r8 all-linear"] = row["MiB a layer"] / by_method[LORA_ALL]
    return rows


def figures(kernel: str, rows: list[dict[str, Any]]) -> list[Figure]:
    """The ratios that have a target; the targets are for the math kernel, fused is reported beside it."""
    named = {row["method"]: row for row in rows}
    columns, by_rows = named["SliceFine columns r5"], named["SliceFine rows r5"]
    wanted = [
        ("columns / frozen limit", columns["/ frozen limit"], 1.01),
        ("rows / LoRA r8 all-linear", by_rows["/ LoRA r8 all-linear"], 0.78),
        ("columns / LoRA r8 all-linear", columns["/ LoRA r8 all-linear"], 0.66),
        ("stashed outside saved tensors, MiB", max(r["stashed MiB, model"] for r in (columns, by_rows)), 0.0),
    ]
    return [
        Figure(name=f"{name} ({kernel} attention)", value=value, at_most=limit if kernel == "math" else None)
        for name, value, limit in wanted
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--layers", type=positive, default=28, help="decoder layers; a layer is this model less one")
    made.add_argument("--batch", type=positive, default=4, help="sequences")
    made.add_argument("--tokens", type=positive, default=768, help="tokens a sequence")
    made.add_argument("--hidden", type=positive, default=3072, help="width of the model")
    made.add_argument("--intermediate", type=positive, default=8192, help="width of the MLP")
    made.add_argument("--heads", type=positive, default=24, help="attention heads")
    made.add_argument("--kv-heads", type=positive, default=8, help="key/value heads")
    made.add_argument("--head", type=positive, default=128, help="features a head")
    made.add_argument("--vocab", type=positive, default=128256, help="tokens in the vocabulary")
    options = made.parse_args(arguments)
    if options.layers < 2:
        made.error("--layers must be at least 2: the figure is a difference")
    torch.manual_seed(options.seed)
    by_kernel = {kernel: measure(kernel, options) for kernel in KERNELS}
    write(
        options.output,
        theme="saved-activations",
        hardware="meta-device",
        intro=INTRO.format(more=options.layers, fewer=options.layers - 1, **vars(options)),
        figures=[figure for kernel, rows in by_kernel.items() for figure in figures(kernel, rows)],
        tables=[Table(title=f"By method, {kernel} attention", rows=rows) for kernel, rows in by_kernel.items()],
        made_by=provenance(
            ["benchmarks/saved_activations.py", *(sys.argv[1:] if arguments is None else arguments)],
            threads=torch.get_num_threads(),
            seed=options.seed,
            device="meta",
        ),
    )


if __name__ == "__main__":
    main()
