"""The architectures of the paper by name, with random weights: sizes as in their public configurations, and a small CPU version of each.

What a step costs depends on shapes alone, so nothing is downloaded. The names and sizes are read without torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING, Any

from slicefine.errors import SliceFineError, did_you_mean

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

CAUSAL_LM = "causal-lm"
TEXT, IMAGE, VIDEO = "text-classification", "image-classification", "video-classification"
BUILT_BY = {
    CAUSAL_LM: "AutoModelForCausalLM",
    TEXT: "AutoModelForSequenceClassification",
    IMAGE: "AutoModelForImageClassification",
    VIDEO: "AutoModelForVideoClassification",
}
"""Task -> class of transformers that builds a model from its configuration."""
STEP_OF = {IMAGE: "patch_size", VIDEO: "tubelet_size"}
"""Task -> size that the length is a multiple of."""
LENGTH_OF = {CAUSAL_LM: "length", TEXT: "length", IMAGE: "image_size", VIDEO: "num_frames"}
"""Task -> what makes its inputs longer: tokens, the side of an image in pixels, frames."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model that can be built, and the size of its batches."""

    name: str
    task: str
    config: str
    """Class of its configuration in transformers."""
    sizes: Mapping[str, Any]
    """Settings of the configuration; what is not here is the default of the class."""
    batch: int
    """Sequences, images or clips in a batch."""
    length: int | None = None
    """Tokens in a sequence."""

    @property
    def heads(self) -> tuple[str, ...]:
        """Modules that are new for the task, and trained in full by every method."""
        return () if self.task == CAUSAL_LM else ("classifier",)

    def dimension(self, name: str) -> int:
        """The size of the model or its batches that the sweep `name` changes: length, width, depth or batch."""
        if name == "batch":
            return self.batch
        if name == "length":
            return self.length if self.length is not None else self.sizes[LENGTH_OF[self.task]]
        return self.sizes[{"width": "hidden_size", "depth": "num_hidden_layers"}[name]]

    def resized(self, name: str, value: int) -> Architecture:
        """The same architecture with `value` for the dimension `name`. Raises `SliceFineError` where no such model can be built.

        With the width go the MLP's width and the number of heads, in proportion: the size of a head stays.
        """
        if name == "batch":
            return dataclasses.replace(self, batch=value)
        if name == "length":
            return self._longer(value)
        if name == "depth":
            return self._with(num_hidden_layers=value)
        width, unit = self.sizes["hidden_size"], self.unit(name)
        if value % unit:
            raise SliceFineError(f"The width of {self.name} is a multiple of {unit}, for whole heads; got {value}.")
        scaled = {
            key: self.sizes[key] * value // width
            for key in ("intermediate_size", "num_attention_heads", "num_key_value_heads")
            if key in self.sizes
        }
        return self._with(hidden_size=value, **scaled)

    def unit(self, name: str) -> int:
        """What the dimension `name` is a multiple of."""
        if name == "width":
            width, heads = self.sizes["hidden_size"], self.sizes["num_attention_heads"]
            return width // gcd(width, heads, self.sizes.get("num_key_value_heads", heads))
        return self.sizes[STEP_OF[self.task]] if name == "length" and self.task in STEP_OF else 1

    def _longer(self, value: int) -> Architecture:
        step = STEP_OF.get(self.task)
        if step is not None:
            if value % self.sizes[step]:
                raise SliceFineError(
                    f"The {LENGTH_OF[self.task]} of {self.name} is a multiple of its {step}, {self.sizes[step]}; got {value}."
                )
            return self._with(**{LENGTH_OF[self.task]: value})
        longest = self.sizes["max_position_embeddings"] - (2 if self.config == "RobertaConfig" else 0)
        if value > longest:
            raise SliceFineError(f"{self.name} takes at most {longest} tokens; got {value}.")
        return dataclasses.replace(self, length=value)

    def _with(self, **sizes: int) -> Architecture:
        return dataclasses.replace(self, sizes={**self.sizes, **sizes})


def _all(*architectures: Architecture) -> dict[str, Architecture]:
    return {architecture.name: architecture for architecture in architectures}


_LLAMA = {"rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "bos_token_id": 0, "eos_token_id": 1}
_ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "num_labels": 2}

MODELS = _all(
    # meta-llama/Llama-3.2-3B
    Architecture(
        name="llama-3.2-3b",
        task=CAUSAL_LM,
        config="LlamaConfig",
        sizes=_LLAMA
        | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
        | {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
        batch=4,
        length=768,
    ),
    # google/gemma-3-12b-pt, its language model
    Architecture(
        name="gemma-3-12b",
        task=CAUSAL_LM,
        config="Gemma3TextConfig",
        sizes={"hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48, "num_attention_heads": 16}
        | {"num_key_value_heads": 8, "head_dim": 256, "vocab_size": 262208, "max_position_embeddings": 131072}
        | {"query_pre_attn_scalar": 256, "sliding_window": 1024},
        batch=4,
        length=768,
    ),
    # deepseek-ai/DeepSeek-R1-Distill-Llama-8B
    Architecture(
        name="deepseek-r1-8b",
        task=CAUSAL_LM,
        config="LlamaConfig",
        sizes=_LLAMA
        | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "vocab_size": 128256},
        batch=4,
        length=768,
    ),
    # FacebookAI/roberta-base
    Architecture(
        name="roberta-base",
        task=TEXT,
        config="RobertaConfig",
        sizes=_ROBERTA
        | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        | {"vocab_size": 50265},
        batch=32,
        length=128,
    ),
    # google/vit-base-patch16-224-in21k, with a head for the classes of CIFAR-100
    Architecture(
        name="vit-base",
        task=IMAGE,
        config="ViTConfig",
        sizes={"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        | {"image_size": 224, "patch_size": 16, "num_labels": 100},
        batch=32,
    ),
    # MCG-NJU/videomae-base, with a head for the classes of UCF101
    Architecture(
        name="videomae-base",
        task=VIDEO,
        config="VideoMAEConfig",
        sizes={"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        | {"image_size": 224, "patch_size": 16, "num_frames": 16, "tubelet_size": 2, "num_labels": 101}
        | {"use_mean_pooling": False},
        batch=8,
    ),
    # Small versions: about a thousand tokens in a batch, and a vocabulary that gives the output layer about the share of the multiply-adds that
    # it has in the large model, a tenth.
    Architecture(
        name="llama-3.2-3b-small",
        task=CAUSAL_LM,
        config="LlamaConfig",
        sizes=_LLAMA
        | {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8}
        | {"num_key_value_heads": 2, "vocab_size": 4096, "tie_word_embeddings": True},
        batch=4,
        length=256,
    ),
    Architecture(
        name="gemma-3-12b-small",
        task=CAUSAL_LM,
        config="Gemma3TextConfig",
        # Six layers: five that see a window, and one that sees everything.
        sizes={"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 4}
        | {"num_key_value_heads": 2, "head_dim": 128, "vocab_size": 4096, "max_position_embeddings": 131072}
        | {"query_pre_attn_scalar": 128, "sliding_window": 128},
        batch=4,
        length=256,
    ),
    Architecture(
        name="deepseek-r1-8b-small",
        task=CAUSAL_LM,
        config="LlamaConfig",
        sizes=_LLAMA
        | {"hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 6, "num_attention_heads": 8}
        | {"num_key_value_heads": 2, "vocab_size": 4096},
        batch=4,
        length=256,
    ),
    Architecture(
        name="roberta-base-small",
        task=TEXT,
        config="RobertaConfig",
        sizes=_ROBERTA
        | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8}
        | {"vocab_size": 4096},
        batch=8,
        length=128,
    ),
    Architecture(
        name="vit-base-small",
        task=IMAGE,
        config="ViTConfig",
        sizes={"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8}
        | {"image_size": 112, "patch_size": 16, "num_labels": 100},
        batch=16,
    ),
    Architecture(
        name="videomae-base-small",
        task=VIDEO,
        config="VideoMAEConfig",
        sizes={"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8}
        | {"image_size": 112, "patch_size": 16, "num_frames": 8, "tubelet_size": 2, "num_labels": 101}
        | {"use_mean_pooling": False},
        batch=4,
    ),
)
"""Name -> architecture."""
SMALL = tuple(name for name in MODELS if name.endswith("-small"))


def architecture(name: str) -> Architecture:
    """The architecture `name`. Raises `SliceFineError` if there is none."""
    if name not in MODELS:
        raise SliceFineError(f"There is no model {name!r}; there are {', '.join(MODELS)}.{did_you_mean(name, MODELS)}")
    return MODELS[name]


def build(of: Architecture, *, dtype: torch.dtype | None = None, device: str = "cpu", seed: int = 0) -> PreTrainedModel:
    """A new model with random weights, in training mode; the same weights for the same seed on the same device."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, of.config)(**of.sizes)
    with torch.device(device):
        model = getattr(transformers, BUILT_BY[of.task]).from_config(config, dtype=dtype or torch.float32)
    return model.train()


def batch_of(
    of: Architecture, *, dtype: torch.dtype | None = None, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Random inputs with labels: `input_ids`, int64 `(batch, length)`, or `pixel_values`, `(batch, 3, side, side)` or
    `(batch, frames, 3, side, side)` in `dtype`; `labels`, int64, the tokens of a language model or `(batch,)` classes.

    No padding: every token counts. A language model is told to keep no cache of keys and values.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    if of.task in (CAUSAL_LM, TEXT):
        assert of.length is not None
        # The first tokens of a vocabulary are reserved; RoBERTa would take token 1 for padding.
        tokens = torch.randint(4, of.sizes["vocab_size"], (of.batch, of.length), generator=generator).to(device)
        inputs: dict[str, Any] = {"input_ids": tokens}
        if of.task == CAUSAL_LM:
            return inputs | {"labels": tokens, "use_cache": False}
    else:
        side = of.sizes["image_size"]
        frames = (of.sizes["num_frames"],) if of.task == VIDEO else ()
        pixels = torch.randn(of.batch, *frames, 3, side, side, generator=generator)
        inputs = {"pixel_values": pixels.to(device, dtype or torch.float32)}
    labels = torch.randint(of.sizes["num_labels"], (of.batch,), generator=generator)
    return inputs | {"labels": labels.to(device)}
