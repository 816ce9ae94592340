"""Tiny classifiers of texts, images and clips, trained for some steps by real runs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filming import film
from PIL import Image
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    VideoMAEConfig,
    VideoMAEModel,
    ViTConfig,
    ViTModel,
)

from slicefine.training.recipe import Recipe
from slicefine.training.run import train

WORDS = {"negative": ["bad", "dull", "flat", "weak"], "positive": ["good", "fine", "warm", "bright"]}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
COLORS = {"blue": (20, 20, 200), "red": (200, 20, 20)}
FRAMES = 4


def review(label: str, number: int) -> str:
    """A text of the class `label`, of 4, 8 or 12 words; others for other numbers up to 256."""
    words = WORDS[label]
    return " ".join([words[number // 4**place % 4] for place in range(4)] * (1 + number % 3))


def write_table(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """A .jsonl or .csv file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = list(rows)
    if path.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    else:
        lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def reviews(numbers: Iterable[int], labels: tuple[Any, Any] = ("negative", "positive")) -> list[dict[str, Any]]:
    """Rows of `text` and `label`, a bad one and a good one for each number."""
    return [
        {"text": review(name, number), "label": label}
        for number in numbers
        for name, label in zip(WORDS, labels, strict=True)
    ]


def text_model(folder: Path, **sizes: int) -> Path:
    """A BERT with random weights, of other `sizes` where they are given, and a tokenizer of the words above."""
    folder.mkdir(parents=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(word for words in WORDS.values() for word in words)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=32).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(
        BertConfig(vocab_size=len(vocabulary), max_position_embeddings=32, initializer_range=0.2, **SMALL | sizes)
    ).save_pretrained(folder)
    return folder


def image_model(folder: Path) -> Path:
    """A ViT of 8 x 8 images with random weights, and its processor."""
    torch.manual_seed(0)
    ViTModel(ViTConfig(image_size=8, patch_size=4, **SMALL)).save_pretrained(folder)
    size = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    (folder / "preprocessor_config.json").write_text(json.dumps(size))
    return folder


def clip_model(folder: Path) -> Path:
    """A VideoMAE of clips of four frames of 16 x 16 with random weights, and its processor."""
    torch.manual_seed(0)
    VideoMAEModel(
        VideoMAEConfig(image_size=16, patch_size=8, num_frames=FRAMES, tubelet_size=2, **SMALL)
    ).save_pretrained(folder)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "VideoMAEImageProcessor"} | size)
    )
    return folder


def paint(folder: Path, numbers: Iterable[int]) -> Path:
    """`<class>/<number>.png`: images of one color, their left half darker, in another shade for each number."""
    for name, color in COLORS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in numbers:
            image = Image.new("RGB", (12, 10), tuple(part + number for part in color))
            image.paste((0, 0, number), (0, 0, 6, 10))
            image.save(folder / name / f"{number}.png")
    return folder


def shoot(folder: Path, numbers: Iterable[int]) -> Path:
    """`<class>/<number>.mp4`: dark clips and bright ones, their left half black, in another shade for each number."""
    for name, shade in (("dark", 70), ("bright", 200)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in numbers:
            frames = [np.full((16, 24, 3), shade + number + n, np.uint8) for n in range(6)]
            for frame in frames:
                frame[:, :12] = 0
            film(folder / name / f"{number}.mp4", frames)
    return folder


def trained(task: str, model: Path, data: Path | None, output: Path, **settings: Any) -> Path:
    """The folder of a finished run."""
    given = {
        "task": task,
        "model.name": str(model),
        "data.train": None if data is None else str(data),
        "data.validation": 0.25,
        "output": str(output),
        "slice.r": 4,
        "slice.slide_every": 4,
        "training.learning_rate": 1e-2,
        "training.per_device_train_batch_size": 8,
        "training.max_steps": 24,
        "training.report_to": "none",
    }
    if task == "text-classification":
        given["data.max_length"] = 16
    train(Recipe.from_flat(given | settings))
    return output
