"""A plan says before a run what is there after it."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from planned import EXPERTS, TINY, llama, mixtral, recipe
from torch import nn
from transformers import (
    BartConfig,
    BertConfig,
    CLIPConfig,
    Gemma3TextConfig,
    Glm4MoeConfig,
    MambaConfig,
    SwinConfig,
    T5Config,
    ViTConfig,
    WhisperConfig,
    XLNetConfig,
)

from slicefine.benchmarking import planned_cost
from slicefine.benchmarking.models import MODELS
from slicefine.benchmarking.planned_config import guess_task, read_config, whole
from slicefine.benchmarking.planned_cost import FULL, LORA, SLICEFINE, attached, cost, repeated_step_memory, step_memory
from slicefine.benchmarking.planned_model import Subject, loss_of, prepare, subject
from slicefine.benchmarking.planning import parse_memory, plan
from slicefine.benchmarking.planning_report import as_dict, size, text
from slicefine.errors import SliceFineError
from slicefine.training.recipe import Recipe
from slicefine.tuner import parameter_counts
from slicefine.tuner.inspection import tuned

# ---------------------------------------------------------------- what is exact


def trained(of: Subject, method: str, steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A real model after `steps` optimizer steps."""
    torch.manual_seed(0)
    model = attached(of, method, "cpu")
    prepare(model, of.recipe)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        train_step(of, model, optimizer)
    return model, optimizer


def train_step(of: Subject, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss_of(model, of.recipe, of.inputs())().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("method", [SLICEFINE, LORA])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"slice__axis": "column"},
        {"slice__axis": "row", "slice__order": "random"},
        {"model__dtype": "bfloat16", "slice__bias": "slicefine_only"},
        {"slice__target_parameters": EXPERTS},
        {"slice__target_modules": [], "slice__target_parameters": EXPERTS[:1], "slice__axis": "column"},
    ],
    ids=str,
)
def test_sizes_are_those_of_a_real_run(method: str, settings: dict[str, Any], tmp_path: Path) -> None:
    made = recipe(**settings)
    experts = made.slice.target_parameters is not None
    of = subject(made, mixtral(dtype="float32") if experts else llama(attention_bias=True, dtype="float32"))
    planned = cost(of, method, gpu=False, steps=8)
    model, optimizer = trained(of, method, 7)
    moments = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    assert planned.moments == sum(t.nbytes for t in moments)
    train_step(of, model, optimizer)  # with a move at its end, which forgets the moments

    model.save_pretrained(tmp_path)
    data = (tmp_path / "adapter_model.safetensors").read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    assert planned.artifact == len(data) - header

    masters = {id(p) for p in model.parameters() if p.requires_grad}
    own = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    assert planned.masters == sum(own[key].nbytes for key in masters)
    assert planned.weights == sum(t.nbytes for key, t in own.items() if key not in masters)
    originals = 0
    if method == SLICEFINE:
        states = [layer.slicefine_state[adapter] for _, layer, adapter in tuned(model)]
        originals = sum(values.nbytes for state in states for _, values in state.originals.stored().values())
        originals += sum(state.bias.nbytes for state in states if state.bias is not None)
    assert planned.originals == originals


def test_counts_are_those_of_the_run() -> None:
    made = plan(recipe(), llama(), device="cpu")
    model, _ = trained(subject(recipe(), llama()), SLICEFINE, 7)
    counts = parameter_counts(model, 7)
    assert made.counts.planned == counts.planned == counts.touched
    fresh = parameter_counts(attached(subject(recipe(), llama()), SLICEFINE, "cpu"))
    assert (made.counts.active, made.counts.added, made.counts.total) == (fresh.active, 0, counts.total)
    assert (made.steps, made.moves, made.lora_rank) == (7, 3, 12)
    sizes = sum(layer.matrix.numel() for _, layer, _ in tuned(model))
    assert made.coverage == counts.touched / sizes


def test_slices_as_wide_as_their_weight_make_no_moves() -> None:
    made = plan(recipe(slice__r=16, slice__axis="row"), llama(), device="cpu")  # as many rows have key and value
    assert (made.fewest_moves, made.moves) == (0, 3)


def test_the_length_of_the_run_is_that_of_the_trainer() -> None:
    of = recipe(training__max_steps=-1, training__num_train_epochs=3, training__gradient_accumulation_steps=2)
    assert plan(of, llama(), examples=20, device="cpu").steps == 9  # 5 batches, 3 steps a pass


def test_a_run_of_unknown_length_is_planned_for_all_it_can_train() -> None:
    unknown = plan(recipe(training__max_steps=-1), llama(), device="cpu")
    endless = plan(recipe(training__max_steps=10_000), llama(), device="cpu")
    assert (unknown.steps, unknown.counts.planned, unknown.coverage, unknown.lora_rank) == (None, None, None, None)
    assert endless.coverage == 1
    assert unknown.costs[0].artifact == endless.costs[0].artifact
    assert "artifact at most" in text(unknown)
    assert "At most: originals and artifact of a run in which every weight is trained" in text(unknown)
    still = recipe(training__max_steps=-1, slice__slide_every=None, slice__axis="row")
    stays = plan(still, llama(), device="cpu")
    said = text(stays)
    assert "at most" not in said.lower()
    assert f"0 touched, {stays.counts.active:,} planned" in said
    assert "length not known (--examples or --training.max_steps), 0 moves" in said
    assert "slide_every=null" in said
    assert stays.lora_rank == plan(recipe(slice__slide_every=None, slice__axis="row"), llama(), device="cpu").lora_rank


def test_heads_are_the_same_for_all_methods() -> None:
    of = recipe(task="image-classification", data__max_length=256)
    costs = plan(of, read_config("vit-base-small"), device="cpu").costs
    assert {made.heads for made in costs} == {512 * 100 + 100}


# ---------------------------------------------------------------- deep models

GLM = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}


FEW = {"training__per_device_train_batch_size": 1, "data__max_length": 8, "slice__r": 16}
"""Of a step whose gradients take more than what it saves, if activations are checkpointed."""


@pytest.mark.parametrize("method", [SLICEFINE, LORA])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"training__activation_checkpointing": True},
        {"training__activation_checkpointing": True, **FEW},
        {"training__activation_checkpointing": True, "training__gradient_accumulation_steps": 2, **FEW},
    ],
    ids=["plain", "checkpointing", "gradients", "accumulating"],
)
@pytest.mark.parametrize(
    "config",
    [
        llama(num_hidden_layers=5),
        mixtral(num_hidden_layers=5),
        Glm4MoeConfig(
            **TINY | {"num_hidden_layers": 6}, **GLM, first_k_dense_replace=1
        ),  # of which the first has no experts
        Gemma3TextConfig(**TINY | {"num_hidden_layers": 10}, head_dim=8, sliding_window=8, sliding_window_pattern=2),
    ],
    ids=["llama", "mixtral", "glm4_moe", "gemma3"],
)
def test_layers_that_repeat_are_counted_as_if_all_were_made(config: Any, settings: dict[str, Any], method: str) -> None:
    experts = EXPERTS if "mo" in config.model_type or "mix" in config.model_type else None
    of = subject(recipe(**settings, slice__target_parameters=experts), config)
    short = repeated_step_memory(of, method, attached(of, method), gpu=True)
    whole = step_memory(of, attached(of, method), gpu=True)
    assert short is not None
    assert (short.saved, short.gradients) == (whole.saved, whole.gradients)
    assert short.peak == whole.peak


def test_layers_that_differ_are_all_made() -> None:
    swin = SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[2, 6], num_heads=[2, 2], window_size=2)
    of = subject(recipe(task="image-classification", data__max_length=256), swin)
    assert repeated_step_memory(of, SLICEFINE, attached(of, SLICEFINE), gpu=True) is None


@pytest.mark.parametrize(
    "settings",
    [{"slice__layers_to_transform": 8}, {"slice__target_modules": r".*layers\.\d*[02468]\..*_proj"}],
    ids=str,
)
def test_settings_that_name_layers_by_number_are_counted_with_all(settings: dict[str, Any]) -> None:
    of = subject(recipe(**settings), llama(num_hidden_layers=9))
    assert repeated_step_memory(of, SLICEFINE, attached(of, SLICEFINE), gpu=True) is None
    assert cost(of, SLICEFINE, gpu=True, deep=0).step.saved > 0


@pytest.mark.parametrize(
    "settings",
    [{"slice__layers_to_transform": 0}, {"slice__target_modules": r".*layers\.[01]\..*_proj"}],
    ids=str,
)
def test_blocks_that_a_shorter_model_has_are_enough(settings: dict[str, Any]) -> None:
    of = subject(recipe(**settings), llama(num_hidden_layers=9))
    short = repeated_step_memory(of, SLICEFINE, attached(of, SLICEFINE), gpu=True)
    assert short is not None
    assert short.saved == step_memory(of, attached(of, SLICEFINE), gpu=True).saved


@pytest.mark.parametrize("axis", ["alternate", "coupled"])
def test_12_billion_parameters_in_20_seconds_and_2_gigabytes(axis: str) -> None:
    """The values of the weights alone would take 24 GB. Seconds of one core, so that other processes do not count."""
    settings = {"slice__axis": axis, "slice__r": 5, "slice__slide_every": 500}
    made = recipe(training__bf16=True, data__max_length=768, training__max_steps=3648, **settings)
    began = time.process_time()
    planned = plan(made, read_config("gemma-3-12b"), memory=parse_memory("64GiB"))
    assert time.process_time() - began < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2 * 10**6  # of 1,024 bytes
    assert planned.counts.total > 11.7e9
    assert [planned.fits(made.device) for made in planned.costs] == [True, True, False]
    assert planned.costs[0].device > 40 * 2**30


# ---------------------------------------------------------------- what is refused


def test_what_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(SliceFineError, match="at most what tiny can read, 64 tokens; got 65"):
        plan(recipe(data__max_length=65), llama())
    with pytest.raises(SliceFineError, match="no model of the architecture llama"):
        plan(recipe(task="image-classification", data__max_length=256), llama())
    with pytest.raises(SliceFineError, match="matches target_modules"):
        plan(recipe(slice__target_modules=".*nothing.*"), llama())


def test_a_quantized_model_is_refused() -> None:
    with pytest.raises(SliceFineError, match="is quantized"):
        plan(recipe(), llama(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}))


def test_tubelets_that_frames_do_not_fill_are_refused() -> None:
    of = recipe(task="video-classification", data__max_length=256, data__num_frames=5)
    with pytest.raises(SliceFineError, match="a multiple of 2; got 5"):
        plan(of, read_config("videomae-base-small"))


def test_a_graph_that_depends_on_values_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Chooses(nn.Module):
        """Takes another way for other values."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[x.sum(-1) > 0]

    def chooses(*args: Any) -> nn.Module:
        model = usual(*args)
        model.get_base_model().model.norm = Chooses()
        return model

    usual = planned_cost.attached
    monkeypatch.setattr(planned_cost, "attached", chooses)
    with pytest.raises(SliceFineError, match="where it depends on values"):
        cost(subject(recipe(), llama()), SLICEFINE, gpu=True)


def test_where_a_step_cannot_be_counted_all_the_rest_is_said() -> None:
    """T5's loss looks for the end of a text, and what it finds depends on values."""
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, pad_token_id=0)
    given = recipe(task="text-classification", data__max_length=16)
    made = plan(given, config, memory=2**30)
    assert [each.method for each in made.costs] == ["SliceFine-3RC", "LoRA-r8", "full"]
    said = text(made)
    assert "The memory of t5 cannot be counted" in said
    assert "Whether SliceFine-3RC fits in 1.00 GiB is not known." in said
    assert [line.split()[-1] for line in said.splitlines() if line.startswith(("gradients", "device, at"))] == [
        "counted"
    ] * 2
    ours, numbers = made.costs[0], as_dict(made)["methods"][0]
    assert (numbers["device"], numbers["step"], numbers["fits"]) == (None, None, None)
    model = attached(subject(given, config), SLICEFINE)
    assert ours.active == parameter_counts(model).active > 0
    assert ours.artifact > 0
    assert ours.weights + ours.masters == sum(t.numel() * t.itemsize for t in {*model.parameters(), *model.buffers()})


def test_no_rank_is_promised_where_peft_attaches_no_lora() -> None:
    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)
    made = plan(recipe(slice__target_modules=["in_proj", "out_proj"]), config, device="cpu")
    assert made.lora_rank is None
    assert "as LoRA      not exported: PEFT attaches none to these weights, see below" in text(made)
    assert "There is no column for LoRA. PEFT does not attach LoRA to mamba" in text(made)


def test_a_limit_below_one_is_none() -> None:
    config = XLNetConfig(vocab_size=64, d_model=32, n_layer=1, n_head=4, d_inner=48)
    assert plan(recipe(task="text-classification"), config).targets


def test_unknown_models_are_refused(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    with pytest.raises(SliceFineError, match=r"There is no config\.json in the folder"):
        read_config(str(tmp_path))
    for written, said in (
        ('{"model_type": "of-tomorrow"}', "of-tomorrow"),
        ("{oops", "not a valid JSON file"),
        ('{"model_type": "llama", "hidden_size": "large"}', "expected int, got str"),
    ):
        config.write_text(written)
        with pytest.raises(SliceFineError, match=said):
            read_config(str(tmp_path))
    with pytest.raises(SliceFineError, match="Give its folder"):
        read_config(str(config))
    with pytest.raises(SliceFineError, match="there is no folder"):
        read_config("/nowhere")


@pytest.mark.parametrize("name", ["llama-3.2-3b", "roberta-base", "vit-base", "videomae-base"])
def test_the_task_is_told_from_the_configuration(name: str, tmp_path: Path) -> None:
    config = read_config(name)
    kinds = {"roberta-base": "RobertaForMaskedLM", "llama-3.2-3b": "LlamaForCausalLM", "vit-base": "ViTModel"}
    config.architectures = [kinds[name]] if name in kinds else None
    config.save_pretrained(tmp_path)
    assert guess_task(read_config(str(tmp_path)), str(tmp_path)) == MODELS[name].task


@pytest.mark.parametrize(
    ("config", "task"),
    [(llama(), "causal-lm"), (BertConfig(), "text-classification"), (BartConfig(), "text-classification")],
    ids=["decoder", "encoder", "both"],
)
def test_a_model_without_a_class_is_for_what_it_can_do(config: Any, task: str) -> None:
    assert guess_task(config, "folder") == task


def test_a_model_for_none_of_the_tasks_is_refused() -> None:
    with pytest.raises(SliceFineError, match="folder is a whisper, for which there is none of the tasks"):
        guess_task(WhisperConfig(architectures=["WhisperForConditionalGeneration"]), "folder")


@pytest.mark.parametrize("config", [BertConfig(), BartConfig()], ids=["encoder", "encoder and decoder"])
def test_an_encoder_does_not_go_on_with_a_text(config: Any) -> None:
    with pytest.raises(SliceFineError, match=r"models that go on with a text; a b.rt is or has an encoder"):
        plan(recipe(), config)


def test_a_head_is_new_and_the_pretrained_part_beside_it_is_not() -> None:
    """CLIP's classifier stands on one part of the pretrained model, without the whole around it."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config=sizes | {"image_size": 16, "patch_size": 8}, text_config=sizes, num_labels=3)
    of = subject(recipe(task="image-classification", data__max_length=256), config)
    assert of.heads(of.build()) == ["classifier"]


# ---------------------------------------------------------------- names that stand for a text model alone


def seeing(**settings: Any) -> Recipe:
    """A recipe for a model that reads images as well, trained where it reads texts."""
    recipe_of = {"model__architecture": "gemma3", "slice__exclude_modules": ".*(vision_tower|multi_modal_projector).*"}
    return recipe(**recipe_of | settings)


def test_a_name_stands_for_the_model_of_the_recipe() -> None:
    """As the public model: https://huggingface.co/google/gemma-3-12b-pt has 12,187,325,040 parameters."""
    config = whole(seeing(model__name="gemma-3-12b"), read_config("gemma-3-12b"))
    assert config.model_type == "gemma3"
    assert sum(p.numel() for p in Subject(config=config, recipe=seeing()).build().parameters()) == 12_187_325_040
    without = recipe(model__name="gemma-3-12b")
    assert whole(without, config) is config


def test_only_the_part_that_reads_texts_is_planned_for_training() -> None:
    made = plan(seeing(model__name="gemma-3-12b-small"), read_config("gemma-3-12b-small"), device="cpu")
    alone = plan(recipe(model__name="gemma-3-12b-small"), read_config("gemma-3-12b-small"), device="cpu")
    assert (made.model, alone.model) == ("gemma3", "gemma3_text")
    assert made.counts.active == alone.counts.active
    assert made.costs[0].weights > alone.costs[0].weights
    assert made.costs[0].step.saved == pytest.approx(alone.costs[0].step.saved, rel=0.01)


@pytest.mark.parametrize("name", ["gemma-3-12b-small", "folder"])
def test_settings_that_match_nothing_are_refused_as_in_a_run(name: str) -> None:
    """A text model of one's own has no other parts, and neither has a name without a recipe that says so."""
    architecture = None if name != "folder" else "gemma3"
    made = seeing(model__name=name, model__architecture=architecture)
    with pytest.raises(SliceFineError, match="matches no module"):
        plan(made, read_config("gemma-3-12b-small"))


def test_the_dictionary_has_all_numbers() -> None:
    made = as_dict(plan(recipe(), llama(), memory=2**30, device="cpu"))
    assert [method["method"] for method in made["methods"]] == ["SliceFine-3RC", "LoRA-r8", "full"]
    ours = made["methods"][0]
    assert ours["device"] == ours["weights"] + ours["masters"] + ours["moments"] + ours["step"]
    assert ours["step"] == sum(ours["step_at_its_peak"].values())
    assert made["set_aside"] == 0
    assert made["parameters"]["planned"] > made["parameters"]["active"] > 0


def test_sizes_in_words() -> None:
    assert [size(n) for n in (0, 1000, 2048, 3 * 2**30)] == ["0 bytes", "1000 bytes", "2.00 KiB", "3.00 GiB"]


def test_full_tuning_has_gradients_and_moments_of_every_weight() -> None:
    made = cost(subject(recipe(), llama(dtype="float32")), FULL, gpu=True)
    assert made.step.gradients == 4 * made.active
    assert made.moments == 8 * made.active
    assert (made.masters, made.added, made.originals) == (0, 0, 0)


def test_a_gradient_that_is_a_view_has_moments_of_its_own_size() -> None:
    """Of a batch of one: positions get theirs from a sum over batches, which is none."""
    vit = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8
    )
    of = subject(recipe(task="image-classification", training__per_device_train_batch_size=1), vit)
    planned = cost(of, FULL, gpu=False)
    _, optimizer = trained(of, FULL, 1)
    states = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    assert planned.moments == sum(t.nbytes for t in states)
    assert planned.step is not None
    assert planned.step.reached < planned.step.gradients


def test_what_gets_no_gradient_has_no_moments() -> None:
    """The part of a model that sees has none where it reads texts."""
    plans = []
    for accumulation in (1, 2):
        settings = seeing(model__name="gemma-3-12b-small", training__gradient_accumulation_steps=accumulation)
        of = subject(settings, whole(settings, read_config("gemma-3-12b-small")))
        plans.append(cost(of, FULL, gpu=True))
    alone, accumulating = plans
    assert alone.moments == 2 * alone.step.gradients < 2 * 2 * alone.active
    assert (accumulating.moments, accumulating.step.gradients) == (alone.moments, alone.step.gradients)
    assert alone.step.peak <= accumulating.step.peak <= alone.step.peak + alone.step.gradients
