"""A tiny model and a recipe for it, for tests of what `slicefine plan` says."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

from slicefine.training.recipe import Recipe

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}


def llama(**more: Any) -> LlamaConfig:
    return LlamaConfig(**TINY | more)


def recipe(**settings: Any) -> Recipe:
    flat = {
        "task": "causal-lm",
        "model.name": "tiny",
        "data.train": "none",
        "output": "none",
        "data.max_length": 16,
        "slice.r": 3,
        "slice.slide_every": 2,
        "training.per_device_train_batch_size": 4,
        "training.max_steps": 7,
    }
    return Recipe.from_flat(flat | {key.replace("__", "."): value for key, value in settings.items()})
