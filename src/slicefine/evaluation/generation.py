"""Answers of a model to many prompts: batches of equal lengths, longest first, padded on the left.

Decoding is greedy by default, so that an answer depends on the model and the prompt alone. LLM-Adapters search with 4 beams
(the temperature, `top_p` and `top_k` that their scripts also set have no effect without sampling): `num_beams=4` does the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from slicefine.errors import SliceFineError, SliceFineWarning

Ids = list[int]


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What a model wrote."""

    text: str
    tokens: int
    """With the one that ends it."""
    ended: bool
    """False if it was cut after the most tokens it may have."""


def encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[Ids]:
    """Token ids of each prompt, with the special tokens that the tokenizer puts before a text but none behind it."""
    if not prompts:
        return []
    encoded: list[Ids] = tokenizer(list(prompts), padding=False, truncation=False, verbose=False)["input_ids"]  # pyright: ignore[reportAssignmentType]
    end = tokenizer.eos_token_id
    # A tokenizer that was set up for training may end every text; an ended prompt has no answer.
    return [ids[:-1] if end is not None and len(ids) > 1 and ids[-1] == end else ids for ids in encoded]


def batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices of at most `size` prompts of near lengths, the longest first.

    The first batch needs the most memory, so that a size that does not fit fails at once and not at night.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for start in range(0, len(order), size):
        yield order[start : start + size]


class Generator:
    """Generates answers with `model`.

    Warns (`SliceFineWarning`), once, of a tokenizer without a token to pad with and of a model without one that ends a text.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_new_tokens: int,
        num_beams: int = 1,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._ends = _end_tokens(model, tokenizer)
        self._pad = _pad_token(tokenizer, self._ends)
        config = GenerationConfig(
            do_sample=False,
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            pad_token_id=self._pad,
            eos_token_id=sorted(self._ends) or None,
        )
        # `generate` fills what is not set from the model's own settings: sampling, repetition penalties.
        model.generation_config = config
        if not self._ends:
            warnings.warn(
                "Neither the tokenizer nor the model names a token that ends a text: every answer is generated to its full "
                f"length of {max_new_tokens} tokens. Set `eos_token` in tokenizer_config.json if the model has one.",
                SliceFineWarning,
                stacklevel=2,
            )

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Ids]) -> list[Generated]:
        """The answers to one batch. Raises `SliceFineError` if it does not fit into memory."""
        length = max(map(len, prompts))
        padded = [[self._pad] * (length - len(ids)) + ids for ids in prompts]
        mask = [[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts]
        device = self._model.device
        try:
            written = self._model.generate(  # pyright: ignore[reportCallIssue]
                input_ids=torch.tensor(padded, device=device), attention_mask=torch.tensor(mask, device=device)
            )
        except torch.OutOfMemoryError as error:
            raise SliceFineError(
                f"A batch of {len(prompts)} prompts of up to {length} tokens does not fit into memory. Give a smaller "
                "--batch_size; the same command goes on with the answers there are."
            ) from error
        return [self._read(row) for row in written[:, length:].tolist()]

    def _read(self, ids: Ids) -> Generated:
        end = next((place for place, token in enumerate(ids) if token in self._ends), None)
        kept = ids if end is None else ids[:end]
        text = self._tokenizer.decode(kept, skip_special_tokens=True)
        assert isinstance(text, str)
        return Generated(text=text, tokens=len(kept) + (end is not None), ended=end is not None)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    named: Any = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends: Any = [*(named if isinstance(named, list | tuple) else [named]), tokenizer.eos_token_id]
    return {token for token in ends if token is not None}


def _pad_token(tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> int:
    pad: Any = tokenizer.pad_token_id
    if pad is not None:
        return pad
    end: Any = tokenizer.eos_token_id
    token = end if end is not None else min(ends, default=0)
    warnings.warn(
        f"The tokenizer has no token to pad with; the shorter prompts of a batch are filled up with "
        f"{tokenizer.convert_ids_to_tokens(token)!r}, which the model does not look at.",
        SliceFineWarning,
        stacklevel=3,
    )
    return token
