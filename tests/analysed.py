"""Subjects of analysis that are made on the spot: tiny classifiers, a tiny Llama, and models that are no more than a sum."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
import torch
from classifiers import clip_model, image_model, paint, reviews, shoot, text_model, write_table
from torch import Tensor, nn

from slicefine.analysis.material import Amounts
from slicefine.analysis.subject import Subject, places_of
from slicefine.training.recipe import Recipe
from slicefine.tuner.base_layers import Place

CLASSIFIERS = ("text-classification", "image-classification", "video-classification")
LANGUAGE = "causal-lm"
AMOUNTS = Amounts(size=4, fitted=2, watched=1, steps=2, choosing=1, held_out=1)
"""Of everything as few as there can be."""


def silent(done: int, total: int, what: str) -> None:
    """Tells nobody how far a stage is."""


def classifier(task: str, folder: Path) -> Subject:
    """A tiny classifier with 24 examples, or 8 clips; a quarter of them held out."""
    if task == "text-classification":
        model, data = text_model(folder / "model"), write_table(folder / "rows.jsonl", reviews(range(12)))
    elif task == "image-classification":
        model, data = image_model(folder / "model"), paint(folder / "images", range(12))
    else:
        model, data = clip_model(folder / "model"), shoot(folder / "clips", range(4))
    given: dict[str, Any] = {
        "task": task,
        "model.name": str(model),
        "data.train": str(data),
        "data.validation": 0.25,
        "output": str(folder / "run"),
        "training.report_to": "none",
    }
    if task == "text-classification":
        given["data.max_length"] = 16
    return Subject(Recipe.from_flat(given).resolved())


@dataclass
class Made:
    """What a stage needs of a subject, made of a model and of batches that are drawn."""

    model: Any
    new_modules: list[str] = field(default_factory=list)
    there: int = 24
    """Examples of each split."""

    def __post_init__(self) -> None:
        self.model.requires_grad_(False).eval()

    @property
    def places(self) -> dict[str, Place]:
        return places_of(self.model, self.new_modules)

    def count(self, split: str) -> int:
        return self.there

    def copy(self) -> Any:
        return copy.deepcopy(self.model)

    def untrained(self, seed: int) -> Any:
        torch.manual_seed(seed)
        return type(self.model)(self.model.config).requires_grad_(False).eval()

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(**batch).loss.float()

    def batches(self, split: str, *, size: int, count: int, seed: int) -> list[dict[str, Tensor]]:
        ids = tiny.tokens(size * count, 6, seed=seed + 100 * (split == "train"))
        mask = torch.ones_like(ids)
        mask[::2, 4:] = 0  # padded on the right
        labels = ids.masked_fill(mask == 0, -100)
        whole = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return [{key: value[at : at + size] for key, value in whole.items()} for at in range(0, size * count, size)]

    def examples(self, split: str, *, count: int, seed: int) -> list[dict[str, Tensor]]:
        return self.batches(split, size=1, count=min(count, self.there), seed=seed)


def language() -> Any:
    """A tiny Llama."""
    return Made(tiny.llama())


def subject_of(task: str, folder: Path) -> Any:
    """A subject of the task."""
    return language() if task == LANGUAGE else classifier(task, folder)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """All bits of a model, to compare with later ones."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same_bits(model: nn.Module, state: dict[str, Tensor]) -> bool:
    """Whether a model has the bits of `state`, and wants no gradients."""
    now = model.state_dict()
    wanted = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad or parameter.grad is not None
    ]
    return not wanted and now.keys() == state.keys() and all(torch.equal(now[name], state[name]) for name in state)
