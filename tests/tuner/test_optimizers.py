"""Optimizers and training loops of every kind: what holds across moves, and what is refused because it cannot."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from oracle import simulate
from peft import PeftModel, get_peft_model
from tiny import adapted_mlp, batch, differences, fit, llama, outputs, tokens, trainable
from torch import optim
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.optimization import Adafactor as ScaledAdafactor

from slicefine import SliceFineConfig, SliceFineError, active_slices
from slicefine.slicing import Slice
from slicefine.training.callback import SliceFineCallback
from slicefine.tuner.layer import SliceLayer

STEPS = 20
TARGETS = ("lin0", "lin1")


class Lion(optim.Optimizer):
    """The sign of a running mean; its state is a plain dictionary."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
        self.state = {}

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                mean = self.state.setdefault(parameter, {"mean": torch.zeros_like(parameter)})["mean"]
                parameter.sub_(group["lr"] * (0.9 * mean + 0.1 * parameter.grad).sign())
                mean.lerp_(parameter.grad, 0.01)


class Momentum(optim.Optimizer):
    """Keeps its moments beside `state`."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
        self.means = {}

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                mean = self.means.setdefault(parameter, torch.zeros_like(parameter))
                mean.mul_(0.9).add_(parameter.grad)
                parameter.sub_(group["lr"] * mean)


class Lookahead(optim.Optimizer):
    """Steps around another optimizer's step; its slow weights are state, so that they are forgotten at a move."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner = inner

    @torch.no_grad()
    def step(self, closure=None):
        before = {p: p.clone() for group in self.param_groups for p in group["params"]}
        self.inner.step(closure)
        for parameter, value in before.items():
            state = self.state[parameter]
            state.setdefault("slow", value)
            state["steps"] = state.get("steps", 0) + 1
            if state["steps"] % 2 == 0:
                state["slow"].lerp_(parameter, 0.5)
                parameter.copy_(state["slow"])


OPTIMIZERS = {
    "adamw-tensor-lr": lambda p: optim.AdamW(p, lr=torch.tensor(3e-2), weight_decay=0.0),
    "adam-amsgrad": lambda p: optim.Adam(p, lr=3e-2, amsgrad=True),
    "adam-amsgrad-foreach": lambda p: optim.Adam(p, lr=3e-2, amsgrad=True, foreach=True),
    "adam-amsgrad-fused": lambda p: optim.Adam(p, lr=3e-2, amsgrad=True, fused=True),
    "adamax": lambda p: optim.Adamax(p, lr=3e-2),
    "nadam": lambda p: optim.NAdam(p, lr=3e-2),
    "radam": lambda p: optim.RAdam(p, lr=1e-1),
    "sgd-nesterov": lambda p: optim.SGD(p, lr=1e-1, momentum=0.9, nesterov=True),
    "sgd-nesterov-foreach": lambda p: optim.SGD(p, lr=1e-1, momentum=0.9, nesterov=True, foreach=True),
    "sgd-nesterov-fused": lambda p: optim.SGD(p, lr=1e-1, momentum=0.9, nesterov=True, fused=True),
    "rmsprop-centered": lambda p: optim.RMSprop(p, lr=1e-2, centered=True),
    "rmsprop-foreach": lambda p: optim.RMSprop(p, lr=1e-2, foreach=True),
    "rprop": lambda p: optim.Rprop(p, lr=1e-2),
    "adagrad": lambda p: optim.Adagrad(p, lr=3e-2),
    "adagrad-fused": lambda p: optim.Adagrad(p, lr=3e-2, fused=True),
    "adadelta": lambda p: optim.Adadelta(p, lr=3.0),
    "muon": lambda p: optim.Muon(p, lr=3e-2, weight_decay=0.0),
    "lion-plain-dict": lambda p: Lion(p, lr=1e-2),
    "moments-beside-state": lambda p: Momentum(p, lr=1e-1),
    "lookahead": lambda p: Lookahead(optim.SGD(p, lr=1e-1, momentum=0.9)),
}
WHOLE_TENSOR = {
    "adafactor": lambda p: optim.Adafactor(p, lr=3e-2),
    "scaled-adafactor-relative": lambda p: ScaledAdafactor(p),
    "scaled-adafactor": lambda p: ScaledAdafactor(p, lr=3e-2, relative_step=False, scale_parameter=False),
    "scaled-adafactor-momentum": lambda p: ScaledAdafactor(p, lr=3e-2, relative_step=False, beta1=0.9),
}
"""Optimizers that look at means over a whole parameter: they see the padding of `alternate`."""


def slice_layers(model):
    return [module for module in model.modules() if isinstance(module, SliceLayer)]


def masters(model):
    return [layer.slicefine_weight["default"] for layer in slice_layers(model)]


def consistent(model):
    """Whether positions are those of the steps made, and weights and biases hold what their masters do."""
    for layer in slice_layers(model):
        parameters = {id(p) for name in layer.adapter_layer_names for p in getattr(layer, name).values()}
        state = layer.slicefine_state["default"]
        assert state.active == state.schedule.slice_at(state.step, layer.shape)
        for present, value in layer.pending_writes("default", parameters):
            assert torch.equal(present, value.to(present.dtype))
    return True


def padding(model):
    """What the masters hold outside of their slices."""
    actives = [layer.slicefine_state["default"].active for layer in slice_layers(model)]
    return torch.cat(
        [
            master.detach()[:, layer.shape[1 - active.dim] :].reshape(-1)
            for layer, master, active in zip(slice_layers(model), masters(model), actives, strict=True)
        ]
    )


def assert_agree(model, expected):
    for name in TARGETS:
        present = getattr(model.base_model.model, name).base_layer.weight
        torch.testing.assert_close(present, getattr(expected, name).weight, rtol=1e-3, atol=1e-4)


def loss_of(model, seed=1):
    return model(batch(seed=seed)).square().mean()


def train(model, optimizer, seeds):
    for seed in seeds:
        loss_of(model, seed).backward()
        optimizer.step()
        optimizer.zero_grad()


# ---------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("axis", ["row", "alternate"])
def test_agrees_with_masked_dense_training(axis, optimizer):
    base, model = adapted_mlp(axis=axis)
    fit(model, STEPS, batch(), OPTIMIZERS[optimizer](trainable(model)))
    assert consistent(model)
    assert_agree(model, simulate(base, model.peft_config["default"].schedule, OPTIMIZERS[optimizer], STEPS, batch()))


@pytest.mark.parametrize("order", ["sweep", "random"])
@pytest.mark.parametrize(("axis", "r", "stays", "moves"), [("row", 3, "head", "lin0"), ("column", 10, "lin0", "lin1")])
def test_a_slice_that_cannot_move_keeps_its_moments(axis, r, stays, moves, order):
    base, model = adapted_mlp(axis=axis, r=r, order=order, target_modules=[stays, moves])
    schedule = model.peft_config["default"].schedule
    optimizer = fit(model, 14)
    expected = simulate(base, schedule, lambda p: torch.optim.AdamW(p, lr=3e-2, weight_decay=0.0), 14, batch(), targets=(stays, moves))  # fmt: skip
    assert (
        int(optimizer.state[model.get_submodule(f"base_model.model.{stays}").slicefine_weight["default"]]["step"]) == 14
    )
    merged = model.merge_and_unload()
    for name in (stays, moves):
        torch.testing.assert_close(getattr(merged, name).weight, getattr(expected, name).weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("optimizer", WHOLE_TENSOR)
@pytest.mark.parametrize("axis", ["row", "column", "alternate"])
def test_optimizers_that_scale_by_a_whole_parameter_see_the_padding_of_alternate(axis, optimizer):
    base, model = adapted_mlp(axis=axis)
    schedule = model.peft_config["default"].schedule
    fit(model, STEPS, batch(), WHOLE_TENSOR[optimizer](trainable(model)))
    assert consistent(model)
    assert len(padding(model)) == (4 * 10 if axis == "alternate" else 0)
    assert not padding(model).any()
    assert_agree(model, simulate(base, schedule, WHOLE_TENSOR[optimizer], STEPS, batch(), padded=True))
    unpadded = simulate(base, schedule, WHOLE_TENSOR[optimizer], STEPS, batch())
    if axis == "alternate":
        with pytest.raises(AssertionError):
            assert_agree(model, unpadded)
    else:
        assert_agree(model, unpadded)


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit", "RMSprop8bit", "AdEMAMix8bit"])
@pytest.mark.parametrize("axis", ["row", "alternate"])
def test_8_bit_optimizers(name, axis):
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def make(parameters):
        return getattr(bitsandbytes.optim, name)(parameters, lr=1e-3, weight_decay=0.0, min_8bit_size=0)

    base, model = adapted_mlp(axis=axis)
    optimizer = make(trainable(model))
    fit(model, 2, batch(), optimizer)
    assert {state["state1"].dtype for state in optimizer.state.values()} == {torch.uint8}
    _, model = adapted_mlp(axis=axis)
    fit(model, STEPS, batch(), make(trainable(model)))
    assert consistent(model)
    # The values of a block share a scale, and the padding is among them.
    assert_agree(model, simulate(base, model.peft_config["default"].schedule, make, STEPS, batch(), padded=True))


def test_an_optimizer_made_after_a_move_is_as_good_as_one_made_before():
    _, model = adapted_mlp(axis="alternate")
    early = fit(model, 6)
    twin = copy.deepcopy(model)
    fit(model, 4, optimizer=early)
    fit(twin, 4)
    assert not differences(model, twin)


def test_a_move_resets_the_state_in_every_optimizer_that_trains_the_slice():
    _, model = adapted_mlp(axis="row", slide_every=3)
    optimizers = [optim.SGD(trainable(model), lr=lr, momentum=0.9) for lr in (0.1, 0.01)]
    for turn in (0, 1, 0):
        train(model, optimizers[turn], [turn])
    assert active_slices(model)["lin0"].start == 4
    assert not [parameter for optimizer in optimizers for parameter in trainable(model) if parameter in optimizer.state]


@pytest.mark.parametrize("saved_after", [2, 3])
def test_optimizer_and_model_are_taken_back_across_a_move(saved_after):
    _, model = adapted_mlp(axis="alternate", bias="slicefine_only")
    optimizer = fit(model, saved_after)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    fit(model, 5, optimizer=optimizer)
    expected = copy.deepcopy(model)
    fit(model, 4, optimizer=optimizer)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert all(master not in optimizer.state for master in masters(model)) == (saved_after == 3)
    fit(model, 5, optimizer=optimizer)
    assert not differences(model, expected)


# ---------------------------------------------------------------------- loops


@pytest.mark.parametrize("kind", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_steps_that_a_gradient_scaler_skips_leave_no_trace(kind):
    _, model = adapted_mlp(axis="alternate", slide_every=2, bias="slicefine_only")
    twin = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=100)
    optimizer = optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.0, **kind)
    for step in range(9):
        loss = loss_of(model, step) * (float("inf") if step % 3 == 1 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    train(twin, optim.AdamW(trainable(twin), lr=1e-2, weight_decay=0.0, **kind), [0, 2, 3, 5, 6, 8])
    assert consistent(model)
    assert active_slices(model) == active_slices(twin) == dict.fromkeys(TARGETS, Slice("column", 4, 4))
    for value, expected in zip(trainable(model), trainable(twin), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)


def test_accelerates_optimizer_with_accumulation():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    _, model = adapted_mlp(axis="alternate", slide_every=2)
    twin = copy.deepcopy(model)
    prepared, optimizer = accelerator.prepare(model, optim.SGD(trainable(model), lr=0.1, momentum=0.9))
    for step in range(10):
        with accelerator.accumulate(prepared):
            accelerator.backward(loss_of(prepared, step))
            optimizer.step()
            optimizer.zero_grad()
    plain = optim.SGD(trainable(twin), lr=0.1, momentum=0.9)
    for step in range(0, 10, 2):
        ((loss_of(twin, step) / 2).backward(), (loss_of(twin, step + 1) / 2).backward())
        plain.step()
        plain.zero_grad()
    assert not differences(model, twin)
    assert active_slices(model)["lin0"] == Slice("row", 4, 4)


def test_a_closure_that_is_evaluated_once():
    _, model = adapted_mlp(axis="alternate", slide_every=2)
    twin = copy.deepcopy(model)
    optimizer = optim.SGD(trainable(model), lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    train(twin, optim.SGD(trainable(twin), lr=0.1), [1] * 5)
    assert not differences(model, twin)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_steps_inside_of_backward(checkpointing):
    """One optimizer per parameter, stepped as soon as its gradient is there, so that no two gradients live at once."""
    model = get_peft_model(llama(), SliceFineConfig(r=2, slide_every=2))
    twin = copy.deepcopy(model)
    if checkpointing:
        model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
        model.base_model.model.enable_input_require_grads()
    optimizers = {parameter: optim.SGD([parameter], lr=0.1, momentum=0.9) for parameter in trainable(model)}

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(step)
    optimizer = optim.SGD(trainable(twin), lr=0.1, momentum=0.9)
    for seed in range(5):
        ids = tokens(seed=seed)
        for net in (model.train(), twin.train()):
            net(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert consistent(model)
    assert not differences(model, twin)
    assert active_slices(model) == active_slices(twin)


@pytest.mark.parametrize("shared", [True, False])
def test_two_models_at_once(shared):
    """In one optimizer or in one each, each is trained as if it were alone."""
    _, first = adapted_mlp(axis="alternate", slide_every=2)
    _, second = adapted_mlp(axis="column", slide_every=3, r=3, bias="slicefine_only")
    alone = copy.deepcopy((first, second))
    groups = [trainable(first) + trainable(second)] if shared else [trainable(first), trainable(second)]
    optimizers = [optim.AdamW(group, lr=1e-2, weight_decay=0.0) for group in groups]
    for seed in range(7):
        (loss_of(first, seed) + loss_of(second, seed)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for model, expected in zip((first, second), alone, strict=True):
        train(expected, optim.AdamW(trainable(expected), lr=1e-2, weight_decay=0.0), range(7))
        assert not differences(model, expected)


def test_layers_with_an_optimizer_each_of_another_kind():
    base, model = adapted_mlp(axis="alternate")
    kinds = {"lin0": OPTIMIZERS["nadam"], "lin1": OPTIMIZERS["sgd-nesterov"]}
    optimizers = [make([getattr(model.base_model.model, n).slicefine_weight["default"]]) for n, make in kinds.items()]
    generator = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        y = model(batch())
        (y - torch.randn(y.shape, generator=generator)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    order = iter(kinds.values())  # the oracle makes those of `lin0` and `lin1` in turn, at equal steps

    def make(parameters):
        nonlocal order
        try:
            return next(order)(parameters)
        except StopIteration:
            order = iter(kinds.values())
            return next(order)(parameters)

    assert_agree(model, simulate(base, model.peft_config["default"].schedule, make, STEPS, batch()))


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        ids = tokens(seed=index)[0]
        return {"input_ids": ids, "labels": ids}


def trainer_of(model, folder, *callbacks, **settings):
    settings = {"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True} | settings
    args = TrainingArguments(str(folder), per_device_train_batch_size=2, dataloader_pin_memory=False, **settings)
    return Trainer(model, args, train_dataset=Rows(), callbacks=[*callbacks, SliceFineCallback()])


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"])
def test_trainers_own_optimizers(tmp_path, name):
    model = get_peft_model(llama(), SliceFineConfig(r=2, slide_every=2))
    before = copy.deepcopy(model.state_dict())
    trainer_of(model, tmp_path, optim=name, max_steps=5, gradient_accumulation_steps=2).train()
    assert consistent(model)
    for target, piece in active_slices(model).items():
        assert piece == Slice("row", 2, 2)
        assert not torch.equal(model.state_dict()[key := f"base_model.model.{target}.base_layer.weight"], before[key])


# ---------------------------------------------------------------------- changes that no optimizer announces

ENDINGS = {
    "forward": lambda model, folder: loss_of(model),
    "eval": lambda model, folder: model.eval(),
    "disable": lambda model, folder: model.disable_adapter().__enter__(),
    "merge_adapter": lambda model, folder: model.merge_adapter(),
    "merge_and_unload": lambda model, folder: model.merge_and_unload(),
    "save": lambda model, folder: model.save_pretrained(folder),
}


def by_hand(parameters):
    with torch.no_grad():
        for parameter in parameters:
            parameter -= 0.1 * parameter.grad


def by_hand_through_data(parameters):
    for parameter in parameters:
        parameter.data -= 0.1 * parameter.grad


def by_the_functional_interface(parameters):
    """Fused kernels do not even tell autograd."""
    gradients = [parameter.grad for parameter in parameters]
    moments = [[torch.zeros_like(gradient) for gradient in gradients] for _ in range(2)]
    steps = [torch.ones(()) for _ in gradients]
    settings = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "eps": 1e-8}
    with torch.no_grad():
        torch._fused_adamw_(parameters, gradients, *moments, [], steps, amsgrad=False, maximize=False, **settings)


UNSEEN = {by_hand_through_data, by_the_functional_interface}
"""Changes that leave the version counter alone: a forward pass, which looks at nothing else, passes them by."""


@pytest.mark.parametrize(
    ("change", "ending"),
    [
        (change, ending)
        for change in (by_hand, by_hand_through_data, by_the_functional_interface)
        for ending in ENDINGS
        if not (change in UNSEEN and ending == "forward")
    ],
)
def test_a_step_that_no_optimizer_announced_is_found(tmp_path, change, ending):
    _, model = adapted_mlp(axis="alternate", bias="slicefine_only")
    fit(model, 4)
    loss_of(model).backward()
    change(trainable(model))
    with pytest.raises(SliceFineError, match="lin0"):
        ENDINGS[ending](model, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_bias_stepped_by_hand_is_found(tmp_path):
    _, model = adapted_mlp(bias="slicefine_only")
    loss_of(model).backward()
    by_hand([layer.slicefine_bias["default"] for layer in slice_layers(model)])
    with pytest.raises(SliceFineError, match="lin0"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_search_for_unannounced_steps_finds_nothing_in_a_sound_model(tmp_path, ending):
    _, model = adapted_mlp(axis="alternate", bias="slicefine_only", dtype=torch.bfloat16)
    fit(model, 5)
    model.to(torch.float32)
    fit(model, 2)
    ENDINGS[ending](model, tmp_path)


class ByHand(TrainerCallback):
    """Changes the masters after the optimizer has stepped."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        by_hand(trainable(model))


def test_the_callback_finds_an_unannounced_step(tmp_path):
    model = get_peft_model(llama(), SliceFineConfig(r=2, slide_every=None, axis="row"))
    with pytest.raises(SliceFineError, match="proj"):
        trainer_of(model, tmp_path, ByHand(), max_steps=1, logging_steps=1).train()


class SAM(optim.Optimizer):
    """Sharpness-aware minimisation: climb, look again from there, go back, step. Both of its usual forms."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})
        self.inner = optim.SGD(self.param_groups, lr=lr)

    @torch.no_grad()
    def climb(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["old"] = parameter.clone()
                parameter.add_(0.05 * parameter.grad)
        self.zero_grad()

    @torch.no_grad()
    def descend(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.copy_(self.state[parameter]["old"])
        self.inner.step()
        self.zero_grad()

    def step(self, closure=None):
        self.climb()
        with torch.enable_grad():
            closure()
        self.descend()


@pytest.mark.parametrize("closure", [True, False])
def test_a_second_look_from_perturbed_values_is_refused(closure):
    """The weights do not follow a perturbation, so both looks would see the same, and nobody would know."""
    _, model = adapted_mlp()
    optimizer = SAM(trainable(model))
    loss_of(model).backward()
    if closure:
        with pytest.raises(SliceFineError, match="lin0"):
            optimizer.step(lambda: loss_of(model).backward())
    else:
        optimizer.climb()
        with pytest.raises(SliceFineError, match="lin0"):
            loss_of(model)


def test_slow_weights_that_are_put_back_outside_of_a_step_are_found():
    _, model = adapted_mlp()
    slow = [parameter.detach().clone() for parameter in trainable(model)]
    fit(model, 2)
    with torch.no_grad():
        for parameter, value in zip(trainable(model), slow, strict=True):
            parameter.lerp_(value, 0.5)
    with pytest.raises(SliceFineError, match="lin0"):
        loss_of(model)


@pytest.mark.parametrize("slide_every", [None, 2])
def test_an_averaged_model_is_not_saved(tmp_path, slide_every):
    """Its weights are averages, but step, position and originals are those of the moment it was made: the file would lack most."""
    _, model = adapted_mlp(axis="row", slide_every=slide_every)
    averaged = optim.swa_utils.AveragedModel(model)
    optimizer = optim.SGD(trainable(model), lr=0.5)
    for seed in range(5):
        train(model, optimizer, [seed])
        averaged.update_parameters(model)
    present, average = (net.base_model.model.lin0.base_layer.weight for net in (model, averaged.module))
    assert not torch.equal(average, present)
    with pytest.raises(SliceFineError, match="lin0"):
        averaged.module.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_an_averaged_model_whose_slices_have_stayed_is_saved_whole(tmp_path):
    base, model = adapted_mlp(axis="row", slide_every=None, bias="slicefine_only")
    optimizer = fit(model, 1)
    averaged = optim.swa_utils.AveragedModel(model)
    for seed in range(5):
        train(model, optimizer, [seed])
        averaged.update_parameters(model)
    averaged.module.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(outputs(loaded), outputs(averaged.module))
    assert not torch.equal(outputs(loaded), outputs(model))
    with averaged.module.disable_adapter():
        assert torch.equal(outputs(averaged.module), outputs(base))


# ---------------------------------------------------------------------- models that come and go


def test_a_model_that_is_let_go_is_freed_with_its_optimizer():
    _, model = adapted_mlp(bias="slicefine_only")
    optimizer = fit(model, 5)
    gone = [weakref.ref(thing) for thing in (optimizer, *slice_layers(model), *trainable(model))]
    del model, optimizer
    gc.collect()
    assert not [reference for reference in gone if reference() is not None]


@pytest.mark.parametrize(
    "through", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_a_model_and_its_optimizer_are_copied_together(through):
    _, model = adapted_mlp(axis="alternate", bias="slicefine_only")
    optimizer = fit(model, 2)
    twin, twins_optimizer = through((model, optimizer))
    fit(twin, 5, optimizer=twins_optimizer)
    assert active_slices(model)["lin0"] == Slice("row", 0, 4)
    fit(model, 5, optimizer=optimizer)
    assert consistent(twin)
    assert not differences(model, twin)
    assert {id(p) for p in twins_optimizer.state} <= {id(p) for p in trainable(twin)}


def test_a_model_that_is_cast_keeps_its_optimizer():
    _, model = adapted_mlp(axis="alternate", bias="slicefine_only")
    optimizer = fit(model, 4)
    held = [id(parameter) for parameter in trainable(model)]
    model.to(torch.bfloat16)
    assert [id(parameter) for parameter in trainable(model)] == held
    before = outputs(model)
    fit(model, 4, optimizer=optimizer)
    assert consistent(model)
    assert not torch.equal(outputs(model), before)
