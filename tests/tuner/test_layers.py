"""Slices beyond linear layers: convolutions, embeddings, fused experts, and weights that models read themselves."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file
from tiny import differences, llama, tokens, trainable
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from slicefine import SliceFineConfig, SliceFineError, SliceFineWarning, active_slices, parameter_counts, touched_slices
from slicefine.kernel import vectors
from slicefine.slicing import Region
from slicefine.tuner import reading
from slicefine.tuner.inspection import tuned


class Convolutions(nn.Module):
    """Every kind of convolution, over a signal, an image and a clip."""

    def __init__(self):
        super().__init__()
        self.signal = nn.Conv1d(2, 6, 3, padding=1, stride=2)
        self.image = nn.Conv2d(3, 8, 3, padding="same", padding_mode="reflect")
        self.grouped = nn.Conv2d(8, 6, 3, groups=2, dilation=2, bias=False)
        self.depthwise = nn.Conv2d(6, 12, 3, groups=6, padding=1)
        self.pointwise = nn.Conv2d(12, 5, 1)
        self.clip = nn.Conv3d(3, 4, (2, 3, 3), stride=(2, 1, 1))

    def forward(self, signal, image, clip):
        image = self.pointwise(self.depthwise(self.grouped(self.image(image).tanh()).tanh()).tanh())
        return torch.cat([y.flatten(1) for y in (self.signal(signal), image, self.clip(clip))], 1)


class Embeddings(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(20, 8, padding_idx=3)
        self.positions = nn.Embedding(6, 8)
        self.out = nn.Linear(8, 5)

    def forward(self, ids):
        return self.out((self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))).tanh())


class OwnLinear(nn.Linear):
    """As FalconLinear."""

    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class OwnEmbedding(nn.Embedding):
    """As Gemma's."""

    def forward(self, ids):
        return super().forward(ids) * 3


class OwnForwards(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = OwnEmbedding(20, 8, padding_idx=3)
        self.a, self.b = OwnLinear(8, 6), OwnLinear(6, 5, bias=False)

    def forward(self, ids):
        return self.b(self.a(self.tokens(ids)).tanh())


class Attention(nn.Module):
    """torch's own, which reads the weight of its last layer."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.out = nn.Linear(6, 4)

    def forward(self, x):
        return self.out(self.attention(x, x, x)[0])


class InPlace(nn.Module):
    """Layers whose output is written into."""

    def __init__(self):
        super().__init__()
        self.a, self.c, self.b = nn.Linear(6, 6), nn.Conv1d(6, 6, 1), nn.Linear(6, 6, bias=False)

    def forward(self, x):
        x = torch.relu_(self.a(x))
        x = torch.relu_(self.c(x.mT)).mT.contiguous()
        y = self.b(x)
        y += 1
        return y


class Readers(nn.Module):
    """Layers whose weights are read, in every way that has a product of its own, and in some that have none."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))
        self.e = Conv1D(6, 6)
        self.kernel = nn.Conv1d(6, 6, 3)
        nn.init.normal_(self.e.bias)

    def forward(self, x):
        x = F.linear(x, self.a.weight, self.a.bias).tanh()
        x = (x @ self.b.weight.t() + self.b.bias).tanh()
        x = (x @ self.c.weight.mT).tanh()
        x = (self.d.weight @ x.mT).mT.tanh()
        x = (x @ self.e.weight + self.e.bias).tanh()
        return F.conv1d(x.mT, self.kernel.weight)


def mixtral(implementation, **settings):
    config = MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=3, num_experts_per_tok=2, experts_implementation=implementation, max_position_embeddings=32, **settings,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def gpt_oss(implementation, **settings):
    config = GptOssConfig(
        vocab_size=40, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        num_local_experts=3, num_experts_per_tok=2, experts_implementation=implementation, max_position_embeddings=32, pad_token_id=0,
        **settings,
    )  # fmt: skip
    return GptOssForCausalLM(config)


EXPERTS = {"target_modules": None, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
CASES = {
    "convolutions": (
        Convolutions,
        {"signal": (2, 2, 9), "image": (2, 3, 7, 7), "clip": (2, 3, 4, 5, 5)},
        {"target_modules": ["signal", "image", "grouped", "depthwise", "pointwise", "clip"], "r": 1},
    ),
    "embeddings": (Embeddings, {"ids": 20}, {"target_modules": ["tokens", "positions"]}),
    "readers": (Readers, {"x": (2, 5, 6)}, {"target_modules": ["a", "b", "c", "d", "e", "kernel"]}),
    "own forwards": (OwnForwards, {"ids": 20}, {"target_modules": ["tokens", "a", "b"]}),
    "attention's output": (Attention, {"x": (2, 5, 6)}, {"target_modules": ["out_proj", "out"]}),
    "attention's input": (
        Attention,
        {"x": (2, 5, 6)},
        {"target_modules": ["out"], "target_parameters": ["in_proj_weight"]},
    ),
    "in place": (InPlace, {"x": (2, 5, 6)}, {"target_modules": ["a", "b", "c"]}),
    "router": (
        lambda: mixtral("eager"),
        {"input_ids": 40},
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]},
    ),
} | {
    f"{make.__name__}-{implementation}": (lambda make=make, i=implementation: make(i), {"input_ids": 40}, EXPERTS)
    for make in (mixtral, gpt_oss)
    for implementation in ("eager", "batched_mm", "grouped_mm")
}


class Case:
    def __init__(self, name):
        self.make, self.inputs, self.settings = CASES[name]

    def base(self):
        torch.manual_seed(0)
        return self.make()

    def adapted(self, base=None, **settings):
        base = self.base() if base is None else copy.deepcopy(base)
        return get_peft_model(base, SliceFineConfig(**({"r": 2, "slide_every": 2} | self.settings | settings)))

    def outputs(self, model, seed=1):
        generator = torch.Generator().manual_seed(seed)
        inputs = {
            name: torch.randint(0, size, (3, 6), generator=generator)
            if isinstance(size, int)
            else torch.randn(size, generator=generator).to(next(model.parameters()).dtype)
            for name, size in self.inputs.items()
        }
        y = model(**inputs)
        return y if isinstance(y, torch.Tensor) else y.logits

    def loss(self, model, seed=1):
        y = self.outputs(model, seed).float()
        return (y - torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))).square().mean()

    def fit(self, model, steps, through=None):
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.0)
        for seed in range(steps):
            self.loss(model if through is None else through, seed).backward()
            optimizer.step()
            optimizer.zero_grad()
        return model


@pytest.fixture(params=CASES)
def case(request):
    return Case(request.param)


each_axis = pytest.mark.parametrize("axis", ["row", "column", "alternate"])


@each_axis
def test_the_gradient_is_that_of_the_slice(case, axis):
    model = case.fit(case.adapted(axis=axis), 3)
    dense = copy.deepcopy(model).merge_and_unload().requires_grad_()
    case.loss(model).backward()
    case.loss(dense).backward()
    for name, layer, adapter in tuned(model):
        stored = dict(dense.named_parameters())[f"{name}.weight" if layer.place.is_layer else name]
        piece = active_slices(model)[name]
        expected = vectors(layer.place.oriented(stored.grad), piece.axis)[piece.start : piece.stop]
        gradient = layer.slicefine_weight[adapter].grad
        assert gradient.shape[2:] == expected.shape[2:]
        used = gradient[: expected.shape[0], : expected.shape[1]]
        torch.testing.assert_close(used, expected, rtol=1e-4, atol=1e-6)
        assert gradient.count_nonzero() == used.count_nonzero()


@each_axis
def test_only_touched_rows_and_columns_change(case, axis):
    base = case.base()
    model = case.fit(case.adapted(base, axis=axis), 5)
    touched, layers = touched_slices(model), {name: layer for name, layer, _ in tuned(model)}
    counts = parameter_counts(model)
    merged = dict(model.merge_and_unload().named_parameters())
    entries = 0
    for name, original in base.named_parameters():
        target = name if name in layers else name.removesuffix(".weight")
        changed = merged[name].detach() != original.detach()
        if target not in layers:
            assert not changed.any()
            continue
        region, changed = Region.of(touched[target]), layers[target].place.oriented(changed)
        entries += region.size(layers[target].shape)
        changed[list(region.rows)] = False
        changed[:, list(region.columns)] = False
        assert not changed.any()
    assert counts.touched == entries


@each_axis
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_exchanged_saved_and_merged_bit_by_bit(case, axis, dtype, tmp_path):
    base = case.base().to(dtype)
    model = case.fit(case.adapted(base, axis=axis), 5).eval()
    with torch.no_grad():
        expected, trained = case.outputs(base.eval()), case.outputs(model)
        assert not torch.equal(expected, trained)
        with model.disable_adapter():
            assert torch.equal(case.outputs(model), expected)
        assert torch.equal(case.outputs(model), trained)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        assert torch.equal(case.outputs(loaded), trained)
        loaded.load_state_dict(model.state_dict())
        assert torch.equal(case.outputs(loaded), trained)
        merged = model.merge_and_unload()
        assert torch.equal(case.outputs(merged), trained)
    assert merged.state_dict().keys() == base.state_dict().keys()
    assert differences(loaded.unload(), base) == []


def test_a_second_adapter(case):
    base = case.base().requires_grad_(False)  # torch rounds some products in another way if a weight wants a gradient
    model = case.adapted(base)
    model.add_adapter("other", SliceFineConfig(**({"r": 1, "slide_every": 3} | case.settings)))
    case.fit(model, 3)
    with torch.no_grad():
        first = case.outputs(model)
    model.set_adapter("other")
    with torch.no_grad():
        assert torch.equal(case.outputs(model), case.outputs(base))
    case.fit(model, 3)
    model.set_adapter("default")
    with torch.no_grad():
        assert torch.equal(case.outputs(model), first)
    model.delete_adapter("other")
    assert differences(model.unload(), base) == []


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm", "fallback"])
def test_experts_never_have_a_gradient_of_the_whole(make, implementation, monkeypatch):
    def refuse(ctx, g):
        raise AssertionError("the gradient of all entries of all experts was computed")

    if implementation == "fallback":
        implementation = "grouped_mm"
        monkeypatch.setattr("transformers.integrations.moe._can_use_grouped_mm", lambda *_: False)
    case = Case(f"{make.__name__}-{implementation}")
    model = case.adapted()
    monkeypatch.setattr(reading._Follow, "backward", staticmethod(refuse))
    case.fit(model, 3)


# dynamo makes an instance of every autograd function that it traces, and torch warns of that
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    "name", ["convolutions", "embeddings", "readers", "own forwards", "in place", "mixtral-grouped_mm"]
)
def test_one_graph_over_three_positions(name):
    torch._dynamo.reset()
    case, counter = Case(name), CompileCounterWithBackend("aot_eager")
    model = case.adapted(axis="row")
    plain = copy.deepcopy(model)
    case.fit(model, 5, through=torch.compile(model, backend=counter, fullgraph=True))
    case.fit(plain, 5)
    assert counter.frame_count == 1
    for (name, layer, adapter), (_, other, _) in zip(tuned(model), tuned(plain), strict=True):
        torch.testing.assert_close(layer.slicefine_weight[adapter], other.slicefine_weight[adapter], msg=name)


def test_a_weight_that_is_read_costs_what_its_slice_costs(monkeypatch):
    monkeypatch.setattr(
        reading._Follow, "backward", staticmethod(lambda ctx, g: pytest.fail("a gradient of the whole"))
    )
    layer = get_peft_model(nn.Sequential(nn.Linear(6, 6)), SliceFineConfig(target_modules=["0"])).base_model.model[0]
    F.linear(torch.randn(3, 6), layer.weight, layer.bias).sum().backward()
    assert layer.slicefine_weight["default"].grad.any()


def test_reading_without_a_gradient_gives_the_parameter_itself():
    model = get_peft_model(nn.Sequential(nn.Linear(6, 6)), SliceFineConfig(target_modules=["0"]))
    layer = model.base_model.model[0]
    with torch.no_grad():
        assert type(layer.weight) is nn.Parameter
    with model.disable_adapter():
        assert type(layer.weight) is nn.Parameter
    assert layer.weight.dtype is torch.float32
    assert layer.weight.shape == (6, 6)
    assert type(layer.weight + 0) is torch.Tensor


def test_a_backward_pass_that_meets_other_values_is_refused():
    model = get_peft_model(Readers(), SliceFineConfig(target_modules=["a", "b", "d"]))
    y = model(torch.randn(2, 5, 6)).sum()
    with model.disable_adapter(), pytest.raises(SliceFineError, match=r"needs the values of its forward pass"):
        y.backward()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_parameters": ["mlp.experts.down"]}, [r"down'", r"Did you mean 'experts.down_proj'"]),
        ({"target_parameters": ["q_proj.weight"]}, ["weight of a layer", "target_modules"]),
        ({"target_parameters": ["input_layernorm.weight"]}, [r"shape \(16,\)", "are matrices"]),
        ({"target_parameters": "mlp.experts.down_proj"}, ["a list of names"]),
        ({"target_parameters": None}, ["names the layers to train"]),
        (
            {"r": 20, "axis": "row", "target_parameters": ["mlp.gate.weight"]},
            [r"model.layers.0.mlp.gate.weight", "r=20"],
        ),
    ],
)
def test_parameters_that_cannot_hold_slices(settings, words):
    with pytest.raises(SliceFineError) as error:
        get_peft_model(mixtral("eager"), SliceFineConfig(**(EXPERTS | settings)))
    for word in words:
        assert error.match(word)


def test_adapters_of_one_model_have_the_same_parameters():
    model = get_peft_model(mixtral("eager"), SliceFineConfig(**EXPERTS))
    with pytest.raises(SliceFineError, match="the same `target_parameters`"):
        model.add_adapter("other", SliceFineConfig(**(EXPERTS | {"target_parameters": ["mlp.experts.down_proj"]})))


def test_experts_of_some_blocks():
    model = get_peft_model(mixtral("eager"), SliceFineConfig(**EXPERTS, layers_to_transform=[1]))
    assert list(active_slices(model)) == [f"model.layers.1.mlp.experts.{name}_proj" for name in ("down", "gate_up")]


def test_what_the_base_layer_has_is_found_at_the_layer():
    model = get_peft_model(Convolutions(), SliceFineConfig(r=1, target_modules=["image"]))
    layer = model.base_model.model.image
    assert (layer.stride, layer.padding) == ((1, 1), "same")
    with pytest.raises(AttributeError, match="'Conv2d' object has no attribute 'colour'"):
        layer.colour  # noqa: B018 -- asking is the test


def test_a_layer_whose_name_ends_as_that_of_a_head():
    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=40, dim=16, hidden_dim=24, n_layers=1, n_heads=2, max_position_embeddings=32)
    model = get_peft_model(DistilBertForSequenceClassification(config), SliceFineConfig(r=2, task_type="SEQ_CLS"))
    heads = {n for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    assert {name.rpartition(".")[2] for name in heads} == {"pre_classifier", "classifier"}
    assert len(active_slices(model)) == 6


def test_wrong_calls_of_embeddings_and_convolutions():
    model = get_peft_model(Convolutions(), SliceFineConfig(r=1, target_modules=["pointwise"]))
    model.base_model.model.pointwise.base_layer.weight.requires_grad = True
    with pytest.raises(SliceFineError, match="trained by its slice or as a whole"):
        model(torch.randn(2, 2, 9), torch.randn(2, 3, 7, 7), torch.randn(2, 3, 4, 5, 5))


def test_the_table_of_an_embedding_is_not_saved(tmp_path):
    base = llama()
    model = get_peft_model(
        copy.deepcopy(base), SliceFineConfig(r=2, slide_every=2, target_modules=["embed_tokens", "lm_head"])
    )
    fit_lm(model, 5)
    with pytest.warns(UserWarning, match="Setting `save_embedding_layers`"):  # PEFT means to
        model.save_pretrained(tmp_path)
    assert all("slicefine_" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def fit_lm(model, steps):
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        model(tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_experts_are_not_left_out_without_a_word():
    with pytest.warns(SliceFineWarning, match=r"of the model are parameters of three dimensions .*'experts.down_proj'"):
        get_peft_model(mixtral("eager"), SliceFineConfig())


def test_slices_that_no_gradient_reaches_are_named():
    class Detached(Embeddings):
        def forward(self, ids):
            return self.out((self.tokens(ids) + self.positions(torch.arange(ids.shape[1])).detach()).tanh())

    model = get_peft_model(Detached(), SliceFineConfig(r=2, target_modules=["tokens", "positions"]))
    model(torch.arange(4)[None]).sum().backward()
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    with pytest.warns(
        SliceFineWarning, match="No gradient has reached 1 of 2 slices before the first step of SGD: positions"
    ):
        optimizer.step()


def test_transformers_own_loader_brings_slices_of_experts(tmp_path):
    case = Case("mixtral-grouped_mm")
    case.base().save_pretrained(tmp_path / "base")
    base, other = (MixtralForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32) for _ in range(2))
    model = case.fit(case.adapted(base), 5).eval()
    model.save_pretrained(tmp_path / "adapter")
    other.load_adapter(str(tmp_path / "adapter"))
    with torch.no_grad():
        assert torch.equal(case.outputs(other.eval()), case.outputs(model))


def test_where_there_are_no_linear_layers():
    with pytest.raises(
        SliceFineError, match=r"Linear layers here: none. Name other layers .*: clip \(1\), depthwise \(1\)"
    ):
        get_peft_model(Convolutions(), SliceFineConfig())


def test_parameters_of_a_module_and_layers_within_it():
    config = SliceFineConfig(r=2, target_modules=["out_proj"], target_parameters=["in_proj_weight"])
    with pytest.raises(SliceFineError, match=r"attention: its parameters and layers within it .*: attention.out_proj"):
        get_peft_model(Attention(), config)
