"""Save and load: the same bits come back, or nothing is changed at all."""

import contextlib
import copy
import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import adapted_mlp, bert, differences, fit, mlp, outputs, tokens, trainable

from slicefine import SliceFineConfig, SliceFineError, active_slices, touched_slices
from slicefine.slicing import artifact_size
from slicefine.tuner.seal import Seal, digest_of_values

SETTINGS = [
    {"axis": "row"},
    {"axis": "column", "order": "random"},
    {"axis": "alternate", "bias": "slicefine_only"},
    {"axis": "alternate", "slide_every": 1, "r": 7, "bias": "slicefine_only"},
    {"axis": "row", "slide_every": None},
]
each_setting = pytest.mark.parametrize("settings", SETTINGS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
WEIGHTS = "adapter_model.safetensors"


def saved(folder, steps=7, dtype=torch.float32, **settings):
    base, model = adapted_mlp(dtype=dtype, **({"axis": "alternate"} | settings))
    optimizer = fit(model, steps)
    model.save_pretrained(folder)
    return base, model, optimizer


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@each_dtype
@each_setting
def test_loading_gives_the_trained_outputs_bit_by_bit(tmp_path, settings, dtype, low_cpu_mem_usage):
    base, model, _ = saved(tmp_path, dtype=dtype, **settings)
    before = outputs(base)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(outputs(loaded), outputs(model))
    assert active_slices(loaded) == active_slices(model)
    assert touched_slices(loaded) == touched_slices(model)
    assert not trainable(loaded)
    with loaded.disable_adapter():
        assert torch.equal(outputs(loaded), before)
    assert not differences(loaded.merge_and_unload(), model.merge_and_unload())


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 6, 13])
@each_setting
def test_training_goes_on_from_a_loaded_adapter(tmp_path, settings, steps):
    base, model, optimizer = saved(tmp_path, steps=steps, **settings)
    loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    other = torch.optim.AdamW(trainable(loaded), lr=3e-2, weight_decay=0.0)
    if optimizer.state:
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    fit(model, 5, optimizer=optimizer, seed=9)
    fit(loaded, 5, optimizer=other, seed=9)
    assert not differences(model, loaded)
    before = outputs(mlp())
    with loaded.disable_adapter():
        assert torch.equal(outputs(loaded), before)


@pytest.mark.parametrize("steps", [3, 6])
def test_a_slice_that_stays_goes_on_from_its_master(tmp_path, steps):
    """`lin1` has 14 rows: what was learned below the spacing of bf16 is not lost where others move."""
    base, model, optimizer = saved(tmp_path, steps=steps, dtype=torch.bfloat16, axis="row", r=14)
    loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    assert not differences(model, loaded)
    other = torch.optim.AdamW(trainable(loaded), lr=3e-2, weight_decay=0.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    fit(model, 5, optimizer=optimizer, seed=9)
    fit(loaded, 5, optimizer=other, seed=9)
    assert not differences(model, loaded)


@each_setting
def test_loading_an_earlier_checkpoint_into_a_live_adapter(tmp_path, settings):
    _, model, optimizer = saved(tmp_path, steps=4, **settings)
    early, then = copy.deepcopy(model), outputs(model)
    fit(model, 8, optimizer=optimizer)
    assert not torch.equal(outputs(model), then)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(outputs(model), then)
    assert not differences(model, early)


def test_saving_changes_nothing_and_is_repeatable(tmp_path):
    _, model, _ = saved(tmp_path / "a", order="random")
    before = copy.deepcopy(model)
    model.save_pretrained(tmp_path / "b")
    assert not differences(model, before)
    for file in (WEIGHTS, "adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_disabled_or_inactive_adapter_is_saved_all_the_same(tmp_path):
    _, model, _ = saved(tmp_path / "a")
    model.add_adapter("other", SliceFineConfig(r=2, target_modules=["lin1"]))
    with model.disable_adapter():
        model.save_pretrained(tmp_path / "b", selected_adapters=["default"])
    model.set_adapter("other")
    model.save_pretrained(tmp_path / "c", selected_adapters=["default"])
    expected = (tmp_path / "a" / WEIGHTS).read_bytes()
    assert (tmp_path / "b" / WEIGHTS).read_bytes() == expected
    assert (tmp_path / "c" / WEIGHTS).read_bytes() == expected


@pytest.mark.parametrize("steps", [0, 1, 3, 7])
def test_the_size_is_the_one_that_shapes_predict(tmp_path, steps):
    _, model, _ = saved(tmp_path, steps=steps, bias="slicefine_only", dtype=torch.bfloat16)
    held = sum(tensor.nbytes for tensor in load_file(tmp_path / WEIGHTS).values())
    schedule = model.peft_config["default"].schedule
    assert held == sum(artifact_size(schedule, shape, steps, itemsize=2, bias=True) for shape in [(20, 10), (14, 20)])


def test_the_configuration_comes_back(tmp_path):
    config = SliceFineConfig(
        r=3, axis="column", slide_every=None, order="random", seed=4, bias="slicefine_only", target_modules=["lin0"]
    )
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, SliceFineConfig)
    assert loaded.to_dict() == config.to_dict()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "SLICEFINE"


def test_a_head_is_saved_with_the_adapter(tmp_path):
    base = bert()
    model = get_peft_model(copy.deepcopy(base), SliceFineConfig(r=2, slide_every=2, task_type="SEQ_CLS"))
    model.train()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.0)
    ids = tokens()
    for _ in range(5):
        model(input_ids=ids, labels=torch.tensor([0, 1, 2, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    model.eval(), loaded.eval()
    assert torch.equal(model(ids).logits, loaded(ids).logits)


def test_the_same_base_in_another_dtype_is_recognised(tmp_path):
    base, _, _ = saved(tmp_path, dtype=torch.bfloat16)
    PeftModel.from_pretrained(copy.deepcopy(base).float(), tmp_path)
    PeftModel.from_pretrained(mlp(), tmp_path)  # what the bf16 base was rounded from
    with torch.no_grad():
        base.lin0.weight[0, 0] *= 1.1
    with pytest.raises(SliceFineError, match=r"lin0.*other values.*trained in bfloat16, this base is in float32"):
        PeftModel.from_pretrained(base.float(), tmp_path)


@pytest.mark.parametrize("steps", [0, 2, 3, 6])
def test_loading_in_another_dtype_changes_nothing_but_what_was_trained(tmp_path, steps):
    """Just after a move the parameter holds values of the base, rounded to the dtype it was trained in."""
    saved(tmp_path, steps=steps, dtype=torch.bfloat16)
    wide = mlp()  # what the bf16 base was rounded from
    loaded = PeftModel.from_pretrained(copy.deepcopy(wide), tmp_path, is_trainable=True)
    for name, pieces in touched_slices(loaded).items():
        present = loaded.base_model.model.get_submodule(name).base_layer.weight.detach().clone()
        original = wide.get_submodule(name).weight.detach()
        for piece in pieces:
            across = (piece.indices, slice(None)) if piece.axis == "row" else (slice(None), piece.indices)
            present[across] = original[across]
        assert torch.equal(present, original)
    loaded.eval()
    fit(loaded.train(), 4)
    assert not differences(loaded.unload(), wide)


# ---------------------------------------------------------------------- refused, and nothing changed


def refused(base, folder, *words):
    before = copy.deepcopy(base)
    flags = [parameter.requires_grad for parameter in base.parameters()]
    with pytest.raises(SliceFineError) as error:
        PeftModel.from_pretrained(base, folder)
    for word in words:
        assert re.search(word, str(error.value)), f"{word!r} is not in: {error.value}"
    assert not differences(base, before)
    assert [str(m) for m in base.modules()] == [str(m) for m in before.modules()]
    assert [parameter.requires_grad for parameter in base.parameters()] == flags
    assert not hasattr(base, "peft_config")


def test_a_wrong_base_of_equal_shapes(tmp_path):
    base, _, _ = saved(tmp_path)
    with torch.no_grad():
        base.lin1.weight[0, 0] += 1e-3
    refused(base, tmp_path, "lin1", "other values in the rows and columns", "Load the base model it was trained on")


@pytest.mark.parametrize("steps", [0, 7])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_base_without_values(tmp_path, steps, low_cpu_mem_usage):
    base, _, _ = saved(tmp_path, steps=steps)
    base.lin1.to("meta")
    with pytest.raises(SliceFineError, match=r"cannot be attached: lin1: .*meta device. Load the base's values first"):
        PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert {type(module) for module in base.children()} == {torch.nn.Linear}
    assert not hasattr(base, "peft_config")
    assert not differences(base.lin0, mlp().lin0)


def test_a_live_adapter_on_a_base_without_values(tmp_path):
    saved(tmp_path)
    model = get_peft_model(mlp().to("meta"), SliceFineConfig(r=4, slide_every=3, target_modules=["lin0", "lin1"]))
    with pytest.raises(SliceFineError, match=r"nothing was loaded: lin0, lin1: .*meta device"):
        model.load_adapter(tmp_path, "default")
    assert touched_slices(model) == {"lin0": [], "lin1": []}
    assert active_slices(model).keys() == {"lin0", "lin1"}


def test_saving_from_a_model_without_values_is_refused_in_words(tmp_path):
    model = get_peft_model(mlp().to("meta"), SliceFineConfig(r=4, slide_every=3, target_modules=["lin0", "lin1"]))
    with pytest.raises(
        SliceFineError, match=r"saved from the values of its weights; .*lin0, .*lin1 are on the meta device"
    ):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.999])
def test_a_truncated_file(tmp_path, keep):
    base, _, _ = saved(tmp_path)
    file = tmp_path / WEIGHTS
    data = file.read_bytes()
    file.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    refused(base, tmp_path, "not a complete safetensors file", WEIGHTS, "copy or save it again")


def test_an_altered_file(tmp_path):
    base, _, _ = saved(tmp_path)
    file = tmp_path / WEIGHTS
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)
    refused(base, tmp_path, "does not hold what adapter_config.json beside it says", "One of the two was altered")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda head: head.view(-1)[:1].add_(1e-3), ["classifier.weight: the file holds something else"]),
        (lambda head: head.fill_(float("nan")), ["classifier.weight: the file holds something else"]),
        (None, ["classifier.weight: the file has nothing for it"]),
    ],
)
def test_a_damaged_head(tmp_path, change, words):
    model = get_peft_model(bert(), SliceFineConfig(r=2, task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = "base_model.model.classifier.weight"
    if change is None:
        del tensors[key]
    else:
        change(tensors[key])
    save_file(tensors, tmp_path / WEIGHTS)
    refused(bert(), tmp_path, *words)


def test_a_head_of_another_size(tmp_path):
    get_peft_model(bert(), SliceFineConfig(r=2, task_type="SEQ_CLS")).save_pretrained(tmp_path)
    refused(bert(num_labels=2), tmp_path, r"classifier.*\(3, 16\).*\(2, 16\)", "num_labels")


def test_a_missing_file_and_a_pickle_beside_it(tmp_path):
    base, _, _ = saved(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.bin")
    refused(base, tmp_path, "there is none", "a pickle, which is never opened")


def cached(cache, folder):
    """`folder` as the hub's cache would hold the repository `somebody/adapter`."""
    repository = cache / "models--somebody--adapter"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    return repository / "snapshots" / ("0" * 40)


def test_an_adapter_of_the_hub_is_checked_as_well(tmp_path):
    saved(tmp_path / "adapter")
    snapshot = cached(tmp_path / "cache", tmp_path / "adapter")

    def load():
        return SliceFineConfig.from_pretrained("somebody/adapter", cache_dir=tmp_path / "cache", local_files_only=True)

    assert load().step == 7
    flip_a_bit(snapshot)
    with pytest.raises(SliceFineError, match=r"lin0: what the file holds is not what was saved"):
        load()
    (snapshot / WEIGHTS).rename(snapshot / "adapter_model.bin")
    with pytest.raises(SliceFineError, match=r"somebody/adapter is not in the cache, .* A pickle is never opened"):
        load()


def alter(folder, change):
    """Rewrite the file, its seals and the configuration, as somebody would who means it."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    config = json.loads((folder / "adapter_config.json").read_text())
    for name in ("lin0", "lin1"):
        prefix = f"base_model.model.{name}."
        parts = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
        sealed = parts.pop("slicefine_seal", None)
        with contextlib.suppress(SliceFineError, AttributeError):
            seal = Seal.from_tensor(sealed)
            seal = dataclasses.replace(seal, values=digest_of_values(seal.step, seal.settings, seal.dtype, parts))
            tensors[prefix + "slicefine_seal"] = seal.tensor()
            config["seals"][name] = str(seal)
    save_file(tensors, folder / WEIGHTS)
    (folder / "adapter_config.json").write_text(json.dumps(config))


KEY = "base_model.model.lin0.slicefine_"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.update({KEY + "row": t[KEY + "row"][:-1]}),
            ["lin0", r"slicefine_row.*shape \(8, 10\) after 7 steps", r"\(7, 10\)"],
        ),
        (lambda t: t.pop(KEY + "column"), ["slicefine_column", "got nothing"]),
        (lambda t: t.update({KEY + "extra": torch.zeros(1)}), ["slicefine_extra", "not part of this adapter"]),
        (lambda t: t.update({KEY + "row": t[KEY + "row"].long()}), ["floating-point", "int64"]),
        (
            lambda t: t.update({KEY + "seal": t[KEY + "seal"].long()}),
            ["lin0: the line that says what was saved is uint8", "int64"],
        ),
        (
            lambda t: t.update({KEY + "seal": t[KEY + "seal"][:-1]}),
            ["lin0: the line that says what was saved is uint8", r"shape \(191,\)"],
        ),
        (lambda t: t[KEY + "seal"].fill_(0), ["lin0: the line that says what was saved", "cannot be read"]),
        (
            lambda t: t[KEY + "seal"][:1].fill_(ord("2")),
            ["lin0: it was saved by a newer slicefine, in format 2", "Upgrade"],
        ),
        (lambda t: t[KEY + "seal"][:1].fill_(ord("-")), ["lin0: the line that says", "got '-:7:r=4 axis=alternate"]),
        (
            lambda t: t.update({KEY.replace("lin0", "../../lin0") + "row": torch.zeros(1)}),
            ["../../lin0: the configuration has nothing for it"],
        ),
        (lambda t: t[KEY + "row"].fill_(float("nan")), ["slicefine_row", "NaN"]),
        (
            lambda t: t.update({KEY.replace("lin0", "lin9") + "row": torch.zeros(1)}),
            ["lin9", "the configuration has nothing for it"],
        ),
        (lambda t: [t.pop(key) for key in list(t) if "lin1" in key], ["lin1", "nothing for it"]),
    ],
)
def test_a_file_that_does_not_fit(tmp_path, change, words):
    base, _, _ = saved(tmp_path)
    alter(tmp_path, change)
    refused(base, tmp_path, *words)


def another_base(folder):
    base = mlp()
    with torch.no_grad():
        base.lin1.weight[0] += 1e-3
    model = get_peft_model(base, SliceFineConfig(target_modules=["lin0", "lin1"], slide_every=3, r=4))
    fit(model, 7)
    model.save_pretrained(folder)


def flip_a_bit(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors[KEY + "row"].view(-1).view(torch.int32)[3] ^= 1
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda f: (saved(f), alter(f, lambda t: t.pop(KEY + "row"))), ["lin0", "slicefine_row", "got nothing"]),
        (lambda f: (saved(f), alter(f, lambda t: t.pop(KEY + "seal"))), ["lin0", "slicefine_seal", "Save the adapter"]),
        (lambda f: (saved(f), flip_a_bit(f)), ["lin0", "what the file holds is not what was saved"]),
        (lambda f: saved(f, order="random", seed=5), ["lin0, lin1: it was trained with .* order=random seed=5, and"]),
        (
            lambda f: saved(f, slide_every=4),
            ["lin0, lin1: it was trained with .*slide_every=4", "loaded with .*slide_every=3"],
        ),
        (lambda f: saved(f, r=3), ["trained with r=3", "loaded with r=4"]),
        (lambda f: saved(f, bias="slicefine_only"), ["slicefine_bias", "not part of this adapter"]),
        (another_base, ["lin1: the adapter was trained on a base with other values"]),
    ],
    ids=["part missing", "seal missing", "bit flipped", "seed", "slide_every", "r", "bias", "base"],
)
def test_a_bad_file_leaves_a_live_adapter_as_it_is(tmp_path, make, words):
    """PEFT reads no configuration for an adapter that is there: a resumed Trainer comes this way."""
    make(tmp_path)
    _, model = adapted_mlp(axis="alternate")
    optimizer = fit(model, 5)
    before = copy.deepcopy(model)
    with pytest.raises(SliceFineError, match="nothing was loaded") as error:
        model.load_adapter(tmp_path, "default", is_trainable=True)
    for word in words:
        assert re.search(word, str(error.value)), f"{word!r} is not in: {error.value}"
    assert not differences(model, before)
    fit(model, 2, optimizer=optimizer)


def test_a_live_adapter_takes_a_file_of_the_same_base_in_another_dtype(tmp_path):
    _, trained, _ = saved(tmp_path, dtype=torch.bfloat16)
    wide, model = mlp(dtype=torch.bfloat16).float(), None
    model = get_peft_model(wide, trained.peft_config["default"])
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert touched_slices(model) == touched_slices(trained)
    fit(model, 2)


def test_the_live_configuration_says_nothing_of_what_was_saved(tmp_path):
    """So that attaching it elsewhere starts a new adapter."""
    _, model, _ = saved(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["step"] == 7
    loaded = PeftModel.from_pretrained(mlp(), tmp_path)
    for config in (model.peft_config["default"], loaded.peft_config["default"]):
        assert (config.step, config.seals, config.heads) == (0, None, None)
        other = mlp()
        with torch.no_grad():
            other.lin0.weight += 1
        get_peft_model(other, config)


def test_a_bad_second_adapter_leaves_the_first_as_it_is(tmp_path):
    saved(tmp_path)
    alter(tmp_path, lambda t: t.pop(KEY + "row"))
    _, model = adapted_mlp()
    fit(model, 4)
    before = copy.deepcopy(model)
    with pytest.raises(SliceFineError, match="nothing was loaded"):
        model.load_adapter(tmp_path, "other")
    assert not differences(model, before)
    assert list(model.peft_config) == ["default"]
    assert model.active_adapters == ["default"]


def test_a_model_without_the_layers(tmp_path):
    saved(tmp_path)
    refused(torch.nn.Sequential(torch.nn.Linear(10, 20)), tmp_path, "lin0", "no module")


def test_a_saved_configuration_starts_afresh_on_its_own_base(tmp_path):
    base, _, _ = saved(tmp_path)
    config = SliceFineConfig.from_pretrained(str(tmp_path))
    config.inference_mode = False  # PEFT saves every configuration for inference
    model = get_peft_model(base, config)
    assert touched_slices(model)["lin0"] == []
    assert torch.equal(outputs(model), outputs(mlp()))
    fit(model, 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seals": {"lin0": "-3:float32:0:0:0"}}, ["lin0: the line that says", "'-3:float32"]),
        ({"step": -1}, ["`step` counts optimizer steps", "-1"]),
        ({"r": 0}, ["`r`", "at least 1"]),
        ({"r": 3}, ["lin0, lin1: it was trained with r=4 axis=alternate", "to be loaded with r=3 axis=alternate"]),
        ({"axis": "row"}, ["lin0, lin1: it was trained with", "to be loaded with r=4 axis=row"]),
        ({"seals": {}}, ["lin0, lin1: the configuration has nothing for it"]),
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit_the_file(tmp_path, change, words):
    base, _, _ = saved(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(base, tmp_path, *words)


def test_a_tensor_that_a_file_holds_twice(tmp_path):
    base, _, _ = saved(tmp_path)
    file = tmp_path / WEIGHTS
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(dict(json.loads(data[8 : 8 + length])))
    twice = header[:-1] + ", " + header[1:]
    file.write_bytes(len(twice).to_bytes(8, "little") + twice.encode() + data[8 + length :])
    refused(base, tmp_path, "not a complete safetensors file")


def test_a_state_dict_of_other_values_is_not_saved(tmp_path):
    _, model = adapted_mlp()
    averaged = {name: value * 0.9 for name, value in model.state_dict().items()}
    with pytest.raises(SliceFineError, match=r"lin0.*holds other values.*load_state_dict"):
        model.save_pretrained(tmp_path, state_dict=averaged)
    model.save_pretrained(tmp_path, state_dict=model.state_dict())


def test_what_the_folder_holds(tmp_path):
    """What PEFT's loaders expect, and nothing that could run code."""
    saved(tmp_path)
    assert {p.name for p in Path(tmp_path).iterdir()} == {WEIGHTS, "adapter_config.json", "README.md"}
    assert all(torch.isfinite(t).all() for t in load_file(tmp_path / WEIGHTS).values())
