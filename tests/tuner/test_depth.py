"""Depth windows: what is trained in each turn, where backpropagation ends, and the rest of an adapter's life in the middle of a turn.

The network below is trained on one example at a time. Gradients of its weights are then products of two numbers each, the same to the bit
in whatever order they are computed, so that slices can be compared to the bit with masked gradients of a plain model.
"""

import contextlib
import copy
import itertools
import json
import os
import pickle
from itertools import pairwise
from multiprocessing import set_forkserver_preload
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from architectures import ARCHITECTURES
from examination import ALL_LINEAR, COLUMNS, Case, examine
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from tiny import bert, differences, gpt2, llama, tokens, trainable
from torch import distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import slicefine
from slicefine import (
    SliceFineCallback,
    SliceFineConfig,
    SliceFineError,
    active_slices,
    parameter_counts,
    touched_slices,
)
from slicefine.errors import SliceFineWarning
from slicefine.kernel import vectors
from slicefine.slicing import COUPLED, Region
from slicefine.tuner.base_layers import Place
from slicefine.tuner.layer import SliceLayer

BLOCKS, WINDOW, EVERY = 4, [2, 0, 3], 2
ROUND = EVERY * len(WINDOW)
STEPS = 2 * ROUND + 3


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6)

    def forward(self, x):
        return x + self.down(self.up(x).tanh())


class Net(nn.Module):
    """Blocks in a row, a pooler above them, and a head."""

    def __init__(self, head=None):
        super().__init__()
        self.embed = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.pooler = nn.Linear(6, 5)
        self.classifier = head or nn.Linear(5, 3)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.pooler(x).tanh())


def net(**kwargs):
    torch.manual_seed(0)
    return Net(**kwargs)


def example(seed, size=1):
    return torch.randn(size, 6, generator=torch.Generator().manual_seed(100 + seed))


def configured(**settings):
    config = SliceFineConfig(
        **{
            "r": 3,
            "axis": "alternate",
            "slide_every": 2,
            "target_modules": ["up", "down"] + ([] if settings.get("axis") == COUPLED else ["pooler"]),
            "modules_to_save": ["classifier"],
            "depth_window": WINDOW,
            "depth_every": EVERY,
        }
        | settings
    )
    if config.axis == COUPLED:
        config.couplings = slicefine.couplings(net(), config, {"x": example(0, size=4)})
    return config


def adapted(base=None, **settings):
    return get_peft_model(net() if base is None else base, configured(**settings))


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=3e-2, weight_decay=0.0)


def loss_of(model, seed, size=1):
    x = example(seed, size).to(next(model.parameters()).dtype)
    return (model(x).float() - example(seed + 50, size)[:, :3]).square().mean()


def fit(model, steps, optimizer=None, first=0, seeds=(0,)):
    """`steps` optimizer steps, from number `first` on, each on one example or one for each of `seeds`."""
    optimizer = optimizer or adamw(trainable(model))
    for step in range(first, first + steps):
        for seed in seeds:
            (loss_of(model, step + 1000 * seed) / len(seeds)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@torch.no_grad()
def outputs(model):
    return model(example(7, size=5))


def sliced(model):
    return {layer.name: layer for layer in model.modules() if isinstance(layer, SliceLayer)}


def block_of(name):
    return int(name.split(".")[1]) if name.startswith("blocks.") else None


def lowest(step, window=WINDOW, every=EVERY):
    """Index of the lowest block that optimizer step number `step` trains."""
    return window[step // every % len(window)]


def rests(name, step, **window):
    block = block_of(name)
    return block is not None and block < lowest(step, **window)


def own(name, step):
    return sum(not rests(name, earlier) for earlier in range(step))


def base_state(model):
    """The state of the base model inside of an adapted one, by the names it had."""
    state = {
        name.replace(".base_layer", "").replace(".original_module", ""): value
        for name, value in model.state_dict().items()
        if "slicefine_" not in name and ".modules_to_save." not in name
    }
    return {name.removeprefix("base_model.model."): value for name, value in state.items()}


def assert_is_base(model):
    state = base_state(model)
    for name, value in net().state_dict().items():
        assert torch.equal(state[name], value), name


def flat(value, name=""):
    """Nested containers as one dictionary; tensors are copied."""
    if isinstance(value, torch.Tensor):
        return {name: value.detach().clone()}
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for part, inner in items for key, leaf in flat(inner, f"{name}/{part}").items()}
    return {name: value}


def unequal(one, other):
    """Names that only one of two flat dictionaries has, or whose values differ in any bit."""
    return sorted(one.keys() ^ other.keys()) + [
        name
        for name in one.keys() & other.keys()
        if not (torch.equal(one[name], other[name]) if torch.is_tensor(one[name]) else one[name] == other[name])
    ]


# ---------------------------------------------------------------------- training, to the bit


class Masked:
    """A plain model of which a trainer keeps the gradients of some rows or columns, and freezes the blocks below the lowest one."""

    def __init__(self, base, config, make=adamw):
        self.model, self.config, self.make = base, config, make
        self.model.requires_grad_(False)
        self.schedules = {
            name: config.schedule.along(config.schedule_of(name).layout)
            for name, module in base.named_modules()
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in config.target_modules
        }
        self.own = dict.fromkeys(self.schedules, 0)
        self.parameters, self.optimizers = {}, {}
        self.always = [make([*base.classifier.requires_grad_(True).parameters()])]
        self.biases = {}
        if config.bias != "none":
            for name in self.schedules:
                bias = base.get_submodule(name).bias
                self.biases[name] = bias.detach().float().clone().requires_grad_()
                self.optimizers[name, "bias"] = make([self.biases[name]])

    def run(self, steps, *, first=0, seeds=(0,), context=contextlib.nullcontext):
        for step in range(first, first + steps):
            trained = [name for name in self.schedules if not rests(name, step)]
            for name in self.schedules:
                module = self.model.get_submodule(name)
                module.weight.requires_grad_(name in trained)
                module.bias.requires_grad_(name in trained and bool(self.biases))
                if name in trained and self.elsewhere(name, tuple(module.weight.shape)):
                    self.begin(name)
            self.model.zero_grad()
            for seed in seeds:
                with context():
                    loss = loss_of(self.model, step + 1000 * seed) / len(seeds)
                loss.backward()
            for name in trained:
                self.step(name)
            for optimizer in self.always:
                optimizer.step()
        return self.model.requires_grad_(True)

    def elsewhere(self, name, shape):
        """Whether the slice is not where it was at the step before that trained it."""
        own, schedule = self.own[name], self.schedules[name]
        return own == 0 or schedule.slice_at(own, shape) != schedule.slice_at(own - 1, shape)

    def begin(self, name):
        """A new position: a new parameter, and an optimizer that knows nothing."""
        schedule, weight = self.schedules[name], self.model.get_submodule(name).weight.detach()
        size = schedule.widest(tuple(weight.shape))
        self.piece = schedule.slice_at(self.own[name], tuple(weight.shape))
        values = vectors(weight, self.piece.axis)[[*self.piece.indices]].float()
        self.parameters[name] = self.piece, framed(values, size).requires_grad_()
        self.optimizers[name] = self.make([self.parameters[name][1]])

    def step(self, name):
        module, (piece, parameter) = self.model.get_submodule(name), self.parameters[name]
        gradient = vectors(module.weight.grad, piece.axis)[[*piece.indices]].float()
        parameter.grad = framed(gradient, parameter.shape)
        self.optimizers[name].step()
        self.own[name] += 1
        with torch.no_grad():
            width, length = gradient.shape
            vectors(module.weight, piece.axis)[[*piece.indices]] = parameter[:width, :length].to(module.weight)
        if name in self.biases:
            self.biases[name].grad = module.bias.grad.float()
            self.optimizers[name, "bias"].step()
            with torch.no_grad():
                module.bias.copy_(self.biases[name])


def framed(values, size):
    frame = torch.zeros(size)
    frame[: values.shape[0], : values.shape[1]] = values
    return frame


VARIANTS = {
    "rows": {"axis": "row"},
    "columns": {"axis": "column"},
    "alternating": {},
    "coupled": {"axis": COUPLED},
    "coupled at random": {"axis": COUPLED, "order": "random", "r": 2},
    "at random, every third step": {"order": "random", "slide_every": 3},
    "that stay": {"axis": "row", "slide_every": None},
    "biases": {"bias": "slicefine_only"},
    "a pooler that is a target": {"axis": "row", "target_modules": ["up", "pooler"]},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_a_run_equals_masked_training_of_a_plain_model(variant):
    model = adapted(**variant)
    fit(model, STEPS)
    expected = Masked(net(), model.peft_config["default"]).run(STEPS)
    assert not differences(model.merge_and_unload(), expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=3e-2, amsgrad=True, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=3e-2, weight_decay=0.0, fused=True),
        lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.9),
    ],
    ids=["SGD", "Adam, foreach", "AdamW, fused", "RMSprop"],
)
def test_optimizers(make):
    model = adapted(bias="slicefine_only", axis="row")
    fit(model, STEPS, make(trainable(model)))
    expected = Masked(net(), model.peft_config["default"], make).run(STEPS)
    assert not differences(model.merge_and_unload(), expected)


def test_accumulated_gradients():
    model = adapted(bias="slicefine_only")
    fit(model, STEPS, seeds=(0, 1, 2))
    expected = Masked(net(), model.peft_config["default"]).run(STEPS, seeds=(0, 1, 2))
    assert not differences(model.merge_and_unload(), expected)


def test_autocast():
    def context():
        return torch.autocast("cpu", torch.bfloat16)

    model = adapted(bias="slicefine_only")
    optimizer = adamw(trainable(model))
    for step in range(STEPS):
        with context():
            loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = Masked(net(), model.peft_config["default"]).run(STEPS, context=context)
    assert not differences(model.merge_and_unload(), expected)


def test_a_window_of_the_first_block_alone_is_none():
    model, plain = adapted(depth_window=[0]), adapted(depth_window=None, depth_every=25)
    fit(model, STEPS)
    fit(plain, STEPS)
    assert not differences(model.merge_and_unload(), plain.merge_and_unload())


def test_what_rests_is_left_alone_by_optimizer_and_counter():
    """Bytes of weight and parameter, moments, Adam's count: all as they were when the turn began."""
    model = adapted(bias="slicefine_only", slide_every=5)
    optimizer = adamw(trainable(model))

    def kept(layer):
        parameters = [p["default"] for p in (layer.slicefine_weight, layer.slicefine_bias)]
        return flat([layer.matrix, layer.place.bias, *parameters, *(optimizer.state.get(p, {}) for p in parameters)])

    rested = 0
    for step in range(STEPS):
        before = {name: kept(layer) for name, layer in sliced(model).items()}
        fit(model, 1, optimizer, first=step)
        for name, layer in sliced(model).items():
            same = not unequal(kept(layer), before[name])
            assert same == rests(name, step), (name, step)
            rested += same
            assert layer.state.step == step + 1
            assert layer.state.resting == rests(name, step + 1)
            assert layer.state.active == layer.state.schedule.slice_at(step + 1, layer.shape)
    assert rested > 40


@pytest.mark.parametrize("optimizer", [adamw, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)])
def test_zeros_for_gradients_are_no_gradients(optimizer):
    """`zero_grad(set_to_none=False)` leaves zeros, by which an optimizer with moments would move what rests."""
    model, twin = adapted(bias="slicefine_only"), adapted(bias="slicefine_only")
    steps = optimizer(trainable(model))
    for step in range(STEPS):
        loss_of(model, step).backward()
        steps.step()
        steps.zero_grad(set_to_none=False)
    fit(twin, STEPS, optimizer(trainable(twin)))
    assert not differences(model, twin)


def test_gradients_of_a_forgotten_zero_grad_do_not_move_what_rests():
    model = adapted(depth_window=[0, 3], axis="row", slide_every=None)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    for step in range(2):
        loss_of(model, step).backward()
        optimizer.step()
    before = copy.deepcopy(model.get_submodule("base_model.model.blocks.0.up.base_layer").weight)
    loss_of(model, 2).backward()
    optimizer.step()
    assert torch.equal(model.get_submodule("base_model.model.blocks.0.up.base_layer").weight, before)


@pytest.mark.parametrize("kind", [{}, {"fused": True}], ids=str)
def test_steps_that_a_gradient_scaler_skips_are_not_of_a_turn(kind):
    model, twin = adapted(axis="row"), adapted(axis="row")
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=100)
    optimizer = torch.optim.AdamW(trainable(model), lr=3e-2, weight_decay=0.0, **kind)
    skipped = (1, 2, 7)
    for step in range(STEPS):
        loss = loss_of(model, step) * (float("inf") if step in skipped else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update(1.0)
        optimizer.zero_grad()
    other = torch.optim.AdamW(trainable(twin), lr=3e-2, weight_decay=0.0, **kind)
    for step in range(STEPS):
        if step not in skipped:
            fit(twin, 1, other, first=step)
    assert not differences(model, twin)
    assert {layer.state.step for layer in sliced(model).values()} == {STEPS - len(skipped)}


MODELS = {"llama": (llama, "CAUSAL_LM"), "gpt2": (gpt2, "CAUSAL_LM"), "bert": (bert, "SEQ_CLS")}


def language_model(name, **settings):
    build, task = MODELS[name]
    return get_peft_model(
        build(), SliceFineConfig(**{"r": 2, "slide_every": 2, "task_type": task, "depth_window": [1, 0]} | settings)
    )


def backward(model, seed):
    y = model(input_ids=tokens(seed=seed)).logits
    (y - torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))).square().mean().backward()


@pytest.mark.parametrize(
    "axis", ["alternate", pytest.param(COUPLED, marks=pytest.mark.filterwarnings("ignore:axis=.*have no partner"))]
)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_full_training_or_none(name, axis):
    model = language_model(name, depth_every=2, axis=axis)
    optimizer = adamw(trainable(model))
    for step in range(6):
        dense = copy.deepcopy(model).merge_and_unload().requires_grad_(True)
        backward(dense, step)
        backward(model, step)
        for target, layer in sliced(model).items():
            gradient, active = layer.slicefine_weight["default"].grad, layer.state.active
            block = next((int(part) for part in target.split(".") if part.isdecimal()), None)
            assert (gradient is None) == (block == 0 and step // 2 % 2 == 0), (target, step)
            if gradient is not None:
                whole = Place(dense.get_submodule(target))
                expected = vectors(whole.oriented(whole.stored.grad), active.axis)[[*active.indices]]
                torch.testing.assert_close(gradient, framed(expected, gradient.shape), rtol=1e-3, atol=1e-6)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("full", [{"modules_to_save": ["classifier"]}, {"modules_to_save": ["classifier", "pooler"]}])
def test_what_is_above_the_blocks_is_trained_at_every_step(full):
    """The pooler by its slice or in full, the head in full."""
    settings = full | ({"target_modules": ["query", "output.dense"]} if len(full["modules_to_save"]) > 1 else {})
    model = language_model("bert", depth_every=2, axis="row", slide_every=None, **settings)
    optimizer = adamw(trainable(model))
    for step in range(5):
        before = base_state(model) | {
            n: p.detach().clone() for n, p in model.named_parameters() if ".modules_to_save." in n
        }
        before = {name: value.clone() for name, value in before.items()}
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        after = base_state(model) | dict(model.named_parameters())
        changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
        above = {name for name in changed if "encoder.layer" not in name}
        assert len(above) == (3 if len(settings) == 1 else 4), above
        assert {int(name.split("layer.")[1][0]) for name in changed - above} == ({1} if step // 2 % 2 == 0 else {0, 1})
    assert set(touched_slices(model)) - {n for n in touched_slices(model) if "encoder" in n} <= {"bert.pooler.dense"}


# ---------------------------------------------------------------------- where backpropagation ends


def entering(model, blocks):
    """Index of a block -> whether the hidden state that enters it in the next forward pass wants a gradient."""
    found = {}

    def look(index):
        def hook(module, args, kwargs):
            x = args[0] if args else kwargs["hidden_states"]
            found[index] = (x.requires_grad, x.grad_fn is not None)

        return hook

    handles = [block.register_forward_pre_hook(look(index), with_kwargs=True) for index, block in enumerate(blocks)]
    return found, handles


@pytest.mark.parametrize("name", [*MODELS, "net"])
def test_no_graph_enters_the_lowest_block(name):
    model = adapted() if name == "net" else language_model(name, depth_every=2)
    stack = model.peft_config["default"].depth_stack
    found, _ = entering(model, model.get_base_model().get_submodule(stack))
    optimizer = adamw(trainable(model))
    window, every = (WINDOW, EVERY) if name == "net" else ([1, 0], 2)
    for step in range(6):
        (loss_of(model, step) if name == "net" else model(input_ids=tokens()).logits.square().mean()).backward()
        low = lowest(step, window, every)
        assert found == {index: (index > low,) * 2 for index in found}, step
        optimizer.step()
        optimizer.zero_grad()


def functions(y):
    """Names of the functions that a backward pass from `y` calls."""
    names, waiting, seen = [], [y.grad_fn], set()
    while waiting:
        function = waiting.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        names.append(type(function).__name__)
        waiting += [inner for inner, _ in function.next_functions]
    return names


def test_no_function_below_the_lowest_block():
    model = adapted(modules_to_save=None, bias="slicefine_only")
    for step, low in ((0, 2), (EVERY, 0), (2 * EVERY, 3)):
        fit(model, step - next(iter(sliced(model).values())).state.step)
        names = functions(loss_of(model, step))
        layers = 2 * (BLOCKS - low) + 1
        assert names.count("_SliceLinearBackward") == layers
        assert names.count("AccumulateGrad") == 2 * layers, "the slice and the bias of each"
        assert names.count("TanhBackward0") == BLOCKS - low + 1


def saved_bytes(model, run):
    """Bytes saved for the backward pass, each storage once, without parameters and buffers."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def save(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        loss = run()
    size = sum(storage.nbytes() for storage in kept.values())
    loss.backward()
    model.zero_grad()
    return size


@pytest.mark.parametrize("axis", ["row", "column"])
def test_bytes_fall_with_the_cut(axis):
    model = adapted(axis=axis, depth_window=[0, 1, 2, 3], depth_every=1, slide_every=None)
    plain = adapted(axis=axis, depth_window=None, depth_every=25, slide_every=None)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    sizes = []
    for step in range(4):
        sizes.append(saved_bytes(model, lambda step=step: loss_of(model, step, size=64)))
        fit(model, 1, optimizer, first=step)
    assert sizes[0] == saved_bytes(plain, lambda: loss_of(plain, 0, size=64))
    steps = [above - below for above, below in pairwise(sizes)]
    assert steps[0] == steps[1] > 0, "blocks of one size save as much as each other"
    assert steps[2] == steps[1]


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_bytes_of_transformers_fall_with_the_cut(name):
    model = language_model(name, depth_every=1)
    run = lambda: model(input_ids=tokens()).logits.square().mean()  # noqa: E731
    cut = saved_bytes(model, run)
    backward(model, 0)
    adamw(trainable(model)).step()
    model.zero_grad()
    assert cut < 0.7 * saved_bytes(model, run)


def test_activation_checkpointing_where_inputs_want_no_gradient():
    model, twin = (language_model("bert", depth_every=2).train() for _ in range(2))
    base = twin.get_base_model()
    base.activation_checkpointing_enable({"use_reentrant": False})
    base.disable_input_require_grads()
    found, _ = entering(twin, base.bert.encoder.layer)
    optimizers = adamw(trainable(model)), adamw(trainable(twin))
    for step in range(6):
        for each, optimizer in zip((model, twin), optimizers, strict=True):
            backward(each, step)
            optimizer.step()
            optimizer.zero_grad()
        assert found[1] == (bool(lowest(step, [1, 0], 2) == 0),) * 2, step
    assert not differences(model, twin)


@pytest.mark.parametrize("reentrant", [False, True])
def test_inputs_that_want_a_gradient_are_told_of(reentrant):
    """transformers makes them want it with any checkpointing. The result is the same, and nothing is saved."""
    model, twin = (language_model("bert", depth_every=2).train() for _ in range(2))
    twin.get_base_model().activation_checkpointing_enable({"use_reentrant": reentrant})
    optimizers = adamw(trainable(model)), adamw(trainable(twin))
    for step in range(6):
        backward(model, step)
        warned = (
            pytest.warns(
                SliceFineWarning,
                match=r"saves neither time nor memory.*use_reentrant=False.*disable_input_require_grads",
            )
            if lowest(step, [1, 0], 2)
            else contextlib.nullcontext()
        )
        with warned:
            backward(twin, step)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert not differences(model, twin)


def test_embeddings_that_are_trained_in_full_are_told_of():
    """They are trained at every step, so that backpropagation goes down to them."""
    model = adapted(modules_to_save=["embed", "classifier"], depth_window=[0, 2])
    optimizer = fit(model, EVERY)
    with pytest.warns(SliceFineWarning, match=r"saves neither time nor memory.*`modules_to_save`"):
        loss_of(model, EVERY).backward()
    head = model.get_submodule("base_model.model.embed.modules_to_save.default").weight
    before = head.detach().clone()
    optimizer.step()
    assert not torch.equal(head, before)


def test_saliency_of_a_model_that_does_not_train_is_not_told_of(tmp_path):
    """Whoever wants gradients of inputs may have them: of a loaded, a disabled and a merged model without a word."""
    model = adapted()
    fit(model, 1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(), tmp_path)
    x = example(0).requires_grad_()
    loaded(x).sum().backward()
    with model.disable_adapter():
        model(x).sum().backward()
    model.merge_adapter()
    model(x).sum().backward()


# ---------------------------------------------------------------------- counts


def test_slices_move_by_steps_of_their_own():
    """With windows of other lengths than positions: in place on `own` steps, whatever the others have made."""
    model = adapted(axis="row", r=1, slide_every=3)
    optimizer = None
    seen = set()
    for step in range(4 * ROUND):
        for name, layer in sliced(model).items():
            assert layer.state.active.start == own(name, step) // 3 % layer.shape[0]
        seen.add(tuple(layer.state.active.start for layer in sliced(model).values()))
        assert set(active_slices(model)) == {name for name in sliced(model) if not rests(name, step)}
        optimizer = fit(model, 1, optimizer, first=step)
    assert any(len(set(starts)) > 2 for starts in seen), "the blocks have not drifted apart"


@pytest.mark.parametrize(
    "variant",
    [VARIANTS["alternating"], VARIANTS["coupled"], VARIANTS["biases"]],
    ids=["alternating", "coupled", "biases"],
)
def test_what_is_planned_is_what_a_run_touches(variant):
    model, base = adapted(**variant), net()
    fresh = adapted(**variant)
    optimizer = adamw(trainable(model))
    changed = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in base.state_dict().items()}
    before = base.state_dict()
    for step in range(STEPS + 1):
        counts = parameter_counts(model)
        assert counts.touched == parameter_counts(fresh, step).planned == parameter_counts(model, step).planned
        targets = {f"{name}.{kind}" for name in sliced(model) for kind in ("weight", "bias")}
        assert counts.touched == sum(int(changed[name].sum()) for name in targets), step
        regions = {name: Region.of(pieces) for name, pieces in touched_slices(model).items()}
        for name, layer in sliced(model).items():
            assert regions[name].size(layer.shape) == int(changed[f"{name}.weight"].sum())
        fit(model, 1, optimizer, first=step)
        after = base_state(model)
        now = {name: after[name] != before[name] for name in targets}
        assert counts.active == sum(int(where.sum()) for where in now.values()), step
        for name in targets:
            changed[name] |= now[name]
        before = {name: value.clone() for name, value in after.items()}


# ---------------------------------------------------------------------- saving, loading, going on


def with_moments_of(optimizer, model):
    other = adamw(trainable(model))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return other


def through_files(model, folder):
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(net(), folder, is_trainable=True)


def through_a_state_dict(model, folder):
    other = adapted(bias="slicefine_only")
    fit(other, 3)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    return other


def through_pefts_state_dict(model, folder):
    other = adapted(bias="slicefine_only")
    fit(other, 9)
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    return other


WAYS = {
    "files": through_files,
    "state_dict": through_a_state_dict,
    "PEFT's state dict": through_pefts_state_dict,
    "deepcopy": lambda model, folder: copy.deepcopy(model),
    "pickle": lambda model, folder: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_is_taken_up_after_every_step(way, tmp_path):
    """In the first, in the middle and after the last step of turns and of positions: the next step is the same to the bit, and so all are."""
    whole = adapted(bias="slicefine_only")
    optimizer = adamw(trainable(whole))
    for step in range(ROUND + EVERY):
        taken_up = WAYS[way](whole, tmp_path / str(step))
        assert not differences(taken_up, whole), step
        assert active_slices(taken_up) == active_slices(whole)
        assert touched_slices(taken_up) == touched_slices(whole)
        assert parameter_counts(taken_up, 20) == parameter_counts(whole, 20)
        others = fit(taken_up, 1, with_moments_of(optimizer, taken_up), first=step)
        fit(whole, 1, optimizer, first=step)
        assert not differences(taken_up, whole), step
        assert not unequal(flat(others.state_dict()), flat(optimizer.state_dict())), step


def test_masters_of_what_rests_are_saved_in_full(tmp_path):
    """The weights of a model in bfloat16 do not tell them."""
    model = adapted(net().bfloat16(), axis="row", modules_to_save=None, depth_window=[0, 2], slide_every=None)
    optimizer = fit(model, EVERY + 1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net().bfloat16(), tmp_path, is_trainable=True)
    assert not differences(loaded, model)
    assert {layer.slicefine_weight["default"].dtype for layer in sliced(loaded).values()} == {torch.float32}
    others = with_moments_of(optimizer, loaded)
    for each, steps in ((model, optimizer), (loaded, others)):
        fit(each, ROUND, steps, first=EVERY + 1)
    assert not differences(loaded, model)


def test_what_no_step_of_its_own_has_trained_is_that_of_a_base_in_another_dtype(tmp_path):
    """Steps of others do not make the saved parameter the better one: a base in float32 has more digits."""
    model = adapted(net().bfloat16(), axis="row", modules_to_save=None)
    fit(model, 1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(), tmp_path)
    for name, layer in sliced(loaded).items():
        assert torch.equal(layer.matrix, net().get_submodule(name).weight) == rests(name, 0)


def test_the_stack_is_saved_and_not_looked_for_again(tmp_path, monkeypatch):
    model = adapted()
    assert model.peft_config["default"].depth_stack == "blocks"
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["depth_window"], saved["depth_every"], saved["depth_stack"]) == (WINDOW, EVERY, "blocks")
    monkeypatch.setattr("slicefine.tuner.depth.find_stack", None)
    PeftModel.from_pretrained(net(), tmp_path)


def test_saving_twice_gives_the_same_file(tmp_path):
    model = adapted(depth_window=tuple(WINDOW))
    fit(model, 3)
    model.save_pretrained(tmp_path / "one")
    PeftModel.from_pretrained(net(), tmp_path / "one").save_pretrained(tmp_path / "other")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"depth_window": [0, 2, 3]},
        {"depth_window": [2, 0]},
        {"depth_window": None, "depth_stack": None, "depth_every": 25},
        {"depth_every": 3},
    ],
    ids=str,
)
def test_an_altered_window_is_refused(change, tmp_path):
    model = adapted()
    fit(model, 5)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    base = net()
    with pytest.raises(
        SliceFineError,
        match=r"it was trained with r=3 axis=alternate#\w{8} .* and is to be loaded with r=3 axis=alternate",
    ):
        PeftModel.from_pretrained(base, tmp_path)
    assert not differences(base, net())


def test_an_altered_stack_is_refused(tmp_path):
    model = adapted()
    fit(model, 5)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"depth_stack": "block"}))
    with pytest.raises(SliceFineError, match="it was trained with"):
        PeftModel.from_pretrained(net(), tmp_path)


def test_a_file_of_another_step_is_refused_by_a_live_adapter(tmp_path):
    """A window of other turns has other values: loaded into a live adapter, where no configuration is read."""
    model, other = adapted(), adapted(depth_every=3)
    fit(model, 5)
    with pytest.raises(SliceFineError, match="it was trained with"):
        set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert_is_base(other)


@pytest.mark.parametrize("step", [1, 3, 5])
def test_transformers_own_loader(step, tmp_path):
    llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        SliceFineConfig(r=2, slide_every=2, depth_window=[1, 0], depth_every=2, task_type="CAUSAL_LM"),
    )
    optimizer = adamw(trainable(model))
    for seed in range(step):
        backward(model, seed)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert active_slices(loaded) == active_slices(model)
    assert touched_slices(loaded) == touched_slices(model)


class Witness(TrainerCallback):
    """Keeps what the rest of a run depends on, after every step."""

    def __init__(self):
        self.moments = {}

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.moments[state.global_step] = flat([dict(model.state_dict()), optimizer.state_dict()])


def trained_by_trainer(folder, resume=None, callbacks=(), **arguments):
    """What there was after each of seven steps, of which [1, 0] makes a round and most of another. A checkpoint of each, or from one of them."""
    witness = Witness()
    data = [{"input_ids": ids, "labels": torch.tensor(n % 3)} for n, ids in enumerate(tokens(size=20))]
    arguments = TrainingArguments(
        str(folder), max_steps=7, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2,
        warmup_steps=2, save_strategy="no" if resume or callbacks else "steps", save_steps=1, report_to="none", logging_strategy="no",
        disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, **arguments,
    )  # fmt: skip
    model = language_model("bert", depth_every=2, bias="slicefine_only")
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[SliceFineCallback(), witness, *callbacks])
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{resume}") if resume else None)
    return witness.moments


@pytest.fixture(scope="module")
def by_trainer(tmp_path_factory):
    """A folder with checkpoints of every step, and what there was after each."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, trained_by_trainer(folder)


def test_trainer_takes_a_run_up_after_every_step(by_trainer):
    folder, whole = by_trainer
    for stop in range(1, 7):
        moments = trained_by_trainer(folder, resume=stop)
        assert [*moments] == [*range(stop + 1, 8)]
        for step, moment in moments.items():
            assert not unequal(moment, whole[step]), (stop, step)


class WithoutInputGradients(TrainerCallback):
    """What the warning says is to be done where Trainer checkpoints activations."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.get_base_model().disable_input_require_grads()


def test_trainer_with_activation_checkpointing(by_trainer, tmp_path):
    _, whole = by_trainer
    checkpointed = trained_by_trainer(tmp_path, callbacks=[WithoutInputGradients()], activation_checkpointing=True)
    assert not unequal(checkpointed[7], whole[7])


# ---------------------------------------------------------------------- disabled, merged, unloaded


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, STEPS])
def test_disabled_merged_unloaded_and_back(steps):
    """At the beginning, in the middle and at the end of turns."""
    model = adapted(bias="slicefine_only")
    twin = copy.deepcopy(model)
    optimizers = fit(model, steps), fit(twin, steps)
    trained = outputs(model)
    with model.disable_adapter():
        assert torch.equal(outputs(model), outputs(net()))
        assert_is_base(model)
        with model.disable_adapter():
            assert_is_base(model)
    assert torch.equal(outputs(model), trained)
    model.merge_adapter()
    assert torch.equal(outputs(model), trained)
    y = model(example(0))
    assert not y.requires_grad or not any("_SliceLinear" in name for name in functions(y))
    model.unmerge_adapter()
    assert not differences(copy.deepcopy(model).unload(), net())
    assert torch.equal(outputs(copy.deepcopy(model).merge_and_unload()), trained)
    for each, optimizer in zip((model, twin), optimizers, strict=True):
        fit(each, 4, optimizer, first=steps)
    assert not differences(model, twin)


def test_a_step_while_the_adapter_is_disabled_counts_for_what_rests_too():
    """A reference forward pass may keep it disabled until after the step."""
    model, twin = adapted(bias="slicefine_only"), adapted(bias="slicefine_only")
    optimizer = adamw(trainable(model))
    for step in range(STEPS):
        loss_of(model, step).backward()
        with model.disable_adapter():
            optimizer.step()
        optimizer.zero_grad()
    fit(twin, STEPS)
    assert not differences(model, twin)
    assert active_slices(model) == active_slices(twin)


@pytest.mark.parametrize("shared", [False, True])
def test_two_adapters_take_turns(shared):
    """One with a window, one without, on the same layers: each becomes what it would have become alone."""
    plain = {"depth_window": None, "depth_every": 25, "axis": "column", "r": 2}
    model = adapted(bias="slicefine_only")
    model.add_adapter("plain", configured(**plain))
    alone = {"default": adapted(bias="slicefine_only"), "plain": adapted(**plain)}
    optimizers = {}
    for name in alone:
        model.set_adapter(name)
        optimizers[name] = adamw(trainable(model))
    if shared:
        every = [p for name in alone for group in optimizers[name].param_groups for p in group["params"]]
        optimizers = dict.fromkeys(alone, adamw(every))
    others = {name: adamw(trainable(each)) for name, each in alone.items()}
    made = dict.fromkeys(alone, 0)
    for turn in range(5):
        for name, each in alone.items():
            model.set_adapter(name)
            for step in range(made[name], made[name] + 1 + turn % 3):
                fit(model, 1, optimizers[name], first=step)
                fit(each, 1, others[name], first=step)
            made[name] += 1 + turn % 3
            assert torch.equal(outputs(model), outputs(each)), (turn, name)
    for name, each in alone.items():
        model.set_adapter(name)
        assert active_slices(model) == active_slices(each)
        assert touched_slices(model) == touched_slices(each)
    with model.disable_adapter():
        assert_is_base(model)
    model.delete_adapter("default")
    assert torch.equal(outputs(model), outputs(alone["plain"]))


def test_a_copy_by_the_configuration_is_in_the_same_turn():
    """So TRL makes the frozen reference of its trainers."""
    model = adapted()
    optimizer = fit(model, 3)
    with pytest.warns(SliceFineWarning, match="starts as a copy"):
        model.add_adapter("ref", model.peft_config["default"])
    fit(model, 4, optimizer, first=3)
    model.set_adapter("ref")
    twin = adapted()
    fit(twin, 3)
    assert torch.equal(outputs(model), outputs(twin))
    assert touched_slices(model) == touched_slices(twin)
    assert active_slices(model) == active_slices(twin)


def test_noise_for_tests_is_where_a_step_would_have_trained(tmp_path):
    """PEFT's `init_weights=False` makes as if a step had been made: which leaves alone what rests."""
    model = adapted(init_weights=False)
    changed = {name for name, value in base_state(model).items() if not torch.equal(value, net().state_dict()[name])}
    assert changed == {f"{name}.weight" for name in sliced(model) if not rests(name, 0)}
    assert {name for name, pieces in touched_slices(model).items() if pieces} == {
        n.removesuffix(".weight") for n in changed
    }
    assert {layer.state.step for layer in sliced(model).values()} == {1}
    assert not differences(through_files(model, tmp_path), model)
    assert not differences(model.unload(), net())


WINDOWED = {"depth_window": [0, 1, 0, 1, 0, 1, 0], "depth_every": 1}
"""As many turns as a position has steps, and the first trains all: so what is examined once a position has a gradient."""


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("Llama", {"axis": COUPLED}, {}),
        ("Qwen3-MoE", {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}, {"export lora": "refused"}),
    ],
)  # fmt: skip
def test_attached_trained_saved_merged_and_exported(name, settings, expected, tmp_path):
    """As in `test_architectures.py`."""
    found = examine(Case(name, ALL_LINEAR | WINDOWED | settings), tmp_path)
    assert {column: cell.word for column, cell in found.cells.items()} == dict.fromkeys(COLUMNS, "yes") | expected, (
        found
    )


# ---------------------------------------------------------------------- compiled


# dynamo makes an instance of every autograd function that it traces, and torch warns of that
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_has_a_graph_for_each_turn():
    torch._dynamo.reset()
    targets = ["blocks.0.up", "blocks.2.down"]
    model = adapted(
        axis="row", bias="slicefine_only", target_modules=targets, modules_to_save=None, depth_window=[2, 0]
    )
    plain = copy.deepcopy(model)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizers = adamw(trainable(model)), adamw(trainable(plain))
    counted = []
    for step in range(STEPS):
        fit(compiled, 1, optimizers[0], first=step)
        fit(plain, 1, optimizers[1], first=step)
        counted.append(counter.frame_count)
    assert counted == [1] * EVERY + [2] * (STEPS - EVERY)
    assert not differences(model, plain)


# ---------------------------------------------------------------------- what would be wrong in silence


def test_steps_inside_of_backward_are_refused():
    """An optimizer that holds what rests alone is not stepped: the layer would never wake."""
    model = adapted(depth_window=[0, 2])
    optimizers = {parameter: torch.optim.SGD([parameter], lr=0.1) for parameter in trainable(model)}
    for parameter, optimizer in optimizers.items():
        parameter.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
    with pytest.raises(
        SliceFineError, match=r"inside of the backward pass \(SGD\).*Step after backward, or leave out `depth_window`"
    ):
        loss_of(model, 0).backward()


def test_an_optimizer_that_begins_with_all_at_once_is_refused():
    """torch's own error would come in the middle of the run: "expected Tensor as element 0 in argument 2"."""
    model = adapted(depth_window=[0, 2])
    with pytest.raises(SliceFineError, match=r"SGD with fused=True and momentum .* Use fused=False"):
        fit(model, 1, torch.optim.SGD(trainable(model), lr=0.1, momentum=0.9, fused=True))
    fit(model, 5, torch.optim.SGD(trainable(model), lr=0.1, fused=True))


def test_an_optimizer_for_each_block_is_stepped_at_rest_too():
    model, twin = adapted(axis="row"), adapted(axis="row")
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(name.split("blocks.")[-1][0] if "blocks." in name else "above", []).append(parameter)
    assert len(groups) == BLOCKS + 1
    optimizers = [adamw(group) for group in groups.values()]
    for step in range(STEPS):
        loss_of(model, step).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    fit(twin, STEPS)
    assert not differences(model, twin)


class Restless(torch.optim.SGD):
    """Moves every parameter, gradient or not, as a lookahead does when it goes back to its slow weights."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.9)


def test_an_optimizer_that_moves_what_rests_is_found_in_the_next_forward_pass():
    model = adapted(depth_window=[0, 2])
    optimizer = Restless(trainable(model), lr=0.1)
    fit(model, EVERY, optimizer)
    loss_of(model, 2).backward()
    optimizer.step()
    with pytest.raises(
        SliceFineError, match=r"blocks\.0\.up: the weight and the parameter .* differ.*rests below the depth window"
    ):
        loss_of(model, 3)


def test_an_average_over_the_first_steps_of_a_block_is_refused():
    """What has not been trained yet is original, however many steps others have made."""
    model = adapted(axis="row", slide_every=None)
    optimizer = fit(model, 1)
    average = AveragedModel(model)
    for step in range(1, 5):
        fit(model, 1, optimizer, first=step)
        average.update_parameters(model)
    with pytest.raises(SliceFineError, match=r"blocks\.0\.up: .* average"):
        average.eval()


def test_a_wrong_step_is_found_when_a_turn_has_ended_between_forward_and_backward():
    """A graph of another turn is a graph of other weights: autograd says so."""
    model = adapted()
    optimizer = fit(model, 1)
    stale = loss_of(model, 0)
    fit(model, 1, optimizer, first=1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


# ---------------------------------------------------------------------- several processes

PROCESSES = 2
UNUSED = {"find_unused_parameters": True}
TOGETHER = {
    "rows": {"ddp": UNUSED},
    "alternating with biases, no_sync": {
        "ddp": UNUSED,
        "accumulate": 2,
        "settings": {"axis": "alternate", "bias": "slicefine_only"},
    },
    "gradient_as_bucket_view, zero": {"ddp": UNUSED | {"gradient_as_bucket_view": True}, "zero": True},
}
REFUSED = {
    "unready": {"ddp": {}},
    "static": {"ddp": UNUSED | {"static_graph": True}},
}


def train_together(model, case, part=0, of=1):
    """A round and a turn and one step, each on an equal share of the batch."""
    net = DistributedDataParallel(model, **case["ddp"]) if of > 1 else model
    if case.get("zero") and of > 1:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # warns when it is imported

        optimizer = ZeroRedundancyOptimizer(trainable(model), torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
    else:
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.0)
    parts = case.get("accumulate", 1)
    for step in range(ROUND + EVERY + 1):
        for number in range(parts):
            with contextlib.nullcontext() if number == parts - 1 or of == 1 else net.no_sync():
                x = example(step * parts + number, size=4).chunk(of)[part]
                (net(x).square().mean() / parts).backward()
        optimizer.step()
        optimizer.zero_grad()


def model_of(case):
    return adapted(**{"axis": "row"} | case.get("settings", {}))


def train_all(rank, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    for name, case in TOGETHER.items():
        model = model_of(case)
        train_together(model, case, rank, PROCESSES)
        torch.save((model.state_dict(), active_slices(model)), f"{folder}/{name}-{rank}.pt")
    for name, case in REFUSED.items():
        model = adapted(depth_window=[0, 2])
        with pytest.raises(SliceFineError) as refused:
            train_together(model, case, rank, PROCESSES)
        steps = {layer.state.step for layer in sliced(model).values()}
        torch.save((str(refused.value), steps), f"{folder}/{name}-{rank}.pt")
    always = adapted(depth_window=[0])
    train_together(always, {"ddp": {"static_graph": True}}, rank, PROCESSES)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What two processes have saved, forked from one that has imported the libraries already."""
    folder = tmp_path_factory.mktemp("together")
    set_forkserver_preload(["peft", "slicefine.tuner"])
    context = mp.start_processes(train_all, (str(folder),), nprocs=PROCESSES, join=False, start_method="forkserver")
    while not context.join():
        pass
    return folder


@pytest.mark.parametrize("name", TOGETHER)
def test_two_processes_train_as_one(together, name):
    (first, positions), (second, others) = (
        torch.load(together / f"{name}-{rank}.pt", weights_only=False) for rank in range(PROCESSES)
    )
    alone = model_of(TOGETHER[name])
    train_together(alone, TOGETHER[name])
    assert positions == others == active_slices(alone)
    assert first.keys() == second.keys() == alone.state_dict().keys()
    for key, value in alone.state_dict().items():
        assert torch.equal(first[key], second[key])
        torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_processes_that_wait_for_what_rests_are_refused(together, name):
    """Before the first step, although all blocks are trained in the first turn."""
    for rank in range(PROCESSES):
        text, steps = torch.load(together / f"{name}-{rank}.pt", weights_only=False)
        assert steps == {0}
        assert "blocks.0.up: it rests when it is below the depth window" in text
        assert f"find_unused_parameters={bool(REFUSED[name]['ddp'])}" in text
        assert "`ddp_find_unused_parameters`" in text


def test_an_adapter_that_is_not_trained_waits_for_nobody(tmp_path, monkeypatch):
    """A teacher within a model of several processes, say."""
    model = adapted()
    fit(model, 1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(), tmp_path)
    ddp = SimpleNamespace(find_unused_parameters=False, static_graph=False)
    monkeypatch.setattr(DistributedDataParallel, "_active_ddp_module", ddp)
    loaded(example(0))
    with pytest.raises(SliceFineError, match="find_unused_parameters=True"):
        model(example(0))


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth_window": []}, r"`depth_window` is a list of indices of blocks, from 0 on, such as \[0, 2, 4\]; got \[\]"),
        ({"depth_window": [0, -1]}, r"`depth_window` is a list .*; got \[0, -1\]"),
        ({"depth_window": [0, 1.0]}, r"`depth_window` is a list .*; got \[0, 1\.0\]"),
        ({"depth_window": [False, True]}, r"`depth_window` is a list .*; got \[False, True\]"),
        ({"depth_window": ["0"]}, r"`depth_window` is a list .*; got \['0'\]"),
        ({"depth_window": "0, 2"}, r"`depth_window` is a list .*; got '0, 2'"),
        ({"depth_window": 2}, r"`depth_window` is a list .*; got 2"),
        ({"depth_window": {0: 2}}, r"`depth_window` is a list .*; got \{0: 2\}"),
        ({"depth_every": 0}, r"`depth_every` is a number of optimizer steps, at least 1; got 0"),
        ({"depth_every": -3}, r"`depth_every` is .*; got -3"),
        ({"depth_every": 2.5}, r"`depth_every` is .*; got 2\.5"),
        ({"depth_every": None}, r"`depth_every` is .*; got None"),
        ({"depth_every": True}, r"`depth_every` is .*; got True"),
        ({"depth_window": None}, r"`depth_every` is for `depth_window`, which is None; got 2\. Leave it out"),
        ({"depth_window": None, "depth_every": 25, "depth_stack": "blocks"}, r"`depth_stack` is for `depth_window`, which is None; got 'blocks'\. Leave it out"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_are_refused(settings, message):
    with pytest.raises(SliceFineError, match=f"SliceFineConfig: {message}"):
        configured(**settings)


def test_all_problems_at_once():
    with pytest.raises(SliceFineError) as refused:
        configured(depth_window=[-1], depth_every=0, r=0)
    assert all(name in str(refused.value) for name in ("3 problems", "`r`", "`depth_window`", "`depth_every`"))


class Plain(nn.Module):
    """Layers in no list."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.down(self.up(x))


class Towers(nn.Module):
    """Two lists of blocks, one after the other."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleList(Block() for _ in range(2))
        self.decoder = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for block in (*self.encoder, *self.decoder):
            x = block(x)
        return x


class Row(nn.Module):
    """A list of layers, of which each reads what the last one writes."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x


WITHOUT_HEAD = {"modules_to_save": None, "target_modules": ["up", "down"]}


@pytest.mark.parametrize(
    ("build", "settings", "message"),
    [
        (Plain, WITHOUT_HEAD, r"needs blocks in an order, and no list of modules within this Plain has targets in more than one of its entries; the targets are up, down\. Add .* or leave"),
        (net, {"target_modules": ["blocks.1.up"]}, r"needs blocks in an order.*; the targets are blocks\.1\.up"),
        (net, {"target_modules": ["pooler"]}, r"needs blocks in an order.*; the targets are pooler"),
        (Towers, WITHOUT_HEAD | {"depth_window": [1, 0]}, r"counts in one list of blocks; there are targets in encoder, decoder\. Say which one with `depth_stack`, or name .*`target_modules`"),
        (net, {"depth_window": [0, 4, 9]}, r"the blocks of blocks with targets are 0 to 3; got 4, 9\. Use indices up to 3"),
        (net, {"depth_window": [3, 2]}, r"blocks has targets that would never be trained, in block 0, 1; got \[3, 2\]\. Let one of the indices be at most 0, or leave .*`layers_to_transform`"),
        (net, {"target_modules": ["blocks.1.up", "blocks.3.up"], "depth_window": [2]}, r"never be trained, in block 1; got \[2\]\. Let one of the indices be at most 1"),
        (net, {"depth_stack": "block"}, r"`depth_stack`: no target is in 'block'\. Leave it out"),
        (net, {"depth_stack": "blocks.0"}, r"`depth_stack`: no target is in 'blocks\.0'"),
        (net, {"target_modules": ["up"], "modules_to_save": ["down", "classifier"]}, r"`modules_to_save` has blocks\.0\.down, blocks\.1\.down, blocks\.2\.down and 1 more trained in full at every step\. Leave them out, or leave out `depth_window`"),
    ],
)  # fmt: skip
def test_models_that_are_refused(build, settings, message):
    base = build()
    before = copy.deepcopy(base)
    with pytest.raises(SliceFineError, match=f"Adapter 'default' cannot be attached: .*{message}"):
        get_peft_model(base, configured(**settings))
    assert not sliced(base)
    assert not differences(base, before)


def test_several_problems_of_a_window_are_listed_together():
    with pytest.raises(SliceFineError, match="3 problems"):
        adapted(depth_window=[7, 2], target_modules=["up"], modules_to_save=["down"])


def test_partners_in_blocks_that_are_trained_at_other_steps_are_refused():
    """The rows of one block and the columns of the next would be of other features as soon as one of them rests."""
    config = SliceFineConfig(r=2, axis=COUPLED, target_modules=["0", "1", "2", "3"], depth_window=[0, 1], depth_every=2)
    config.couplings = slicefine.couplings(Row(), config, {"x": example(0, size=4)})
    with pytest.raises(
        SliceFineError,
        match=r"layers\.1, layers\.3: axis='coupled' moves both sides .*reads what another block writes.*`exclude_modules`",
    ):
        get_peft_model(Row(), config)
    config.depth_window = [0]
    get_peft_model(Row(), config)


class Uneven(nn.Module):
    """Six layers in two blocks, eight features between each two: the first of the second block reads what the first block writes, and not what its neighbour does."""

    def __init__(self):
        super().__init__()
        sizes = ([6, 8, 8, 8], [8, 8, 8, 6])
        self.blocks = nn.ModuleList(
            nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(of))) for of in sizes
        )

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_a_writer_of_as_many_features_in_the_same_block_hides_no_partner_in_another():
    names = [f"blocks.{block}.{layer}" for block in (0, 1) for layer in range(3)]
    config = SliceFineConfig(r=2, axis=COUPLED, target_modules=names, depth_window=[0, 1], depth_every=2)
    config.couplings = slicefine.couplings(Uneven(), config, {"x": example(0, size=4)})
    assert [config.couplings[name].split()[0] for name in names] == ["row", "column"] * 3
    with pytest.raises(
        SliceFineError,
        match=r"blocks\.1\.0, blocks\.1\.2: axis='coupled' moves both sides .*reads what another block writes",
    ):
        get_peft_model(Uneven(), config)


@pytest.mark.parametrize("name", ["T5", "Whisper", "CLIP", "ALBERT"])
def test_architectures_that_are_refused(name):
    """Two stacks; one block that is used again and again."""
    architecture = ARCHITECTURES[name]
    config = SliceFineConfig(r=2, task_type=architecture.task_type, depth_window=[1, 0])
    match = (
        "needs blocks in an order"
        if name == "ALBERT"
        else r"there are targets in \S+(encoder|block|layers), \S+(decoder|block|layers)\. Say which"
    )
    with pytest.raises(SliceFineError, match=match):
        get_peft_model(architecture.build(), config)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("T5", {"depth_stack": "encoder.block"}), ("T5", {"target_modules": r"decoder.*\.(q|wi|wo)"}), ("Whisper", {"depth_stack": "model.encoder.layers"})],
    ids=["the first of two", "targets in the second alone", "sounds"],
)  # fmt: skip
def test_one_of_two_stacks(name, settings):
    """Blocks of the encoder take turns, and the decoder is always trained; or the other way round with the encoder left out."""
    architecture = ARCHITECTURES[name]
    config = SliceFineConfig(r=2, task_type=architecture.task_type, depth_window=[1, 0], depth_every=1, **settings)
    model = get_peft_model(architecture.build(), config)
    stack = model.peft_config["default"].depth_stack
    found, _ = entering(model, model.get_base_model().get_submodule(stack))
    optimizer = adamw(trainable(model))
    for step in range(2):
        model(**architecture.inputs()).logits.square().mean().backward()
        resting = {name for name, layer in sliced(model).items() if layer.state.resting}
        assert resting == ({name for name in sliced(model) if name.startswith(f"{stack}.0.")} if step == 0 else set())
        assert {
            name for name, layer in sliced(model).items() if layer.slicefine_weight["default"].grad is None
        } == resting
        if stack.startswith(("encoder", "model.encoder")):
            assert found[1] == (step == 1,) * 2
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("build", "stack"),
    [
        (lambda: net(head=nn.Sequential(nn.Dropout(0.0), nn.Linear(5, 3))), "blocks"),
        (lambda: nn.ModuleDict({"towers": nn.ModuleList([net()])}), "towers.0.blocks"),
    ],
    ids=["a head in a list", "a list of one model"],
)
def test_lists_of_one_are_no_stacks(build, stack):
    config = configured(target_modules="all-linear", exclude_modules=r".*embed", modules_to_save=None)
    assert get_peft_model(build(), config).peft_config["default"].depth_stack == stack


@pytest.mark.parametrize(
    ("name", "stack", "blocks"),
    [
        ("Swin", "swin.encoder.layers", 2),
        ("ViT", "vit.layers", 2),
        ("ConvNeXt", "convnext.encoder.stages", 2),
    ],
)
def test_of_lists_within_lists_the_outermost_counts(name, stack, blocks):
    architecture = ARCHITECTURES[name]
    config = SliceFineConfig(
        r=2,
        task_type=architecture.task_type,
        modules_to_save=[architecture.head] if architecture.head else None,
        depth_window=[1, 0],
    )
    model = get_peft_model(architecture.build(), config)
    assert model.peft_config["default"].depth_stack == stack
    assert {layer.state.schedule.window.block for layer in sliced(model).values() if layer.state.schedule.window} == {
        *range(blocks)
    }


def test_a_head_of_several_layers_needs_the_stack_by_name():
    head = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    settings = {"target_modules": "all-linear", "exclude_modules": ["embed"], "modules_to_save": None}
    with pytest.raises(SliceFineError, match=r"targets in blocks, classifier\. Say which one with `depth_stack`"):
        adapted(net(head=head), **settings)
    model = adapted(net(head=head), depth_stack="blocks", **settings)
    fit(model, 1)
    assert {name for name in sliced(model) if not touched_slices(model)[name]} == {
        n for n in sliced(model) if rests(n, 0)
    }
