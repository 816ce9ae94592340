"""What `slicefine plan` counts on: the model of a recipe from its configuration alone, its largest batch, and its loss."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast
from unittest.mock import patch

import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

from slicefine.benchmarking.models import BUILT_BY, CAUSAL_LM, TEXT
from slicefine.benchmarking.planned_config import settle
from slicefine.errors import SliceFineError, first_line
from slicefine.training.checkpointing import enable_checkpointing
from slicefine.training.recipe import Recipe, SliceSettings
from slicefine.training.tasks.text_classification import positions
from slicefine.tuner.pixels import pixel_shape

VARIABLE_LENGTH = ("flash_attention_2", "flash_attention_3", "flex_attention")
"""Attention without padding and without a matrix of masks, whose packages a plan does not need."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model that can be built as often as it is needed, and how it is trained."""

    config: Any
    """Its configuration, of transformers."""
    recipe: Recipe

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        named = self.recipe.model.dtype
        return (self.config.dtype or torch.float32) if named == "auto" else getattr(torch, named)

    @property
    def variable_length(self) -> bool:
        """Whether attention is computed without padding and masks."""
        return self.recipe.model.attn_implementation in VARIABLE_LENGTH

    @property
    def attention(self) -> str:
        """How attention is computed, by transformers' names."""
        return self.recipe.model.attn_implementation or self.build().config._attn_implementation or "eager"

    @property
    def joined(self) -> bool:
        """Whether the packed sequences of a batch are one, with a mask that keeps examples apart."""
        data = self.recipe.data
        return self.recipe.task == CAUSAL_LM and data.packing and data.packing_strategy != "wrapped"

    @property
    def padded(self) -> bool:
        """Whether the longest batch has a mask: one of texts of different lengths, or of packed examples."""
        recipe = self.recipe
        if self.variable_length or recipe.task not in (TEXT, CAUSAL_LM):
            return False
        return self.joined or (recipe.training.per_device_train_batch_size > 1 and not recipe.data.packing)

    @property
    def layers(self) -> int:
        """Layers of the language model, or of all; 0 where the configuration does not say."""
        return getattr(self.config.get_text_config(), "num_hidden_layers", None) or 0

    @property
    def kinds(self) -> list[tuple[Any, ...]]:
        """What the configuration says of each layer."""
        by_layer = self._by_layer()
        return [tuple(values[i] for values in by_layer.values()) for i in range(self.layers)]

    @property
    def in_full(self) -> Subject:
        """The same model without a depth window: trained as in the turn whose lowest block is the first of all."""
        usual = {name: value for name, value in vars(SliceSettings()).items() if name.startswith("depth_")}
        slices = dataclasses.replace(self.recipe.slice, **usual)
        return dataclasses.replace(self, recipe=dataclasses.replace(self.recipe, slice=slices))

    def with_layers(self, kinds: list[tuple[Any, ...]]) -> Subject:
        """The same model with other layers, of these kinds."""
        config = copy.deepcopy(self.config)
        text = config.get_text_config()
        text.num_hidden_layers = len(kinds)
        for number, name in enumerate(self._by_layer()):
            setattr(text, name, [kind[number] for kind in kinds])
        return dataclasses.replace(self, config=config)

    def _by_layer(self) -> dict[str, list[Any]]:
        """Settings of the configuration that have a value for each layer, as `layer_types` has."""
        settings = vars(self.config.get_text_config())
        return {
            name: kinds for name, kinds in settings.items() if isinstance(kinds, list) and len(kinds) == self.layers
        }

    def build(self, device: str = "meta") -> PreTrainedModel:
        """A new model with random weights, on the meta device none, in training mode. Raises `SliceFineError` if transformers cannot build it."""
        named = self.recipe.model.attn_implementation
        attention = "sdpa" if self.variable_length else named
        made: Any = getattr(transformers, BUILT_BY[self.recipe.task])
        try:
            with torch.device(device):
                model = made.from_config(self.config, dtype=self.dtype, attn_implementation=attention)
        except (ValueError, TypeError, AttributeError, ImportError, KeyError) as error:
            raise SliceFineError(
                f"`model.name`: transformers builds no {made.__name__.removeprefix('Auto')} from the configuration of "
                f"{self.recipe.model.name} ({self.config.model_type}): {first_line(error)}."
            ) from error
        return model.train()

    def inputs(self) -> dict[str, Tensor]:
        """A batch of the largest size that the recipe allows, labels included; its values mean nothing.

        Texts `(batch, tokens)`, images `(batch, channels, height, width)`, clips `(batch, frames, channels, height, width)`.
        """
        recipe, batch = self.recipe, self.recipe.training.per_device_train_batch_size
        if recipe.task in (TEXT, CAUSAL_LM):
            shape = (1, batch * recipe.data.max_length) if self.joined else (batch, recipe.data.max_length)
            tokens = torch.zeros(shape, dtype=torch.long)
            inputs = {"input_ids": tokens}
            inputs |= {"position_ids": tokens} if self.joined else {"attention_mask": torch.ones_like(tokens)}
            labels = torch.zeros_like(tokens) if recipe.task == CAUSAL_LM else self._classes(batch)
            return inputs | {"labels": labels}
        pixels = torch.zeros(batch, *pixel_shape(self.config), dtype=self.dtype)
        return {"pixel_values": pixels, "labels": self._classes(batch)}

    def _classes(self, batch: int) -> Tensor:
        number = self.config.problem_type == "regression"
        return torch.zeros(batch, dtype=torch.float32 if number else torch.long)

    @property
    def widths(self) -> frozenset[int]:
        """Numbers in the last dimension of logits of a language model: the vocabulary, or the part that is computed at a time."""
        if self.recipe.task != CAUSAL_LM:
            return frozenset()
        return frozenset({self.config.get_text_config().vocab_size, trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE})

    def heads(self, model: PreTrainedModel) -> list[str]:
        """Modules that no pretrained model has values for; they are trained in full."""
        if self.recipe.task == CAUSAL_LM:
            return []
        backbone = {model.base_model_prefix}
        if not hasattr(
            model, model.base_model_prefix
        ):  # a part of the pretrained model without the whole around it (CLIP)
            with torch.device("meta"):
                backbone = {name for name, _ in transformers.AutoModel.from_config(self.config).named_children()}
        return [
            name
            for name, module in model.named_children()
            if name not in backbone and any(True for _ in module.parameters())
        ]


def loss_of(model: nn.Module, recipe: Recipe, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    """What computes the loss of `batch` as the trainer of the task does.

    Args:
        model: The model itself, or with an adapter around it, and of a causal language model as `prepare` made it.
    """
    called = cast(Any, model)
    autocast = torch.autocast("cpu", torch.bfloat16) if recipe.training.bf16 else nullcontext()

    def loss() -> Tensor:
        with autocast:
            if recipe.task != CAUSAL_LM:
                return called(**batch).loss
            # As TRL's SFTTrainer, which computes some logits at a time, and again in the backward pass.
            return -called(**batch, use_cache=False, fused_lm_head=True).log_probs.sum() / batch["labels"].numel()

    return loss


def prepare(model: nn.Module, recipe: Recipe) -> None:
    """What the trainer of the task does to the model, with an adapter or without, before it trains. Raises `SliceFineError` if it cannot."""
    base = cast(Any, model).get_base_model() if isinstance(model, PeftModel) else cast(PreTrainedModel, model)
    if recipe.task == CAUSAL_LM:
        trl_utils.add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    if recipe.training.activation_checkpointing:
        enable_checkpointing(base)


@contextmanager
def logits_in_place() -> Iterator[None]:
    """Within this context the loss works on logits without tensors of its own, as its kernels do on a GPU; values are wrong."""
    with ExitStack() as stack:
        for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):
            stack.enter_context(patch.object(chunked_logprob, name, lambda *_, **__: None))
        yield


def subject(recipe: Recipe, config: Any) -> Subject:
    """The model of `recipe`, with the settings of the recipe put into its configuration.

    Raises `SliceFineError` with all that does not fit.
    """
    settle(recipe, config)
    made = Subject(config=config, recipe=recipe)
    _refuse_longer(made)
    return made


def _refuse_longer(subject: Subject) -> None:
    if subject.recipe.task not in (TEXT, CAUSAL_LM):
        return
    limits = [getattr(subject.config.get_text_config(), "max_position_embeddings", None), positions(subject.build())]
    longest = min((limit for limit in limits if limit and limit > 0), default=None)  # XLNet says -1: any
    if longest and subject.recipe.data.max_length > longest:
        raise SliceFineError(
            f"`data.max_length` is at most what {subject.recipe.model.name} can read, {longest} tokens; got "
            f"{subject.recipe.data.max_length}."
        )
