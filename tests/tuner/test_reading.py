"""Weights that are read: whatever code does with them, outputs and gradients are those of the plain model."""

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from tiny import mlp, trainable
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import MambaConfig, MambaForCausalLM

from slicefine import SliceFineConfig, SliceFineError, SliceFineWarning, active_slices
from slicefine.kernel import vectors
from slicefine.tuner.inspection import tuned


class Table(nn.Module):
    """Holds parameters `w` and `v`; `use(self, x)` computes with them."""

    def __init__(self, *shape, use=None, **others):
        super().__init__()
        self.w = nn.Parameter(torch.randn(*shape))
        for name, size in others.items():
            setattr(self, name, nn.Parameter(torch.randn(*size)))
        self.use = use

    def forward(self, x):
        return self.use(self, x)

    def project(self, x):
        return x @ self.w


class Around(nn.Module):
    """Has a module `inner` and computes with it in a way of its own."""

    def __init__(self, inner, use):
        super().__init__()
        self.inner, self.use = inner, use

    def forward(self, x):
        return self.use(self.inner, x)


class Scaled(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight / weight.std(), bias)


ids = torch.tensor([3, 2, -1])
PARAMETER = {"target_modules": None, "target_parameters": ["inner.w"]}
LAYER = {"target_modules": ["inner"]}
CASES = {
    "another parameter called weight": (
        Table(4, 6, use=lambda s, x: s.weight[:, 0] + x @ s.w.t(), weight=(4, 6)),
        None,
        PARAMETER,
    ),
    "weight and bias of a router": (
        Table(4, 6, weight=(4, 6), bias=(4,)),
        lambda m, x: F.linear(x, m.weight, m.bias) + x @ m.w.t(),
        {"target_modules": None, "target_parameters": ["inner.weight", "inner.w"]},
    ),
    "read from outside": (Table(6, 6), lambda m, x: x @ m.w, PARAMETER),
    "by a method": (Table(6, 6), lambda m, x: m.project(x), PARAMETER),
    "a tap of a convolution": (nn.Conv1d(6, 6, 6), lambda m, x: F.linear(x, m.weight[1]), LAYER),
    "a product with the taps of a convolution": (
        nn.Conv1d(6, 6, 6),
        lambda m, x: torch.bmm(m.weight[ids], x.unsqueeze(2)),
        LAYER,
    ),
    "picked twice": (
        Table(4, 6, 6, use=lambda s, x: torch.stack([F.linear(x[i], s.w[ids][i]) for i in range(3)])),
        None,
        PARAMETER,
    ),
    "negative numbers of experts": (
        Table(4, 6, 6, use=lambda s, x: torch.bmm(s.w[ids], x.unsqueeze(2))),
        None,
        PARAMETER,
    ),
    "a convolution of its own": (
        Scaled(1, 4, 2),
        lambda m, x: m(x[None, None]),
        {"target_modules": ["inner"], "axis": "row"},
    ),
    "arguments by name": (
        nn.Linear(6, 6),
        lambda m, x: (
            F.linear(input=x, weight=m.weight) + torch.matmul(input=x, other=m.weight.transpose(dim0=0, dim1=1))
        ),
        LAYER,
    ),
    "several weights in one": (nn.Linear(6, 6), lambda m, x: F.linear(x, torch.cat([m.weight, m.weight * 2])), LAYER),
    "in another dtype": (nn.Linear(6, 6), lambda m, x: F.linear(x.double(), m.weight.to(torch.float64)), LAYER),
    "einsum": (Table(4, 6, 6, use=lambda s, x: torch.einsum("ti,eoi->teo", x, s.w)), None, PARAMETER),
}


@pytest.fixture(params=CASES)
def case(request):
    inner, use, settings = CASES[request.param]
    torch.manual_seed(0)
    return Around(inner, use or (lambda m, x: m(x))), settings


@pytest.mark.parametrize("axis", ["row", "column"])
def test_outputs_and_gradients_are_those_of_the_plain_model(case, axis):
    base, settings = case
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    base.requires_grad_()
    base.zero_grad()
    y = base(x)
    target = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    (y * target).sum().backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in base.named_parameters() if parameter.grad is not None
    }
    model = get_peft_model(base, SliceFineConfig(**({"r": 2, "axis": axis} | settings)))
    z = model(x)
    assert torch.equal(z, y)
    (z * target).sum().backward()
    pieces = active_slices(model)
    for name, layer, adapter in tuned(model):
        dense = gradients[f"{name}.weight" if layer.place.is_layer else name]
        piece = pieces[name]
        expected = vectors(layer.place.oriented(dense), piece.axis)[piece.start : piece.stop]
        torch.testing.assert_close(layer.slicefine_weight[adapter].grad, expected.float(), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(model.unload()(x), y, atol=1e-6)


def test_autocast_and_gathered_experts():
    base = Around(nn.Linear(6, 6), lambda m, x: table(m(x)))
    table = Table(4, 6, 6, use=lambda s, x: torch.bmm(s.w[ids], x.unsqueeze(2)))
    base.table = table
    x = torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = base(x)
        model = get_peft_model(base, SliceFineConfig(target_modules=None, target_parameters=["table.w"]))
        base.use = lambda m, x: model.base_model.model.table(m(x))
        assert torch.equal(model(x), y)


def test_a_weight_that_was_kept_is_a_plain_one_when_nothing_is_shown():
    model = get_peft_model(mlp(), SliceFineConfig(r=2))
    kept = model.base_model.model.lin0.weight
    x = torch.randn(2, 10)
    with model.disable_adapter():
        assert torch.allclose(F.linear(x, kept), F.linear(x, model.base_model.model.lin0.weight))


def test_a_module_that_enters_itself_again():
    inner = Table(6, 6, use=lambda s, x: x @ s.w if x.dim() == 2 else s(x[0]) @ s.w)
    model = get_peft_model(Around(inner, lambda m, x: m(x[None])), SliceFineConfig(r=2, **PARAMETER))
    model(torch.randn(3, 6)).sum().backward()
    assert all(parameter.grad is not None for parameter in trainable(model))
    assert "w" not in vars(inner)


def test_no_gradient_anywhere_is_said():
    model = get_peft_model(
        Around(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), lambda m, x: m[1](F.linear(x, m[0].weight.data))),
        SliceFineConfig(r=2, target_modules=["inner.0"], modules_to_save=["inner.1"]),
    )
    model(torch.randn(2, 6)).sum().backward()
    with pytest.warns(SliceFineWarning, match=r"No gradient has reached 1 of 1 slices .* inner.0"):
        torch.optim.SGD(trainable(model), lr=0.1).step()


def test_a_checkpoint_within_the_module_does_not_go_unnoticed():
    class Own(nn.Linear):
        def forward(self, x):
            return checkpoint(lambda x: F.linear(x, self.weight, self.bias).tanh(), x, use_reentrant=True)

    model = get_peft_model(nn.Sequential(nn.Linear(6, 6), Own(6, 6), nn.Linear(6, 6)), SliceFineConfig(r=2))
    model(torch.randn(3, 6)).sum().backward()
    with pytest.warns(SliceFineWarning, match=r"No gradient has reached 1 of 3 slices .*: 1\."):
        torch.optim.SGD(trainable(model), lr=0.1).step()


def mamba():
    config = MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, state_size=4, pad_token_id=0)
    return MambaForCausalLM(config)


INNER, OUTER = {"target_modules": ["in_proj"]}, {"target_modules": None, "target_parameters": ["A_log"]}


def test_a_parameter_and_a_layer_within_its_module():
    for settings in (INNER | {"target_parameters": ["A_log"]}, OUTER | {"target_modules": "all-linear"}):
        with pytest.raises(SliceFineError, match=r"mixer: its parameters and layers within it .*in_proj"):
            get_peft_model(mamba(), SliceFineConfig(r=2, **settings))
    for first, second in ((INNER, OUTER), (OUTER, INNER), (OUTER, {"target_modules": "all-linear"})):
        model = get_peft_model(mamba(), SliceFineConfig(r=2, **first))
        with pytest.raises(SliceFineError, match=r"mixer: its parameters and layers within it .*in_proj"):
            model.add_adapter("other", SliceFineConfig(r=2, **second))


@pytest.mark.parametrize(
    ("make", "settings", "words"),
    [
        (
            lambda: Around(nn.ParameterList([torch.randn(6, 6)]), None),
            {"target_parameters": ["inner.0"]},
            "a list of parameters",
        ),
        (lambda: Table(6, 6), {"target_parameters": ["w"]}, "a parameter of the model itself"),
        (
            lambda: Around(Table(6, 6), None),
            {"target_parameters": ["inner.w"], "modules_to_save": ["inner"]},
            "trained in full .* or by slices, not both",
        ),
    ],
)
def test_parameters_around_which_no_layer_can_stand(make, settings, words):
    model = make()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(SliceFineError, match=words):
        get_peft_model(model, SliceFineConfig(r=2, target_modules=None, **settings))
    assert [name for name, _ in model.named_modules()] == before


def test_blocks_are_counted_where_peft_counts_them():
    model = nn.ModuleDict(
        {
            "layers": nn.ModuleList(
                nn.ModuleDict({"experts": nn.ModuleList([Table(4, 4), Table(4, 4)])}) for _ in range(2)
            )
        }
    )
    config = SliceFineConfig(
        r=2, target_modules=None, target_parameters=["w"], layers_to_transform=[0], layers_pattern="layers"
    )
    assert list(active_slices(get_peft_model(model, config))) == [f"layers.0.experts.{n}.w" for n in (0, 1)]


def test_a_module_with_hooks_of_its_own():
    inner = Table(6, 6, use=lambda s, x: x @ s.w)
    inner.register_forward_hook(lambda module, args, y: None)
    model = get_peft_model(Around(inner, lambda m, x: m(x)), SliceFineConfig(r=2, **PARAMETER))
    model(torch.randn(2, 6)).sum().backward()
    assert all(parameter.grad is not None for parameter in trainable(model))
