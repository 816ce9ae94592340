"""A plan with a depth window says what each turn trains, and counts the memory of the one that needs most."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from planned import TINY, llama, recipe, saved_by_hooks, training
from transformers import BertConfig, PreTrainedConfig

from slicefine.benchmarking.models import CAUSAL_LM, TEXT
from slicefine.benchmarking.planned_cost import SLICEFINE, cost
from slicefine.benchmarking.planned_model import loss_of, subject
from slicefine.benchmarking.planning import plan
from slicefine.benchmarking.planning_report import as_dict, text
from slicefine.errors import SliceFineError
from slicefine.training.recipe import Recipe
from slicefine.tuner import parameter_counts
from slicefine.tuner.inspection import tuned

pytestmark = pytest.mark.filterwarnings("ignore::slicefine.errors.SliceFineWarning")

BERT = BertConfig(**{k: v for k, v in TINY.items() if k != "num_key_value_heads"} | {"num_hidden_layers": 3})
CONFIGS: dict[str, tuple[str, PreTrainedConfig]] = {
    "Llama": (CAUSAL_LM, llama(num_hidden_layers=3, attention_bias=True, dtype="float32")),
    "BERT, whose pooler is trained in every turn": (TEXT, BERT),
}


def in_turn(window: list[int], **settings: Any) -> Recipe:
    return recipe(**{"slice__depth_window": window, "slice__depth_every": 2} | settings)


@pytest.mark.parametrize("axis", ["row", "column", "coupled"])
@pytest.mark.parametrize("window", [[0, 1, 2], [2, 0], [1, 2, 0, 0]], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_turns_are_those_of_a_real_run(name: str, window: list[int], axis: str, tmp_path: Path) -> None:
    task, config = CONFIGS[name]
    steps = 2 * len(window) + 2
    of = subject(
        in_turn(window, task=task, slice__axis=axis, slice__bias="slicefine_only", training__max_steps=steps), config
    )
    made = plan(of.recipe, config, device="cpu")
    model, trained, optimizer, batch = training(of)
    active, saved, gradients = [], [], []
    for step in range(steps):
        if step % 2 == 0:
            active.append(parameter_counts(model).active)
        saved.append(saved_by_hooks(model, loss_of(model, of.recipe, batch)))
        gradients.append(sum(p.grad.nbytes for p in trained if p.grad is not None))
        optimizer.step()
        optimizer.zero_grad()

    assert [turn.lowest for turn in made.turns] == window
    assert [turn.active for turn in made.turns] == active[: len(window)]
    assert made.counts.active == made.costs[0].active == max(active)
    assert made.costs[0].step.saved == pytest.approx(max(saved), abs=128)
    assert made.costs[0].step.gradients == max(gradients)
    assert max(saved) > min(saved)

    layers = tuned(model)
    counts = parameter_counts(model, steps)
    assert made.counts.planned == counts.touched
    biases = sum(layer.slicefine_bias[a].numel() for _, layer, a in layers if a in layer.slicefine_bias)
    assert made.coverage == (counts.touched - biases) / sum(layer.matrix.numel() for _, layer, _ in layers)
    moves = {layer.slicefine_state[a].schedule.moves(steps - 1) for _, layer, a in layers}
    assert (made.fewest_moves, made.moves) == (min(moves), max(moves))
    assert min(moves) < max(moves)

    states = [layer.slicefine_state[a] for _, layer, a in layers]
    originals = sum(values.nbytes for state in states for _, values in state.originals.stored().values())
    assert made.costs[0].originals == originals + sum(s.bias.nbytes for s in states if s.bias is not None)
    model.save_pretrained(tmp_path)
    data = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert made.costs[0].artifact == len(data) - 8 - int.from_bytes(data[:8], "little")


def test_a_slice_that_rests_after_a_move_is_kept_already() -> None:
    """After 8 steps the first block has made 4 of its own and a move, and rests."""
    of = subject(in_turn([1, 0], slice__axis="row", training__max_steps=8), llama(dtype="float32"))
    model, _, optimizer, batch = training(of)
    for _ in range(8):
        loss_of(model, of.recipe, batch)().backward()
        optimizer.step()
        optimizer.zero_grad()
    states = [layer.slicefine_state[a] for _, layer, a in tuned(model)]
    assert any(state.resting for state in states)
    originals = sum(values.nbytes for state in states for _, values in state.originals.stored().values())
    assert cost(of, SLICEFINE, gpu=False, steps=8).originals == originals


def test_biases_of_layers_that_a_short_run_never_trains_are_not_covered() -> None:
    """Two steps of the first turn."""
    made = in_turn([1, 0], slice__axis="row", slice__bias="slicefine_only", training__max_steps=2)
    with_biases = plan(made, llama(attention_bias=True), device="cpu")
    without = plan(in_turn([1, 0], slice__axis="row", training__max_steps=2), llama(attention_bias=True), device="cpu")
    assert with_biases.coverage == without.coverage


def test_a_deep_model_is_counted_from_a_few_layers_all_the_same() -> None:
    of = subject(in_turn([4, 0]), llama(num_hidden_layers=8))
    few, all_of_them = (cost(of, SLICEFINE, gpu=True, deep=deep).step for deep in (0, 100))
    assert (few.saved, few.gradients) == (all_of_them.saved, all_of_them.gradients)


def test_without_a_window_there_are_no_turns() -> None:
    made = plan(recipe(), llama(), device="cpu")
    assert made.turns == []
    assert made.fewest_moves == made.moves
    assert "turns" not in text(made)


def test_turns_are_told() -> None:
    made = plan(in_turn([1, 0], slice__axis="row"), llama(), device="cpu")
    upper, whole = (turn.active for turn in made.turns)
    assert 2 * upper == whole
    shown = text(made).splitlines()
    assert f"parameters   {whole:,} active at most, 0 touched" in shown[3]
    assert shown[4] == (
        f"turns        {upper:,} active from block 1, {whole:,} active from block 0; {3 * upper // 2:,} in the mean; 2 steps each"
    )
    assert "7 steps, 1 to 3 moves" in shown[5]
    written = as_dict(made)
    assert written["turns"] == [{"lowest": 1, "active": upper}, {"lowest": 0, "active": whole}]
    assert (written["parameters"]["active"], written["fewest_moves"], written["moves"]) == (whole, 1, 3)


def test_a_window_that_does_not_fit_the_model_is_refused_as_in_a_run() -> None:
    with pytest.raises(SliceFineError, match=r"`depth_window`: the blocks of .* are 0 to 1; got 7"):
        plan(in_turn([0, 7]), llama())
