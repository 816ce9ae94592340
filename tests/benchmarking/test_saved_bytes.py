"""The count on tensors without values is the count on real ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from planned import saved_by_hooks
from torch import Tensor, nn
from transformers import (
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    RobertaConfig,
    VideoMAEConfig,
    ViTConfig,
)

from slicefine.benchmarking.fake_tensors import fake
from slicefine.benchmarking.planned_cost import FULL, LORA, SLICEFINE, attached, step_memory
from slicefine.benchmarking.planned_model import Subject, loss_of, prepare, subject
from slicefine.benchmarking.saved_bytes import BLOCK, count
from slicefine.training.recipe import Recipe

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
TEXT = SMALL | {"vocab_size": 64, "max_position_embeddings": 40, "pad_token_id": 0}
CONFIGS: dict[str, tuple[str, Callable[[], PreTrainedConfig]]] = {
    "llama": ("causal-lm", lambda: LlamaConfig(**TEXT, num_key_value_heads=2)),
    "gpt2": ("causal-lm", lambda: GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=40)),
    "bert": ("text-classification", lambda: BertConfig(**TEXT)),
    "roberta": ("text-classification", lambda: RobertaConfig(**TEXT)),
    "llama classifier": ("text-classification", lambda: LlamaConfig(**TEXT, num_key_value_heads=2)),
    "vit": ("image-classification", lambda: ViTConfig(**SMALL, image_size=32, patch_size=8)),
    "videomae": ("video-classification", lambda: VideoMAEConfig(**SMALL, image_size=16, patch_size=8, num_frames=4)),
}
SINGLE = 128
"""Bytes of some single numbers, which real and fake tensors keep in different ways."""
AXES = {"rows": "row", "columns": "column"}


def made(name: str, method: str = "rows", **settings: Any) -> tuple[Subject, str]:
    """A small model and the method, of `planned_cost`, that trains it."""
    task, config = CONFIGS[name]
    flat = {
        "task": task,
        "model.name": name,
        "data.train": "none",
        "output": "none",
        "slice.r": 3,
        "slice.axis": AXES.get(method, "alternate"),
        "training.per_device_train_batch_size": 3,
    } | ({"data.max_length": 24} if "image" not in task and "video" not in task else {})
    of = subject(Recipe.from_flat(flat | {key.replace("__", "."): value for key, value in settings.items()}), config())
    return of, SLICEFINE if method in AXES else method


def real(of: Subject, method: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The same with values, and with padding where there is some."""
    torch.manual_seed(0)
    model = attached(of, method, "cpu")
    prepare(model, of.recipe)
    batch = of.inputs()
    if of.padded and "attention_mask" in batch:
        batch["attention_mask"][1:, -5:] = 0
    return model, loss_of(model, of.recipe, batch)


@pytest.mark.parametrize("method", ["rows", "columns", LORA, FULL])
@pytest.mark.parametrize("name", CONFIGS)
def test_saved_bytes_are_those_of_a_real_step(name: str, method: str) -> None:
    of, method = made(name, method)
    planned = step_memory(of, attached(of, method), gpu=False)
    model, loss = real(of, method)
    assert planned.saved == pytest.approx(saved_by_hooks(model, loss), abs=SINGLE)
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert planned.gradients == gradients > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"training__bf16": True},
        {"model__dtype": "bfloat16"},
        {"model__attn_implementation": "eager"},
        {"training__activation_checkpointing": True},
        {"training__per_device_train_batch_size": 1},
        {"data__packing": True},
        {"data__packing": True, "data__packing_strategy": "wrapped"},
        {"slice__bias": "slicefine_only"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_whatever_the_settings(name: str, settings: dict[str, Any]) -> None:
    of, method = made(name, **settings)
    planned = step_memory(of, attached(of, method), gpu=False)
    assert planned.saved == pytest.approx(saved_by_hooks(*real(of, method)), abs=SINGLE)


@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_the_highest_moment_is_that_of_a_real_step(name: str) -> None:
    of, method = made(name)
    assert step_memory(of, attached(of, method), gpu=False).peak == pytest.approx(
        count(*real(of, method)).peak, rel=0.03
    )


class Chain(nn.Module):
    """x -> linear -> relu, of 1,024 x 256 numbers: 1 MiB a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(256, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x).relu()


MIB = 2**20


def test_a_step_that_can_be_counted_by_hand() -> None:
    """relu saves its output, the layer its input; the sum needs nothing."""
    model = Chain()
    x = torch.ones(1024, 256)
    step = count(model, lambda: model(x).sum())
    assert step.saved == 2 * MIB
    assert step.gradients == 256 * 256 * 4
    # `x` was there before; forward: the layer's output goes as soon as relu has its own. Then the gradient of relu's input, a second
    # tensor, and that of the weight.
    assert step.at_peak["activations"] == 2 * MIB
    assert 3 * MIB <= step.peak <= 3.5 * MIB


def test_gradients_of_a_batch_before_are_there_in_the_next() -> None:
    model = Chain()
    x = torch.ones(8, 256)
    alone, second = (count(model, lambda: model(x).sum(), accumulating=again) for again in (False, True))
    assert second.gradients == alone.gradients
    assert second.peak == alone.peak + alone.gradients
    assert all(p.grad is None for p in model.parameters())


def test_what_no_batch_gives_a_gradient_has_none_after_several_either() -> None:
    model, x = Chain(), torch.ones(8, 256)
    before = count(model, lambda: model(x).sum(), accumulating=True)
    model.register_parameter("unused", nn.Parameter(torch.ones(2**18)))
    assert count(model, lambda: model(x).sum(), accumulating=True) == before
    assert before.gradients == 256 * 256 * 4


def test_logits_are_told_by_their_width() -> None:
    model = nn.Linear(64, 256)
    x = torch.ones(8, 64)
    step = count(model, lambda: model(x).exp().sum(), widths=frozenset({256}))
    assert step.saved == 8 * (64 + 256) * 4
    assert step.saved_logits == 8 * 256 * 4


def test_logits_that_are_gone_at_the_highest_moment_are_counted_still() -> None:
    """Logits of 8 KiB; later the layer before them makes a gradient of 1 MiB."""
    model = nn.Sequential(nn.Linear(512, 512, bias=False), nn.Linear(512, 256, bias=False))
    step = count(model, lambda: model(torch.ones(8, 512)).sum(), widths=frozenset({256}))
    assert step.logits == 8 * 256 * 4
    assert "logits" not in {kind for kind, size in step.at_peak.items() if size}


def test_a_small_tensor_takes_a_block() -> None:
    model = Chain()
    assert count(model, lambda: model(torch.ones(1, 256)).sum()).peak % BLOCK == 0


def test_the_model_is_put_back() -> None:
    of, method = made("videomae")
    model = attached(of, method)
    before = {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    step_memory(of, model, gpu=True)
    assert {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]} == before
    assert (
        torch.nn.functional.softmax is torch.softmax or torch.nn.functional.softmax.__module__ == "torch.nn.functional"
    )
    assert "pow" not in vars(Tensor)


# ---------------------------------------------------------------- as on a GPU

HEADS, TOKENS, BATCH = 4, 24, 3
MATRIX = BATCH * HEADS * TOKENS * TOKENS


def on_gpu(name: str, method: str = "rows", **settings: Any) -> int:
    of, method = made(name, method, **settings)
    return step_memory(of, attached(of, method), gpu=True).saved


@pytest.mark.parametrize(("batch", "bias"), [(1, 0), (BATCH, 2 * BATCH * TOKENS * 32 * 2)])
def test_attention_on_a_gpu_keeps_no_matrix(batch: int, bias: int) -> None:
    """The eager form keeps probabilities in bf16 and in fp32; the fused one a number a query, and a mask where there is padding."""
    settings = {"model__dtype": "bfloat16", "training__per_device_train_batch_size": batch}
    eager = on_gpu("llama", model__attn_implementation="eager", **settings)
    fused = on_gpu("llama", **settings)
    assert eager - fused > 2 * (MATRIX // BATCH * batch) * 2 - bias - 20_000
    assert fused < eager


def test_fp32_with_fewer_heads_of_keys_has_no_fused_kernel() -> None:
    one = {"training__per_device_train_batch_size": 1}
    grouped, half = on_gpu("llama", **one), on_gpu("llama", model__dtype="bfloat16", **one)
    assert grouped - 2 * half > 2 * (MATRIX // BATCH) * 4 - 20_000


def test_variable_length_attention_has_no_mask_and_needs_no_package() -> None:
    flash = on_gpu("llama", model__dtype="bfloat16", model__attn_implementation="flash_attention_2")
    assert flash < on_gpu("llama", model__dtype="bfloat16")


def dropped() -> tuple[nn.Module, Tensor]:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 64)), torch.empty(16, 64)


@pytest.mark.parametrize(("gpu", "itemsize"), [(True, 1), (False, 4)])
def test_dropout_keeps_a_byte_an_entry_on_a_gpu(gpu: bool, itemsize: int) -> None:
    model, _ = dropped()
    with fake(model, gpu=gpu):
        x = torch.empty(16, 64)
        saved = count(model, lambda: model(x).sum()).saved
    # the input of both layers, and the mask
    assert saved == 16 * 64 * (4 + 4 + itemsize)


@pytest.mark.parametrize(("gpu", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_autocast_on_a_gpu_normalises_in_fp32(gpu: bool, dtype: torch.dtype) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    with fake(model, gpu=gpu), torch.autocast("cpu", torch.bfloat16):
        assert model(torch.empty(16, 64)).dtype is dtype
