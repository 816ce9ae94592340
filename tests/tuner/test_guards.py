"""What would be silently wrong is found: gradients of exchanged weights, parameters changed behind our back."""

import copy
import threading
import weakref

import pytest
import torch
from peft import get_peft_model
from tiny import adapted_mlp, batch, differences, fit, llama, outputs, tokens, trainable

from slicefine import SliceFineConfig, SliceFineError, SliceFineWarning, active_slices
from slicefine.tuner.layer import SliceLayer


def layers(model):
    return [module for module in model.modules() if isinstance(module, SliceLayer)]


# ---------------------------------------------------------------------- backward passes that come too late


def gradients_of_input(model, when="before", **context):
    x = batch().requires_grad_()
    with context["forward"](model):
        loss = model(x).square().sum()
        if when == "before":
            loss.backward()
            return x.grad
    loss.backward()
    return x.grad


def disabled(model):
    return model.disable_adapter()


def test_a_disabled_forward_with_its_backward():
    base, model = adapted_mlp()
    fit(model, 4)
    x = batch().requires_grad_()
    base.requires_grad_(False)(x).square().sum().backward()
    assert torch.equal(gradients_of_input(model, forward=disabled), x.grad)


def test_a_disabled_forward_whose_backward_comes_after_enabling():
    _, model = adapted_mlp()
    fit(model, 4)
    with pytest.raises(
        SliceFineError, match=r"lin1.*made with no adapter.*now holds the values of adapter 'default'.*no_grad"
    ):
        gradients_of_input(model, "after", forward=disabled)


@pytest.mark.parametrize("trainable_adapter", [True, False])
def test_a_forward_whose_backward_comes_after_a_switch(trainable_adapter):
    _, model = adapted_mlp()
    fit(model, 4)
    model.add_adapter("other", SliceFineConfig(r=2, target_modules=["lin0", "lin1"]))
    if not trainable_adapter:
        model.requires_grad_(False)
    loss = model(batch().requires_grad_()).sum()
    model.set_adapter("other")
    with pytest.raises(SliceFineError, match=r"lin1.*made with adapter 'default'.*adapter 'other'"):
        loss.backward()


def test_there_and_back_again_is_fine():
    _, model = adapted_mlp()
    fit(model, 4)
    twin = copy.deepcopy(model)
    model.add_adapter("other", SliceFineConfig(r=2, target_modules=["lin0", "lin1"]))
    x, y = batch().requires_grad_(), batch().requires_grad_()
    loss = model(x).square().sum()
    model.set_adapter("other")
    outputs(model)
    model.set_adapter("default")
    loss.backward()
    twin(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # true of the disabled pass
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_meets_the_right_values(reentrant):
    model = get_peft_model(llama(), SliceFineConfig(r=2))
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.base_model.model.enable_input_require_grads()
    model.train()
    loss = model(input_ids=tokens(), labels=tokens(), use_cache=False).loss
    with model.disable_adapter(), torch.no_grad():
        model(input_ids=tokens())
    loss.backward()
    assert all(parameter.grad is not None for parameter in trainable(model))


# ---------------------------------------------------------------------- parameters changed behind our back


def by_hand(model):
    """An optimizer that is none of torch's."""
    with torch.no_grad():
        for parameter in trainable(model):
            parameter -= 0.1


CHANGED = r"lin0: the weight and the parameter of its slice.*differ.*torch.optim.Optimizer"


@pytest.mark.parametrize(
    "event",
    [
        lambda model, folder: model.save_pretrained(folder),
        lambda model, folder: model.merge_and_unload(),
        lambda model, folder: model.merge_adapter(),
        lambda model, folder: model.base_model.disable_adapter_layers(),
        lambda model, folder: model.set_adapter("other"),
        lambda model, folder: model.eval(),
        lambda model, folder: model(batch()),
    ],
    ids=["save", "merge and unload", "merge", "disable", "switch", "eval", "forward"],
)
def test_a_parameter_changed_by_hand(event, tmp_path):
    _, model = adapted_mlp()
    model.add_adapter("other", SliceFineConfig(r=2, target_modules=["lin0"]))
    fit(model, 2)
    model.train()
    by_hand(model)
    with pytest.raises(SliceFineError, match=CHANGED):
        event(model, tmp_path / "out")
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


EVERYWHERE = {
    "disable": lambda model: model.base_model.disable_adapter_layers(),
    "switch": lambda model: model.set_adapter("other"),
    "merge": lambda model: model.merge_adapter(),
    "merge and unload": lambda model: model.merge_and_unload(),
    "eval": lambda model: model.eval(),
}


@pytest.mark.parametrize("event", EVERYWHERE)
def test_what_is_found_in_the_last_layer_leaves_the_first_as_it_was(event):
    _, model = adapted_mlp()
    model.add_adapter("other", SliceFineConfig(r=2, target_modules=["lin0", "lin1"]))
    fit(model, 2)
    model.train()
    with torch.no_grad():
        layers(model)[1].slicefine_weight["default"] += 1

    def state():
        return [
            (m.installed, m.disable_adapters, m.merged_adapters, m.active_adapter, m.training) for m in layers(model)
        ]

    before = state()
    with pytest.raises(SliceFineError, match=CHANGED.replace("lin0", "lin1")):
        EVERYWHERE[event](model)
    assert state() == before
    assert model.active_adapters == ["default"]


def test_an_average_that_is_swapped_in_for_evaluation_is_found():
    """As EMA implementations do: copy to the parameters, evaluate, restore."""
    _, model = adapted_mlp()
    fit(model, 2)
    model.eval()
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.copy_(parameter * 0.9)
        with pytest.raises(SliceFineError, match=CHANGED):
            model(batch())


def test_a_frozen_adapter_does_not_move():
    """A head that is warmed up first, with an optimizer that holds everything."""
    _, model = adapted_mlp(slide_every=2)
    for layer in layers(model):
        layer.requires_grad_(False)
    model.base_model.model.head.requires_grad_(True)
    before = copy.deepcopy(active_slices(model))
    fit(model, 4, optimizer=torch.optim.SGD(model.parameters(), lr=1e-2))
    assert active_slices(model) == before


def test_a_warning_that_is_an_error_comes_before_the_step():
    _, model = adapted_mlp()
    before = copy.deepcopy(model)
    with pytest.raises(SliceFineWarning, match="weight_decay"):
        fit(model, 1, optimizer=torch.optim.AdamW(trainable(model), weight_decay=0.1))
    assert not differences(model, before)


def test_an_exchange_that_is_interrupted(monkeypatch):
    from slicefine.tuner.originals import Originals

    _, model = adapted_mlp()
    model.add_adapter("other", SliceFineConfig(r=2, target_modules=["lin0", "lin1"], slide_every=2))
    fit(model, 4)
    before = outputs(model)
    exchange, calls = Originals.exchange, []

    def interrupted(self, weight):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        exchange(self, weight)

    monkeypatch.setattr(Originals, "exchange", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.set_adapter("other")
    model.set_adapter("default")
    assert torch.equal(outputs(model), before)


def test_an_inner_optimizer_is_forgotten_when_the_outer_one_raises():
    from slicefine.tuner import sliding

    class Outer(torch.optim.SGD):
        def step(self):
            inner.step()
            raise RuntimeError("no")

    _, model = adapted_mlp()
    parameters = trainable(model)
    inner, outer = (
        kind([parameter], lr=0.1) for kind, parameter in zip((torch.optim.SGD, Outer), parameters, strict=True)
    )
    model(batch()).sum().backward()
    with pytest.raises(RuntimeError, match="no"):
        outer.step()
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    other.step()
    assert sliding._threads.inner == []
    assert {layer.slicefine_state["default"].step for layer in layers(model)} == {0}


def test_a_model_made_in_another_thread_waits_for_the_hook(monkeypatch):
    """A set that grows while it is walked through raises."""
    from slicefine.tuner import sliding

    _, model = adapted_mlp()
    other = layers(adapted_mlp()[1])[0]
    threads, waited = [], []

    class Watched(weakref.WeakSet):
        def __iter__(self):
            threads.append(threading.Thread(target=sliding.watch, args=(other,)))
            threads[-1].start()
            threads[-1].join(0.2)
            waited.append(threads[-1].is_alive())
            yield from super().__iter__()

    watched = Watched(layers(model))
    monkeypatch.setattr(sliding, "_layers", watched)
    fit(model, 1)
    for thread in threads:
        thread.join()
    assert waited
    assert all(waited)
    assert other in watched


# dynamo makes an instance of every autograd function that it traces, and torch warns of that
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_finds_it_at_eval():
    _, model = adapted_mlp()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(batch()).sum().backward()
    by_hand(model)
    compiled(batch())
    with pytest.raises(SliceFineError, match=CHANGED):
        model.eval()


def test_what_is_changed_and_changed_back_is_fine():
    _, model = adapted_mlp()
    fit(model, 2)
    by_hand(model)
    with torch.no_grad():
        for layer in layers(model):
            active = layer.slicefine_state["default"].active
            rows = layer.base_layer.weight[active.start : active.stop]
            layer.slicefine_weight["default"][:, : rows.shape[1]] = rows
    model.eval()
    fit(model, 2)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD], ids=lambda kind: kind.__name__)
def test_sharpness_aware_steps_are_found(optimizer):
    """Perturb, run again, restore, step: the second pass would see the unperturbed weights."""
    _, model = adapted_mlp()
    optimizer = optimizer(trainable(model), lr=1e-2, weight_decay=0.0)
    model(batch()).sum().backward()
    with torch.no_grad():
        for parameter in trainable(model):
            parameter += 0.05 * parameter.grad
    with pytest.raises(SliceFineError, match=r"perturb \(SAM\)"):
        model(batch())


def test_nan_is_not_mistaken_for_a_change():
    _, model = adapted_mlp()
    optimizer = fit(model, 2)
    for parameter in trainable(model):
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.step()
    model.eval()
    assert outputs(model).isnan().any()


@pytest.mark.parametrize("there_and_back", [False, True])
def test_a_cast_is_no_change(there_and_back):
    _, model = adapted_mlp(axis="alternate")
    fit(model, 5)
    model.to(torch.bfloat16)
    if there_and_back:
        model.to(torch.float32)
    model.eval()
    fit(model, 3)
    model.merge_and_unload()


def test_a_hidden_adapter_that_was_cast_is_no_change():
    _, model = adapted_mlp(axis="alternate")
    fit(model, 5)
    with model.disable_adapter():
        model.to(torch.bfloat16)
    model.float().eval()


def test_a_copy_by_value_of_two_networks_is_told_apart():
    """The average of a copy across a move holds parameters of different places."""
    model = adapted_mlp(slide_every=2)[1]
    averaged = torch.optim.swa_utils.AveragedModel(model)
    optimizer = None
    for _ in range(3):
        optimizer = fit(model, 1, optimizer=optimizer)
        averaged.update_parameters(model)
    with pytest.raises(SliceFineError, match=r"average \(EMA, SWA\)"):
        averaged.eval()
