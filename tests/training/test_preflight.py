"""The first batch is tried before a run: what would go wrong is named, and what is tried leaves no trace."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from tiny import bert, gpt2, llama, opt, tokens
from torch import nn
from transformers import TrainingArguments
from transformers.models.llama.modeling_llama import LlamaMLP

from slicefine import SliceFineConfig, SliceFineError, SliceFineWarning
from slicefine.training import run
from slicefine.training.checked import CheckedTrainer
from slicefine.training.preflight import preflight
from slicefine.training.recipe import Recipe
from slicefine.training.record import RunRecord

pytestmark = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing(_enable|_disable)?` is deprecated:FutureWarning"
)


def trainer_for(
    base: nn.Module, folder: Path, *, data: list[dict[str, Any]] | None = None, task: str = "CAUSAL_LM", **settings: Any
) -> CheckedTrainer:
    slicing = {
        name: settings.pop(name) for name in ("axis", "bias", "target_modules", "slide_every") if name in settings
    }
    config = SliceFineConfig(task_type=task, **{"r": 2, "slide_every": 1} | slicing)
    arguments = TrainingArguments(
        output_dir=str(folder),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        per_device_train_batch_size=4,
        **{"learning_rate": 1e-2} | settings,
    )
    data = data or [{"input_ids": ids, "labels": ids} for ids in tokens()]
    return CheckedTrainer(model=get_peft_model(base, config), args=arguments, train_dataset=data)


def refusal(trainer: CheckedTrainer) -> str:
    with pytest.raises(SliceFineError) as error:
        preflight(trainer)
    return str(error.value)


def everything(trainer: CheckedTrainer) -> dict[str, Any]:
    """All that a run starts from, down to what a state dict leaves out."""
    model: Any = trainer.model
    layers = [module for module in model.modules() if hasattr(module, "slicefine_state")]
    return copy.deepcopy(
        {
            "state": dict(model.state_dict()),
            "buffers": dict(model.named_buffers()),
            "gradients": [parameter.grad for parameter in model.parameters()],
            "positions": [
                (layer.slicefine_state["default"].active, layer.slicefine_state["default"].step) for layer in layers
            ],
            "modes": [module.training for module in model.modules()],
            "random": [torch.get_rng_state(), str(random.getstate()), str(np.random.get_state())],
            "trainer": (trainer.state.global_step, trainer.optimizer, trainer.args.to_dict()),
        }
    )


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict | list | tuple):
        keys = one.keys() if isinstance(one, dict) else range(len(one))
        assert len(one) == len(other)
        for key in keys:
            assert_same(one[key], other[key])
    else:
        assert one == other


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        (llama, {}),
        (llama, {"axis": "column", "slide_every": 3}),
        (llama, {"activation_checkpointing": True}),
        (lambda: llama(attention_bias=True, mlp_bias=True), {"bias": "slicefine_only"}),
        (lambda: llama().to(torch.bfloat16), {"axis": "row"}),
        (lambda: opt().eval(), {"target_modules": ["fc1", "q_proj"]}),
        (gpt2, {}),
        (gpt2, {"axis": "column", "bias": "slicefine_only"}),
    ],
    ids=["moves", "no move", "checkpointing", "biases", "bf16", "evaluating", "Conv1D", "Conv1D, columns and biases"],
)
def test_it_leaves_no_trace(base: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    trainer = trainer_for(base(), tmp_path, **settings)
    before = everything(trainer)
    preflight(trainer)
    assert_same(everything(trainer), before)


def test_a_head_and_dropout_leave_no_trace(tmp_path: Path) -> None:
    base = bert()
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    data = [{"input_ids": ids, "labels": torch.tensor(n % 3)} for n, ids in enumerate(tokens())]
    trainer = trainer_for(base, tmp_path, data=data, task="SEQ_CLS")
    before = everything(trainer)
    preflight(trainer)
    assert_same(everything(trainer), before)


@pytest.mark.parametrize("kind", ["text-classification", "causal-lm"])
def test_a_run_with_it_equals_a_run_without(
    kind: str, settings: dict[str, Any], lm_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings if kind == "text-classification" else lm_settings
    tried = []

    def noting(trainer: CheckedTrainer) -> None:
        preflight(trainer)
        tried.append(trainer)

    for name, check in (("with", noting), ("without", lambda trainer: None)):
        monkeypatch.setattr(run, "preflight", check)
        run.train(Recipe.from_flat(chosen | {"output": str(tmp_path / name)}))
    assert len(tried) == 1
    records = [RunRecord.read(tmp_path / name) for name in ("with", "without")]
    assert records[0].metrics == records[1].metrics
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()
    last = f"checkpoints/checkpoint-{records[0].steps}"
    for name in ("optimizer.pt", "rng_state.pth"):
        states = [torch.load(tmp_path / which / last / name, weights_only=False) for which in ("with", "without")]
        assert str(states[0]) == str(states[1])
    histories = [
        json.loads((tmp_path / which / last / "trainer_state.json").read_text()) for which in ("with", "without")
    ]
    logs = [
        [{key: value for key, value in entry.items() if "second" not in key and "time" not in key} for entry in entries]
        for entries in (history["log_history"] for history in histories)
    ]
    assert logs[0] == logs[1]


# ---------------------------------------------------------------- what it finds


def test_a_target_that_is_never_called(tmp_path: Path) -> None:
    base = llama()
    base.model.extra = nn.Sequential(nn.Linear(16, 16))
    said = refusal(trainer_for(base, tmp_path))
    assert said.startswith("Pre-flight, first step: no gradient reaches model.extra.0: the model never calls the layer")
    assert "`slice.exclude_modules`" in said


def test_a_kernel_that_bypasses_the_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fused(self: Any, x: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.silu(x @ self.gate_proj.weight.data.t()) * (x @ self.up_proj.weight.data.t())
        return hidden @ self.down_proj.weight.data.t()

    monkeypatch.setattr(LlamaMLP, "forward", fused)
    said = refusal(trainer_for(llama(), tmp_path))
    assert "no gradient reaches model.layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj, " in said
    assert "a fused kernel that uses the weight itself bypasses the layer's forward" in said
    assert "self_attn" not in said


def test_frozen_inputs_under_checkpointing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = llama()
    monkeypatch.setattr(type(base), "enable_input_require_grads", lambda self: None)
    trainer = trainer_for(
        base, tmp_path, activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": True}
    )
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        said = refusal(trainer)
    assert "model.layers.0.self_attn.q_proj" in said
    assert "frozen inputs under activation checkpointing" in said
    assert "use_reentrant=False" in said


def test_an_output_that_is_not_used(tmp_path: Path) -> None:
    base = llama()
    base.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output.detach())
    said = refusal(trainer_for(base, tmp_path))
    assert (
        "no gradient reaches model.layers.1.mlp.gate_proj, model.layers.1.mlp.up_proj, model.layers.1.mlp.down_proj: "
        in said
    )
    assert "the loss does not depend on its output" in said


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_labels_out_of_range(task: str, tmp_path: Path) -> None:
    ids = tokens()
    labels = ids.clone() if task == "CAUSAL_LM" else torch.tensor([0, 1, 2, 0])
    labels[2] = 50
    base = llama() if task == "CAUSAL_LM" else bert()
    data = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
    said = refusal(trainer_for(base, tmp_path, data=data, task=task))
    count = 50 if task == "CAUSAL_LM" else 3
    assert (
        said == f"Pre-flight, first batch: label 50 is out of range; the model has {count} outputs, 0 to {count - 1}."
    )


def test_tokens_out_of_range(tmp_path: Path) -> None:
    data = [{"input_ids": torch.tensor([1, 50]), "labels": torch.tensor([1, 2])}]
    said = refusal(trainer_for(llama(), tmp_path, data=data))
    assert "token 50 is out of range; the model knows 50 tokens. The tokenizer is not that of the model." in said


def test_nothing_to_learn(tmp_path: Path) -> None:
    data = [{"input_ids": ids, "labels": torch.full_like(ids, -100)} for ids in tokens()]
    assert "no label counts: all 28 are -100" in refusal(trainer_for(llama(), tmp_path, data=data))


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    base = llama()
    base.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("inf")
    said = refusal(trainer_for(base, tmp_path))
    assert "the loss is nan; the first layer whose output is not finite is model.layers.1.mlp.up_proj." in said


def test_a_learning_rate_too_small_for_the_number_format(tmp_path: Path) -> None:
    base = llama().to(torch.bfloat16)
    for parameter in base.parameters():
        parameter.data += 1.0  # far from zero, where numbers are close to each other
    said = refusal(trainer_for(base, tmp_path, learning_rate=1e-6, target_modules=["v_proj"]))
    assert "does not change the weight of 2 of 2 targets: model.layers.0.self_attn.v_proj, model.layers.1" in said
    assert "peak learning rate (1e-06)" in said


def test_gradients_of_zero(tmp_path: Path) -> None:
    base = opt()
    base.model.decoder.layers[0].fc1.bias.data -= 100  # no neuron is ever active
    with pytest.warns(
        SliceFineWarning, match=r"gradient of 1 of 2 slices is exactly zero: model\.decoder\.layers\.0\.fc1\."
    ):
        preflight(trainer_for(base, tmp_path, target_modules=["fc1"], axis="row"))
    base.model.decoder.layers[1].fc1.bias.data -= 100
    base = opt()
    for layer in base.model.decoder.layers:
        layer.fc1.bias.data -= 100
    assert "the gradient of every slice is exactly zero" in refusal(
        trainer_for(base, tmp_path, target_modules=["fc1"], axis="row")
    )


def test_nothing_is_written_when_it_fails(
    lm_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        LlamaMLP, "forward", lambda self, x: x @ self.gate_proj.weight.data.t() @ self.down_proj.weight.data.t()
    )
    with pytest.raises(SliceFineError, match=r"mlp\.gate_proj"):
        run.train(Recipe.from_flat(lm_settings))
    assert not (tmp_path / "run").exists()
