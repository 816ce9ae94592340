"""Exporting: peak memory over a bare process, bit-equality with the trained model, exactness of the LoRA adapter.

Run `python benchmarks/export.py` on Linux; takes about two minutes, 5 GB of disk in the system's folder for temporary files, and memory
for the model in fp32, to compare with. Every sample of memory is a fresh process.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _common import Figure, Table, cores, cpu_model, parser, positive, provenance, say, spread, write
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from slicefine import SliceFineConfig
from slicefine.training.export import export

INTRO = """\
A Llama with random weights: hidden {hidden}, intermediate {intermediate}, {layers} layers, vocabulary {vocab}, {dtype}, \
{size:.2f} GB in one safetensors file, CPU, {threads} threads; an adapter on all linear layers, r = {r}, axis alternate, {steps} steps with \
a move after each.

Peak memory: the greatest resident size (`VmHWM`) of a process that exports, less that of one that makes the same imports and ends, over the bytes of the \
model's weights; {repeats} processes each. `merged` without verification is what writing takes; with it, the trained and the exported \
model are loaded, one after the other. Bit-equal: tensors of the exported files that differ from `merge_and_unload()` of the adapter \
on its base, in name, dtype or any bit. LoRA: largest absolute difference, over {tokens} random tokens, between the logits of the trained model and \
those of PEFT's LoRA on the base, both computed in fp32; largest absolute logit {scale:.3g}."""

BARE = """
import sys
import torch
from transformers.models.llama import modeling_llama
import slicefine.training.export
torch.set_num_threads(int(sys.argv[1]))
"""
EXPORT = """
import warnings
warnings.simplefilter("ignore")
slicefine.training.export.export(sys.argv[2], sys.argv[3], sys.argv[4], verify=sys.argv[5] == "verify")
"""
# Not getrusage's `ru_maxrss`: a process starts with that of the one that started it.
PEAK = """
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM:")))
"""


def make_adapter(options: argparse.Namespace, folder: Path) -> Path:
    """Save a random model to `folder/base` and a trained adapter to `folder/adapter`; returns the latter."""
    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        max_position_embeddings=max(64, options.tokens),
        dtype=options.dtype,
    )
    base = LlamaForCausalLM(config).to(getattr(torch, options.dtype))
    base.save_pretrained(folder / "base")
    loaded = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=options.dtype)
    settings = SliceFineConfig(r=options.r, slide_every=1, task_type="CAUSAL_LM")
    model = get_peft_model(loaded, settings)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.0)
    for _ in range(options.steps):
        tokens = torch.randint(0, options.vocab, (1, 16))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(str(folder / "adapter"))
    loaded.config.save_pretrained(folder / "adapter")
    return folder / "adapter"


def peak(options: argparse.Namespace, *arguments: str) -> int:
    """Peak memory, in bytes, of a process that exports with `arguments`, or makes the imports alone if there are none."""
    code = BARE + (EXPORT if arguments else "") + PEAK
    done = subprocess.run(
        [sys.executable, "-c", code, str(options.threads), *arguments], check=True, stdout=subprocess.PIPE, text=True
    )
    return int(done.stdout.split()[-2]) * 1024


def differing(folder: Path, state: dict[str, Tensor]) -> int:
    """Tensors in the exported files that are not, in name, dtype and every bit, those of `state`; and those that are missing."""
    wrong, seen = 0, set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118 -- not a mapping
                seen.add(key)
                tensor = handle.get_tensor(key)
                expected = state.get(key)
                wrong += expected is None or tensor.dtype != expected.dtype or not torch.equal(tensor, expected)
    return wrong + len(state.keys() - seen)


def base_model(folder: Path) -> Any:
    """The base model, in the dtype that it is stored in."""
    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")


@torch.no_grad()
def logits(model: Any, options: argparse.Namespace) -> Tensor:
    """Of fixed random tokens."""
    tokens = torch.randint(0, options.vocab, (1, options.tokens), generator=torch.Generator().manual_seed(options.seed))
    return model.eval()(input_ids=tokens).logits


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--threads", type=positive, default=cores(), help="CPU threads")
    made.add_argument("--repeats", type=positive, default=3, help="processes a sample of memory; the median counts")
    made.add_argument("--hidden", type=positive, default=2048, help="width of the model")
    made.add_argument("--intermediate", type=positive, default=5632, help="width of the MLP")
    made.add_argument("--layers", type=positive, default=8, help="decoder layers")
    made.add_argument("--heads", type=positive, default=16, help="attention heads")
    made.add_argument("--vocab", type=positive, default=32000, help="tokens in the vocabulary")
    made.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="dtype of the model")
    made.add_argument("--r", type=positive, default=5, help="rank: rows or columns in a slice")
    made.add_argument("--steps", type=positive, default=8, help="optimizer steps, one move each")
    made.add_argument("--tokens", type=positive, default=32, help="tokens whose logits are compared")
    options = made.parse_args(arguments)
    torch.set_num_threads(options.threads)
    made_by = provenance(
        ["benchmarks/export.py", *(sys.argv[1:] if arguments is None else arguments)],
        threads=options.threads,
        seed=options.seed,
    )
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is no tokenizer")
        warnings.filterwarnings("ignore", "Rank ")  # what servers take by default is not the matter here
        folder = Path(name)
        say("making the model and its adapter")
        adapter = make_adapter(options, folder)
        gc.collect()
        size = (folder / "base" / "model.safetensors").stat().st_size
        samples: dict[str, list[int]] = {"bare": [], "without": [], "verify": []}
        for number in range(options.repeats):
            say(f"memory, round {number + 1} of {options.repeats}")
            samples["bare"].append(peak(options))
            for how in ("without", "verify"):
                shutil.rmtree(folder / how, ignore_errors=True)
                samples[how].append(peak(options, str(adapter), "merged", str(folder / how), how))
        bare, _, _ = spread(samples["bare"])
        say("comparing")
        model = PeftModel.from_pretrained(base_model(folder), str(adapter)).merge_and_unload()
        wrong = differing(folder / "without", model.state_dict())
        expected = logits(model.float(), options)
        del model
        export(adapter, "lora", folder / "lora", verify=False)
        lora = PeftModel.from_pretrained(base_model(folder).float(), str(folder / "lora"))
        exact = float((logits(lora, options) - expected).abs().max())
        for key, parameter in lora.named_parameters():
            if "lora_" in key:
                parameter.data = parameter.data.bfloat16().float()
        rounded = float((logits(lora, options) - expected).abs().max())
        rank = json.loads((folder / "lora" / "adapter_config.json").read_text())["r"]
    figures = []
    for how, title, limit in (
        ("without", "export merged: peak memory over the bare process / model size", 0.3),
        ("verify", "the same, verification included", None),
    ):
        median, low, high = ((value - bare) / size for value in spread(samples[how]))
        figures.append(Figure(name=title, value=median, low=low, high=high, at_most=limit))
    figures += [
        Figure(name="merged export: tensors that differ from the trained model", value=wrong, at_most=0),
        Figure(name=f"LoRA export (rank {rank}): largest logit difference in fp32", value=exact, at_most=1e-5),
        Figure(name="the same with the LoRA adapter rounded to bf16", value=rounded),
    ]
    write(
        options.output,
        theme="export",
        hardware=f"{cpu_model()} {options.threads} threads",
        intro=INTRO.format(**vars(options), size=size / 1e9, scale=float(expected.abs().max())),
        figures=figures,
        tables=[
            Table(
                title="Every process, peak memory in MB",
                rows=[
                    {
                        "round": number,
                        "imports alone": a / 1e6,
                        "without verification": b / 1e6,
                        "with verification": c / 1e6,
                    }
                    for number, (a, b, c) in enumerate(zip(*samples.values(), strict=True), 1)
                ],
            )
        ],
        made_by=made_by,
    )


if __name__ == "__main__":
    main()
