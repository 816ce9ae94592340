"""Small images of three classes that a tiny model can tell apart, made on the spot."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

COLORS = {"blue": (40, 40, 200), "green": (40, 200, 40), "red": (200, 40, 40)}


def picture(color: str, number: int, size: tuple[int, int] = (30, 24)) -> Image.Image:
    """RGB noise around a color, the same for the same number."""
    noise = np.random.default_rng(number).normal(COLORS[color], 25, (size[1], size[0], 3))
    return Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8))


def noise(item: Any, draw: random.Random) -> dict[str, Any]:
    """Two numbers that are drawn; where processes that are spawned find it."""
    return {"x": torch.tensor([draw.random(), draw.random()])}


def folder(root: Path, count: int, first: int = 0) -> Path:
    """`root/<class>/<number>.png|.jpg`, `count` of each class."""
    for color in COLORS:
        (root / color).mkdir(parents=True, exist_ok=True)
        for number in range(first, first + count):
            picture(color, number, (30 + number % 3, 24)).save(
                root / color / f"{number}.{'jpg' if number % 2 else 'png'}"
            )
    return root


def table(root: Path, count: int) -> Path:
    """`root/rows.jsonl` with paths relative to it."""
    folder(root / "files", count)
    rows = [
        {"image": path.relative_to(root).as_posix(), "label": path.parent.name}
        for path in sorted((root / "files").glob("*/*"))
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root / "rows.jsonl"
