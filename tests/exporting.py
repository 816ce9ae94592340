"""Trained adapters to export, and reading what was exported."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import tiny
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from slicefine import SliceFineConfig
from slicefine.training.export_check import same_kernels
from slicefine.training.export_source import CLASSES


def trained_adapter(
    folder: Path,
    model: Any,
    *,
    task: str = "CAUSAL_LM",
    dtype: torch.dtype | None = None,
    shards: str = "1GB",
    load: dict[str, Any] | None = None,
    steps: int = 7,
    **settings: Any,
) -> Path:
    """Save `model` as `folder/base`, train an adapter on it, and save that as `folder/adapter`; returns the latter.

    Args:
        dtype: That of training; that of the base if None.
        shards: Largest file of the base.
        load: Further arguments for loading the base.
        settings: Of `SliceFineConfig`; by default slices of 2 move every 2 steps, rows and columns in turn.
    """
    base = folder / "base"
    model.save_pretrained(base, max_shard_size=shards)
    loaded = CLASSES[task].from_pretrained(base, dtype=dtype or model.dtype, **(load or {}))
    config = loaded.config
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of PEFT, about tied heads
        peft_model = get_peft_model(
            loaded, SliceFineConfig(**({"r": 2, "slide_every": 2, "task_type": task} | settings))
        )
        optimizer = torch.optim.AdamW(tiny.trainable(peft_model), lr=3e-2, weight_decay=0.0)
        for step in range(steps):
            peft_model(input_ids=tiny.tokens(size=1, seed=step)).logits.float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        peft_model.save_pretrained(folder / "adapter")
    config.save_pretrained(folder / "adapter")
    return folder / "adapter"


def base_of(adapter: Path, task: str = "CAUSAL_LM") -> Any:
    """The base model as it was in training."""
    config = AutoConfig.from_pretrained(adapter)
    return CLASSES[task].from_pretrained(adapter.parent / "base", config=config, dtype=config.dtype)


def merged_by_peft(adapter: Path, task: str = "CAUSAL_LM") -> Any:
    """The trained model, merged in memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return PeftModel.from_pretrained(base_of(adapter, task), str(adapter)).merge_and_unload()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Of `tiny.tokens(size=1)`."""
    same_kernels(model)
    return model.eval()(input_ids=tiny.tokens(size=1)).logits


def weights(folder: Path) -> dict[str, Tensor]:
    """All tensors in the safetensors files of a folder."""
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def differing(folder: Path, other: Path) -> list[str]:
    """Keys that only one of two model folders has, or whose dtype or bits differ."""
    one, two = weights(folder), weights(other)
    return sorted(one.keys() ^ two.keys()) + [
        key
        for key in one.keys() & two.keys()
        if one[key].dtype != two[key].dtype or not torch.equal(one[key], two[key])
    ]


def fingerprints(folder: Path) -> dict[str, str]:
    """Every file below a folder, with a hash of its bytes."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def gemma3(**kwargs: Any) -> Gemma3ForCausalLM:
    torch.manual_seed(0)
    return Gemma3ForCausalLM(Gemma3TextConfig(**_GEMMA3, **kwargs))


def gemma3_with_images() -> Gemma3ForConditionalGeneration:
    """Its files have other names than its modules."""
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=_GEMMA3, vision_config=vision | {"image_size": 8, "patch_size": 4}, mm_tokens_per_image=4,
        image_token_index=49, boi_token_index=47, eoi_token_index=48,
    )  # fmt: skip
    return Gemma3ForConditionalGeneration(config)


_GEMMA3: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32, "sliding_window": 8,
}  # fmt: skip


def mixtral() -> MixtralForCausalLM:
    """Its files hold experts one by one, its modules hold them fused."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, max_position_embeddings=32,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def mamba() -> MambaForCausalLM:
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4))
