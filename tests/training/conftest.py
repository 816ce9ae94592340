"""A tiny real model, tokenizer and data set, made on the spot."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from slicefine.training.recipe import Recipe

WORDS = {
    "sport": ["ball", "goal", "team", "match", "coach"],
    "food": ["bread", "soup", "salt", "apple", "cook"],
    "space": ["star", "moon", "orbit", "rocket", "comet"],
}


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
