"""What users of PEFT rely on, tuner for tuner, over seven architectures; docs/compatibility.md tells the outcome.

Each model trains for real and moves its slices every other step, so a behaviour is always met in the middle of a run.
"""

import contextlib
import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import (
    PeftConfig,
    PeftModel,
    convert_to_lora,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from peft.helpers import check_if_peft_model, disable_input_dtype_casting, rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter
from peft.utils.other import AuxiliaryTrainingWrapper
from tiny import batch, bert, conv_mlp, differences, electra, gpt2, llama, mlp, opt, tokens, trainable
from torch import nn

from slicefine import SliceFineConfig, SliceFineError, active_slices, couplings, parameter_counts, touched_slices
from slicefine.tuner.layer import SliceLayer


@dataclass(frozen=True)
class Architecture:
    """A tiny model, what it is called with, and how it is adapted."""

    base: Callable[[], nn.Module]
    inputs: dict[str, torch.Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    head: str | None = None
    """A module that can be trained in full; none where it is tied to the embedding."""

    def config(self, **settings):
        config = SliceFineConfig(**{"r": 2, "slide_every": 2, **self.settings, **settings})
        if config.axis == "coupled" and config.couplings is None:
            config.couplings = couplings(self.base(), config, self.inputs)
        return config

    def adapted(self, **settings):
        return get_peft_model(self.base(), self.config(**settings))

    def trained(self, steps=5, **settings):
        model = self.adapted(**settings)
        self.train(model, steps)
        return model

    def logits(self, model):
        inputs = {
            k: x.to(next(model.parameters()).dtype) if x.is_floating_point() else x for k, x in self.inputs.items()
        }
        output = model(**inputs)
        return output if isinstance(output, torch.Tensor) else output.logits

    @torch.no_grad()
    def outputs(self, model):
        return self.logits(model)

    def backward(self, model, seed=2):
        y = self.logits(model)
        target = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))
        (y.float() - target).square().mean().backward()

    def train(self, model, steps, optimizer=None):
        optimizer = optimizer or torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.0)
        for seed in range(steps):
            self.backward(model, seed)
            optimizer.step()
            optimizer.zero_grad()
        return optimizer

    def load(self, folder, **options):
        return PeftModel.from_pretrained(self.base(), folder, **options)


VECTORS, TOKENS = {"x": batch(size=4)}, {"input_ids": tokens()}
HIDDEN = {"target_modules": ["lin0", "lin1"]}
CAUSAL, CLASSIFIER = {"task_type": "CAUSAL_LM"}, {"task_type": "SEQ_CLS"}
ARCHITECTURES = {
    "mlp": Architecture(mlp, VECTORS, HIDDEN, "head"),
    "conv1d": Architecture(conv_mlp, VECTORS, HIDDEN, "head"),
    "llama": Architecture(llama, TOKENS, CAUSAL, "lm_head"),
    "gpt2": Architecture(gpt2, TOKENS, CAUSAL),
    "opt": Architecture(opt, TOKENS, CAUSAL),
    "bert": Architecture(bert, TOKENS, CLASSIFIER, "classifier"),
    "electra": Architecture(electra, TOKENS, CLASSIFIER, "classifier"),
}
LANGUAGE_MODELS = ("llama", "gpt2", "opt")
TRANSFORMERS = (*LANGUAGE_MODELS, "bert", "electra")

coupled = pytest.param("coupled", marks=pytest.mark.filterwarnings("ignore:axis='coupled'.* have no partner"))
each_axis = pytest.mark.parametrize("axis", ["row", "column", "alternate", coupled])


@pytest.fixture(params=ARCHITECTURES)
def arch(request):
    return ARCHITECTURES[request.param]


def only(*names):
    """Run a test on these architectures alone."""
    return pytest.mark.parametrize("arch", names, indirect=True)


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, SliceLayer)}


def is_adapter(name):
    return "slicefine_" in name or ".modules_to_save." in name


def mentions(model, adapter):
    """Where a model still knows of an adapter."""
    found = [name for name in model.state_dict() if adapter in name.split(".")]
    for name, module in model.named_modules():
        if isinstance(module, SliceLayer):
            holders = (*module.adapter_layer_names, *module.other_param_names)
            found += [f"{name}.{holder}" for holder in holders if adapter in getattr(module, holder)]
            found += [name] * (adapter in module.active_adapters)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            found += [name] * (adapter in module._adapters or adapter in module.active_adapters)
    return found


def same_base(model, base):
    """Whether the weights inside of an adapted model are those of the base, bit by bit; while the adapter is disabled."""
    state = {
        name.replace(".base_layer", "").replace(".original_module", ""): value
        for name, value in model.state_dict().items()
    }
    return all(torch.equal(state[f"base_model.model.{name}"], value) for name, value in base.state_dict().items())


# ---------------------------------------------------------------------- attaching and training


@each_axis
def test_attaching_changes_no_output(arch, axis):
    base = arch.base()
    expected = arch.outputs(base)
    model = get_peft_model(base, arch.config(axis=axis))
    assert layers(model)
    assert torch.equal(arch.outputs(model.train()), expected)
    assert torch.equal(arch.logits(model), expected)
    assert torch.equal(arch.outputs(model.eval()), expected)


@each_axis
def test_only_the_slices_are_trained(arch, axis):
    base, model = arch.base(), arch.adapted(axis=axis)
    arch.train(model, 5)
    arch.backward(model)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None) == is_adapter(name), name
    expected = {f"base_model.model.{name}": value for name, value in base.named_parameters()}
    touched = touched_slices(model)
    assert all(len(slices) > 1 for slices in touched.values()), "the slices have not moved"
    for name, parameter in model.get_base_model().named_parameters():
        if is_adapter(name):
            continue
        name = name.replace(".base_layer", "").replace(".original_module", "")
        changed = parameter != expected[f"base_model.model.{name}"]
        target = name.removesuffix(".weight")
        if target in touched:
            weight = (
                changed
                if type(model.get_submodule(f"base_model.model.{target}.base_layer")) is nn.Linear
                else changed.t()
            )
            assert weight.any(), name
            for piece in touched[target]:
                weight.index_fill_(piece.dim, torch.tensor(piece.indices), False)
        assert not changed.any(), name


@each_axis
def test_counts(arch, axis, capsys):
    model = arch.trained(axis=axis)
    counts = parameter_counts(model)
    shown, everything = model.get_nb_trainable_parameters()
    masters = sum(parameter.numel() for name, parameter in model.named_parameters() if "slicefine_" in name)
    widest = sum(
        l.state.active.count
        * {"row": l.in_features, "column": l.out_features, "alternate": max(l.shape)}[l.state.schedule.axis]
        for l in layers(model).values()
    )
    assert masters == widest, "a master is as long as the longest slice of its axis"
    assert (counts.active == masters) == (
        axis != "alternate" or all(len(set(l.shape)) == 1 for l in layers(model).values())
    )
    assert counts.active <= masters
    assert shown == masters + counts.modules_to_save
    assert everything == counts.total + shown, (
        "while training, masters and trained copies of heads come on top of the base"
    )
    assert counts.total == sum(parameter.numel() for parameter in arch.base().parameters())
    assert counts.added == 0
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(f"trainable params: {shown:,d} || all params: {everything:,d}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(arch, dtype, tmp_path):
    base = arch.base().to(dtype)
    model = get_peft_model(copy.deepcopy(base), arch.config(bias="slicefine_only"))
    assert {p.dtype for n, p in model.named_parameters() if "slicefine_" in n} == {torch.float32}
    # A head that is trained in full stays in the dtype of the base, as PEFT has it: AdamW's usual eps is 0 in float16.
    arch.train(model, 5, torch.optim.AdamW(trainable(model), lr=1e-2, eps=1e-4, weight_decay=0.0))
    trained = arch.outputs(model)
    assert trained.isfinite().all()
    model.save_pretrained(tmp_path)
    assert torch.equal(arch.outputs(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)), trained)
    with model.disable_adapter():
        assert same_base(model, base)
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {dtype}
    assert torch.equal(arch.outputs(merged), trained)


def test_biases(arch, tmp_path):
    model = arch.trained(bias="slicefine_only")
    assert any(len(layer.slicefine_bias) for layer in layers(model).values()) == (arch is not ARCHITECTURES["llama"])
    trained = arch.outputs(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(arch.outputs(arch.load(tmp_path)), trained)
    with model.disable_adapter():
        assert same_base(model, arch.base())
    assert torch.equal(arch.outputs(model.merge_and_unload()), trained)


@only(*(name for name, arch in ARCHITECTURES.items() if arch.head))
def test_a_module_trained_in_full(arch, tmp_path):
    base = arch.base()
    model = arch.trained(modules_to_save=[arch.head])
    assert parameter_counts(model).modules_to_save == sum(p.numel() for p in base.get_submodule(arch.head).parameters())
    trained = arch.outputs(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(arch.outputs(arch.load(tmp_path)), trained)
    with model.disable_adapter():
        assert torch.equal(arch.outputs(model), arch.outputs(base))
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(arch.outputs(merged), trained)
    assert differences(merged.get_submodule(arch.head), base.get_submodule(arch.head))
    assert not differences(model.unload(), base)


@only("gpt2", "opt")
def test_tied_embeddings_stay_tied(arch):
    merged = arch.trained().merge_and_unload()
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert torch.equal(merged.get_input_embeddings().weight, arch.base().get_input_embeddings().weight)


@only("gpt2", "opt")
def test_tied_targets_are_refused(arch):
    base = arch.base()
    with pytest.raises(SliceFineError, match=r"lm_head: its weight is tied.*exclude_modules"):
        get_peft_model(base, arch.config(target_modules=["lm_head"]))
    assert not layers(base)
    assert not differences(base, arch.base())


# ---------------------------------------------------------------------- which layers


@only("llama")
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, {f"{i}.self_attn.{n}" for i in (0, 1) for n in ("q_proj", "v_proj")}),
        ({"target_modules": ["0.mlp.up_proj"]}, {"0.mlp.up_proj"}),
        ({"target_modules": r".*\.1\.mlp\.(up|down)_proj"}, {"1.mlp.up_proj", "1.mlp.down_proj"}),
        ({"target_modules": ["up_proj"], "layers_to_transform": 1}, {"1.mlp.up_proj"}),
        ({"layers_to_transform": 1, "exclude_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}, {"1.mlp.gate_proj", "1.mlp.up_proj", "1.mlp.down_proj"}),
        ({"target_modules": ["up_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}, {"0.mlp.up_proj"}),
        ({"target_modules": ["up_proj", "q_proj"], "exclude_modules": ["q_proj"]}, {"0.mlp.up_proj", "1.mlp.up_proj"}),
        ({"target_modules": "all-linear", "exclude_modules": r".*(self_attn|layers\.0).*"}, {f"1.mlp.{n}_proj" for n in ("up", "gate", "down")}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_which_layers_are_trained(arch, settings, expected, tmp_path):
    model = arch.trained(**settings)
    assert {name.removeprefix("model.layers.") for name in active_slices(model)} == expected
    model.save_pretrained(tmp_path)
    assert torch.equal(arch.outputs(arch.load(tmp_path)), arch.outputs(model))


def test_all_linear_is_all_but_the_head(arch):
    model = arch.adapted(target_modules="all-linear")
    weights = {n for n, m in arch.base().named_modules() if hasattr(m, "weight") and m.weight.ndim == 2} - {"lm_head"}
    embeddings = {n for n, m in arch.base().named_modules() if isinstance(m, nn.Embedding)}
    heads = {n for n in weights if n.startswith("classifier")}
    assert active_slices(model).keys() == weights - embeddings - heads


# ---------------------------------------------------------------------- saving and loading


@each_axis
def test_save_and_load(arch, axis, tmp_path):
    model = arch.adapted(axis=axis)
    arch.train(model, 5)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = arch.load(tmp_path, is_trainable=True)
    assert not differences(loaded, model)
    arch.train(model, 4)
    arch.train(loaded, 4)
    assert not differences(loaded, model), "training does not go on as it would have"


@pytest.mark.parametrize(
    ("options", "trains"),
    [
        ({}, False),
        ({"low_cpu_mem_usage": True, "is_trainable": True}, True),
        ({"adapter_name": "other", "autocast_adapter_dtype": False}, False),
        ({"device_map": {"": "cpu"}, "torch_device": "cpu"}, False),
    ],
    ids=str,
)
def test_loading_options(arch, options, trains, tmp_path):
    model = arch.trained()
    model.save_pretrained(tmp_path)
    loaded = arch.load(tmp_path, **options)
    assert torch.equal(arch.outputs(loaded), arch.outputs(model))
    assert bool(trainable(loaded)) == trains
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    assert loaded.active_adapters == [options.get("adapter_name", "default")]
    assert next(iter(loaded.peft_config.values())).inference_mode != trains


def test_loading_with_a_configuration(arch, tmp_path):
    """The adapter takes a copy; a configuration that was never saved has no fingerprints to check the base by."""
    config = arch.config()
    model = get_peft_model(arch.base(), config)
    arch.train(model, 5)
    model.save_pretrained(tmp_path)
    for given in (config, PeftConfig.from_pretrained(tmp_path)):
        loaded = arch.load(tmp_path, config=given)
        assert torch.equal(arch.outputs(loaded), arch.outputs(model))
        assert loaded.peft_config["default"].inference_mode
        assert loaded.peft_config["default"] is not given
    with pytest.raises(SliceFineError, match="does not fit the adapter; nothing was loaded"):
        arch.load(tmp_path, config=arch.config(axis="row", slide_every=1))


def test_saving_selected_adapters(arch, tmp_path):
    """One adapter is not taken for another whose name holds its own."""
    model = arch.trained()
    trained = arch.outputs(model)
    for name in ("default2", "other_default", "foodefault_bar", "efaul"):
        model.add_adapter(name, arch.config(axis="row", r=1))
    assert torch.equal(arch.outputs(model), trained)
    model.save_pretrained(tmp_path / "all")
    model.save_pretrained(tmp_path / "one", selected_adapters=["default"])
    assert not [path for path in (tmp_path / "one").iterdir() if path.is_dir()]
    for folder in ("all", "one"):
        loaded = arch.load(tmp_path / folder)
        assert list(loaded.peft_config) == ["default"]
        assert torch.equal(arch.outputs(loaded), trained)
    result = loaded.load_adapter(tmp_path / "all" / "other_default", "another")
    assert not result.missing_keys
    assert not result.unexpected_keys
    loaded.set_adapter("another")
    assert torch.equal(arch.outputs(loaded), arch.outputs(arch.base()))


def test_loading_several_adapters(arch, tmp_path):
    trained = {"default": arch.trained(3), "second": arch.trained(4, axis="row", r=1, slide_every=1)}
    for name, model in trained.items():
        model.save_pretrained(tmp_path / name)
    model = arch.load(tmp_path / "default")
    for name, options in (("second", {"low_cpu_mem_usage": True}), ("third", {})):
        result = model.load_adapter(tmp_path / "second", name, **options)
        assert not result.missing_keys
        assert not result.unexpected_keys
    for name in ("second", "default", "third", "default"):
        model.set_adapter(name)
        assert torch.equal(arch.outputs(model), arch.outputs(trained[name if name != "third" else "second"]))
    with model.disable_adapter():
        assert same_base(model, arch.base())


def test_injection_without_a_peft_model(arch):
    model = inject_adapter_in_model(arch.config(), arch.base())
    arch.train(model, 5)
    state = get_peft_model_state_dict(model)
    other = inject_adapter_in_model(arch.config(), arch.base(), low_cpu_mem_usage=True)
    assert {parameter.device.type for parameter in other.parameters()} == {"cpu"}
    assert not set_peft_model_state_dict(other, state, low_cpu_mem_usage=True).unexpected_keys
    assert torch.equal(arch.outputs(other), arch.outputs(model))
    arch.train(model, 4)
    arch.train(other, 4)
    assert torch.equal(arch.outputs(other), arch.outputs(model))


@only(*TRANSFORMERS)
def test_the_model_card(arch, tmp_path):
    name = str(tmp_path / "base")
    arch.base().save_pretrained(name)
    model = get_peft_model(type(arch.base()).from_pretrained(name), arch.config())
    model.save_pretrained(tmp_path / "adapter")
    card = yaml.safe_load((tmp_path / "adapter" / "README.md").read_text().split("---")[1])
    assert card["library_name"] == "peft"
    assert card["base_model"] == name
    assert card["tags"] == [f"base_model:adapter:{name}", "transformers"]
    assert card.get("pipeline_tag") == ("text-generation" if arch.settings == CAUSAL else None)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == name
    assert config["peft_type"] == "SLICEFINE"
    assert config["task_type"] == arch.settings["task_type"]


@only("mlp")
def test_the_model_card_of_a_custom_model(arch, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\nMy own words.\n")
    arch.adapted().save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "My own words." in text
    card = yaml.safe_load(text.split("---")[1])
    assert card == {"license": "mit", "library_name": "peft"}


def test_the_model_card_says_how_to_load(tmp_path):
    model = get_peft_model(llama(), SliceFineConfig(r=2))
    for _ in range(2):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text().count("import slicefine") == 1


@only("mlp")
def test_a_saved_adapter_is_recognised(arch, tmp_path):
    arch.adapted().save_pretrained(tmp_path)
    assert check_if_peft_model(str(tmp_path))
    assert not check_if_peft_model(str(tmp_path / "nothing"))


@only("mlp")
def test_a_pickle_is_written_but_never_read(arch, tmp_path):
    """PEFT does not tell the tuner how it is going to write, so only reading can be refused."""
    arch.adapted().save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(SliceFineError, match="a pickle, which is never opened"):
        arch.load(tmp_path)


@only("mlp")
def test_masters_stay_in_float32(arch, tmp_path):
    base = arch.base().to(torch.bfloat16)
    model = get_peft_model(copy.deepcopy(base), arch.config(), autocast_adapter_dtype=False)
    model.add_adapter("added", arch.config(), autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "loaded", autocast_adapter_dtype=False)
    assert {p.dtype for n, p in model.named_parameters() if "slicefine_" in n} == {torch.float32}


# ---------------------------------------------------------------------- several adapters


def test_adapters_take_turns_across_moves(arch):
    """Two adapters that are trained in turns become what each becomes alone; heads that are trained in full included."""
    settings = {
        "default": {"axis": "alternate"},
        "other": {"axis": "column", "r": 1, "slide_every": 1, "bias": "slicefine_only"},
    }
    alone = {name: arch.adapted(**given) for name, given in settings.items()}
    expected = {name: arch.train(model, 3) for name, model in alone.items()}
    model = arch.adapted(**settings["default"])
    model.add_adapter("other", arch.config(**settings["other"]))
    optimizers = {}
    for turn in range(2):
        for name in settings:
            model.set_adapter(name)
            assert model.active_adapters == [name]
            optimizers[name] = arch.train(model, 3, optimizers.get(name))
            if turn:
                arch.train(alone[name], 3, expected[name])
            assert torch.equal(arch.outputs(model), arch.outputs(alone[name])), name
    for name in settings:
        model.set_adapter(name)
        assert torch.equal(arch.outputs(model), arch.outputs(alone[name])), name
        assert active_slices(model) == active_slices(alone[name])
    assert not differences(model.unload(), arch.base())


@only("mlp", "llama", "bert", "electra")
def test_adapters_of_different_targets(arch):
    """One with a head that is trained in full, one without where the task brings none."""
    names = [name.rpartition(".")[2] for name in active_slices(arch.adapted())]
    settings = {
        "default": {"target_modules": names[:1]},
        "other": {"target_modules": names[1:2], "modules_to_save": [arch.head]},
    }
    alone = {name: arch.trained(**given) for name, given in settings.items()}
    model = arch.trained(**settings["default"])
    model.add_adapter("other", arch.config(**settings["other"]))
    model.set_adapter("other")
    arch.train(model, 5)
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        assert torch.equal(arch.outputs(model), arch.outputs(alone[name]))
    model.merge_adapter(["other"])
    assert torch.equal(arch.outputs(model), arch.outputs(alone["other"]))
    model.unmerge_adapter()
    assert torch.equal(arch.outputs(model), arch.outputs(alone["default"]))
    assert torch.equal(arch.outputs(model.merge_and_unload(adapter_names=["other"])), arch.outputs(alone["other"]))


def test_adding_an_adapter_changes_nothing(arch):
    model = arch.trained()
    before, grads = arch.outputs(model), {n: p.requires_grad for n, p in model.named_parameters()}
    model.add_adapter("other", arch.config(r=1))
    assert model.active_adapters == ["default"]
    assert torch.equal(arch.outputs(model), before)
    assert {n: p.requires_grad for n, p in model.named_parameters() if n in grads} == grads
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.endswith(".other"))
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter("other", arch.config())
    with pytest.raises(ValueError, match="not found"):
        model.set_adapter("third")


def test_deleting_an_inactive_adapter(arch):
    model = arch.trained()
    trained = arch.outputs(model)
    model.add_adapter("other", arch.config())
    model.delete_adapter("other")
    assert model.active_adapters == list(model.peft_config) == ["default"]
    assert not mentions(model, "other")
    assert torch.equal(arch.outputs(model), trained)
    arch.train(model, 3)


def test_deleting_the_active_adapter(arch):
    model = arch.trained()
    trained = arch.outputs(model)
    model.add_adapter("other", arch.config())
    model.set_adapter("other")
    arch.train(model, 3)
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        model.delete_adapter("other")
    assert model.active_adapters == list(model.peft_config) == ["default"]
    assert not mentions(model, "other")
    assert torch.equal(arch.outputs(model), trained)
    with pytest.raises(ValueError, match="Adapter other does not exist"):
        model.delete_adapter("other")


def test_deleting_the_last_adapter(arch):
    """As with every tuner of PEFT, a forward pass then goes through `base_model`."""
    base, model = arch.base(), arch.trained()
    model.delete_adapter("default")
    assert model.active_adapters == []
    assert not model.peft_config
    assert not mentions(model, "default")
    assert torch.equal(arch.outputs(model.base_model), arch.outputs(base))
    assert not differences(model.unload(), base)


def test_a_merged_adapter_is_not_deleted(arch):
    model = arch.trained()
    model.merge_adapter()
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("default")
    model.unmerge_adapter()
    model.delete_adapter("default")
    assert torch.equal(arch.outputs(model.base_model), arch.outputs(arch.base()))


def test_requires_grad_is_set_by_adapter(arch):
    model = arch.trained()
    model.add_adapter("other", arch.config())
    own = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = arch.outputs(model)
    model.set_requires_grad("default", False)
    assert not trainable(model)
    assert torch.equal(arch.logits(model), before)
    model.set_requires_grad(["default", "other"])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == own | {
        n for n, _ in model.named_parameters() if is_adapter(n) and "other" in n.split(".")
    }
    model.set_requires_grad("other", False)
    model.set_adapter("default", inference_mode=True)
    assert not trainable(model)
    model.set_adapter("default")
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == own


# ---------------------------------------------------------------------- merging, unloading, disabling


def test_merging_in_place_and_back(arch):
    base, model = arch.base(), arch.adapted()
    twin = copy.deepcopy(model)
    optimizer, other = arch.train(model, 5), arch.train(twin, 5)
    trained = arch.outputs(model)
    model.merge_adapter()
    assert all(layer.merged for layer in layers(model).values())
    assert torch.equal(arch.logits(model), trained)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert torch.equal(arch.outputs(model), trained)
    model.unmerge_adapter()
    assert not any(layer.merged for layer in layers(model).values())
    assert not differences(model, twin)
    arch.train(model, 5, optimizer)
    arch.train(twin, 5, other)
    assert not differences(model, twin)
    model.merge_adapter()
    with model.disable_adapter():
        assert same_base(model, base)
    assert torch.equal(arch.outputs(model), arch.outputs(twin))


@pytest.mark.parametrize(
    ("axis", "options"), [("row", {}), ("column", {"safe_merge": True}), ("alternate", {"progressbar": True})], ids=str
)
def test_merging_for_good(arch, axis, options):
    base, model = arch.base(), arch.trained(axis=axis)
    trained = arch.outputs(model)
    merged = model.merge_and_unload(**options)
    assert type(merged) is type(base)
    assert not layers(merged)
    assert not hasattr(merged, "peft_config")
    assert [type(module) for module in merged.modules()] == [type(module) for module in base.modules()]
    assert {n: v.shape for n, v in merged.state_dict().items()} == {n: v.shape for n, v in base.state_dict().items()}
    assert torch.equal(arch.outputs(merged), trained)
    assert not torch.equal(trained, arch.outputs(base))


def test_merging_for_good_what_is_merged_in_place(arch):
    model = arch.trained()
    trained = arch.outputs(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="already merged"):
        merged = model.merge_and_unload()
    assert torch.equal(arch.outputs(merged), trained)
    again = get_peft_model(merged, arch.config())
    assert torch.equal(arch.outputs(again), trained)
    arch.train(again, 3)
    assert not torch.equal(arch.outputs(again), trained)
    assert torch.equal(arch.outputs(again.unload()), trained)


@each_axis
def test_unloading_gives_the_base_back(arch, axis):
    base, model = arch.base(), arch.trained(axis=axis)
    unloaded = model.unload()
    assert not layers(unloaded)
    assert not hasattr(unloaded, "peft_config")
    assert not differences(unloaded, base)


def test_saving_while_merged_or_disabled(arch, tmp_path):
    model = arch.trained()
    trained = arch.outputs(model)
    with model.disable_adapter():
        model.save_pretrained(tmp_path / "disabled")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    for folder in ("disabled", "merged"):
        assert torch.equal(arch.outputs(arch.load(tmp_path / folder)), trained)


def test_disabling_nested_and_with_an_exception(arch):
    base, model = arch.base(), arch.adapted()
    twin = copy.deepcopy(model)
    optimizer, other = arch.train(model, 5), arch.train(twin, 5)
    expected, trained = arch.outputs(base), arch.outputs(model)
    with model.disable_adapter():
        with model.disable_adapter():
            assert torch.equal(arch.outputs(model), expected)
        assert torch.equal(arch.outputs(model), expected)
        assert same_base(model, base)
    assert torch.equal(arch.outputs(model), trained)
    with contextlib.suppress(KeyError), model.disable_adapter():
        raise KeyError
    assert torch.equal(arch.outputs(model), trained)
    arch.train(model, 5, optimizer)
    arch.train(twin, 5, other)
    assert not differences(model, twin)


# ---------------------------------------------------------------------- looking at it


def test_status(arch):
    model = arch.trained()
    status = model.get_model_status()
    shown, everything = model.get_nb_trainable_parameters()
    assert status.adapter_model_type == "SliceFineModel"
    assert status.peft_types == {"default": "SLICEFINE"}
    assert (status.trainable_params, status.total_params) == (shown, everything)
    assert status.enabled is True
    assert status.active_adapters == status.available_adapters == ["default"]
    assert status.merged_adapters == []
    assert status.requires_grad == {"default": True}
    assert status.devices == {"default": ["cpu"]}
    names = [f"model.{name}" for name in active_slices(model)]
    assert status.num_adapter_layers >= len(names)
    assert [layer.name for layer in model.get_layer_status() if layer.module_type == "slicefine.SliceLinear"] == names
    model.merge_adapter()
    merged = [
        layer.merged_adapters for layer in model.get_layer_status() if layer.module_type == "slicefine.SliceLinear"
    ]
    assert merged == [["default"]] * len(names)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


def test_the_base_model_inside(arch):
    model = arch.trained()
    assert type(model.get_base_model()) is type(arch.base())
    name = next(iter(active_slices(model)))
    layer = model.get_base_model().get_submodule(name)
    base = arch.base().get_submodule(name)
    assert repr(layer).startswith("slicefine.SliceLinear(\n  (base_layer): " + repr(base))
    assert layer.get_base_layer() is layer.base_layer
    assert layer.weight.shape == base.weight.shape
    assert (layer.in_features, layer.out_features) == (arch.inputs["x"].shape[1], 20) if "x" in arch.inputs else True


def test_the_state_of_the_base(arch):
    """While the adapter is enabled the same weights hold the trained values, which nothing may overwrite unnoticed."""
    model = arch.trained()
    before, expected = copy.deepcopy(model), arch.base().state_dict()
    assert get_base_model_state_dict(model).keys() == expected.keys()
    with model.disable_adapter():
        state = get_base_model_state_dict(model)
        assert all(torch.equal(state[name], value) for name, value in expected.items())
        set_base_model_state_dict(model, expected)
    assert not differences(model, before)
    with pytest.raises((SliceFineError, RuntimeError), match="disable_adapter"):
        set_base_model_state_dict(model, expected)
    assert not differences(model, before)


# ---------------------------------------------------------------------- the rest of a model's life


def test_copies_and_pickles(arch, tmp_path):
    model = arch.trained()
    torch.save(model, tmp_path / "model.pt")
    others = [copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)]
    arch.train(model, 4)
    for other in others:
        assert differences(other, model)
        arch.train(other, 4)
        assert not differences(other, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_casting_an_adapted_model(arch, dtype):
    model = arch.trained()
    model.to(dtype)
    assert {p.dtype for n, p in model.named_parameters() if "slicefine_" in n} == {
        torch.promote_types(dtype, torch.float32)
    }
    arch.train(model, 3)
    with model.disable_adapter():
        assert same_base(model, arch.base().to(dtype))
    trained = arch.outputs(model)
    assert torch.equal(arch.outputs(model.merge_and_unload()), trained)


@only(*LANGUAGE_MODELS)
def test_generating(arch):
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "attention_mask": torch.ones_like(TOKENS["input_ids"]),
        "pad_token_id": 1,
    }
    base = arch.base().eval()
    expected = base.generate(**TOKENS, **options)
    model = arch.adapted()
    arch.train(model, 12, torch.optim.AdamW(trainable(model), lr=0.1, weight_decay=0.0))
    generated = model.eval().generate(**TOKENS, **options)
    assert not torch.equal(generated, expected)
    assert torch.equal(model.generate(TOKENS["input_ids"], **options), generated)
    with model.disable_adapter():
        assert torch.equal(model.generate(**TOKENS, **options), expected)
    model.merge_adapter()
    assert torch.equal(model.generate(**TOKENS, **options), generated)
    model.unmerge_adapter()
    assert torch.equal(model.merge_and_unload().generate(**TOKENS, **options), generated)


@only(*TRANSFORMERS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(arch, reentrant):
    model, twin = arch.adapted().train(), arch.adapted().train()
    model.prepare_model_for_gradient_checkpointing(model)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert model.get_base_model().is_gradient_checkpointing
    arch.backward(model)
    arch.backward(twin)
    for parameter, other in zip(trainable(model), trainable(twin), strict=True):
        assert torch.equal(parameter.grad, other.grad)
    model.zero_grad()
    twin.zero_grad()
    arch.train(model, 5)
    arch.train(twin, 5)
    assert not differences(model, twin)


@only(*TRANSFORMERS)
def test_inputs_that_require_grad(arch):
    """`prepare_model_for_kbit_training` is harmless on a model that is not quantized."""
    base = prepare_model_for_kbit_training(arch.base())
    assert not trainable(base)
    model, twin = get_peft_model(base, arch.config()), arch.adapted()
    assert not model.get_input_embeddings()(TOKENS["input_ids"]).requires_grad
    model.enable_input_require_grads()
    assert model.get_input_embeddings()(TOKENS["input_ids"]).requires_grad
    arch.train(model, 5)
    arch.train(twin, 5)
    assert not differences(model, twin)


# ---------------------------------------------------------------------- refused


def test_several_active_adapters_are_refused(arch):
    model = arch.trained()
    model.add_adapter("other", arch.config())
    before = arch.outputs(model)
    # where a head is trained in full, PEFT itself refuses first
    with pytest.raises(
        ValueError, match=r"One slicefine adapter is active at a time|Only one adapter can be set at a time"
    ):
        model.base_model.set_adapter(["default", "other"])
    with pytest.raises(SliceFineError, match="One slicefine adapter is merged at a time"):
        model.merge_adapter(["default", "other"])
    assert model.active_adapters == ["default"]
    assert torch.equal(arch.outputs(model), before)


def test_mixed_batches_are_refused(arch):
    model = arch.trained()
    model.add_adapter("other", arch.config())
    for mode in (True, False):
        with pytest.raises(SliceFineError, match=r"adapter_names"):
            model.train(mode)(**arch.inputs, adapter_names=["default", "other", "__base__", "default"])


def test_mixed_models_are_refused(arch):
    base = arch.base()
    with pytest.raises(ValueError, match=r"'SLICEFINE' is not compatible with the `PeftMixedModel`"):
        get_peft_model(base, arch.config(), mixed=True)
    assert not layers(base)
    assert not differences(base, arch.base())


def test_what_belongs_to_lora_is_refused(arch, tmp_path):
    model = arch.trained()
    before = arch.outputs(model)
    model.save_pretrained(tmp_path)
    model.add_adapter("other", arch.config())
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but SLICEFINE was passed"):
        hotswap_adapter(model, tmp_path, "default")
    with pytest.raises(ValueError, match="scaling is only supported"), rescale_adapter_scale(model, 0.5):
        pass
    assert not model.supports_lora_conversion()
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, rank=2)
    assert not hasattr(model, "add_weighted_adapter")
    assert torch.equal(arch.outputs(model), before)


@only("mlp")
def test_there_is_no_input_cast_to_disable(arch):
    model = arch.trained()
    expected = arch.outputs(model)
    with disable_input_dtype_casting(model):
        assert torch.equal(arch.outputs(model), expected)


# ---------------------------------------------------------------------- the table


def test_every_row_of_the_table_names_its_tests():
    root = Path(__file__).parents[2]
    existing = {
        name
        for path in (root / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    about_peft = (root / "docs" / "compatibility.md").read_text().partition("## Optimizers")[0]
    rows = [
        line for line in about_peft.splitlines() if line.startswith("|") and not re.match(r"\|( behaviour |-)", line)
    ]
    assert rows
    for row in rows:
        named = set(re.findall(r"\btest_\w+", row))
        assert named, f"no test behind: {row}"
        assert named <= existing, f"there is no {named - existing}"
