"""Is an exported model the trained one? Its logits say so, bit by bit."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slicefine.errors import SliceFineError
from slicefine.training.export_source import Source
from slicefine.tuner.pixels import pixel_shape

TOKENS_IN, PIXELS_IN = "input_ids", "pixel_values"
TOKENS = 16


def verify(source: Source, folder: Path) -> None:
    """Raise `SliceFineError` unless the model in `folder` has the very logits of the trained one, in the dtype of its base.

    One model is in memory at a time.
    """
    model: Any = source.load_trained()
    expected = logits(model)
    del model
    gc.collect()
    made = logits(source.model_class.from_pretrained(folder, dtype="auto", **source.trust))
    if expected.dtype != made.dtype or not torch.equal(expected, made):
        raise SliceFineError(
            f"The exported model does not compute what the trained one does: its logits are {made.dtype} and differ by up to "
            f"{float((made.double() - expected.double()).abs().max()):.2g}; nothing was written. If the model's own code draws random numbers, export with "
            "--no_verify; if not, report this with the model's name."
        )


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """The logits, or the first output, for a fixed batch of random tokens, images or clips."""
    same_kernels(model)
    generator = torch.Generator().manual_seed(0)
    inputs = _tokens(model, generator) if model.main_input_name == TOKENS_IN else _pixels(model, generator)
    output = model.eval()(**inputs)
    return output["logits"] if "logits" in output else output[0]


def _tokens(model: Any, generator: torch.Generator) -> dict[str, Tensor]:
    config = model.config.get_text_config()
    # Decoders that classify need a padding token to take more than one text.
    size = 1 if config.pad_token_id is None else 2, min(TOKENS, getattr(config, "max_position_embeddings", TOKENS))
    tokens = torch.randint(0, config.vocab_size, size, generator=generator)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    return inputs


def _pixels(model: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """`(2, channels, height, width)`, or `(2, frames, channels, height, width)` for models of clips, in the dtype of the model."""
    pixels = torch.randn(2, *pixel_shape(model.config), generator=generator)
    return {PIXELS_IN: pixels.to(model.dtype)}


def same_kernels(model: nn.Module) -> None:
    """Have equal weights meet equal kernels, whose sums differ in the last bit.

    torch chooses by whether a weight wants a gradient, and MKL by where it lies: what was mapped from files may lie at any address, memory of
    torch's own is aligned.
    """
    for tensor in (*model.requires_grad_(False).parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
