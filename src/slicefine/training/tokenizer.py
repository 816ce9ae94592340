"""Tokenizers, and those with which a model would learn nothing.

transformers makes a tokenizer of a folder that has none: of the five special tokens of BERT, say, so that all words are
unknown and every text is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto, tokenization_auto

from slicefine.errors import SliceFineError

FILES = (
    "tokenizer*",
    "*.tokenizer",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "*.codes",
    "tekken.json",
)
"""As the tokenizers of transformers call theirs."""
TRIED = 1000
"""Texts of the training examples that are tried."""
MOST_UNKNOWN = 0.9
_FIX = "Copy the tokenizer's files (tokenizer.json, tokenizer_config.json) into the folder, or save them there with tokenizer.save_pretrained"


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the model `name`, a folder or a hub name.

    Raises `SliceFineError` if the model does not read text, its folder has no tokenizer, or the tokenizer knows special tokens
    alone; OSError or ValueError as transformers does.
    """
    if kind := _other_kind(name):
        raise SliceFineError(
            f"`model.name`: {name} is a {kind}, which does not read text. Name a model of texts, or use a recipe for images or clips."
        )
    folder = Path(name)
    if folder.is_dir() and not any(path for pattern in FILES for path in folder.glob(pattern)):
        raise SliceFineError(
            f"`model.name` is a folder with a pretrained model and its tokenizer; {name} has no file of a tokenizer in it. {_FIX}."
        )
    # Without `trust_remote_code`, transformers asks on the terminal whether to run code that comes with the model.
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    if not words:
        raise SliceFineError(
            f"`model.name`: the tokenizer of {name} knows special tokens alone ({' '.join(tokenizer.all_special_tokens)}): the file with its "
            f"vocabulary is missing or empty. {_FIX}."
        )
    return tokenizer


def refuse_unknown(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], name: str) -> None:
    """Raise `SliceFineError` if nearly nothing of `texts`, evenly spaced ones of which are tried, is known to the tokenizer of `name`."""
    tried = [text for text in texts[:: max(1, len(texts) // TRIED)] if text.strip()]
    found: list[list[int]] = tokenizer(tried, add_special_tokens=False)["input_ids"] if tried else []
    tokens = [token for ids in found for token in ids]
    unknown = sum(token == tokenizer.unk_token_id for token in tokens)
    if tried and unknown >= MOST_UNKNOWN * len(tokens):  # no token at all counts as nothing known
        share = (
            f"{unknown / len(tokens):.0%} of their tokens are {tokenizer.unk_token}"
            if tokens
            else "they become no token at all"
        )
        raise SliceFineError(
            f"`model.name`: the tokenizer of {name} does not know the training texts: {share} (the first text is {tried[0][:40]!r}). If the "
            f"texts are in a language that the model can read, its files are incomplete. {_FIX}."
        )


def _other_kind(name: str) -> str | None:
    """The model_type of a model of images, clips or sounds that has no tokenizer; None for all others."""
    kind = AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
    others = (
        modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    )
    texts = (
        tokenization_auto.TOKENIZER_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    )
    return kind if any(kind in names for names in others) and not any(kind in names for names in texts) else None
