"""Experts, whose matrices are one parameter and no layer, are planned like all else; routing does not matter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planned import EXPERTS, TINY, llama, mixtral, recipe, saved_by_hooks
from transformers import GptOssConfig, JetMoeConfig, PhimoeConfig, PreTrainedConfig, Qwen3MoeConfig

from slicefine.benchmarking.fake_tensors import grouped_product
from slicefine.benchmarking.planned_cost import FULL, LORA, SLICEFINE, attached, step_memory
from slicefine.benchmarking.planned_model import Subject, loss_of, prepare, subject
from slicefine.benchmarking.planning import plan
from slicefine.benchmarking.planning_report import as_dict, text
from slicefine.errors import SliceFineWarning
from slicefine.tuner import parameter_counts
from slicefine.tuner.inspection import tuned

CONFIGS: dict[str, PreTrainedConfig] = {
    "mixtral": mixtral(),
    "qwen3 moe": Qwen3MoeConfig(
        **TINY, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8, pad_token_id=0
    ),
    # Biases, and matrices stored the other way round.
    "gpt-oss": GptOssConfig(**TINY, num_local_experts=4, num_experts_per_tok=2, head_dim=8, pad_token_id=0),
}
ROWS, COLUMNS = {"slice__axis": "row"}, {"slice__axis": "column"}
METHODS = {"rows": (SLICEFINE, ROWS), "columns": (SLICEFINE, COLUMNS), LORA: (LORA, ROWS), FULL: (FULL, ROWS)}


def with_experts(name: str, **settings: Any) -> Subject:
    return subject(recipe(slice__target_parameters=EXPERTS, **settings), CONFIGS[name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CONFIGS)
def test_saved_bytes_are_those_of_a_real_step(name: str, method: str, dtype: str) -> None:
    """Its tokens go to different experts, as many to each as it happens."""
    kind, axis = METHODS[method]
    of = with_experts(name, model__dtype=dtype, training__bf16=dtype == "bfloat16", **axis)
    planned = step_memory(of, attached(of, kind), gpu=False)
    torch.manual_seed(0)
    model = attached(of, kind, "cpu")
    prepare(model, of.recipe)
    batch = of.inputs()
    batch["input_ids"].random_(1, 64)
    batch["attention_mask"][1:, -5:] = 0
    saved = saved_by_hooks(model, loss_of(model, of.recipe, batch))
    assert planned.saved == pytest.approx(saved, abs=128)
    assert planned.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)


def test_numbers_of_parameters_are_those_of_the_real_model() -> None:
    made = plan(recipe(slice__target_parameters=EXPERTS), mixtral(), device="cpu")
    of = with_experts("mixtral")
    model = attached(of, SLICEFINE, "cpu")
    counts = parameter_counts(model, 7)
    assert made.targets == len(tuned(model)) == 2 * (4 + 2)
    assert (made.counts.active, made.counts.planned, made.counts.added) == (counts.active, counts.planned, 0)
    masters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert made.costs[0].masters == 4 * masters
    assert made.counts.active > plan_without_experts().counts.active


def plan_without_experts() -> Any:
    with pytest.warns(SliceFineWarning, match="three dimensions"):
        return plan(recipe(), mixtral(), device="cpu")


def test_lora_is_given_the_experts_too() -> None:
    of = with_experts("mixtral")
    model = attached(of, LORA)
    trained = [name for name, p in model.named_parameters() if p.requires_grad and ".experts." in name]
    assert len(trained) == 2 * 2 * 2  # A and B of two parameters, in two layers
    made = plan(of.recipe, mixtral(), device="cpu")
    assert made.costs[1].active == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_slices_in_experts_are_not_exported_as_lora() -> None:
    made = plan(recipe(slice__target_parameters=EXPERTS), mixtral(), device="cpu")
    assert made.lora_rank is None
    assert "as LoRA      not exported: slices are in more than linear layers" in text(made)
    assert as_dict(made)["lora_rank"] is None
    assert "as LoRA      rank 12 when exported\n" in text(plan(recipe(), llama(), device="cpu"))


def test_what_cannot_be_counted_beside_ours_is_said() -> None:
    """Phi's router is a linear layer that gives a tuple, which PEFT's LoRA does not expect."""
    config = PhimoeConfig(**TINY, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0)
    made = plan(recipe(slice__target_parameters=EXPERTS), config, device="cpu")
    assert [each.method for each in made.costs] == ["SliceFine-3RC", "full"]
    assert "There is no column for LoRA. The memory of phimoe cannot be counted" in text(made)
    assert as_dict(made)["notes"] == made.notes


def test_a_step_with_experts_whose_shapes_depend_on_routing_is_not_counted() -> None:
    config = JetMoeConfig(**TINY, num_local_experts=4, num_experts_per_tok=2, kv_channels=8, pad_token_id=0)
    with pytest.warns(SliceFineWarning):
        made = plan(recipe(), config)
    assert [each.device for each in made.costs] == [None] * 3
    assert "where it depends on values" in text(made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [20, 24])
def test_grouped_products_are_stored_as_torch_stores_them(width: int, dtype: torch.dtype) -> None:
    x, w, g = (torch.ones(shape, dtype=dtype) for shape in ((10, 16), (4, 16, 24), (10, 24)))
    square = torch.ones((4, 24, 24), dtype=dtype)
    offs = torch.tensor([3, 3, 8, 10], dtype=torch.int32)
    pairs = [(x, w[..., :width], offs), (x.t(), g[:, :width], offs), (w, square[..., :width], None)]
    for a, b, ends in pairs:
        real, planned = torch._grouped_mm(a, b, offs=ends), grouped_product(a, b, ends)
        assert (planned.shape, planned.stride(), planned.dtype) == (real.shape, real.stride(), real.dtype)
