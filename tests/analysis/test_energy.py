"""The stage of task energy, on tiny models of every kind."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import tiny
import torch
from classifiers import clip_model, image_model, paint, reviews, shoot, text_model, write_table

from slicefine.analysis import energy, kernel
from slicefine.analysis.settings import AnalysisSettings
from slicefine.analysis.subject import Subject, places_of
from slicefine.training.recipe import Recipe


def subject_of(task: str, folder: Path) -> Subject:
    """A tiny classifier with 24 examples, 6 of them for validation."""
    model, data = {
        "text-classification": lambda: (
            text_model(folder / "model"),
            write_table(folder / "rows.jsonl", reviews(range(12))),
        ),
        "image-classification": lambda: (image_model(folder / "model"), paint(folder / "images", range(12))),
        "video-classification": lambda: (clip_model(folder / "model"), shoot(folder / "clips", range(4))),
    }[task]()
    given: dict[str, Any] = {
        "task": task,
        "model.name": str(model),
        "data.train": str(data),
        "data.validation": 0.25,
        "output": str(folder / "run"),
        "slice.r": 2,
        "training.report_to": "none",
    }
    if task == "text-classification":
        given["data.max_length"] = 16
    return Subject(Recipe.from_flat(given).resolved())


@dataclass
class Language:
    """What the stage needs of a subject: a tiny Llama with texts of different lengths."""

    model: Any = field(default_factory=lambda: tiny.llama().requires_grad_(False).eval())
    new_modules: list[str] = field(default_factory=list)
    examples_there: int = 6

    @property
    def places(self) -> Any:
        return places_of(self.model)

    def count(self, split: str) -> int:
        return self.examples_there

    def untrained(self, seed: int) -> Any:
        torch.manual_seed(seed)
        return type(self.model)(self.model.config).requires_grad_(False).eval()

    def examples(self, split: str, *, count: int, seed: int) -> list[dict[str, torch.Tensor]]:
        found = [tiny.tokens(1, 5 + number % 3, seed=seed + number) for number in range(min(count, self.count(split)))]
        return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in found]

    def batches(self, split: str, *, size: int, count: int, seed: int) -> list[dict[str, torch.Tensor]]:
        ids = [tiny.tokens(size, 6, seed=seed + number) for number in range(count)]
        masks = [torch.ones_like(part).index_fill_(1, torch.tensor([5]), 0) for part in ids]
        return [{"input_ids": part, "attention_mask": mask} for part, mask in zip(ids, masks, strict=True)]


def run(subject: Any, say: Callable[[int, int, str], None] = lambda done, total, what: None, **given: Any) -> Any:
    """The stage's figures, as they are in a file."""
    wanted: dict[str, Any] = {"ranks": (1, 2, 4), **given}
    found = energy.run(subject, AnalysisSettings(**wanted), say)
    return json.loads(json.dumps(found, allow_nan=False))


@pytest.fixture
def text(tmp_path: Path) -> Subject:
    return subject_of("text-classification", tmp_path)


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


def check_layers(layers: list[dict[str, Any]]) -> None:
    assert [layer["name"] for layer in layers] == ["embeddings", "layer 0", "layer 1"]
    for layer in layers:
        for kind in ("with", "without"):
            k = layer["variance"][kind]["k"]
            points = layer["variance"][kind]["cumulative"]
            assert 1 <= k["0.8"] <= k["0.9"] <= k["0.95"] <= layer["dimension"]
            assert points == sorted(points)
            assert points[-1][1] == pytest.approx(1)
            assert len(points) <= 40
        assert 1 <= layer["participation_ratio"] <= layer["dimension"]
        assert layer["truncated"] == (layer["samples"] <= layer["dimension"])
        assert bool(layer["note"]) == (layer["samples"] < 10 * layer["dimension"])


@pytest.mark.parametrize("task", ["text-classification", "image-classification", "video-classification"])
def test_classifiers(task: str, tmp_path: Path) -> None:
    subject = subject_of(task, tmp_path)
    before, told = bits(subject.model), list[tuple[int, int, str]]()
    found = run(subject, lambda done, total, what: told.append((done, total, what)))
    check_layers(found["layers"])
    check_layers(found["untrained"])
    assert (found["split"], found["examples"], found["skipped"]) == ("train", 16 if task[0] != "v" else 6, [])
    assert found["tokens"] == found["layers"][0]["samples"]
    ntk = found["ntk"]
    count = subject.count("train")
    assert (ntk["examples"], ntk["axis"], ntk["r"], ntk["why_no_full"]) == (count, "row", 2, "")
    assert (ntk["outputs"], ntk["method"]) == ("the 2 logits", "torch.func.vmap")
    assert sum(ntk["eigenvalues"]) == pytest.approx(1)
    assert 1 <= ntk["k"]["0.8"] <= ntk["k"]["0.95"] <= count - 1
    assert 1 <= ntk["effective_rank"] <= count - 1
    assert [(entry["r"], entry["axis"]) for entry in ntk["by_rank"]] == [
        (r, axis) for r in (1, 2, 4) for axis in ("row", "column")
    ]
    for entry in (ntk, *ntk["by_rank"], *(entry["elsewhere"] for entry in ntk["by_rank"])):
        for name in ("trace_share_of_full", "alignment_with_full", "alignment_without_dominant"):
            assert 0 < entry[name] <= 1 + 1e-9
        assert entry["alignment_per_weight"]["least"] <= entry["alignment_per_weight"]["median"]
        assert -1 <= entry["alignment_with_labels"] <= 1
        assert 0 < entry["p_of_labels"] <= 1
    assert ntk["full"]["effective_rank"] > 0
    assert ntk["dominant"]["name"] in subject.places
    assert 1 / len(subject.places) < ntk["dominant"]["trace_share_of_full"] < 1
    assert ntk["untrained"]["effective_rank"] != ntk["effective_rank"]
    assert -1 <= ntk["untrained"]["alignment_per_weight"]["median"] <= 1 + 1e-9
    assert ntk["untrained"]["alignment_per_weight"] != ntk["alignment_per_weight"]
    summary = found["summary"]
    assert summary["dimension"] == 32
    assert summary["share"] == summary["k90_median"] / 32
    assert summary["ntk_effective_rank"] == ntk["effective_rank"]
    assert all(value is not None for value in summary.values())
    assert all(torch.equal(value, subject.model.state_dict()[key]) for key, value in before.items())
    assert all(p.grad is None and not p.requires_grad for p in subject.model.parameters())
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert told[-1][:2] == (1000, 1000)


def test_a_language_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "MOST_WEIGHTS", 100)
    subject: Any = Language()
    before = bits(subject.model)
    found = run(subject)
    check_layers(found["layers"])
    assert (found["examples"], found["tokens"]) == (6, 6 * 5)
    ntk = found["ntk"]
    assert ntk["outputs"] == "the mean log-probability of the tokens that are trained on"
    assert "for models of at most" in ntk["why_no_full"]
    assert ntk["effective_rank"] > 1
    missing = (
        "trace_share_of_full",
        "alignment_with_full",
        "alignment_without_dominant",
        "alignment_per_weight",
        "full",
    )
    assert [ntk[name] for name in missing] == [None] * 5
    assert ntk["alignment_with_labels"] is None
    assert ntk["dominant"]["trace_share"] > 0
    assert found["summary"]["ntk_alignment_with_full"] is None
    assert all(torch.equal(value, subject.model.state_dict()[key]) for key, value in before.items())


def test_the_same_seed_gives_the_same_figures_and_quick_has_fewer_examples(
    text: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "STATE_EXAMPLES", {False: 16, True: 8})
    monkeypatch.setattr(energy, "KERNEL_EXAMPLES", {False: 8, True: 4})
    first = run(text, ranks=(2,))
    torch.rand(3)  # the global generator has no part in it
    assert run(text, ranks=(2,)) == first
    quick = run(text, ranks=(2,), quick=True)
    assert [(found["examples"], found["ntk"]["examples"]) for found in (first, quick)] == [(16, 8), (8, 4)]
    assert run(text, ranks=(2,), seed=1)["summary"] != first["summary"]


def test_wide_ranks_are_as_wide_as_the_weight(text: Subject) -> None:
    ntk = run(text, ranks=(500,), quick=True)["ntk"]
    assert ntk["parameter_share"] == ntk["trace_share_of_full"] == 1
    assert ntk["alignment_with_full"] == pytest.approx(1)
    assert ntk["alignment_per_weight"]["least"] == pytest.approx(1)


def test_a_head_of_zeros_leaves_no_gradients(text: Subject) -> None:
    for name in text.new_modules:
        for parameter in text.model.get_submodule(name).parameters():
            parameter.data.zero_()
    found = run(text, ranks=(2,), quick=True)
    ntk = found["ntk"]
    assert (ntk["eigenvalues"], ntk["k"], ntk["effective_rank"], ntk["alignment_with_full"]) == ([], None, None, None)
    assert ntk["dominant"] is None
    assert found["summary"]["ntk_effective_rank"] is None
    assert found["summary"]["share"] > 0


def test_weights_that_are_not_finite_are_said(text: Subject) -> None:
    cast(Any, text.model).bert.encoder.layer[0].output.dense.weight.data.fill_(torch.nan)
    found = run(text, ranks=(2,), quick=True)
    assert [layer["name"] for layer in found["layers"]] == ["embeddings"]
    assert [entry["name"] for entry in found["skipped"]] == ["layer 0", "layer 1"]
    assert found["ntk"]["effective_rank"] is None
    assert found["untrained"][2]["name"] == "layer 1"


def test_one_example_has_states_and_no_kernel() -> None:
    subject: Any = Language(examples_there=1)
    found = run(subject)
    assert (found["examples"], found["ntk"]["examples"]) == (1, 1)
    assert all(layer["truncated"] for layer in found["layers"])
    assert found["ntk"]["effective_rank"] is None
