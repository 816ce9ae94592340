"""What is refused when attaching: all problems at once, each with where, what and how to mend; and nothing changed."""

import copy
import os
import re
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tiny import adapted_mlp, bert, differences, fit, llama, mlp
from torch import nn
from torch.nn.utils import parametrizations

from slicefine import SliceFineConfig, SliceFineError, SliceFineWarning, active_slices


def refused(model, config, *words):
    before, modules = copy.deepcopy(model.state_dict()), [id(m) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(SliceFineError) as error:
        get_peft_model(model, config)
    for word in words:
        assert re.search(word, str(error.value)), f"{word!r} is not in: {error.value}"
    assert [id(m) for m in model.modules()] == modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 0}, ["`r`", "at least 1", "got 0"]),
        ({"r": 2.5}, ["`r`", "got 2.5"]),
        ({"axis": "rows"}, ["`axis`", "row, column, alternate", "got 'rows'", "Did you mean 'row'"]),
        ({"order": "sweeps"}, ["`order`", "sweep, random", "Did you mean 'sweep'"]),
        ({"slide_every": 0}, ["`slide_every`", "at least 1", "None"]),
        ({"seed": "x"}, ["`seed`", "'x'"]),
        ({"bias": "all"}, ["`bias`", "none, slicefine_only", "'all'"]),
        ({"target_modules": []}, ["`target_modules`", "all-linear"]),
        ({"target_modules": None}, ["`target_modules`", "all-linear"]),
        ({"layers_pattern": "layers"}, ["`layers_pattern`", "both or neither"]),
        ({"target_modules": "*q"}, ["`target_modules`", "regular expression", "'.*query'"]),
        ({"exclude_modules": "*q"}, ["`exclude_modules`", "regular expression"]),
        ({"target_modules": ".*q", "layers_to_transform": 1}, ["`layers_to_transform`", "regular expression"]),
        ({"axis": "coupled", "couplings": "auto"}, ["`couplings` is a dictionary", "got 'auto'", "Leave it out"]),
        ({"axis": "coupled", "couplings": [("a", "b")]}, ["`couplings` is a dictionary", r"got \[\('a', 'b'\)\]"]),
        ({"axis": "coupled", "couplings": []}, ["`couplings` is a dictionary", r"got \[\]"]),
        ({"couplings": {"x": 5, 6: "row 0+4"}}, ["3 problems", "axis='coupled'", "got 'x': 5", "got 6: 'row 0.4'"]),
        ({"r": 0, "axis": "x", "order": "y"}, ["3 problems", "`r`", "`axis`", "`order`"]),
    ],
)
def test_settings(settings, words):
    with pytest.raises(SliceFineError) as error:
        SliceFineConfig(**settings)
    for word in words:
        assert re.search(word, str(error.value)), f"{word!r} is not in: {error.value}"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"target_modules": ["lin7"]},
            ["'lin7'", "Did you mean 'lin0'|Did you mean 'lin1'", r"head \(1\), lin0 \(1\), lin1 \(1\)"],
        ),
        ({"target_modules": ["lin0", "line"]}, ["'line'", r"these match: lin0 \(1\)"]),
        (
            {"target_modules": ".*query"},
            ["no module matches", "a string is a regular expression", "'.*query'", r"lin0 \(1\)"],
        ),
        ({"target_modules": "all_linear"}, ["no module matches", "Did you mean 'all-linear'"]),
        ({"target_modules": "lin_0"}, ["no module matches", "Did you mean 'lin0'"]),
        ({"target_modules": ["lin0"], "exclude_modules": ["lin0"]}, ["no module matches", "exclude_modules"]),
        ({"exclude_modules": ["hed"]}, ["`exclude_modules`", "'hed'", "Did you mean 'head'"]),
        ({"modules_to_save": ["hed"]}, ["`modules_to_save`", "'hed'", "Did you mean 'head'"]),
        (
            {"r": 11, "axis": "column", "target_modules": ["lin0"]},
            ["lin0", "r=11", r"10 columns.*\(20, 10\)", "Lower `r`"],
        ),
        ({"r": 15, "axis": "row", "target_modules": ["lin1"]}, ["lin1", r"14 rows.*\(14, 20\)"]),
        ({"target_modules": ["lin0", "lin8", "lin9"]}, ["2 problems", "'lin8'", "'lin9'"]),
    ],
)
def test_targets_of_a_small_network(settings, words):
    refused(mlp(), SliceFineConfig(**settings), *words)


def test_a_head_that_may_be_new_is_said():
    with pytest.warns(SliceFineWarning, match=r"head 'classifier'.*modules_to_save=\['classifier'\].*SEQ_CLS"):
        get_peft_model(bert(), SliceFineConfig(r=2))


def test_blocks_that_are_not_there():
    refused(
        bert(), SliceFineConfig(target_modules=["query"], layers_to_transform=[0, 5]), "`layers_to_transform`", r"\[5\]"
    )


def test_blocks_that_are_there():
    model = get_peft_model(
        bert(), SliceFineConfig(target_modules=["query", "value"], layers_to_transform=1, layers_pattern="layer")
    )
    assert sorted(active_slices(model)) == [
        f"bert.encoder.layer.1.attention.self.{name}" for name in ("query", "value")
    ]


class Holder(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer


class Offload:
    offload = True


def with_hook(layer):
    layer._hf_hook = Offload()
    return layer


def with_forward_hook(layer):
    layer.register_forward_hook(lambda *arguments: None)
    return layer


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: parametrizations.weight_norm(nn.Linear(6, 6)), ["a way of its own"]),
        (lambda: nn.LayerNorm(6), ["torch.nn.Linear, Conv1d, Conv2d, Conv3d and Embedding", "LayerNorm"]),
        (lambda: nn.ConvTranspose1d(6, 6, 1), ["Conv3d and Embedding", "ConvTranspose1d"]),
        (lambda: nn.Embedding(6, 6, max_norm=1.0), ["max_norm=1.0", "pass over"]),
        (lambda: with_hook(nn.Linear(6, 6)), ["offloaded"]),
        (lambda: with_forward_hook(nn.Linear(6, 6)), ["hooks or a `forward` of its own"]),
    ],
)
def test_layers_that_cannot_hold_a_slice(make, words):
    refused(
        Holder(make()),
        SliceFineConfig(target_modules=["layer"]),
        "^Adapter 'default' cannot be attached: layer",
        *words,
    )


def test_a_packed_weight():
    layer = nn.Linear(6, 6)
    layer.weight = nn.Parameter(torch.zeros(6, 6, dtype=torch.int8), requires_grad=False)
    refused(Holder(layer), SliceFineConfig(target_modules=["layer"]), "int8", "unquantized")


def test_a_quantized_model():
    model = mlp()
    model.is_quantized = True
    refused(model, SliceFineConfig(), "quantized", "bf16, fp16 or fp32")


def test_tied_weights():
    model = mlp()
    model.lin2 = nn.Linear(10, 20)
    model.lin2.weight = model.lin0.weight
    refused(model, SliceFineConfig(target_modules=["lin0"]), "lin0", "tied", "Untie")


def test_another_method_on_the_same_layer():
    model = inject_adapter_in_model(LoraConfig(target_modules=["lin0"]), mlp())
    del model.peft_config  # or PEFT warns of several adapters first
    with pytest.raises(SliceFineError, match="another PEFT method tunes this layer already"):
        inject_adapter_in_model(SliceFineConfig(target_modules=["lin0"]), model, "second")


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_sharding_engines(monkeypatch, engine):
    monkeypatch.setitem(os.environ, f"ACCELERATE_USE_{engine}", "true")
    refused(mlp(), SliceFineConfig(), engine, "not supported yet", "DDP")


def test_an_engine_that_comes_after_attaching(monkeypatch):
    _, model = adapted_mlp()
    monkeypatch.setitem(os.environ, "ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(SliceFineError, match=r"DEEPSPEED.*not supported yet"):
        fit(model, 1)


def test_a_model_that_has_the_adapter_already():
    """PEFT would wrap it once more, and start again."""
    _, model = adapted_mlp()
    fit(model, 4)
    before = copy.deepcopy(model)
    for again in (model, model.base_model.model):
        with (
            warnings.catch_warnings(action="ignore"),  # PEFT warns of adapters that are there
            pytest.raises(SliceFineError, match=r"has a slicefine adapter 'default' already.*add_adapter.*unload"),
        ):
            get_peft_model(again, SliceFineConfig())
    assert not differences(model, before)
    fit(model, 1)


def test_equal_problems_of_many_layers_are_said_once():
    with pytest.raises(SliceFineError) as error:
        get_peft_model(llama(), SliceFineConfig(target_modules=["up_proj", "q_proj", "k_proj"], r=17))
    found = str(error.value)
    assert "3 problems" in found
    assert "model.layers.0.self_attn.k_proj, model.layers.1.self_attn.k_proj: r=17 is more than the 8 rows" in found


def test_all_problems_at_once():
    model = Holder(parametrizations.weight_norm(nn.Linear(6, 6)))
    model.other = nn.LayerNorm(3)
    refused(
        model,
        SliceFineConfig(target_modules=["layer", "other", "nothing"]),
        "3 problems",
        "ParametrizedLinear",
        "LayerNorm",
        "'nothing'",
    )


def test_a_refused_second_adapter_leaves_the_first_alone():
    model = get_peft_model(mlp(), SliceFineConfig(target_modules=["lin0"]))
    before = copy.deepcopy(model)
    with pytest.raises(SliceFineError, match="lin7"):
        model.add_adapter("other", SliceFineConfig(target_modules=["lin7"]))
    assert not differences(model, before)
    assert list(model.peft_config) == ["default"]
