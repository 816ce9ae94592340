"""Off the main road: state dicts, several optimizers, steps at odd moments, shared modules, casts."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import adapted_mlp, batch, differences, fit, mlp, outputs, trainable

from slicefine import SliceFineConfig, SliceFineError, SliceFineWarning, active_slices
from slicefine.slicing import Slice
from slicefine.tuner.layer import SliceLayer

SETTINGS = {"axis": "alternate", "bias": "slicefine_only"}


def layers(model):
    return [module for module in model.modules() if isinstance(module, SliceLayer)]


def consistent(model):
    """Whether position, index, weight, bias and masters of the installed adapter agree."""
    for layer in layers(model):
        adapter = layer.installed
        state = layer.slicefine_state[adapter]
        assert state.active == state.schedule.slice_at(state.step, layer.shape)
        assert layer.slicefine_index[adapter].tolist() == list(state.active.indices)
        parameters = {id(p) for name in layer.adapter_layer_names for p in getattr(layer, name).values()}
        for present, master in layer.pending_writes(adapter, parameters):
            assert torch.equal(present, master.to(present.dtype))
    return True


@pytest.mark.parametrize("steps", [0, 2, 4, 7])
@pytest.mark.parametrize("disabled", [False, True])
def test_a_state_dict_brings_everything_back(steps, disabled):
    base, model = adapted_mlp(**SETTINGS)
    fit(model, steps)
    trained = outputs(model)
    if disabled:
        with model.disable_adapter():
            state = copy.deepcopy(model.state_dict())
    else:
        state = copy.deepcopy(model.state_dict())
    _, other = adapted_mlp(**SETTINGS)
    fit(other, 5)
    other.load_state_dict(state)
    assert consistent(other)
    assert torch.equal(outputs(other), trained)
    assert active_slices(other) == active_slices(model)
    fit(model, 5)
    fit(other, 5)
    assert not differences(model, other)
    with other.disable_adapter():
        assert torch.equal(outputs(other), outputs(base))


def test_a_state_dict_without_positions_is_reported():
    _, model = adapted_mlp()
    state = {name: value for name, value in model.state_dict().items() if "slicefine_index" not in name}
    with pytest.raises(RuntimeError, match=r"lin0: .*values for the weight alone.*disable_adapter"):
        model.load_state_dict(state)


@pytest.mark.parametrize("strict", [True, False])
def test_positions_without_the_weights_are_refused(strict):
    """At a move the new slice is original, so nothing else could tell that what was trained before is lost."""
    _, model = adapted_mlp(axis="row", slide_every=3)
    fit(model, 3)
    state = {name: value for name, value in model.state_dict().items() if "slicefine" in name}
    _, other = adapted_mlp(axis="row", slide_every=3)
    with pytest.raises(
        RuntimeError, match=r"lin0: .*position of adapter 'default' after 3 steps, and no values for the weight"
    ):
        other.load_state_dict(state, strict=strict)
    assert {layer.slicefine_state["default"].step for layer in layers(other)} == {0}


def test_weights_that_hold_another_adapter_are_refused():
    _, model = adapted_mlp()
    model.add_adapter("other", SliceFineConfig(r=2, target_modules=["lin0", "lin1"]))
    model.set_adapter("other")
    fit(model, 2)
    base, plain = adapted_mlp()
    with pytest.raises(RuntimeError, match=r"lin0: .*adapter 'other', which this model does not have"):
        plain.load_state_dict(model.state_dict(), strict=False)
    assert not differences(plain.unload(), base)


def test_a_state_dict_of_another_dtype_that_is_assigned(tmp_path):
    base, model = adapted_mlp(dtype=torch.bfloat16, slide_every=2)
    fit(model, 3)
    _, wide = adapted_mlp(slide_every=2)
    wide.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(outputs(wide), outputs(model))
    wide.save_pretrained(tmp_path)
    assert torch.equal(outputs(PeftModel.from_pretrained(base, tmp_path)), outputs(model))


def test_loading_in_inference_mode(tmp_path):
    base, model = adapted_mlp()
    fit(model, 4)
    model.save_pretrained(tmp_path)
    trained = outputs(model)
    with torch.inference_mode():
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        assert torch.equal(loaded(batch()), trained)
        inside = PeftModel.from_pretrained(mlp(), tmp_path).eval()
        assert torch.equal(inside(batch()), trained)
        with inside.disable_adapter():
            assert torch.equal(inside(batch()), outputs(base))
        model.load_adapter(tmp_path, "default", is_trainable=True)
    fit(model, 4)


def test_the_best_weights_kept_in_memory():
    _, model = adapted_mlp(**SETTINGS)
    optimizer = fit(model, 5)
    best, then = copy.deepcopy(model.state_dict()), outputs(model)
    fit(model, 6, optimizer=optimizer)
    model.load_state_dict(best)
    assert torch.equal(outputs(model), then)
    assert consistent(model)


def test_one_optimizer_per_parameter():
    _, model = adapted_mlp(**SETTINGS)
    twin = copy.deepcopy(model)
    fit(twin, 7, optimizer=torch.optim.SGD(trainable(twin), lr=0.1))
    optimizers = [torch.optim.SGD([parameter], lr=0.1) for parameter in trainable(model)]
    for _ in range(7):
        fit(model, 0)
    generator = torch.Generator().manual_seed(2)
    for _ in range(7):
        y = model(batch())
        (y - torch.randn(y.shape, generator=generator)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert consistent(model)
    assert not differences(model, twin)


def test_biases_alone():
    _, model = adapted_mlp(**SETTINGS)
    biases = [layer.slicefine_bias["default"] for layer in layers(model)]
    for layer in layers(model):
        layer.slicefine_weight["default"].requires_grad = False
    before = outputs(model)
    fit(model, 5, optimizer=torch.optim.SGD(biases, lr=0.1))
    assert consistent(model)
    assert not torch.equal(outputs(model), before)
    assert active_slices(model)["lin0"] == Slice("row", 0, 4)


def test_a_step_while_disabled_is_not_lost():
    _, model = adapted_mlp(**SETTINGS, slide_every=2)
    twin = copy.deepcopy(model)
    for net, disabled in ((model, True), (twin, False)):
        optimizer = torch.optim.SGD(trainable(net), lr=0.1)
        for _ in range(3):
            net(batch()).square().mean().backward()
            if disabled:
                with net.disable_adapter():
                    for parameter in net.parameters():
                        parameter.requires_grad_(parameter.grad is not None)
                    optimizer.step()
            else:
                optimizer.step()
            optimizer.zero_grad()
    assert consistent(model)
    assert not differences(model, twin)


class Lookahead(torch.optim.Optimizer):
    """An optimizer that steps around another one's step."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure=None):
        self.inner.step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(1.0 + 1e-3)


def test_an_optimizer_around_another_counts_once():
    _, model = adapted_mlp(**SETTINGS, slide_every=3)
    fit(model, 2, optimizer=Lookahead(torch.optim.SGD(trainable(model), lr=0.1)))
    assert active_slices(model)["lin0"] == Slice("row", 0, 4)
    assert consistent(model)


def test_an_optimizer_without_parameters_is_said_once(tmp_path):
    """Trainer makes one for an adapter that was loaded for inference, and trains nothing without a word."""
    base, model = adapted_mlp()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    optimizer = torch.optim.SGD([{"params": trainable(loaded)}])
    with pytest.warns(SliceFineWarning, match=r"SGD holds no parameter.*is_trainable=True"):
        optimizer.step()
    optimizer.step()


def test_an_optimizer_that_raises_does_not_stop_the_others():
    _, model = adapted_mlp(slide_every=1)

    def fail():
        raise RuntimeError("out of memory")

    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(RuntimeError, match="out of memory"):
        other.step(fail)
    fit(model, 1)
    assert active_slices(model)["lin0"] != Slice("row", 0, 4)
    assert consistent(model)


def test_lbfgs_is_refused():
    _, model = adapted_mlp()
    optimizer = torch.optim.LBFGS(trainable(model))
    with pytest.raises(SliceFineError, match=r"LBFGS evaluates the model between updates"):
        optimizer.step(lambda: model(batch()).square().mean())


def test_one_module_under_two_names_is_refused():
    model = mlp()
    model.again = model.lin1
    with pytest.raises(SliceFineError, match=r"lin1: its weight is tied: another module, or another name of this one"):
        get_peft_model(model, SliceFineConfig(target_modules=["lin1"]))


def test_a_bias_shared_by_two_layers_is_refused_only_if_it_is_trained():
    model = mlp()
    model.other = torch.nn.Linear(10, 20)
    model.other.bias = model.lin0.bias
    with pytest.raises(SliceFineError, match=r"lin0: its bias is tied"):
        get_peft_model(model, SliceFineConfig(target_modules=["lin0"], bias="slicefine_only"))
    get_peft_model(model, SliceFineConfig(target_modules=["lin0"]))


def test_merging_an_adapter_of_other_layers():
    base, model = adapted_mlp(target_modules=["lin0", "lin1"])
    fit(model, 4)
    model.add_adapter("other", SliceFineConfig(r=2, target_modules=["lin1"]))
    model.set_adapter("other")
    fit(model, 3)
    expected = outputs(model)
    model.set_adapter("default")
    merged = model.merge_and_unload(adapter_names=["other"])
    assert torch.equal(outputs(merged), expected)
    assert torch.equal(merged.lin0.weight, base.lin0.weight)


def test_a_merged_model_is_let_go():
    _, model = adapted_mlp()
    optimizer = fit(model, 4)
    masters = trainable(model)
    held = layers(model)
    merged = model.merge_and_unload()
    before = outputs(merged)
    for master in masters:
        master.grad = torch.ones_like(master)
    optimizer.step()
    assert torch.equal(outputs(merged), before)
    assert held


@pytest.mark.parametrize("axis", ["row", "column", "alternate"])
def test_an_adapter_that_was_cast_fits_the_cast_base(tmp_path, axis):
    base, model = adapted_mlp(axis=axis, bias="slicefine_only")
    fit(model, 7)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    base.to(torch.bfloat16)
    with model.disable_adapter():
        assert torch.equal(outputs(model), outputs(base))
    assert torch.equal(outputs(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)), outputs(model))
    model.float()
    with model.disable_adapter():
        assert torch.equal(outputs(model), outputs(base.float()))


@pytest.mark.parametrize("name", ["a.b", "keys", "items", "training"])
def test_names_that_torch_cannot_hold(name):
    model = mlp()
    with pytest.raises(SliceFineError, match="an adapter's name has no dot"):
        get_peft_model(model, SliceFineConfig(target_modules=["lin0"]), adapter_name=name)
    assert not layers(model)


def test_layers_that_made_different_numbers_of_steps(tmp_path):
    base, model = adapted_mlp(axis="row", slide_every=2)
    fit(model, 5, optimizer=torch.optim.SGD([layers(model)[0].slicefine_weight["default"]], lr=0.1))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(outputs(loaded), outputs(model))
    assert active_slices(loaded) == active_slices(model)


def test_nan_is_said_when_it_is_saved(tmp_path):
    base, model = adapted_mlp()
    optimizer = fit(model, 2)
    layers(model)[0].slicefine_weight["default"].grad = torch.full((4, 20), float("nan"))
    optimizer.step()
    with pytest.warns(SliceFineWarning, match=r"saved with NaN or Inf in 1 layers.*lin0"):
        model.save_pretrained(tmp_path)
    with pytest.raises(SliceFineError, match="NaN"):
        PeftModel.from_pretrained(base, tmp_path)


def test_pickle_of_a_whole_model(tmp_path):
    _, model = adapted_mlp(**SETTINGS)
    fit(model, 4)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    fit(model, 4)
    fit(loaded, 4)
    assert not differences(model, loaded)
    assert consistent(loaded)


def test_no_noise_outside_of_the_slice():
    _, model = adapted_mlp(axis="alternate", init_weights=False)
    assert consistent(model)
    for layer in layers(model):
        active = layer.slicefine_state["default"].active
        assert not layer.slicefine_weight["default"][:, layer.shape[1 - active.dim] :].any()
