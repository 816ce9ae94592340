"""Coupled slices that train, against a slow simulation of the same rows and columns; and the rest of their life."""

import copy
import json

import pytest
import torch
from architectures import ARCHITECTURES
from examination import ALL_LINEAR, COLUMNS, Case, examine
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from tiny import batch, bert, differences, gpt2, llama, mlp, tokens, trainable
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM

import slicefine
from slicefine import SliceFineConfig, SliceFineError, active_slices, parameter_counts, touched_slices
from slicefine.kernel import vectors
from slicefine.slicing import Region
from slicefine.tuner import coupling
from slicefine.tuner.base_layers import Place
from slicefine.tuner.layer import SliceLayer

IDS = tokens()
SETTINGS = {"r": 3, "axis": "coupled", "slide_every": 3}
MODELS = {
    "llama": (llama, {"task_type": "CAUSAL_LM"}, {"input_ids": IDS}),
    "gpt2": (gpt2, {"task_type": "CAUSAL_LM"}, {"input_ids": IDS}),
    "bert": (bert, {"exclude_modules": ["pooler.dense", "classifier"]}, {"input_ids": IDS}),
    "mlp": (mlp, {"target_modules": ["lin0", "lin1"], "bias": "slicefine_only"}, {"x": batch()}),
}  # fmt: skip


def configured(name, **settings):
    build, own, inputs = MODELS[name]
    config = SliceFineConfig(**SETTINGS | own | settings)
    if name == "mlp":
        config.couplings = slicefine.couplings(build(), config, inputs)
    return config


def adapted(name="llama", **settings):
    return get_peft_model(MODELS[name][0](), configured(name, **settings))


def backward(name, model, step):
    output = model(**MODELS[name][2])
    y = output if torch.is_tensor(output) else output.logits
    (y - torch.randn(y.shape, generator=torch.Generator().manual_seed(step))).square().mean().backward()


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=3e-2, weight_decay=0.0)


def fit(model, steps, name="llama", optimizer=None):
    optimizer = optimizer or adamw(trainable(model))
    for step in range(steps):
        backward(name, model, step)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def result(model, name="llama"):
    with torch.no_grad():
        output = model(**MODELS[name][2])
    return output if torch.is_tensor(output) else output.logits


def sliced(model):
    return {layer.name: layer for layer in model.modules() if isinstance(layer, SliceLayer)}


@pytest.fixture
def no_probe(monkeypatch):
    """Nothing may look for partners."""

    def refuse(*arguments):
        raise AssertionError("the model is probed")

    monkeypatch.setattr(coupling, "find_couplings", refuse)


# ---------------------------------------------------------------------- training


def simulate(name, config, steps):
    """Full backward passes; of each target the rows or columns of its features are a parameter, which is new after every move."""
    model = MODELS[name][0]()
    weights = {target: Place(model.get_submodule(target)) for target in config.couplings}
    pieces, parameters, optimizers = {}, {}, {}
    biases = [place.bias for place in weights.values() if place.bias is not None] if config.bias != "none" else []
    for_biases = adamw(biases) if biases else None
    for step in range(steps):
        for target, place in weights.items():
            piece = config.schedule_of(target).slice_at(step, place.shape)
            if pieces.get(target) != piece:
                pieces[target] = piece
                parameters[target] = vectors(place.matrix.detach(), piece.axis)[[*piece.indices]].requires_grad_()
                optimizers[target] = adamw([parameters[target]])
        model.zero_grad()
        backward(name, model, step)
        for target, place in weights.items():
            piece, parameter = pieces[target], parameters[target]
            parameter.grad = vectors(place.oriented(place.stored.grad), piece.axis)[[*piece.indices]]
            optimizers[target].step()
            with torch.no_grad():
                vectors(place.matrix, piece.axis)[[*piece.indices]] = parameter
        if for_biases:
            for_biases.step()
    return model


@pytest.mark.parametrize("order", ["sweep", "random"])
@pytest.mark.parametrize("name", MODELS)
def test_twenty_steps_are_those_of_a_masked_model(name, order):
    model = adapted(name, order=order)
    fit(model, 20, name)
    expected = simulate(name, model.peft_config["default"], 20)
    merged = model.merge_and_unload()
    assert expected.state_dict().keys() == merged.state_dict().keys()
    for key, tensor in expected.state_dict().items():
        # Adam divides by gradients of any size, so one that rounding alone made non-zero is a step of full length.
        torch.testing.assert_close(merged.state_dict()[key], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_full_training(name):
    model = adapted(name)
    optimizer = adamw(trainable(model))
    for step in range(13):
        dense = copy.deepcopy(model).merge_and_unload().requires_grad_(True)
        backward(name, dense, step)
        backward(name, model, step)
        for target, layer in sliced(model).items():
            active, whole = layer.state.active, Place(dense.get_submodule(target))
            expected = vectors(whole.oriented(whole.stored.grad), active.axis)[[*active.indices]]
            torch.testing.assert_close(layer.slicefine_weight["default"].grad, expected, rtol=1e-3, atol=1e-6)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", MODELS)
def test_only_the_rows_and_columns_of_touched_features_change(name):
    base, model = MODELS[name][0](), adapted(name, bias="none")
    fit(model, 8, name)
    touched = touched_slices(model)
    assert {len(pieces) for pieces in touched.values()} == {3}
    for target, matrix in [(t, Place(model.merge_and_unload().get_submodule(t)).matrix) for t in touched]:
        changed = matrix != Place(base.get_submodule(target)).matrix
        region = Region.of(touched[target])
        where = torch.zeros_like(changed)
        where[list(region.rows)] = True
        where[:, list(region.columns)] = True
        assert not (changed & ~where).any()
        assert changed.any()


def test_partners_stay_together_over_moves():
    """The columns of the reader follow the rows of the writers, also where the last block is moved back."""
    model = adapted(order="random", slide_every=1)
    optimizer = adamw(trainable(model))
    seen = set()
    for step in range(9):
        before = active_slices(model)
        slices = {name.removeprefix("model.layers.0."): piece for name, piece in before.items()}
        for block, features in (("self_attn.", 8), ("mlp.", 24)):
            of = {
                tuple(sorted({list_of(piece.layout)[index] for index in piece.indices}))
                for name, piece in slices.items()
                if name.startswith(block)
            }
            assert len(of) == 1
            assert len(*of) == 3
            assert max(*of) < features
            seen |= of
        fit(model, 1, optimizer=optimizer)
        # A new pass may begin with the block that ended the one before.
        stays = {name for name, piece in active_slices(model).items() if piece == before[name]}
        kept = {name for name, layer in sliced(model).items() if layer.slicefine_weight["default"] in optimizer.state}
        assert kept == stays, f"at step {step}"
    assert len(seen) > 6


def list_of(layout):
    return [feature for first, count in layout.runs for feature in range(first, first + count)]


def test_counts():
    model = adapted()
    fit(model, 4)
    counts = parameter_counts(model, steps=1000)
    attention = 3 * (2 * 16 + 16 + 16 + 2 * 16)  # q and o have two copies of a feature
    assert counts.active == 2 * (attention + 3 * 3 * 16) == sum(p.numel() for p in trainable(model))
    assert counts.touched == 2 * counts.active
    assert counts.planned == sum(layer.matrix.numel() for layer in sliced(model).values())
    assert counts.added == 0


def test_a_model_in_bf16_follows_its_masters():
    model = get_peft_model(llama().bfloat16(), configured("llama"))
    optimizer = None
    for _ in range(8):
        optimizer = fit(model, 1, optimizer=optimizer)
        for layer in sliced(model).values():
            piece = layer.state.active
            present = vectors(layer.matrix, piece.axis)[[*piece.indices]]
            assert torch.equal(present, layer.slicefine_weight["default"].detach().bfloat16())


def test_gradient_checkpointing():
    model, twin = adapted().train(), adapted().train()
    twin.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    fit(model, 5)
    fit(twin, 5)
    assert not differences(model, twin)


# ---------------------------------------------------------------------- the rest of its life

WARNED = {"attach": "warned"}
HEAD = {"export lora": "different"}
LIVES = {
    "Llama": {},
    "Qwen3": {},
    "GPT-2": {},
    "T5": {},
    "BERT": WARNED | HEAD,
    "ViT": HEAD,
    "Swin": WARNED | HEAD,
    "ConvNeXt": HEAD,
}


@pytest.mark.parametrize("name", LIVES)
def test_what_works(name, tmp_path):
    """Attach, train, disable, save and load, merge, unload, export as a model and as LoRA: as in `test_architectures.py`."""
    found = examine(Case(name, ALL_LINEAR | {"axis": "coupled"}), tmp_path)
    assert {column: cell.word for column, cell in found.cells.items()} == dict.fromkeys(COLUMNS, "yes") | LIVES[name]


@pytest.mark.parametrize("name", ["CLIP", "Whisper", "Mamba", "ALBERT"])
def test_what_is_refused(name, tmp_path):
    """Inputs that cannot be guessed, and where nothing couples."""
    cells = examine(Case(name, ALL_LINEAR | {"axis": "coupled"}), tmp_path).cells
    assert {cell.word for cell in cells.values()} == {"refused", ""}


@pytest.mark.parametrize("name", MODELS)
def test_loading_probes_nothing_and_goes_on_bit_by_bit(name, tmp_path, request):
    model = adapted(name)
    optimizer = fit(model, 7, name)
    model.save_pretrained(tmp_path)
    request.getfixturevalue("no_probe")
    loaded = PeftModel.from_pretrained(MODELS[name][0](), tmp_path, is_trainable=True)
    assert not differences(loaded, model)
    assert loaded.peft_config["default"].couplings == model.peft_config["default"].couplings
    # A step with the moments that a checkpoint would have brought.
    other = adamw(trainable(loaded))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    fit(model, 6, name, optimizer)
    fit(loaded, 6, name, other)
    assert not differences(loaded, model)


@pytest.mark.parametrize("how", ["from_pretrained", "load_adapter"])
def test_transformers_own_loader(how, tmp_path, request):
    llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), configured("llama"))
    fit(model, 7)
    model.save_pretrained(tmp_path / "adapter")
    request.getfixturevalue("no_probe")
    if how == "from_pretrained":
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    else:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        loaded.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(result(loaded), result(model))
    assert active_slices(loaded) == active_slices(model)
    assert touched_slices(loaded) == touched_slices(model)


def test_state_dicts(request):
    model, other, third = adapted(), adapted(), adapted()
    fit(model, 7)
    request.getfixturevalue("no_probe")
    other.load_state_dict(model.state_dict())
    assert not differences(other, model)
    assert active_slices(other) == active_slices(model)
    set_peft_model_state_dict(third, get_peft_model_state_dict(model))
    assert torch.equal(result(third), result(model))
    fit(model, 4)
    for each in (other, third):
        fit(each, 4)
        assert not differences(each, model)


def test_disabled_merged_unloaded_and_back():
    base, model = llama(), adapted()
    twin = copy.deepcopy(model)
    fit(model, 7)
    fit(twin, 7)
    trained = result(model)
    with model.disable_adapter():
        assert torch.equal(result(model), result(base))
    model.merge_adapter()
    assert torch.equal(result(model), trained)
    model.unmerge_adapter()
    assert not differences(model, twin)
    assert not differences(copy.deepcopy(model).unload(), base)
    assert torch.equal(result(model.merge_and_unload()), trained)


def test_two_adapters_take_turns():
    model = adapted()
    fit(model, 5)
    first = result(model)
    model.add_adapter("rows", SliceFineConfig(r=2, axis="row", slide_every=2, task_type="CAUSAL_LM"))
    model.set_adapter("rows")
    fit(model, 5)
    model.set_adapter("default")
    assert torch.equal(result(model), first)
    model.delete_adapter("rows")
    assert torch.equal(result(model), first)


# ---------------------------------------------------------------------- files that were altered


@pytest.fixture
def saved(tmp_path):
    model = adapted()
    fit(model, 7)
    model.save_pretrained(tmp_path)
    return tmp_path


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "alter",
    [
        lambda couplings: couplings | {Q: "row 0+4 4+4 0+4 4+4"},
        lambda couplings: couplings | {Q: "row 0+16"},
        lambda couplings: {name: text for name, text in couplings.items() if name != Q},
        lambda couplings: None,
    ],
    ids=["order", "features", "one less", "none"],
)
def test_altered_couplings_are_refused(saved, alter):
    path, base = saved / "adapter_config.json", llama()
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"couplings": alter(config["couplings"])}))
    with pytest.raises(
        SliceFineError, match=rf"{Q}.*: it was trained with r=3 axis=row@\w+ .* and is to be loaded with r=3 axis=row"
    ):
        PeftModel.from_pretrained(base, saved)
    assert not differences(base, llama())


def test_couplings_in_other_words_are_the_same(saved):
    path = saved / "adapter_config.json"
    config = json.loads(path.read_text())
    assert config["couplings"][Q] == "row 0+4*2 4+4*2"
    path.write_text(json.dumps(config | {"couplings": config["couplings"] | {Q: "row 0+4 0+4 4+1 5+3 4+4"}}))
    PeftModel.from_pretrained(llama(), saved)


def test_an_adapter_for_another_model_is_refused(saved):
    other = ARCHITECTURES["Llama"].build()  # as wide, with other heads
    with pytest.raises(SliceFineError, match="cannot be attached"):
        PeftModel.from_pretrained(other, saved)
    assert not sliced(other)


def test_saving_twice_gives_the_same_file(saved, tmp_path):
    model = PeftModel.from_pretrained(llama(), saved)
    model.save_pretrained(tmp_path / "again")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (saved / file).read_bytes()


# ---------------------------------------------------------------------- compiled


# dynamo makes an instance of every autograd function that it traces, and torch warns of that
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_stays_compiled_over_moves():
    torch._dynamo.reset()
    model = adapted("mlp", slide_every=2, bias="slicefine_only")
    plain = copy.deepcopy(model)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizer, other = adamw(trainable(model)), adamw(trainable(plain))
    for _ in range(12):
        fit(compiled, 1, "mlp", optimizer)
        fit(plain, 1, "mlp", other)
        assert counter.frame_count == 1
    assert not differences(model, plain)
