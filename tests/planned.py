"""Tiny models and a recipe for them, for tests of what `slicefine plan` says, and what a real step saves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, MixtralConfig

from slicefine.benchmarking.planned_cost import SLICEFINE, attached
from slicefine.benchmarking.planned_model import Subject, prepare
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


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
"""Parameters of `mixtral()` that are no layer's weight."""


def mixtral(**more: Any) -> MixtralConfig:
    return MixtralConfig(**TINY | {"num_local_experts": 4} | more)


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


def saved_by_hooks(model: nn.Module, loss_of: Callable[[], Tensor]) -> int:
    """Bytes of the storages that autograd saves, each once, without those of the model: counted in another way."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of()
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    loss.backward()
    return sum(size for place, size in found.items() if place not in own)


def training(of: Subject) -> tuple[Any, list[nn.Parameter], torch.optim.Optimizer, dict[str, Tensor]]:
    """What a plan says of `of`, in earnest: the model with its slices, what is trained, an optimizer, and a batch of which the last tokens are padding."""
    torch.manual_seed(0)
    model = attached(of, SLICEFINE, "cpu")
    prepare(model, of.recipe)
    trained = [p for p in model.parameters() if p.requires_grad]
    batch = of.inputs()
    if "attention_mask" in batch:
        batch["attention_mask"][1:, -5:] = 0
    return model, trained, torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0), batch
