"""A tiny real model, tokenizer and data set, made on the spot."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from slicefine.training.recipe import Recipe

WORDS = {
    "sport": ["ball", "goal", "team", "match", "coach"],
    "food": ["bread", "soup", "salt", "apple", "cook"],
    "space": ["star", "moon", "orbit", "rocket", "comet"],
}


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is no file or folder goes to the loaders, which tests replace, or fails at once, as it does offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with random weights, two layers of 32 features, and a WordPiece tokenizer of the words above."""
    folder = tmp_path_factory.mktemp("model")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(word for words in WORDS.values() for word in words)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def examples(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """`count` texts of one topic each, the topic the label; every topic occurs."""
    draw = random.Random(seed)
    topics = [sorted(WORDS)[number % len(WORDS)] for number in range(count)]
    return [{"text": " ".join(draw.choices(WORDS[topic], k=draw.randint(2, 6))), "label": topic} for topic in topics]


@pytest.fixture(scope="session")
def make_examples() -> Callable[..., list[dict[str, Any]]]:
    return examples


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    """48 examples as JSONL."""
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in examples(48)), encoding="utf-8")
    return path


@pytest.fixture
def settings(model_folder: Path, data_file: Path, tmp_path: Path) -> dict[str, Any]:
    """Dotted settings of a run of 12 steps with 3 moves."""
    return {
        "task": "text-classification",
        "model.name": str(model_folder),
        "data.train": str(data_file),
        "data.validation": 0.25,
        "data.max_length": 16,
        "output": str(tmp_path / "run"),
        "slice.r": 2,
        "slice.slide_every": 4,
        "training.learning_rate": 5e-3,
        "training.per_device_train_batch_size": 6,
        "training.num_train_epochs": 2,
        "training.logging_steps": 2,
    }


@pytest.fixture
def recipe(settings: dict[str, Any]) -> Recipe:
    return Recipe.from_flat(settings)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; begins texts with `<s>` as Llama's does, and has no pad token."""
    vocabulary = {
        mark: number for number, mark in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokens = Tokenizer(models.BPE(vocabulary, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, bos_token="<s>", eos_token="</s>", model_max_length=512
    )
    tokenizer.add_bos_token = True
    return tokenizer


@pytest.fixture(scope="session")
def lm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights, two layers of 32 features, and a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("lm")
    byte_tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        attention_dropout=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def sums(count: int) -> list[dict[str, str]]:
    """`count` instructions with their answers."""
    draw = random.Random(0)
    pairs = [(draw.randint(1, 99), draw.randint(1, 99)) for _ in range(count)]
    return [{"instruction": f"Add {a} and {b}.", "input": "", "output": f"It is {a + b}."} for a, b in pairs]


@pytest.fixture
def lm_settings(lm_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Dotted settings of a run of 12 steps with 2 moves over instructions."""
    path = tmp_path / "train.json"
    path.write_text(json.dumps(sums(30), indent=1), encoding="utf-8")
    return {
        "task": "causal-lm",
        "model.name": str(lm_folder),
        "data.train": str(path),
        "data.validation": 0.2,
        "data.max_length": 256,
        "output": str(tmp_path / "run"),
        "slice.r": 2,
        "slice.slide_every": 4,
        "training.learning_rate": 5e-3,
        "training.per_device_train_batch_size": 4,
        "training.num_train_epochs": 2,
        "training.logging_steps": 2,
        "training.report_to": "none",
    }
