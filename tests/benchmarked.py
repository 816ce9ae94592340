"""Models of the benchmark's architectures, made tinier still."""

from __future__ import annotations

import dataclasses

from slicefine.benchmarking.models import MODELS, Architecture

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "image_size": 16,
    "patch_size": 8,
    "num_frames": 4,
}


def tiny(name: str) -> Architecture:
    """The architecture `name` with 2 layers, 32 wide, and a batch of 2."""
    of = MODELS[name]
    sizes = {key: TINY.get(key, value) for key, value in of.sizes.items()}
    return dataclasses.replace(of, sizes=sizes, batch=2, length=of.length and 16)
