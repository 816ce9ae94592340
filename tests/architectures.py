"""Tiny models of common architectures with random weights: all numbers of their configurations are as small as they can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

TEXT = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
DECODER = TEXT | {
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = TEXT | {
    "max_position_embeddings": 32,
    "num_labels": 3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
PATCHES = {"image_size": 8, "patch_size": 4, "num_channels": 3}
VISION = PATCHES | {key: value for key, value in TEXT.items() if key != "vocab_size"}


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def text() -> dict[str, Tensor]:
    """The first tokens of the vocabulary, where slices of embeddings start."""
    tokens = torch.arange(1, 13).view(2, 6)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def text_pair() -> dict[str, Tensor]:
    return text() | {"decoder_input_ids": text()["input_ids"].flip(1)}


def images() -> dict[str, Tensor]:
    return {"pixel_values": _random(2, 3, 8, 8)}


def images_16() -> dict[str, Tensor]:
    return {"pixel_values": _random(2, 3, 16, 16)}


def clips() -> dict[str, Tensor]:
    return {"pixel_values": _random(2, 4, 3, 8, 8)}


def pairs() -> dict[str, Tensor]:
    return text() | images()


def sounds() -> dict[str, Tensor]:
    return {"input_features": _random(2, 8, 12), "decoder_input_ids": text()["input_ids"]}


class Architecture(NamedTuple):
    """How a tiny model of an architecture is made, and what it takes."""

    kind: str
    """Name of its class in transformers."""
    settings: dict[str, Any]
    inputs: Callable[[], dict[str, Tensor]]
    task_type: str | None = None
    """PEFT's, if it has one for what the model does."""
    head: str | None = None
    """The new layer that is trained in full, where no `task_type` says so."""
    training: dict[str, Any] = {}  # noqa: RUF012 -- of a tuple, which nobody changes
    """What its forward pass needs beside the inputs to give a loss."""

    def build(self) -> PreTrainedModel:
        """The model in eval mode, the same weights each time."""
        torch.manual_seed(0)
        kind = getattr(transformers, self.kind)
        model = kind(kind.config_class(**self.settings))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        return model.eval()


ARCHITECTURES = {
    "Llama": Architecture("LlamaForCausalLM", DECODER, text, "CAUSAL_LM"),
    "Mistral": Architecture("MistralForCausalLM", DECODER, text, "CAUSAL_LM"),
    "Qwen3": Architecture("Qwen3ForCausalLM", DECODER | {"head_dim": 8}, text, "CAUSAL_LM"),
    "Qwen3-MoE": Architecture(
        "Qwen3MoeForCausalLM",
        DECODER | {"head_dim": 8, "num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        text, "CAUSAL_LM",
    ),
    "Gemma 3": Architecture("Gemma3ForCausalLM", DECODER | {"head_dim": 8, "sliding_window": 4}, text, "CAUSAL_LM"),
    "Phi": Architecture("PhiForCausalLM", DECODER | {"num_key_value_heads": 2}, text, "CAUSAL_LM"),
    "GPT-2": Architecture(
        "GPT2LMHeadModel",
        {"vocab_size": 50, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24, "bos_token_id": 1, "eos_token_id": 2},
        text, "CAUSAL_LM",
    ),
    "Mamba": Architecture(
        "MambaForCausalLM",
        {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4},
        text, "CAUSAL_LM",
    ),
    "T5": Architecture(
        "T5ForConditionalGeneration",
        {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0, "decoder_start_token_id": 0},
        text_pair, "SEQ_2_SEQ_LM",
    ),
    "BERT": Architecture("BertForSequenceClassification", ENCODER, text, "SEQ_CLS"),
    "RoBERTa": Architecture("RobertaForSequenceClassification", ENCODER, text, "SEQ_CLS"),
    "DeBERTa-v2": Architecture(
        "DebertaV2ForSequenceClassification",
        ENCODER | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "max_relative_positions": -1},
        text, "SEQ_CLS",
    ),
    "ALBERT": Architecture("AlbertForSequenceClassification", ENCODER | {"embedding_size": 12}, text, "SEQ_CLS"),
    "ViT": Architecture("ViTForImageClassification", VISION | {"num_labels": 3}, images, head="classifier"),
    "Swin": Architecture(
        "SwinForImageClassification",
        {"image_size": 16, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 2, "num_labels": 3, "drop_path_rate": 0.0},
        images_16, head="classifier",
    ),
    "ConvNeXt": Architecture(
        "ConvNextForImageClassification",
        {"image_size": 16, "patch_size": 4, "num_stages": 2, "hidden_sizes": [8, 12], "depths": [1, 1], "num_labels": 3, "layer_scale_init_value": 0.5},
        images_16, head="classifier",
    ),
    "DINOv2": Architecture(
        "Dinov2ForImageClassification", PATCHES | {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2, "num_labels": 3},
        images, head="classifier",
    ),
    "CLIP": Architecture(
        "CLIPModel",
        {
            "text_config": TEXT | {"max_position_embeddings": 32, "projection_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
            "vision_config": VISION | {"projection_dim": 8}, "projection_dim": 8,
        },
        pairs, training={"return_loss": True},
    ),
    "VideoMAE": Architecture("VideoMAEForVideoClassification", VISION | {"num_frames": 4, "tubelet_size": 2, "num_labels": 3}, clips, head="classifier"),
    "Whisper": Architecture(
        "WhisperForConditionalGeneration",
        {
            "vocab_size": 50, "num_mel_bins": 8, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_source_positions": 6, "max_target_positions": 16,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
        },
        sounds,
    ),
}  # fmt: skip
