"""Batches of like length, means over labels, and losses that are computed from the middle of a model on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from analysed import CLASSIFIERS, LANGUAGE, Made, classifier, language, same_bits, state_of, subject_of
from torch import Tensor, nn

from slicefine.analysis import portions
from slicefine.analysis.losses import gradients, labels_in, mean_gradients, mean_value
from slicefine.analysis.material import Amounts, Material, dealt
from slicefine.analysis.portions import cut, draw, rows, size_for
from slicefine.analysis.resumed import Resumed, block_of, kind_of, list_of, stack_of
from slicefine.analysis.subject import places_of


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return classifier("text-classification", tmp_path_factory.mktemp("texts"))


# ---------------------------------------------------------------- batches


def test_examples_of_like_length_come_together(texts: Any) -> None:
    (whole,) = texts.batches("train", size=18, count=1, seed=0)
    pieces = cut(whole, 4)
    lengths = whole["attention_mask"].sum(1).sort().values.tolist()
    assert [rows(piece) for piece in pieces] == [4, 4, 4, 4, 2]
    assert [length for piece in pieces for length in piece["attention_mask"].sum(1).tolist()] == lengths
    assert [piece["input_ids"].shape[1] for piece in pieces] == [max(lengths[at : at + 4]) for at in range(0, 18, 4)]
    one = texts.model
    assert mean_value(lambda batch: texts.loss(one, batch), pieces) == pytest.approx(
        float(texts.loss(one, whole)), rel=1e-5
    )


def test_padding_on_the_left_is_left_out_too() -> None:
    ids = torch.arange(12).view(2, 6)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
    short, long = cut({"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([1, 0])}, 1)
    assert short["input_ids"].tolist() == [[3, 4, 5]]
    assert long["input_ids"].tolist() == [[7, 8, 9, 10, 11]]
    assert (short["labels"].tolist(), long["labels"].tolist()) == ([1], [0])


def test_without_a_mask_examples_stay_as_they_come() -> None:
    pieces = cut({"pixel_values": torch.arange(10).view(5, 2), "labels": torch.arange(5)}, 2)
    assert [piece["labels"].tolist() for piece in pieces] == [[0, 1], [2, 3], [4]]


def test_no_example_is_drawn_twice(texts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(**given: int) -> list[Any]:
        return [tuple(row) for batch in draw(texts, "train", **given) for row in batch["input_ids"].tolist()]

    everything = sorted(row[: row.index(0)] if 0 in row else row for row in drawn(size=18, count=1, seed=0))
    found = drawn(size=4, count=100, seed=3)
    assert sorted(row[: row.index(0)] if 0 in row else row for row in found) == everything
    assert drawn(size=4, count=2, seed=3) == drawn(size=4, count=2, seed=3)
    assert len(drawn(size=4, count=2, seed=3)) == 8
    monkeypatch.setattr(portions, "AT_ONCE", 1)  # as many calls as batches
    assert len(drawn(size=4, count=100, seed=3)) == 18 // 5 * 5


def test_examples_that_the_collator_packs_into_one_row() -> None:
    class Packed(Made):
        def batches(self, split: Any, *, size: int, count: int, seed: int) -> Any:
            return [{"input_ids": tiny.tokens(1, 5 * size, seed=number)} for number in range(count)]

    batches = draw(Packed(tiny.llama()), "train", size=4, count=3, seed=0)  # pyright: ignore[reportArgumentType]
    assert [batch["input_ids"].shape for batch in batches] == [(1, 20)] * 3


def test_long_examples_make_small_batches(texts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert size_for(texts, 16) == 16
    monkeypatch.setattr(portions, "TOKENS", 60)
    monkeypatch.setattr(portions, "LEAST", 2)
    length = 10  # the median: 4, 8 or 12 words with a mark on either side
    assert size_for(texts, 16) == 60 // length
    monkeypatch.setattr(portions, "TOKENS", 1)
    assert size_for(texts, 16) == 2
    assert size_for(language(), 16) == 1  # each token of which is a label


def test_labels_are_what_is_to_be_predicted() -> None:
    assert labels_in({"labels": torch.tensor([3, 0, 1])}) == 3
    assert labels_in({"labels": torch.tensor([[-100, 4, 5], [-100, -100, 6]])}) == 3
    assert labels_in({"labels": torch.tensor([[-100]])}) == 1
    assert labels_in({"x": torch.zeros(4, 2)}) == 4


def test_parts_of_the_examples_share_nothing_as_long_as_there_are_enough() -> None:
    batches: list[Any] = list(range(10))
    assert dealt(batches, [4, 2, 0, 3]) == [[0, 1, 2, 3], [4, 5], [], [6, 7, 8]]
    assert dealt(batches, [8, 8, 4]) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert dealt(batches[:2], [8, 8, 8]) == [[0], [1], [0]]


@pytest.mark.parametrize("task", [*CLASSIFIERS, LANGUAGE])
def test_the_examples_of_a_stage(task: str, tmp_path: Path) -> None:
    amounts = Amounts(size=2, fitted=1, watched=1, steps=2, choosing=1, held_out=2)
    data = Material.drawn(subject_of(task, tmp_path), amounts, seed=0)
    heads = 0 if task == LANGUAGE else 1
    assert [len(part) for part in (data.fitted, data.watched, data.train, data.choosing)] == [heads, heads, 2, 1]
    assert data.summary()["held_out"] in (2, 4)
    assert (data.note == "") is (task != "video-classification")  # of which there are six


def test_parts_that_share_examples_are_named(tmp_path: Path) -> None:
    subject = subject_of("text-classification", tmp_path)
    amounts = Amounts(size=8, fitted=4, watched=4, steps=4, choosing=4, held_out=2)
    data = Material.drawn(subject, amounts, seed=0)
    assert "too few training examples to keep them apart" in data.note
    assert "the fit of the head" in data.note
    amounts = Amounts(size=2, fitted=1, watched=1, steps=40, choosing=1, held_out=1)
    data = Material.drawn(subject, amounts, seed=0)
    assert "too few training examples for 40 steps: they are made on" in data.note


# ---------------------------------------------------------------- losses


def test_means_are_over_labels_and_not_over_batches() -> None:
    weight = torch.tensor([2.0], requires_grad=False)
    batches = [
        {"x": torch.ones(1), "labels": torch.zeros(1)},
        {"x": torch.full((3,), 5.0), "labels": torch.zeros(3)},
    ]

    def loss(batch: dict[str, Tensor]) -> Tensor:
        return (weight * batch["x"]).mean()

    assert mean_value(loss, batches) == pytest.approx((2 + 3 * 10) / 4)
    mean, (gradient,) = mean_gradients(loss, [weight], batches)
    assert (mean, float(gradient)) == pytest.approx((8, (1 + 3 * 5) / 4))
    assert gradients(lambda batch: batch["x"].mean(), [weight], batches[0])[1][0].tolist() == [0]


# ---------------------------------------------------------------- blocks that are skipped


def test_names_and_blocks() -> None:
    name = "bert.encoder.layer.3.attention.self.query"
    assert (block_of(name), kind_of(name), list_of([name, "bert.pooler.dense"])) == (
        3,
        "attention.self.query",
        "bert.encoder.layer",
    )
    assert (block_of("bert.pooler.dense"), kind_of("bert.pooler.dense")) == (None, "bert.pooler.dense")
    assert list_of(["encoder.block.0.q", "decoder.block.0.q"]) is None
    model = tiny.bert()
    assert stack_of(model, [name]) == list(model.bert.encoder.layer)
    assert stack_of(model, ["bert.pooler.dense"]) == []


@pytest.mark.parametrize("task", [*CLASSIFIERS, LANGUAGE])
def test_a_resumed_loss_has_the_same_bits_and_gradients(task: str, tmp_path: Path) -> None:
    subject = subject_of(task, tmp_path)
    state = state_of(subject.model)
    stack = stack_of(subject.model, subject.places)
    trained = [place.stored for name, place in subject.places.items() if block_of(name) == 1]
    resumed = Resumed(subject, subject.model, stack[:1], trained)
    runs = []
    handles = [block.register_forward_hook(lambda block, given, output: runs.append(block)) for block in stack]
    for batch in subject.batches("train", size=3, count=2, seed=0):
        for _ in range(2):
            expected = gradients(lambda batch: subject.loss(subject.model, batch), trained, batch)
            found = gradients(resumed.loss, trained, batch)
            assert found[0] == expected[0]
            assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))
    assert len(resumed.skipped) == 1
    for handle in handles:
        handle.remove()
    assert same_bits(subject.model, state)
    assert "forward" not in vars(stack[0])


def test_skipped_blocks_are_not_run() -> None:
    subject = language()
    stack = stack_of(subject.model, subject.places)
    resumed = Resumed(subject, subject.model, stack[:1], [subject.places["model.layers.1.mlp.up_proj"].stored])
    (batch,) = subject.batches("train", size=3, count=1, seed=0)
    resumed.loss(batch)
    ran = []
    stack[0].get_submodule("self_attn.q_proj").register_forward_hook(lambda *given: ran.append(0))
    stack[1].get_submodule("self_attn.q_proj").register_forward_hook(lambda *given: ran.append(1))
    resumed.loss(batch)
    assert ran == [1]


def test_weights_outside_of_blocks_are_above_all_of_them_or_nothing_is_skipped() -> None:
    for model, name, skips in (
        (tiny.bert(), "bert.pooler.dense", True),
        (tiny.electra(), "electra.embeddings_project", False),
    ):
        subject: Any = Made(model, ["classifier"])
        places = places_of(model, subject.new_modules)
        assert name in places
        subject.batches = lambda *given, **named: [{"input_ids": tiny.tokens(4), "labels": torch.tensor([0, 1, 2, 0])}]
        resumed = Resumed(subject, model, stack_of(model, places), [places[name].stored])
        (batch,) = subject.batches()
        _, (expected,) = gradients(lambda batch, model=model: model(**batch).loss, [places[name].stored], batch)
        _, (found,) = gradients(resumed.loss, [places[name].stored], batch)
        assert torch.equal(found, expected)
        assert expected.abs().max() > 0
        assert bool(resumed.skipped) is skips


class Bridged(nn.Module):
    """Two blocks, whose outputs are both used: what the first gives goes past the second."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)])

    def forward(self, x: Tensor) -> Tensor:
        first = self.blocks[0](x)
        return (first + self.blocks[2](self.blocks[1](first))).square().mean()


def test_a_model_that_is_no_stack_is_computed_as_a_whole() -> None:
    torch.manual_seed(0)
    model = Bridged().requires_grad_(False)

    class Subject:
        def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            return model(batch["x"])

    subject: Any = Subject()
    blocks = list(model.blocks)
    weight: Any = blocks[2].weight
    batch = {"x": torch.randn(4, 3)}
    for skipped, left in ((1, 1), (2, 0)):
        resumed = Resumed(subject, model, blocks[:skipped], [weight])
        assert float(resumed.loss(batch)) == float(model(batch["x"]))
        assert len(resumed.skipped) == left
