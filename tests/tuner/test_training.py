"""Slices that train and slide, against a slow simulation that masks dense gradients."""

import copy
import warnings

import pytest
import torch
from peft import get_peft_model
from tiny import adapted_mlp, batch, differences, fit, llama, mlp, outputs, tokens, trainable

import slicefine
from slicefine import SliceFineConfig, SliceFineError, SliceFineWarning, active_slices, parameter_counts, touched_slices
from slicefine.kernel import vectors
from slicefine.slicing import Slice
from slicefine.tuner.layer import SliceLayer


@pytest.mark.parametrize("order", ["sweep", "random"])
def test_only_touched_entries_change(order):
    base, model = adapted_mlp(axis="alternate", order=order, slide_every=2)
    fit(model, 9)
    touched = touched_slices(model)
    merged = model.merge_and_unload()
    for name in ("lin0", "lin1"):
        changed = getattr(merged, name).weight != getattr(base, name).weight
        allowed = torch.zeros_like(changed)
        for piece in touched[name]:
            vectors(allowed, piece.axis)[piece.start : piece.stop] = True
        assert not bool((changed & ~allowed).any())
        assert float(changed[allowed].float().mean()) > 0.5  # dead ReLU units get no gradient
    assert torch.equal(merged.head.weight, base.head.weight)


def test_the_weight_follows_the_master_after_every_step():
    _, model = adapted_mlp(axis="alternate", dtype=torch.bfloat16)
    optimizer = None
    for _ in range(8):
        optimizer = fit(model, 1, optimizer=optimizer)
        for layer in (m for m in model.modules() if isinstance(m, SliceLayer)):
            active = layer.slicefine_state["default"].active
            present = vectors(layer.base_layer.weight, active.axis)[active.start : active.stop]
            assert torch.equal(present, layer._in_use("default").to(torch.bfloat16))


def test_bf16_does_not_swallow_small_updates():
    """One hundred updates of a thousandth of the spacing of bf16: lost one by one, seen by the fp32 master."""
    _, model = adapted_mlp(dtype=torch.bfloat16, axis="row", slide_every=None)
    layer = model.base_model.model.lin0
    before = layer.base_layer.weight.detach().clone()
    optimizer = torch.optim.SGD(trainable(model), lr=1.0)
    master = layer.slicefine_weight["default"]
    gradient = -master.detach().abs() * 2**-9 / 100
    for _ in range(200):
        for parameter in trainable(model):
            parameter.grad = torch.zeros_like(parameter)
        master.grad = gradient.clone()
        optimizer.step()
    changed = (layer.base_layer.weight != before)[:4]
    assert float(changed.float().mean()) > 0.9


def test_positions_and_counts_while_training():
    _, model = adapted_mlp(axis="alternate", r=4, slide_every=3)
    assert active_slices(model) == {"lin0": Slice("row", 0, 4), "lin1": Slice("row", 0, 4)}
    assert touched_slices(model) == {"lin0": [], "lin1": []}
    optimizer = fit(model, 3)
    assert active_slices(model) == {"lin0": Slice("column", 0, 4), "lin1": Slice("column", 0, 4)}
    assert touched_slices(model)["lin0"] == [Slice("row", 0, 4)]
    fit(model, 2, optimizer=optimizer)
    counts = parameter_counts(model, steps=9)
    shapes = [(20, 10), (14, 20)]
    assert counts.active == sum(4 * d_out for d_out, _ in shapes)
    assert counts.touched == sum(4 * d_in + 4 * d_out - 16 for d_out, d_in in shapes)
    assert counts.planned == sum(8 * d_in + 4 * d_out - 32 for d_out, d_in in shapes)
    assert counts.added == 0
    assert counts.total == sum(p.numel() for p in mlp().parameters())
    assert parameter_counts(model).planned is None


def test_parameters_keep_identity_and_shape_over_moves():
    _, model = adapted_mlp(axis="alternate", slide_every=1)
    before = {name: (id(p), p.shape) for name, p in model.named_parameters() if p.requires_grad}
    fit(model, 7)
    assert {name: (id(p), p.shape) for name, p in model.named_parameters() if p.requires_grad} == before


def test_a_move_resets_the_moments_and_adams_step():
    _, model = adapted_mlp(axis="row", slide_every=3)
    optimizer = fit(model, 2)
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}
    fit(model, 1, optimizer=optimizer)
    assert not optimizer.state
    fit(model, 1, optimizer=optimizer)
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}


def test_gradient_accumulation_counts_optimizer_steps():
    _, model = adapted_mlp(axis="row", slide_every=2)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    for micro_batch in range(6):
        model(batch(seed=micro_batch)).square().mean().backward()
        if micro_batch % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
    assert active_slices(model)["lin0"] == Slice("row", 4, 4)


def test_a_skipped_step_of_a_scaler_is_not_counted():
    _, model = adapted_mlp(axis="row", slide_every=1)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for scale, start in ((1.0, 4), (float("inf"), 4), (1.0, 8)):
        scaler.scale(model(batch()).square().mean() * scale).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert active_slices(model)["lin0"].start == start


def test_a_copied_model_trains_on_its_own():
    _, model = adapted_mlp(axis="alternate", slide_every=2)
    fit(model, 1)
    twin = copy.deepcopy(model)
    fit(twin, 4)
    assert active_slices(model)["lin0"] == Slice("row", 0, 4)
    assert active_slices(twin)["lin0"] == Slice("row", 4, 4)
    alone = copy.deepcopy(model)
    fit(alone, 4)
    assert not differences(alone, twin)


def test_two_models_of_one_configuration_do_not_meet():
    config = SliceFineConfig(r=2, axis="row", slide_every=2, target_modules=["lin0"])
    first, second = get_peft_model(mlp(), config), get_peft_model(mlp(), config)
    fit(first, 3)
    assert active_slices(first)["lin0"].start == 2
    assert active_slices(second)["lin0"].start == 0


def test_biases_are_trained_through_fp32_masters():
    base, model = adapted_mlp(bias="slicefine_only", dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4 * 20 + 4 * 20 + 20 + 14
    fit(model, 5)
    layer = model.base_model.model.lin0
    assert layer.slicefine_bias["default"].dtype is torch.float32
    assert torch.equal(layer.base_layer.bias, layer.slicefine_bias["default"].bfloat16())
    assert not torch.equal(layer.base_layer.bias, base.lin0.bias)
    assert not layer.base_layer.bias.requires_grad


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_language_model_with_gradient_checkpointing(reentrant):
    model = get_peft_model(llama(), SliceFineConfig(r=2, slide_every=2))
    twin = copy.deepcopy(model)
    ids, calls = tokens(), []
    twin.base_model.model.model.layers[0].self_attn.register_forward_hook(lambda *arguments: calls.append(1))
    twin.base_model.model.activation_checkpointing_enable({"use_reentrant": reentrant})
    twin.base_model.model.enable_input_require_grads()  # PEFT does so when checkpointing is on before attaching
    for net in (model, twin):
        net.train()
        optimizer = torch.optim.AdamW(trainable(net), lr=1e-2, weight_decay=0.0)
        for _ in range(5):
            net(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len(calls) == 10, "nothing was computed again in backward"
    assert not differences(model, twin)
    assert active_slices(model)["model.layers.0.self_attn.q_proj"] == Slice("row", 2, 2)


def test_the_training_forward_gives_the_bits_of_the_plain_one():
    _, model = adapted_mlp(axis="alternate")
    fit(model, 4)
    assert torch.equal(model(batch()).detach(), outputs(model))


def test_weight_decay_on_slices_is_said_once():
    _, model = adapted_mlp()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3, weight_decay=0.01)
    with pytest.warns(SliceFineWarning, match=r"weight_decay=0.01.*Set weight_decay=0"):
        fit(model, 1, optimizer=optimizer)
    fit(model, 2, optimizer=optimizer)


def test_an_unfrozen_base_weight_is_refused():
    _, model = adapted_mlp()
    model.base_model.model.lin0.base_layer.weight.requires_grad = True
    with pytest.raises(SliceFineError, match=r"by its slice or as a whole, not both.*20 x 10"):
        model(batch())


def test_alternate_without_moves_is_said():
    with pytest.warns(SliceFineWarning, match="only rows will be trained"):
        get_peft_model(mlp(), SliceFineConfig(slide_every=None, target_modules=["lin0"]))


def test_a_static_slice_stays():
    _, model = adapted_mlp(axis="column", slide_every=None)
    fit(model, 12)
    assert active_slices(model)["lin0"] == Slice("column", 0, 4)


def test_narrow_weights_under_all_linear_are_clamped_and_listed():
    with pytest.warns(SliceFineWarning, match=r"r=12.*lin0 \(20, 10\).*head \(3, 14\)"):
        model = get_peft_model(mlp(), SliceFineConfig(r=12, axis="alternate", slide_every=1))
    pieces = []
    optimizer = None
    for _ in range(4):
        pieces.append(active_slices(model)["head"])
        optimizer = fit(model, 1, optimizer=optimizer)
    assert pieces == [Slice("row", 0, 3), Slice("column", 0, 12), Slice("row", 0, 3), Slice("column", 2, 12)]


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_casting_the_model_keeps_masters_wide(cast):
    _, model = adapted_mlp(axis="alternate", bias="slicefine_only")
    fit(model, 4)
    model.to(cast)
    for layer in (m for m in model.modules() if isinstance(m, SliceLayer)):
        assert layer.base_layer.weight.dtype is cast
        assert layer.slicefine_weight["default"].dtype is torch.float32
        assert layer.slicefine_bias["default"].dtype is torch.float32
    fit(model, 4)


def test_an_optimizer_of_another_model_is_left_alone():
    _, model = adapted_mlp(slide_every=1)
    fit(mlp(), 3)
    assert active_slices(model)["lin0"].start == 0


def test_no_warning_in_a_plain_run():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, model = adapted_mlp()
        fit(model, 7)
    assert slicefine.touched_slices(model)["lin0"]
