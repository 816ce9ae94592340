"""Disable, unload, merge, switch: exact bytes, always."""

import copy

import pytest
import torch
from peft import get_peft_model
from tiny import adapted_mlp, batch, bert, differences, fit, mlp, outputs, tokens, trainable

from slicefine import SliceFineConfig, SliceFineError, SliceFineWarning

SETTINGS = [
    {"axis": "row"},
    {"axis": "column"},
    {"axis": "alternate", "bias": "slicefine_only"},
    {"axis": "alternate", "order": "random", "slide_every": 1, "r": 3},
    {"axis": "alternate", "slide_every": 1, "r": 7, "bias": "slicefine_only"},
]
each_setting = pytest.mark.parametrize("settings", SETTINGS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def base_state(model):
    """The base model's weights inside an adapted one, by the base's own names."""
    state = model.base_model.model.state_dict()
    return {k.replace(".base_layer", ""): v.clone() for k, v in state.items() if "slicefine" not in k}


@each_dtype
@each_setting
def test_disabled_is_the_base_model_bit_by_bit(settings, dtype):
    base, model = adapted_mlp(dtype=dtype, **settings)
    before = outputs(base)
    assert torch.equal(outputs(model), before), "attaching must not change the outputs"
    fit(model, 11)
    trained = outputs(model)
    assert not torch.equal(trained, before)
    with model.disable_adapter():
        assert torch.equal(outputs(model), before)
        inside = base_state(model)
        assert all(torch.equal(inside[name], value) for name, value in base.state_dict().items())
    assert torch.equal(outputs(model), trained)


@each_dtype
@each_setting
def test_training_goes_on_after_disabling_as_if_nothing_had_been(settings, dtype):
    _, model = adapted_mlp(dtype=dtype, **settings)
    twin = copy.deepcopy(model)
    optimizer, other = fit(model, 4), fit(twin, 4)
    with model.disable_adapter():
        outputs(model)
    fit(model, 5, optimizer=optimizer, seed=3)
    fit(twin, 5, optimizer=other, seed=3)
    assert not differences(model, twin)


@each_dtype
@each_setting
def test_unload_gives_the_base_model_back(settings, dtype):
    base, model = adapted_mlp(dtype=dtype, **settings)
    fit(model, 11)
    assert not differences(model.unload(), base)


@each_dtype
@each_setting
def test_merge_and_unload_gives_the_trained_model(settings, dtype):
    base, model = adapted_mlp(dtype=dtype, **settings)
    fit(model, 11)
    trained = outputs(model)
    merged = model.merge_and_unload()
    assert torch.equal(outputs(merged), trained)
    assert merged.state_dict().keys() == base.state_dict().keys(), "parameters were added"
    assert {type(m) for m in merged.modules()} == {type(m) for m in base.modules()}


def test_merge_while_disabled_merges_the_trained_values():
    _, model = adapted_mlp()
    fit(model, 4)
    trained = outputs(model)
    model.base_model.disable_adapter_layers()
    assert torch.equal(outputs(model.merge_and_unload()), trained)


def test_disabling_in_inference_mode():
    base, model = adapted_mlp(axis="alternate", bias="slicefine_only")
    twin = copy.deepcopy(model)
    optimizer, other = fit(model, 4), fit(twin, 4)
    with torch.inference_mode(), model.disable_adapter():
        assert torch.equal(model(batch()), base(batch()))
    fit(model, 4, optimizer=optimizer)
    fit(twin, 4, optimizer=other)
    assert not differences(model, twin)


def test_merge_and_unmerge_in_place():
    _, model = adapted_mlp(axis="alternate")
    twin = copy.deepcopy(model)
    optimizer, other = fit(model, 4), fit(twin, 4)
    trained = outputs(model)
    model.merge_adapter()
    assert torch.equal(outputs(model), trained)
    model.unmerge_adapter()
    assert torch.equal(outputs(model), trained)
    fit(model, 4, optimizer=optimizer)
    fit(twin, 4, optimizer=other)
    assert not differences(model, twin)


def test_a_thousand_exchanges_drift_nowhere():
    _, model = adapted_mlp(dtype=torch.bfloat16, axis="alternate", slide_every=1, bias="slicefine_only")
    fit(model, 9)
    before = copy.deepcopy(model)
    for _ in range(1000):
        model.base_model.disable_adapter_layers()
        model.base_model.enable_adapter_layers()
    assert not differences(model, before)


def test_a_disabled_forward_between_forward_and_backward():
    """The order of DPO: policy forward, disabled reference forward, backward."""
    _, model = adapted_mlp()
    twin = copy.deepcopy(model)
    x = batch()
    loss = model(x).square().mean()
    with torch.no_grad(), model.disable_adapter():
        model(x)
    loss.backward()
    twin(x).square().mean().backward()
    for parameter, other in zip(trainable(model), trainable(twin), strict=True):
        assert torch.equal(parameter.grad, other.grad)


def test_a_stale_graph_is_caught():
    _, model = adapted_mlp(target_modules=["lin1"])
    loss = model.base_model.model.lin1(batch(size=4) @ torch.ones(10, 20, requires_grad=True)).sum()
    fit(model, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_two_adapters_take_turns():
    base, model = adapted_mlp(axis="alternate")
    fit(model, 5)
    first = outputs(model)
    model.add_adapter("other", SliceFineConfig(r=2, axis="row", slide_every=2, target_modules=["lin1", "head"]))
    assert torch.equal(outputs(model), first)
    model.set_adapter("other")
    assert torch.equal(outputs(model), outputs(base))
    fit(model, 5)
    second = outputs(model)
    for _ in range(3):
        model.set_adapter("default")
        assert torch.equal(outputs(model), first)
        model.set_adapter("other")
        assert torch.equal(outputs(model), second)
    fresh = get_peft_model(mlp(), SliceFineConfig(r=2, axis="row", slide_every=2, target_modules=["lin1", "head"]))
    fit(fresh, 5)
    assert torch.equal(outputs(fresh), second), "an adapter depends on the one that was active when it was added"
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(outputs(model), first)
    assert not differences(model.unload(), base)


@each_setting
def test_the_configuration_of_a_trained_adapter_itself_makes_a_copy_of_it(settings):
    """As TRL makes the frozen reference of a policy that is trained further."""
    base, model = adapted_mlp(**settings)
    optimizer = fit(model, 5)
    trained = outputs(model)
    with pytest.warns(SliceFineWarning, match=r"'ref'.*'default'.*has made 5 steps, and starts as a copy"):
        model.add_adapter("ref", model.peft_config["default"])
    twin = copy.deepcopy(model)
    fit(model, 4, optimizer=optimizer)
    moved = outputs(model)
    model.set_adapter("ref")
    assert torch.equal(outputs(model), trained)
    with model.disable_adapter():
        assert torch.equal(outputs(model), outputs(base))
    model.set_adapter("default")
    assert torch.equal(outputs(model), moved)
    # The copy trains on as the original would.
    twin.set_adapter("ref")
    one, other = copy.deepcopy(twin), twin
    one.set_adapter("default")
    fit(one, 4)
    fit(other, 4)
    assert torch.equal(outputs(one), outputs(other))


def test_several_active_adapters_are_refused():
    _, model = adapted_mlp()
    model.add_adapter("other", SliceFineConfig(target_modules=["lin1"]))
    with pytest.raises(SliceFineError, match=r"One slicefine adapter is active at a time.*\['default', 'other'\]"):
        model.base_model.set_adapter(["default", "other"])


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_nan_is_never_merged(merge):
    _, model = adapted_mlp()
    fit(model, 4)
    layer = model.base_model.model.lin1
    with torch.no_grad():
        layer.base_layer.weight[1, 2] = float("nan")
    before = copy.deepcopy(model)
    with pytest.raises(SliceFineError, match=r"Only finite values are merged; 1 layers.*lin1.*Nothing was merged"):
        getattr(model, merge)()
    assert not layer.merged
    assert all(
        torch.equal(a, b) or a.isnan().any()
        for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True)
    )


def test_a_head_with_nan_is_never_merged():
    model = get_peft_model(bert(), SliceFineConfig(r=2, task_type="SEQ_CLS"))
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight[0, 0] = float("nan")
    with pytest.raises(SliceFineError, match=r"Only finite values are merged.*classifier.weight"):
        model.merge_and_unload()


def test_a_real_architecture_with_a_head_trained_in_full():
    base = bert()
    model = get_peft_model(
        copy.deepcopy(base), SliceFineConfig(r=3, slide_every=2, task_type="SEQ_CLS", bias="slicefine_only")
    )
    ids = tokens()
    model.train()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.0)
    for _ in range(7):
        model(input_ids=ids, labels=torch.tensor([0, 1, 2, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval(), base.eval()
    with torch.no_grad():
        expected, trained = base(ids).logits, model(ids).logits
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model(ids).logits, trained)
        twin = copy.deepcopy(model)
        assert torch.equal(twin.merge_and_unload()(ids).logits, trained)
        assert torch.equal(model.unload()(ids).logits, expected)
