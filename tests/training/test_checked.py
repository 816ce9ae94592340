"""NaN and Inf stop a run before the optimizer makes them part of the weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import Trainer
from transformers.models.llama.modeling_llama import LlamaMLP

from slicefine.training.checked import CheckedTrainer, NotFiniteError
from slicefine.training.recipe import Recipe
from slicefine.training.record import RunRecord
from slicefine.training.run import train


class Poison(torch.autograd.Function):
    """Passes on; the gradient is NaN."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return g * float("nan")


def spoil(monkeypatch: pytest.MonkeyPatch, step: int, change: Any) -> None:
    """From optimizer step `step` on, let `change` act on the MLP's output in the last block, in training."""
    running: list[CheckedTrainer] = []
    training_step, forward = CheckedTrainer.training_step, LlamaMLP.forward

    def noting(self: CheckedTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        running[:] = [self]
        return training_step(self, *args, **kwargs)

    def spoiled(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = forward(self, x)
        at_last = running and self is running[0].model.base_model.model.model.layers[-1].mlp
        return change(y) if at_last and running[0].state.global_step + 1 >= step and self.training else y

    monkeypatch.setattr(CheckedTrainer, "training_step", noting)
    monkeypatch.setattr(LlamaMLP, "forward", spoiled)


@pytest.mark.parametrize("clipping", [1.0, 0.0])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            Poison.apply,
            "Step 6: the loss is {number}, and the gradient is NaN or Inf in 14 layers, from the loss on: "
            "model.layers.1.mlp.down_proj, model.layers.1.mlp.up_proj, model.layers.1.mlp.gate_proj and 11 more.",
        ),
        (
            lambda y: y / 0,
            "Step 6: the loss is nan; the first layer whose output is not finite is model.layers.1.mlp.",
        ),
    ],
    ids=["gradient", "loss"],
)
def test_a_run_stops_before_the_step(
    change: Any,
    says: str,
    clipping: float,
    lm_settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = lm_settings | {"training.max_grad_norm": clipping}
    with monkeypatch.context() as patch:
        spoil(patch, 6, change)
        with pytest.raises(NotFiniteError) as error:
            train(Recipe.from_flat(settings))
    assert re.match(re.escape(says).replace(r"\{number\}", r"5\.\d+"), str(error.value)), str(error.value)
    assert f"{tmp_path}/run/checkpoints/checkpoint-5 has the state after step 5, the last good one." in str(error.value)
    record = RunRecord.read(tmp_path / "run")
    assert (record.status, record.steps) == ("failed", 5)
    assert not (tmp_path / "run" / "adapter").exists()


def test_the_checkpoint_goes_on_as_if_nothing_had_happened(
    lm_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, dropout included, where the cause is gone."""
    settings = lm_settings | {"training.save_steps": 8, "training.save_total_limit": None}
    train(Recipe.from_flat(settings | {"output": str(tmp_path / "whole")}))
    # Early, right after a move, the first of an epoch, and where the checkpoint has been made already.
    for step in (2, 5, 7, 9):
        folder = tmp_path / str(step)
        recipe = Recipe.from_flat(settings | {"output": str(folder)})
        with monkeypatch.context() as patch:
            spoil(patch, step, Poison.apply)
            with pytest.raises(NotFiniteError):
                train(recipe)
        torch.manual_seed(1234)  # nothing outside of the checkpoint decides how a run goes on
        record = train(recipe, resume=True)
        assert record.resumed_from == [step - 1]
        assert record.metrics == RunRecord.read(tmp_path / "whole").metrics
        name = "adapter/adapter_model.safetensors"
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("of", ["lm_settings", "settings"])
def test_how_often_it_is_evaluated_does_not_change_what_is_trained(
    of: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """To the bit, dropout included: loaders draw a seed, and samplers an order."""
    adapters = []
    for every in (2, 1000):
        folder = tmp_path / str(every)
        recipe = Recipe.from_flat(request.getfixturevalue(of) | {"output": str(folder), "training.eval_steps": every})
        assert recipe.data.validation
        train(recipe)
        adapters.append((folder / "adapter" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]


def test_nothing_to_keep_at_the_first_step(
    lm_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 1, Poison.apply)
    with pytest.raises(NotFiniteError, match=r"Step 1: .* Nothing has been trained yet"):
        train(Recipe.from_flat(lm_settings))
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_classification_is_checked_as_well(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.training_step

    def spoiled(self: Trainer, model: PeftModel, *args: Any) -> torch.Tensor:
        loss = step(self, model, *args)
        if self.state.global_step == 3:
            next(p for n, p in model.named_parameters() if "layer.1.output" in n and p.requires_grad).grad[0] = (
                torch.inf
            )
        return loss

    monkeypatch.setattr(Trainer, "training_step", spoiled)
    with pytest.raises(
        NotFiniteError, match=r"Step 4: .* in 1 layers, from the loss on: bert\.encoder\.layer\.1\.output"
    ):
        train(Recipe.from_flat(settings))
    assert RunRecord.read(tmp_path / "run").status == "failed"
