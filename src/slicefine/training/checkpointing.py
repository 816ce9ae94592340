"""Activation checkpointing, refused in words where a model has none."""

from __future__ import annotations

from typing import Any

from slicefine.errors import SliceFineError


def enable_checkpointing(model: Any, settings: Any = None) -> None:
    """transformers' `activation_checkpointing_enable`. Raises `SliceFineError` for a model that keeps all activations."""
    if not can_checkpoint(model):
        raise SliceFineError(
            f"{type(model).__name__} has no activation checkpointing; set `training.activation_checkpointing` to false."
        )
    model.activation_checkpointing_enable(settings)


def can_checkpoint(model: Any) -> bool:
    """Whether transformers can compute the activations of `model` again instead of keeping them."""
    return bool(getattr(model, "supports_gradient_checkpointing", False))
