"""What a plan says of the memory of a device: whether the run fits, and what would make it fit."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from planned import TINY, llama, recipe
from transformers import BertConfig, OpenAIGPTConfig

from slicefine.benchmarking import planning
from slicefine.benchmarking.planning import Change, Plan, parse_memory, plan
from slicefine.benchmarking.planning_report import text
from slicefine.errors import SliceFineError
from slicefine.training.recipe import Recipe


def tight(share: float) -> tuple[Plan, BertConfig]:
    """A plan in a memory in which `share` of what a step takes is left."""
    config = BertConfig(**{k: v for k, v in TINY.items() if k != "num_key_value_heads"} | {"num_hidden_layers": 3})
    base = recipe(task="text-classification", data__max_length=64, training__per_device_train_batch_size=8)
    ours = plan(base, config, device="cpu").costs[0]
    memory = ours.device - round(ours.step.peak * (1 - share))
    return plan(base, config, memory=memory, device="cpu"), config


def test_changes_that_are_named_make_it_fit() -> None:
    made, config = tight(0.45)
    assert not made.fits(made.costs[0].device)
    assert {"training.activation_checkpointing": True} in [change.settings for change in made.changes]
    batches = [change.settings for change in made.changes if "training.per_device_train_batch_size" in change.settings]
    assert [b["training.per_device_train_batch_size"] * b["training.gradient_accumulation_steps"] for b in batches] == [
        8
    ]
    for change in made.changes:
        changed = plan(Recipe.from_flat(made.recipe.flat() | change.settings), config, memory=made.memory, device="cpu")
        assert changed.fits(changed.costs[0].device)
        assert changed.changes == []
        assert changed.costs[0].device == pytest.approx(change.device, rel=0.02)
    assert "fits with" in text(made)


def test_the_axis_alone_can_be_enough() -> None:
    made, _ = tight(0.95)
    assert {"slice.axis": "column"} in [change.settings for change in made.changes]


def test_the_batch_is_the_largest_that_fits() -> None:
    made, _ = tight(0.15)
    assert [c.settings.get("training.per_device_train_batch_size") for c in made.changes][-1] == 1


def test_a_batch_is_found_where_a_part_of_the_step_does_not_shrink_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits in tiles, say: in proportion a batch of 32 would fit."""
    asked = []

    def changed(made: Plan, _: Any, settings: dict[str, Any]) -> Change:
        size = settings.get("training.per_device_train_batch_size", 64)
        asked.append(size)
        return Change(settings=settings, device=made.costs[0].fixed + 1_000_000 + 10_000 * size)

    monkeypatch.setattr(planning, "_changed", changed)
    made = plan(recipe(training__per_device_train_batch_size=64), llama(), device="cpu")
    needed = made.costs[0].fixed + 1_000_000 + 10_000 * 8 + 1
    made = planning._with_changes(dataclasses.replace(made, memory=needed), llama(), 2 * needed)
    assert [change.settings["training.per_device_train_batch_size"] for change in made.changes] == [8]
    assert made.smallest is None
    assert len(asked) <= 8


def test_where_nothing_helps_the_least_is_said() -> None:
    made, _ = tight(0.001)
    assert made.changes == []
    assert made.smallest is not None
    assert made.smallest.settings["training.per_device_train_batch_size"] == 1
    assert "No batch, checkpointing or axis" in text(made)


def test_what_cannot_checkpoint_is_not_told_to() -> None:
    config = OpenAIGPTConfig(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=64)
    made = plan(recipe(slice__axis="row"), config, memory=1, device="cpu")
    assert made.smallest is not None
    assert "training.activation_checkpointing" not in made.smallest.settings
    with pytest.raises(SliceFineError, match="OpenAIGPTLMHeadModel has no activation checkpointing"):
        plan(recipe(training__activation_checkpointing=True), config, device="cpu")


def test_where_it_fits_nothing_is_changed() -> None:
    made = plan(recipe(), llama(), memory=parse_memory("2GiB"))
    assert made.fits(made.costs[0].device)
    assert (made.changes, made.smallest) == ([], None)
    assert "SliceFine-3RC, LoRA-r8, full fit." in text(made)
    assert not made.fits(2**30 + 1)  # a gibibyte is set aside


@pytest.mark.parametrize(
    ("given", "size"),
    [("24GiB", 24 * 2**30), ("80 GB", 80 * 10**9), ("512mib", 512 * 2**20), ("1.5TiB", 3 * 2**39)],
)
def test_memory_is_read(given: str, size: int) -> None:
    assert parse_memory(given) == size


@pytest.mark.parametrize(
    ("given", "fix"),
    [("24", "Write 24GiB"), ("lots", "Write 24GiB"), ("-3GiB", "above 0"), ("0GiB", "above 0"), ("", "GB")],
)
def test_memory_that_cannot_be_read_is_refused(given: str, fix: str) -> None:
    with pytest.raises(SliceFineError, match=fix):
        parse_memory(given)
