"""A plan of coupled slices, made without values, is that of the real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from planned import EXPERTS, TINY, llama, mixtral, recipe, saved_by_hooks, training
from transformers import (
    AlbertConfig,
    BartConfig,
    BeitConfig,
    BertConfig,
    CLIPConfig,
    DeepseekV3Config,
    Gemma3TextConfig,
    Glm4MoeConfig,
    GPT2Config,
    MobileViTConfig,
    PreTrainedConfig,
    SwinConfig,
    VideoMAEConfig,
    ViTConfig,
    VivitConfig,
)

from slicefine.benchmarking import planned_couplings
from slicefine.benchmarking.models import CAUSAL_LM, IMAGE, TEXT, VIDEO
from slicefine.benchmarking.planned_cost import SLICEFINE, attached, repeated_step_memory, step_memory
from slicefine.benchmarking.planned_model import Subject, loss_of, subject
from slicefine.benchmarking.planning import plan
from slicefine.errors import SliceFineError
from slicefine.tuner import parameter_counts
from slicefine.tuner.inspection import tuned

pytestmark = pytest.mark.filterwarnings("ignore::slicefine.errors.SliceFineWarning")

DEEP = TINY | {"num_hidden_layers": 6}
ENCODER = {key: value for key, value in DEEP.items() if key != "num_key_value_heads"}
SIZES = {key: ENCODER[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
PATCHES = SIZES | {"image_size": 24, "patch_size": 4}
EACH = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
GPT2 = {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_head": 4}

CONFIGS: dict[str, tuple[str, PreTrainedConfig, bool]] = {
    # name: (task, configuration, whether a few of the layers are enough)
    "Llama, groups of two": (CAUSAL_LM, llama(num_hidden_layers=6), True),
    "two kinds of layers": (
        CAUSAL_LM,
        Gemma3TextConfig(**DEEP | {"num_hidden_layers": 10}, head_dim=8, sliding_window=8, sliding_window_pattern=3),
        True,
    ),
    "experts": (CAUSAL_LM, mixtral(num_hidden_layers=5, dtype="bfloat16"), True),
    "dense layers before experts": (
        CAUSAL_LM,
        Glm4MoeConfig(**DEEP, **EACH, head_dim=8, n_routed_experts=4, first_k_dense_replace=2),
        True,
    ),
    "latent attention": (
        CAUSAL_LM,
        DeepseekV3Config(
            **DEEP | {"num_key_value_heads": 4}, **EACH, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8,
            v_head_dim=8, first_k_dense_replace=1, n_routed_experts=8, n_group=2, topk_group=1,
        ),
        True,
    ),
    "GPT-2": (CAUSAL_LM, GPT2Config(**GPT2, n_layer=6), True),
    "BERT": (TEXT, BertConfig(**ENCODER), True),
    "an encoder and a decoder": (
        TEXT,
        BartConfig(
            vocab_size=64, d_model=32, encoder_layers=4, decoder_layers=4, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
        ),
        False,
    ),
    "ViT": (IMAGE, ViTConfig(**PATCHES), True),
    "biases of positions": (IMAGE, BeitConfig(**PATCHES, use_relative_position_bias=True), True),
    "CLIP": (IMAGE, CLIPConfig(vision_config=PATCHES, text_config=ENCODER), False),
    "stages": (
        IMAGE, SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[2, 4], num_heads=[2, 2], window_size=2), True,
    ),
    "tokens that become one": (IMAGE, MobileViTConfig(), False),
    "VideoMAE": (VIDEO, VideoMAEConfig(**PATCHES, num_frames=8, tubelet_size=2), True),
    "ViViT": (VIDEO, VivitConfig(**SIZES, image_size=24, num_frames=8, tubelet_size=[2, 4, 4]), True),
}  # fmt: skip


def coupled(task: str, config: PreTrainedConfig, **settings: Any) -> Subject:
    return subject(recipe(task=task, slice__axis="coupled", **settings), config)


def partners(of: Subject, device: str) -> dict[str, str]:
    model: Any = attached(of, SLICEFINE, device)
    return model.peft_config["default"].couplings


@pytest.fixture
def from_few(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each time that partners were found, whether a few layers were enough."""
    seen: list[bool] = []
    usual = planned_couplings._of_few_layers

    def watched(*args: Any) -> Any:
        found = usual(*args)
        seen.append(found is not None)
        return found

    monkeypatch.setattr(planned_couplings, "_of_few_layers", watched)
    monkeypatch.setattr(planned_couplings, "_found", {})
    return seen


@pytest.mark.parametrize("name", CONFIGS)
def test_partners_are_those_of_the_real_model(name: str, from_few: list[bool]) -> None:
    task, config, few = CONFIGS[name]
    of = coupled(task, config)
    found = partners(of, "meta")
    assert found == partners(of, "cpu")
    assert len({text.partition(" ")[0] for text in found.values()}) == 2  # rows, and columns
    assert from_few == [few]
    assert partners(of, "meta") == found
    assert len(from_few) == 1  # they are kept


@pytest.mark.parametrize(
    "settings",
    [
        {"slice__target_modules": ["q_proj", "v_proj", "o_proj"]},
        {"slice__layers_to_transform": [7, 8]},
        {"slice__target_modules": r".*layers\.\d*[02468]\..*_proj"},
    ],
    ids=str,
)
def test_some_of_the_layers(settings: dict[str, Any], from_few: list[bool]) -> None:
    of = coupled(CAUSAL_LM, llama(num_hidden_layers=9), **settings)
    assert partners(of, "meta") == partners(of, "cpu")
    assert from_few == [True]


def test_layers_that_do_not_agree_are_all_probed(from_few: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    usual = planned_couplings.find_couplings
    probed: list[int] = []

    def without_one(model: Any, places: Any) -> dict[str, str]:
        found = usual(model, places)
        probed.append(len(places))
        return {
            name: text for name, text in found.items() if len(places) > 21 or not name.startswith("model.layers.1.")
        }

    monkeypatch.setattr(planned_couplings, "find_couplings", without_one)
    of = coupled(CAUSAL_LM, llama(num_hidden_layers=6))
    assert len(partners(of, "meta")) == 42
    assert (from_few, probed) == ([False], [21, 42])


# ---------------------------------------------------------------- counts, sizes, memory

RUNS: dict[str, tuple[str, PreTrainedConfig, dict[str, Any]]] = {
    "Llama, groups of two": (CAUSAL_LM, llama(num_hidden_layers=4, dtype="float32"), {}),
    "Llama in bf16": (CAUSAL_LM, llama(dtype="float32"), {"model__dtype": "bfloat16", "training__bf16": True}),
    "experts, whose rows are trained": (CAUSAL_LM, mixtral(dtype="float32"), {"slice__target_parameters": EXPERTS}),
    "GPT-2": (CAUSAL_LM, GPT2Config(**GPT2, n_layer=4), {"slice__bias": "slicefine_only"}),
    "BERT, with a pooler": (TEXT, BertConfig(**ENCODER, num_labels=3), {"slice__order": "random"}),
    "ViT": (IMAGE, ViTConfig(**PATCHES), {}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_plan_is_what_the_run_will_be(name: str, tmp_path: Path) -> None:
    task, config, settings = RUNS[name]
    of = coupled(task, config, slice__slide_every=3, training__max_steps=7, **settings)
    made = plan(of.recipe, config, device="cpu")
    ours = made.costs[0]
    model, trained, optimizer, batch = training(of)
    saved, gradients, active = [], [], []
    for _ in range(7):
        active.append(parameter_counts(model).active)
        saved.append(saved_by_hooks(model, loss_of(model, of.recipe, batch)))
        gradients.append(sum(p.grad.nbytes for p in trained if p.grad is not None))
        optimizer.step()
        optimizer.zero_grad()
    counts = parameter_counts(model, 7)
    assert (made.counts.active, made.counts.planned, made.counts.total) == (max(active), counts.touched, counts.total)
    assert made.counts.modules_to_save == counts.modules_to_save
    assert made.targets == len(tuned(model))
    schedules = [layer.slicefine_state[a].schedule for _, layer, a in tuned(model)]
    assert made.moves == max(schedule.moves(6) for schedule in schedules) == 2
    assert ours.step.saved == pytest.approx(max(saved), abs=128)
    assert ours.step.gradients == max(gradients)
    assert ours.masters == sum(p.nbytes for p in trained)
    model.save_pretrained(tmp_path)
    data = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert ours.artifact == len(data) - 8 - int.from_bytes(data[:8], "little")
    states = [layer.slicefine_state[adapter] for _, layer, adapter in tuned(model)]
    originals = sum(values.nbytes for state in states for _, values in state.originals.stored().values())
    assert ours.originals == originals + sum(state.bias.nbytes for state in states if state.bias is not None)


def test_layers_that_repeat_are_counted_as_if_all_were_made() -> None:
    of = coupled(CAUSAL_LM, llama(num_hidden_layers=6))
    short = repeated_step_memory(of, SLICEFINE, attached(of, SLICEFINE), gpu=True)
    whole = step_memory(of, attached(of, SLICEFINE), gpu=True)
    assert short is not None
    assert (short.saved, short.gradients) == (whole.saved, whole.gradients)


# ---------------------------------------------------------------- what is refused


def test_a_model_where_nothing_couples_is_refused_as_in_a_run() -> None:
    config = AlbertConfig(**ENCODER, embedding_size=12)
    with pytest.raises(SliceFineError, match="writes what another one reads"):
        plan(recipe(task=TEXT, slice__axis="coupled"), config)


def test_a_rank_above_the_features_is_refused_as_in_a_run() -> None:
    with pytest.raises(SliceFineError, match="r=17 is more than the 16 hidden features"):
        plan(recipe(slice__axis="coupled", slice__r=17), llama())


def test_a_model_whose_inputs_are_not_known_is_to_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    config = llama()
    monkeypatch.setattr(type(subject(recipe(), config).build()), "main_input_name", "sounds")
    monkeypatch.setattr(planned_couplings, "_found", {})
    with pytest.raises(
        SliceFineError, match=r"its main input is 'sounds'.*load the model, attach .* or plan another `slice.axis`"
    ):
        plan(recipe(slice__axis="coupled"), config)
