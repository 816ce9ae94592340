"""`lora`: the slices as a LoRA adapter, for servers that know LoRA alone. Nothing is approximated.

A touched row `i` of the `(d_out, d_in)` weight is one rank: column `i` of the identity in B, the change of the row in A. A touched
column `j` is another: row `j` of the identity in A, the change of the column in B, without the entries where it crosses touched rows,
which have them already. So `B A` is the change itself, every product being a number times 1 or 0.

The rank of a layer is the number of touched rows and columns, or the shorter side of the weight if that is less. `r` and
`lora_alpha` of the whole are the greatest rank: servers that read no `rank_pattern` (vLLM) take `lora_alpha / r` as the scale of
every layer, which is 1, and `r` as the rank to make room for.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, LoraModel, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from slicefine.errors import SliceFineError, SliceFineWarning, listed, raise_all
from slicefine.slicing import Region
from slicefine.training.export_check import logits
from slicefine.training.export_source import BaseFiles, LoadedBase, Source
from slicefine.tuner import artifact
from slicefine.tuner.base_layers import LINEAR_LAYERS

VLLM_DEFAULT_RANK = 16
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for `--max-lora-rank`."""
EXACT = 1e-5
"""Largest logit difference in fp32 that rounding explains in a model of usual depth, for logits of about 1."""
WRONG = 1e-3
"""One that no rounding explains."""

Factors = dict[str, tuple[Tensor, Tensor]]
"""Target -> A `(rank, d_in)` and B `(d_out, rank)`, fp32."""


def refuse_what_lora_lacks(source: Source, *, drop: bool) -> None:
    """Raise `SliceFineError` for trained biases and heads, unless they are left out on purpose, and for layers that LoRA cannot hold."""
    extra = _biases_and_heads(source)
    if extra and not drop:
        raise_all(
            [f"{name} was trained in full." for name in extra],
            "LoRA servers take changes of weights alone, no biases and no heads. Export as merged, or leave them out on purpose with "
            "--drop_biases_and_heads",
        )
    others = [
        name for name, target in source.target_of.items() if not isinstance(source.places[target].module, LINEAR_LAYERS)
    ]
    if others:
        raise SliceFineError(
            f"LoRA servers take changes of linear layers; slices were trained in {listed(others)} too. Export as merged or slices."
        )
    config = _config(source, dict.fromkeys(source.trained.seals, 1), drop=drop)
    try:
        LoraModel(source.skeleton, config, "default", low_cpu_mem_usage=True).unload()
    except ValueError as error:
        raise SliceFineError(
            f"PEFT's LoRA does not take every layer that was trained: {error} Export as merged or slices."
        ) from error


def factors(source: Source, base: BaseFiles | LoadedBase) -> Factors:
    """The changed layers as LoRA factors.

    Raises `SliceFineError` if the base is not the one that the adapter was trained on, or nothing was changed.
    """
    found = {}
    for parameter, name in source.target_of.items():
        _, weight, values = source.read(base, parameter, name)
        original = weight.clone()
        source.trained.patch(values, weight)
        change = weight.float() - original.float()
        if bool(change.any()):
            found[name] = factorise(change, values.region)
    if not found:
        raise SliceFineError(
            f"A LoRA adapter holds what training changed; the adapter in {source.trained.folder} has changed nothing in any layer."
        )
    return found


def factorise(change: Tensor, region: Region) -> tuple[Tensor, Tensor]:
    """A `(rank, d_in)` and B `(d_out, rank)` with `B A = change` `(d_out, d_in)`, which is 0 outside of `region`."""
    d_out, d_in = change.shape
    rows, columns = list(region.rows), list(region.columns)
    if len(rows) + len(columns) > min(d_out, d_in):
        rows, columns = (list(range(d_out)), []) if d_out <= d_in else ([], list(range(d_in)))
    rank = len(rows) + len(columns)
    a, b = change.new_zeros(rank, d_in), change.new_zeros(d_out, rank)
    a[: len(rows)] = change[rows]
    b[rows, range(len(rows))] = 1
    rest = change.clone()
    rest[rows] = 0
    a[range(len(rows), rank), columns] = 1
    b[:, len(rows) :] = rest[:, columns]
    return a, b


def write(source: Source, found: Factors, folder: Path, *, drop: bool) -> None:
    """Write the adapter as PEFT does."""
    ranks = {name: len(a) for name, (a, _) in found.items()}
    _config(source, ranks, drop=drop).save_pretrained(str(folder))
    tensors = {}
    for name, (a, b) in found.items():
        tensors[f"{artifact.PEFT_ROOT}{name}.lora_A.weight"] = a
        tensors[f"{artifact.PEFT_ROOT}{name}.lora_B.weight"] = b
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def size(found: Factors) -> int:
    """Bytes of all factors."""
    return sum(tensor.nbytes for pair in found.values() for tensor in pair)


def say_ranks(source: Source, found: Factors, say: Callable[[str], None], *, drop: bool) -> None:
    """Say how large the adapter is, what it lacks, and which servers will not take it as it is."""
    ranks = sorted(len(a) for a, _ in found.values())
    spread = str(ranks[-1]) if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
    unchanged = len(source.trained.seals) - len(found)
    say(
        f"LoRA of rank {spread} in {len(found)} layers, {size(found):,} bytes"
        + (f"; {unchanged} layers that training has not changed are left out" if unchanged else "")
    )
    extra = list(_biases_and_heads(source))
    if drop and extra:
        warnings.warn(
            f"The LoRA adapter is not the whole of what was trained. Left out, as asked: {listed(extra, 5)}.",
            SliceFineWarning,
            stacklevel=2,
        )
    if ranks[-1] > VLLM_RANKS[-1]:
        warnings.warn(
            f"Rank {ranks[-1]} is more than LoRA servers take (vLLM: {VLLM_RANKS[-1]} at most). Export as merged to serve this model.",
            SliceFineWarning,
            stacklevel=2,
        )
    elif ranks[-1] > VLLM_DEFAULT_RANK:
        needed = next(rank for rank in VLLM_RANKS if rank >= ranks[-1])
        warnings.warn(
            f"Rank {ranks[-1]} is more than LoRA servers take by default (vLLM: {VLLM_DEFAULT_RANK}). Start vLLM with --max-lora-rank {needed}.",
            SliceFineWarning,
            stacklevel=2,
        )


def verify(source: Source, folder: Path, say: Callable[[str], None]) -> None:
    """Compare the logits of the base with the LoRA adapter in `folder` with those of the trained model, all in fp32.

    What was left out on purpose is given to both. One model is in memory at a time. Raises `SliceFineError` if the two differ by more
    than rounding.
    """
    expected = _trained_logits(source)
    scale = max(1.0, float(expected.abs().max()))
    model = PeftModel.from_pretrained(_with_biases_and_heads(source, source.load_base().float()), str(folder)).eval()  # pyright: ignore[reportArgumentType]
    exact = float((logits(model) - expected).abs().max())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16).float()
    rounded = float((logits(model) - expected).abs().max())
    say(
        f"Largest logit difference from the trained model, computed in fp32: {exact:.2g}; with the LoRA adapter rounded to bf16: {rounded:.2g} "
        f"(largest logit {scale:.2g})"
    )
    if not exact <= WRONG * scale:
        raise SliceFineError(
            f"The logits of the LoRA adapter differ from those of the trained model by {exact:.2g} in fp32 (largest logit {scale:.2g}), more than "
            "rounding explains; nothing was written. Export as merged, and report this with the model's name."
        )
    if exact > EXACT * scale:
        warnings.warn(
            f"The logits differ by {exact:.2g} in fp32, more than {EXACT * scale:.2g}: sums are rounded in another order.",
            SliceFineWarning,
            stacklevel=2,
        )


def _trained_logits(source: Source) -> Tensor:
    """Those of the trained model in fp32, merged first: the weights are to be what they are in its own dtype."""
    model = source.load_trained().merge_and_unload().float()
    found = logits(model)
    del model
    gc.collect()
    return found


def _with_biases_and_heads(source: Source, model: PreTrainedModel) -> PreTrainedModel:
    trained = source.trained
    dtypes = {name: tensor.dtype for name, tensor in source.skeleton.state_dict().items()}
    with torch.no_grad():
        for name, key in _biases_and_heads(source).items():
            # As in the trained model, rounded to the dtype of its base.
            values = trained.tensors.read(key).to(dtypes[name])
            parent, _, part = name.rpartition(".")
            setattr(model.get_submodule(parent), part, nn.Parameter(values.float()))
    return model


def _biases_and_heads(source: Source) -> dict[str, str]:
    """What was trained beside the slices: name in the model -> key in the file."""
    keys = source.trained.tensors.file_of
    ending = f".{artifact.PREFIX}bias"
    biases = {artifact.bare(key).removesuffix(ending) + ".bias": key for key in keys if key.endswith(ending)}
    return biases | source.trained.heads


def _config(source: Source, ranks: dict[str, int], *, drop: bool) -> LoraConfig:
    """PEFT's description of an adapter with these ranks."""
    greatest = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != greatest}
    given = source.trained.config
    config = LoraConfig(
        base_model_name_or_path=given.base_model_name_or_path,
        revision=given.revision,
        # With a task type PEFT would look for the heads.
        task_type=None if drop and source.trained.heads else given.task_type,
        r=greatest,
        lora_alpha=greatest,
        rank_pattern=others,
        alpha_pattern=dict(others),
        fan_in_fan_out=all(isinstance(source.skeleton.get_submodule(name), Conv1D) for name in ranks),
        inference_mode=True,
    )
    # Set here, because PEFT makes a set of it, which it would write in an order of its own.
    config.target_modules = _shortest_names(source.skeleton, set(ranks))
    return config


def _shortest_names(model: nn.Module, targets: set[str]) -> list[str]:
    """The last parts of the names, which servers like best, if they mean these layers alone; the whole names otherwise."""
    last = {name.rpartition(".")[2] for name in targets}
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last}
    return sorted(last if meant == targets else targets)
