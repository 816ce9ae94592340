"""Which weights write the features that another one reads: what the probe finds, against the whole Jacobian of tiny models."""

import contextlib
import functools
import random
import re
from types import SimpleNamespace

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, DECODER, ENCODER
from peft import TaskType, get_peft_model
from tiny import batch, bert, differences, electra, llama, mlp, opt, tokens
from torch import nn
from transformers.integrations.moe import ExpertsInterface

import slicefine
from slicefine import SliceFineConfig, SliceFineError, SliceFineWarning, active_slices
from slicefine.slicing import Layout
from slicefine.tuner import coupling
from slicefine.tuner.base_layers import CONVOLUTIONS
from slicefine.tuner.coupling import find_couplings, random_inputs
from slicefine.tuner.layer import SliceLayer
from slicefine.tuner.stand_ins import stand_ins
from slicefine.tuner.targets import find_targets

# ---------------------------------------------------------------------- tiny models


def of(kind, **settings):
    """A model of transformers with random weights and random statistics of its norms, as if it had been trained."""
    torch.manual_seed(0)
    kind = getattr(transformers, kind)
    return trained(kind(kind.config_class(**settings)))


def trained(model):
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(mean=2.0)
            module.running_var.uniform_(0.5, 2.0)
    return model.eval()


def sequence(*layers):
    torch.manual_seed(0)
    return trained(nn.Sequential(*layers))


def known(name):
    return functools.partial(ARCHITECTURES[name].build), ARCHITECTURES[name].inputs


def mobile():
    """Pointwise, depthwise, pointwise, with batch norms; twice."""
    blocks = []
    for _ in range(2):
        blocks += [nn.Conv2d(6, 10, 1, bias=False), nn.BatchNorm2d(10), nn.ReLU6()]
        blocks += [nn.Conv2d(10, 10, 3, padding=1, groups=10, bias=False), nn.BatchNorm2d(10), nn.ReLU6()]
        blocks += [nn.Conv2d(10, 6, 1, bias=False), nn.GroupNorm(1, 6)]
    return sequence(*blocks)


class FusedKeyValue(nn.Module):
    """Attention with two heads of four: a query, and keys and values head by head in one weight."""

    def __init__(self, interleaved=True, gate=False):
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(6, 16 if gate else 8), nn.Linear(6, 16), nn.Linear(8, 6)
        self.interleaved, self.gate = interleaved, gate

    def forward(self, x):
        rows, length, _ = x.shape
        q, kv = self.q(x), self.kv(x)
        if self.interleaved:
            k, v = kv.view(rows, length, 2, 8).split(4, -1)
        else:
            k, v = (part.reshape(rows, length, 2, 4) for part in kv.chunk(2, -1))
        if self.gate:
            q, gate = q.view(rows, length, 2, 8).split(4, -1)
        q = q.reshape(rows, length, 2, 4)
        scores = torch.einsum("blhd,bmhd->bhlm", q, k)
        y = torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v)
        return self.o((y * gate.sigmoid() if self.gate else y).flatten(2))


class GroupedAttention(nn.Module):
    """Of 16 features, with heads of a size of its own. Every key and value head serves two query heads."""

    def __init__(self, size):
        super().__init__()
        self.size = size
        self.q, self.k, self.v, self.o = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = (part.repeat_interleave(2, 1) for part in (k, v))
        return x + self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def attentions(*sizes):
    return sequence(*[GroupedAttention(size) for size in sizes])


class Experts(nn.Module):
    """A mixture of experts of linear layers: rows of their inputs are tokens that a router has picked."""

    def __init__(self, experts=4):
        super().__init__()
        self.gate = nn.Linear(6, experts)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(6, 10), "act": nn.ReLU(), "down": nn.Linear(10, 6)}) for _ in range(experts)
        )

    def forward(self, x):
        flat = x.flatten(0, 1)
        weights, chosen = self.gate(flat).softmax(-1).topk(2, -1)
        y = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            at, place = (chosen == number).nonzero(as_tuple=True)
            hidden = expert["act"](expert["up"](flat[at]))
            y.index_add_(0, at, expert["down"](hidden) * weights[at, place, None])
        return y.view_as(x)


class GatedUnit(nn.Module):
    """Gate and up in one weight, row by row in turn."""

    def __init__(self):
        super().__init__()
        self.gate_up, self.down = nn.Linear(6, 24), nn.Linear(12, 6)

    def forward(self, x):
        gate, up = self.gate_up(x).unflatten(-1, (12, 2)).unbind(-1)
        return self.down(nn.functional.silu(gate) * up)


class Apart(nn.Module):
    """What a layer computes is read by two others, or put beside what another one computes, or normalised."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(8, 6)
        self.d, self.e, self.f = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(8, 6)
        self.g, self.norm, self.h = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6)

    def forward(self, x):
        hidden = self.a(x).relu()
        x = x + self.b(hidden) * self.c(hidden)
        x = x + self.f(torch.cat([self.d(x), self.e(x)], -1))
        return x + self.h(self.norm(self.g(x)))


class Twice(nn.Module):
    """One of the two layers that write is called twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.c(self.a(self.a(x)) * self.b(x))


class Model(nn.Module):
    """Linear layers of eight features by name, and what is computed with them: `compute(self, x)`."""

    def __init__(self, names, compute):
        super().__init__()
        for name in names.split():
            self.add_module(name, nn.Linear(8, 8))
        self.compute = compute

    def forward(self, x):
        return self.compute(self, x)


def written_into_afterwards(model, x):
    hidden = model.a(x) * 2
    y = model.b(hidden)
    hidden += model.c(x)
    return y


def attention(q, k, v):
    q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def one_query_for_two(model, x):
    q = model.q(x)
    return model.o1(attention(q, model.k1(x), model.v1(x))) + model.o2(attention(q, model.k2(x), model.v2(x)))


def without_norms(model, x):
    x = model.stem(x)
    return model.head(x + model.block(x).relu())


def centred(model, x):
    query = model.q(x)
    return model.o(model.v(x) + query - query.mean(-1, keepdim=True))


def vectors_of(*shape):
    return lambda: {"input": torch.randn(shape, generator=torch.Generator().manual_seed(5))}


SEQUENCE = {"x": torch.randn(8, 5, 6, generator=torch.Generator().manual_seed(5))}
WIDE = {"x": torch.randn(8, 5, 8, generator=torch.Generator().manual_seed(5))}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
EVERYTHING = None

MODELS = {
    # name: (builder, inputs or None for those that are guessed, last parts of the names that have partners or None for all targets)
    **{name: (*known(name), EVERYTHING) for name in ("Llama", "Mistral", "Qwen3", "Gemma 3", "Phi", "GPT-2", "T5", "Whisper")},
    "BERT": (*known("BERT"), EVERYTHING),
    "RoBERTa": (*known("RoBERTa"), EVERYTHING),
    "BERT, its own inputs": (bert, None, {"query", "key", "value", "dense"}),
    "DeBERTa-v2": (*known("DeBERTa-v2"), {"query_proj", "key_proj", "value_proj", "dense", "classifier"}),
    "ViT": (known("ViT")[0], None, {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"}),
    "VideoMAE": (known("VideoMAE")[0], None, {"query", "key", "value", "dense"}),
    "Swin": (known("Swin")[0], None, {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"}),
    "ConvNeXt": (known("ConvNeXt")[0], None, {"pwconv1", "pwconv2"}),
    "CLIP": (*known("CLIP"), {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}),
    "Llama, groups of two": (llama, None, EVERYTHING),
    "OPT": (opt, None, EVERYTHING),
    "Phi-3": (lambda: of("Phi3ForCausalLM", **DECODER | GROUPED), None, EVERYTHING),
    "GPT-NeoX": (lambda: of("GPTNeoXForCausalLM", **DECODER), None, EVERYTHING),
    "Falcon": (
        lambda: of("FalconForCausalLM", **DECODER | GROUPED, num_kv_heads=2, new_decoder_architecture=True),
        None, EVERYTHING,
    ),
    "BLOOM": (lambda: of("BloomForCausalLM", vocab_size=50, hidden_size=16, n_layer=2, n_head=4), None, EVERYTHING),
    "one key head": (lambda: of("GPTBigCodeForCausalLM", vocab_size=50, n_embd=16, n_layer=2, n_head=4, n_positions=32, **ENDS), None, EVERYTHING),
    "BART": (
        lambda: of("BartModel", vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
                   encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32, **ENDS, decoder_start_token_id=2, forced_eos_token_id=None),
        None, EVERYTHING,
    ),
    "DistilBERT": (lambda: of("DistilBertModel", vocab_size=50, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=32), None, EVERYTHING),
    "norms over all heads": (lambda: of("Olmo2ForCausalLM", **DECODER | {"num_key_value_heads": 2}), None, EVERYTHING),
    "norms over all heads, groups of two": (
        lambda: of("Olmo2ForCausalLM", **DECODER | GROUPED), None, {"v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    ),
    "a gate per head": (
        lambda: of("Qwen3NextForCausalLM", **DECODER | GROUPED, head_dim=4, layer_types=["full_attention"] * 2, num_experts=0, mlp_only_layers=[0, 1]),
        None, EVERYTHING,
    ),
    "latent attention": (
        lambda: of("DeepseekV3ForCausalLM", **DECODER | {"num_key_value_heads": 2}, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8,
                   v_head_dim=8, first_k_dense_replace=2),
        None, {"kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    ),
    "mlp": (mlp, lambda: {"x": batch(size=8)}, {"lin0", "lin1"}),
    "two rows": (mlp, lambda: {"x": batch(size=2)}, {"lin0", "lin1"}),
    "many rows": (mlp, lambda: {"x": batch(size=200)}, {"lin0", "lin1"}),
    "nothing between": (lambda: sequence(nn.Linear(6, 10), nn.Linear(10, 4)), vectors_of(4, 6), EVERYTHING),
    "four in a row": (lambda: sequence(*[nn.Linear(6, 6) for _ in range(4)]), vectors_of(4, 6), EVERYTHING),
    "ReLU in place": (
        lambda: sequence(nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(6, 4, 3), nn.ReLU(inplace=True)),
        vectors_of(4, 3, 12, 12), EVERYTHING,
    ),
    "convolutions of one dimension": (lambda: sequence(nn.Conv1d(3, 6, 3), nn.GELU(), nn.Conv1d(6, 4, 3)), vectors_of(4, 3, 12), EVERYTHING),
    "convolutions of three dimensions": (lambda: sequence(nn.Conv3d(3, 6, 2), nn.GELU(), nn.Conv3d(6, 4, 2)), vectors_of(4, 3, 5, 5, 5), EVERYTHING),
    "a depthwise layer between": (mobile, vectors_of(4, 6, 8, 8), {"0", "6", "8", "14"}),
    "ResNet": (
        lambda: of("ResNetForImageClassification", embedding_size=8, hidden_sizes=[8, 12], depths=[2, 1], num_labels=3, layer_type="bottleneck"),
        None, {"layer.0.convolution", "layer.1.convolution"},
    ),
    "key and value in one, by heads": (FusedKeyValue, lambda: SEQUENCE, EVERYTHING),
    "key and value in one": (lambda: FusedKeyValue(interleaved=False), lambda: SEQUENCE, EVERYTHING),
    "query and gate in one": (lambda: FusedKeyValue(gate=True), lambda: SEQUENCE, EVERYTHING),
    "gate and up row by row": (GatedUnit, lambda: SEQUENCE, EVERYTHING),
    "heads smaller than before": (lambda: attentions(4, 2), vectors_of(4, 5, 16), EVERYTHING),
    "heads larger than before": (lambda: attentions(2, 4), vectors_of(4, 5, 16), EVERYTHING),
    "experts": (Experts, lambda: SEQUENCE, {"up", "down"}),
    "torch's encoder": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 10, batch_first=True), 2), lambda: {"src": SEQUENCE["x"]}, {"linear1", "linear2"}),
    "torch's encoder, tokens first": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 10), 2, enable_nested_tensor=False), lambda: {"src": SEQUENCE["x"]}, {"linear1", "linear2"}),
    "read by two, beside another, normalised": (Apart, lambda: SEQUENCE, set()),
    "called twice": (Twice, lambda: SEQUENCE, set()),
    "written into afterwards": (lambda: Model("a b c", written_into_afterwards), lambda: WIDE, {"a", "b"}),
    "one query for two": (lambda: Model("q k1 v1 o1 k2 v2 o2", one_query_for_two), lambda: WIDE, {"k1", "v1", "o1", "k2", "v2", "o2"}),
    "a residual stream without norms": (lambda: Model("stem block head", without_norms), lambda: WIDE, set()),
    "centred": (lambda: Model("q v o", centred), lambda: WIDE, EVERYTHING),
    "a layer for all depths": (*known("ALBERT"), {"pooler", "classifier"}),
    "Mamba": (known("Mamba")[0], None, set()),
}  # fmt: skip


def couples(model):
    """Names and modules that are coupled if they have partners."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, transformers.pytorch_utils.Conv1D, *CONVOLUTIONS))
        and not name.endswith(("lm_head", "embed_out", "proj_out"))
    }


def config_for(model, **settings):
    return SliceFineConfig(**{"r": 2, "axis": "coupled", "target_modules": [*couples(model)]} | settings)


def probed(model, inputs=None, **settings):
    """Couplings as layouts by name."""
    config = config_for(model, **settings)
    found = slicefine.couplings(model, config, inputs) if inputs else find_couplings(model, find_targets(model, config))
    return {name: Layout.parse(text) for name, text in found.items()}


# ---------------------------------------------------------------------- the oracle


class Jacobian:
    """For a reader, and everything that its input is computed from: which of its features change with which rows.

    One feature of one row of the batch at a time, with all outputs of targets cut; another batch, other numbers than the probe's.
    """

    def __init__(self, model, inputs, names):
        self.inputs, self.leaves = {}, {}
        self.modules = {name: model.get_submodule(name) for name in names}
        generator = torch.Generator().manual_seed(7)

        def cut(name, module, args, output):
            self.inputs[name] = args[0].clone()
            leaf = (torch.rand(output.shape, generator=generator) + 0.5).to(output).requires_grad_()
            self.leaves[name] = leaf
            return leaf * 1

        handles = [m.register_forward_hook(functools.partial(cut, name)) for name, m in self.modules.items()]
        # A ReLU hides features after a norm that has seen other numbers.
        handles += [
            m.register_forward_hook(lambda m, a, y: a[0] * 1.5)
            for m in model.modules()
            if isinstance(m, nn.BatchNorm2d | nn.ReLU6)
        ]
        with torch.enable_grad():
            model.eval()(**inputs)
        for handle in handles:
            handle.remove()

    def by_feature(self, name, x):
        """`x` with features in dimension 0, anything else in dimension 1."""
        dim = 1 if isinstance(self.modules[name], CONVOLUTIONS) else x.dim() - 1
        return x.movedim(dim, 0).flatten(1)

    def of(self, reader, writers):
        """Writer -> bool `(features of the reader, rows of the writer)`"""
        x = self.by_feature(reader, self.inputs[reader])
        weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(8), dtype=x.dtype)
        leaves = [self.leaves[name] for name in writers]
        found = {name: [] for name in writers}
        for feature, weight in zip(x, weights, strict=True):
            gradients = torch.autograd.grad(feature, leaves, weight, retain_graph=True, allow_unused=True)
            for name, leaf, gradient in zip(writers, leaves, gradients, strict=True):
                gradient = torch.zeros_like(leaf) if gradient is None else gradient
                found[name].append((self.by_feature(name, gradient) != 0).any(1))
        return {name: torch.stack(rows) for name, rows in found.items()}


def groups(found):
    """Reader -> its writers: in the order of the model, a reader follows those that it reads."""
    return {name for name, layout in found.items() if layout.axis == "column"}


def features(layout):
    """The feature of each row or column."""
    return [feature for first, count in layout.runs for feature in range(first, first + count)]


@pytest.mark.parametrize("name", MODELS)
def test_the_probe_finds_what_the_jacobian_says(name):
    build, inputs, expected = MODELS[name]
    model = build()
    found = probed(model, inputs and inputs())
    names = set(couples(model))
    coupled = (
        names
        if expected is EVERYTHING
        else {n for n in names if n.endswith(tuple(f".{e}" for e in expected)) or n in expected}
    )
    if name == "BERT, its own inputs":
        coupled -= {"bert.pooler.dense"}
    assert set(found) == coupled
    if not found:
        return
    cut = [n for n in names if _is_called(model, n) and getattr(model.get_submodule(n), "groups", 1) == 1]
    jacobian = Jacobian(model, inputs() if inputs else random_inputs(model), cut)
    written = {}
    for reader in groups(found):
        of_feature = features(found[reader])
        for writer, rows in jacobian.of(reader, [n for n in found if n != reader and n in jacobian.leaves]).items():
            if not rows.any():
                continue
            assert writer not in written, f"{writer} is read by {reader} and by {written[writer]}"
            written[writer] = reader
            assert found[writer].axis == "row"
            assert found[writer].features == found[reader].features
            seen = {}
            for row, unit in enumerate(features(found[writer])):
                reached = tuple(rows[:, row].nonzero().flatten().tolist())
                own = tuple(index for index, feature in enumerate(of_feature) if feature == unit)
                assert set(own) & set(reached), f"row {row} of {writer} does not write feature {unit} of {reader}"
                if not set(reached) <= set(own):  # of a block: row by row, the features in their order
                    order = list(dict.fromkeys(of_feature[index] for index in reached))
                    assert unit == order[seen.setdefault(reached, 0) % len(order)], f"row {row} of {writer}"
                    seen[reached] += 1
    assert set(written) == {n for n, layout in found.items() if layout.axis == "row"}


def _is_called(model, name):
    return not name.endswith("out_proj") or not isinstance(
        model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention
    )


# ---------------------------------------------------------------------- answers by hand


def test_grouped_query_attention_by_hand():
    """Four query heads of four features, two key heads: each value head is read by the columns of two query heads."""
    found = probed(llama())
    attention = "model.layers.0.self_attn."
    first_head, second_head = [*range(4)], [*range(4, 8)]
    by_query_head = first_head + first_head + second_head + second_head
    assert features(found[attention + "v_proj"]) == first_head + second_head
    assert features(found[attention + "k_proj"]) == first_head + second_head
    assert features(found[attention + "q_proj"]) == by_query_head
    assert features(found[attention + "o_proj"]) == by_query_head
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert features(found[f"model.layers.0.mlp.{name}"]) == [*range(24)]


@pytest.mark.parametrize("sizes", [(4, 2), (2, 4), (4, 2, 4), (8, 2), (2, 8), (4, 4)])
def test_heads_of_another_size_than_those_before_by_hand(sizes):
    """What is known of one block is tried on the next, and is no answer."""
    found = probed(attentions(*sizes), vectors_of(4, 5, 16)())
    for number, size in enumerate(sizes):
        served = [[*range(first, first + size)] for first in range(0, 8, size)]
        twice = [feature for head in served for feature in head * 2]
        assert features(found[f"{number}.o"]) == features(found[f"{number}.q"]) == twice
        assert features(found[f"{number}.k"]) == features(found[f"{number}.v"]) == [*range(8)]


@pytest.mark.parametrize(
    ("name", "weight", "expected"),
    [
        ("GPT-2", "transformer.h.0.attn.c_attn", [*range(16)] * 3),
        ("Phi-3", "model.layers.0.self_attn.qkv_proj", [0, 1, 2, 3] * 2 + [4, 5, 6, 7] * 2 + [*range(8)] * 2),
        ("Phi-3", "model.layers.0.mlp.gate_up_proj", [*range(24)] * 2),
        ("GPT-NeoX", "gpt_neox.layers.0.attention.query_key_value", [*range(8)] * 3 + [*range(8, 16)] * 3),
        ("BLOOM", "transformer.h.0.self_attention.query_key_value", [h * 4 + i for h in range(4) for _ in "qkv" for i in range(4)]),
        ("one key head", "transformer.h.0.attn.c_attn", [0, 1, 2, 3] * 6),
        ("one key head", "transformer.h.0.attn.c_proj", [0, 1, 2, 3] * 4),
        ("key and value in one, by heads", "kv", [*range(4)] * 2 + [*range(4, 8)] * 2),
        ("query and gate in one", "q", [*range(4)] * 2 + [*range(4, 8)] * 2),
        ("gate and up row by row", "gate_up", [i for i in range(12) for _ in range(2)]),
        ("latent attention", "model.layers.0.self_attn.kv_b_proj", [*range(8)] * 2 + [*range(8, 16)] * 2),
    ],
)  # fmt: skip
def test_fused_weights_by_hand(name, weight, expected):
    build, inputs, _ = MODELS[name]
    assert features(probed(build(), inputs and inputs())[weight]) == expected


LINEAR_ATTENTION = {"layer_types": ["linear_attention"] * 2, "num_experts": 0, "mlp_only_layers": [0, 1]} | {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 4, "linear_value_head_dim": 4,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 2,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
    "first_k_dense_replace": 2,
}
WITHOUT_ORDER = {
    # name: (builder, weights of which no order says which feature they are of)
    "a query of half a value, in one weight": (lambda: of("Qwen3NextForCausalLM", **DECODER | GROUPED, **LINEAR_ATTENTION), {"in_proj_qkvz"}),
    "a key of half a value": (
        lambda: of("LevitModel", image_size=32, hidden_sizes=[8, 8, 8], depths=[1, 1, 1], num_attention_heads=[2, 2, 2], key_dim=[4, 4, 4]),
        {"queries_keys_values.linear", "projection.linear"},
    ),
    "a norm over all heads of one weight": (
        lambda: of("MiniMaxForCausalLM", **DECODER | GROUPED, layer_types=["linear_attention"] * 2, num_local_experts=2, block_size=4), {"qkv_proj"},
    ),
    "a value that is wider than its key, in one weight": (
        lambda: of("Glm4MoeLiteForCausalLM", **DECODER | {"num_key_value_heads": 2} | LATENT), {"q_b_proj", "kv_b_proj", "o_proj"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WITHOUT_ORDER)
def test_what_no_order_tells_apart_has_no_partner(name):
    build, without = WITHOUT_ORDER[name]
    model = build()
    assert {end for end in without if any(target.endswith(end) for target, _ in model.named_modules())} == without
    assert not [target for target in probed(model) if target.endswith(tuple(without))]


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (["v_proj", "o_proj"], {"v_proj": 1, "o_proj": 2}),
        (["k_proj", "v_proj", "o_proj"], {"k_proj": 1, "v_proj": 1, "o_proj": 2}),
        (["q_proj", "v_proj", "o_proj"], {"q_proj": 2, "v_proj": 1, "o_proj": 2}),
        (["up_proj", "down_proj"], {"up_proj": 1, "down_proj": 1}),
        (["q_proj", "k_proj", "o_proj"], {}),
        (["gate_proj", "up_proj"], {}),
        (["v_proj"], {}),
        (["down_proj"], {}),
    ],
    ids=" ".join,
)
def test_some_of_the_layers(chosen, expected):
    """What is not targeted is no partner, and in nobody's way. Query and key alone do not say which feature is whose."""
    found = probed(llama(), target_modules=chosen)
    copies = {name.rpartition(".")[2]: layout.copies for name, layout in found.items()}
    assert copies == expected
    assert len(found) == 2 * len(expected)


def test_some_of_the_blocks():
    assert {
        name.split(".")[2] for name in probed(llama(), target_modules=["up_proj", "down_proj"], layers_to_transform=[1])
    } == {"1"}


# ---------------------------------------------------------------------- attaching


def attached(model, **settings):
    return get_peft_model(model, config_for(model, **settings))


def test_partners_show_the_same_features():
    slices = active_slices(attached(llama(), r=3))
    assert {tuple(slices[f"model.layers.1.self_attn.{n}_proj"].indices) for n in "kv"} == {(0, 1, 2)}
    assert {tuple(slices[f"model.layers.1.self_attn.{n}_proj"].indices) for n in "qo"} == {(0, 1, 2, 4, 5, 6)}
    assert {n.rpartition(".")[2] for n, piece in slices.items() if piece.axis == "column"} == {"o_proj", "down_proj"}


def test_what_has_no_partner_trains_rows_and_is_listed():
    with pytest.warns(SliceFineWarning, match=r"axis='coupled': 1 of 3 weights have no partner .* train rows: head\."):
        model = get_peft_model(mlp(), coupled_mlp(["lin0", "lin1", "head"]))
    pieces = active_slices(model)
    assert [(pieces[name].axis, pieces[name].layout is None) for name in ("lin0", "lin1", "head")] == [
        ("row", False),
        ("column", False),
        ("row", True),
    ]
    assert model.peft_config["default"].couplings == {"lin0": "row 0+20", "lin1": "column 0+20"}


def coupled_mlp(names=("lin0", "lin1"), r=2, **settings):
    base = mlp()
    config = SliceFineConfig(r=r, axis="coupled", target_modules=[*names], **settings)
    config.couplings = slicefine.couplings(base, config, {"x": batch()})
    return config


def test_the_configuration_of_the_user_stays_as_it_is():
    base, config = llama(), config_for(llama())
    model = get_peft_model(base, config)
    assert config.couplings is None
    assert len(model.peft_config["default"].couplings) == 14


@pytest.mark.parametrize("chosen", [["v_proj"], ["q_proj", "k_proj"], ["down_proj"]], ids=" ".join)
def test_where_nothing_couples_the_adapter_is_refused(chosen):
    base = llama()
    with pytest.raises(
        SliceFineError,
        match=rf"none of the \d targets \(.*{chosen[0]}.* feature by feature. Add the layers on the other side",
    ):
        get_peft_model(base, config_for(base, target_modules=chosen))
    assert not differences(base, llama())


def test_a_slice_wider_than_the_features_is_refused():
    base = llama()
    with pytest.raises(SliceFineError) as error:
        get_peft_model(base, config_for(base, r=9))
    assert str(error.value).count("r=9 is more than the 8 hidden features") == 1
    assert " and 5 more: r=9" in str(error.value)
    assert "mlp" not in str(error.value)
    assert not differences(base, llama())


def test_a_slice_wider_than_what_has_no_partner():
    """Refused if the layer was named, and listed if it was not: as with rows."""
    names = ["lin0", "lin1", "head"]
    config = coupled_mlp(names, r=4)
    for couplings in (config.couplings, None):
        config.couplings = couplings
        with pytest.raises(SliceFineError, match=r"head: r=4 is more than the 3 rows"), known_inputs():
            get_peft_model(mlp(), config)
    config.couplings, config.target_modules = None, "all-linear"
    with pytest.warns(SliceFineWarning) as said, known_inputs():
        get_peft_model(mlp(), config)
    assert any("head (3, 14)" in str(warning.message) for warning in said)


def known_inputs():
    """Where a plain model has something that tells its inputs."""
    patch = pytest.MonkeyPatch()
    patch.setattr(coupling, "random_inputs", lambda model: {"x": batch()})
    return contextlib.closing(SimpleNamespace(close=patch.undo))


def test_couplings_of_another_model_are_refused():
    config = config_for(llama(), couplings={name: str(layout) for name, layout in probed(llama()).items()})
    torch.manual_seed(0)
    wider = ARCHITECTURES["Llama"].build()
    with pytest.raises(SliceFineError) as error:
        get_peft_model(
            wider, config_for(wider, couplings=dict(config.couplings) | {"model.layers.0.mlp.down": "row 0+16"})
        )
    assert not [m for m in wider.modules() if isinstance(m, SliceLayer)]
    assert "there is no target 'model.layers.0.mlp.down'. Did you mean 'model.layers.0.mlp.down_proj'" in str(
        error.value
    )
    narrower = mlp()
    with pytest.raises(
        SliceFineError, match=r"lin0: 16 rows are said to be of features, its weight of shape \(20, 10\) has 20"
    ):
        get_peft_model(
            narrower, SliceFineConfig(axis="coupled", target_modules=["lin0"], couplings={"lin0": "row 0+16"})
        )


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"axis": "row", "couplings": {"lin0": "row 0+20"}}, "`couplings` are for axis='coupled'; got axis='row'"),
        ({"axis": "coupled", "couplings": {"lin0": "rows"}}, "`couplings`: lin0: a coupling is written as"),
        ({"axis": "coupled", "couplings": {"lin0": "row 3+4"}}, "`couplings`: lin0: a coupling names every feature"),
    ],
)
def test_malformed_couplings_are_refused(settings, why):
    with pytest.raises(SliceFineError, match=re.escape(why)):
        SliceFineConfig(**settings)


# ---------------------------------------------------------------------- inputs


def test_a_model_whose_inputs_are_not_known():
    base = mlp()
    config = SliceFineConfig(r=2, axis="coupled", target_modules=["lin0", "lin1"])
    with pytest.raises(
        SliceFineError, match=r"the inputs of MLP are not known.*slicefine\.couplings\(model, config, batch\)"
    ):
        get_peft_model(base, config)
    assert not differences(base, mlp())
    config.couplings = slicefine.couplings(base, config, {"x": batch()})
    assert active_slices(get_peft_model(base, config))["lin1"].axis == "column"


def test_an_input_that_is_not_known_by_its_name():
    model = ARCHITECTURES["Whisper"].build()
    with pytest.raises(
        SliceFineError, match=r"inputs of WhisperFor\w+ are not known \(its main input is 'input_features'\)"
    ):
        attached(model)


@pytest.mark.parametrize(
    "inputs", [{"x": batch()[:, :3]}, {"y": batch()}, {}, {"x": None}], ids=["shape", "name", "none", "None"]
)
def test_inputs_that_the_model_refuses(inputs):
    model = mlp().train()
    before = state_of(model)
    with pytest.raises(
        SliceFineError, match=r"by a forward pass, which failed: \w+Error: .*Find them with a batch that MLP takes"
    ):
        slicefine.couplings(model, coupled_mlp(), inputs)
    assert state_of(model) == before


def test_a_model_that_needs_more_than_its_main_input():
    model = ARCHITECTURES["CLIP"].build()
    before = state_of(model)
    with pytest.raises(SliceFineError, match=r"by a forward pass, which failed: .*slicefine\.couplings"):
        attached(model)
    assert state_of(model) == before


def test_a_batch_is_a_mapping():
    model = mlp()
    with pytest.raises(
        SliceFineError, match=r"`batch` maps the names of the model's arguments to their values.*got Tensor"
    ):
        slicefine.couplings(model, coupled_mlp(), batch())


def test_a_model_whose_base_takes_other_inputs():
    """DINOv3's `base_model` is its encoder."""
    model = of(
        "DINOv3ViTModel",
        image_size=32,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
    )
    assert {name.rpartition(".")[2] for name in probed(model)} >= {"q_proj", "o_proj", "up_proj", "down_proj"}


def test_a_model_without_a_configuration_that_names_its_input():
    model = mlp()
    model.main_input_name = "input_ids"
    for model.config in (None, {}):
        with pytest.raises(SliceFineError, match=r"the inputs of MLP are not known \(its main input is 'input_ids'\)"):
            find_couplings(model, find_targets(model, coupled_mlp()))


def rwkv(**settings):
    return of(
        "RwkvForCausalLM",
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        intermediate_size=24,
        context_length=16,
        **settings,
    )


def test_a_model_that_changes_its_weights_to_evaluate_is_refused_and_stays_as_it_is():
    model = rwkv(rescale_every=1)
    model.train()
    before = state_of(model)
    with pytest.raises(
        SliceFineError, match=r"that of this model writes into its weights \(rwkv\.blocks\.\d\..*weight, by aten\.div_"
    ):
        attached(model)
    assert state_of(model) == before


def test_a_model_that_keeps_what_it_writes_into_for_the_next_token():
    """Its cache is left out: a backward pass would meet values of later."""
    model = rwkv(rescale_every=0)
    assert {name.rpartition(".")[2] for name in probed(model)} >= {"key", "value"}


def test_a_batch_of_one_row_is_refused():
    with pytest.raises(SliceFineError, match="a batch of at least two rows"):
        slicefine.couplings(mlp(), coupled_mlp(), {"x": batch(size=1)})


def test_a_batch_as_it_comes_from_a_data_loader():
    """With labels, which some models make their inputs from."""
    model = ARCHITECTURES["T5"].build()
    ids = tokens(size=4) % 50
    assert len(slicefine.couplings(model, config_for(model), {"input_ids": ids, "labels": ids})) == 32


@pytest.mark.parametrize("task", ["SEQ_CLS", TaskType.SEQ_CLS, None], ids=str)
def test_a_head_that_is_trained_in_full_is_no_target(task):
    """PEFT adds it to the configuration, when the model is called by its task."""
    model = electra()
    config = SliceFineConfig(r=2, axis="coupled", task_type=task)
    config.couplings = slicefine.couplings(model, config, {"input_ids": tokens()})
    assert any(name.startswith("classifier") for name in config.couplings) == (task is None)
    assert config.modules_to_save is None
    with pytest.warns(SliceFineWarning, match="no partner"):
        get_peft_model(model, config)


def test_a_classifier_without_a_pad_token():
    model = of("GPT2ForSequenceClassification", vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    assert model.config.pad_token_id is None
    assert {name.rpartition(".")[2] for name in probed(model)} == {"c_attn", "c_proj", "c_fc"}


def test_a_classifier_of_images_within_a_larger_model():
    """CLIP, whose configuration has the size of images in a part of its own."""
    model = of("CLIPForImageClassification", **ARCHITECTURES["CLIP"].settings)
    assert {name.rpartition(".")[2] for name in probed(model)} >= {
        "q_proj",
        "k_proj",
        "v_proj",
        "out_proj",
        "fc1",
        "fc2",
    }


def test_a_layer_that_gives_more_than_one_tensor_has_no_partner():
    """Phi's router."""
    model = of("PhimoeForCausalLM", **DECODER | {"num_local_experts": 2, "num_experts_per_tok": 2})
    assert {name.rpartition(".")[2] for name in probed(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}


# ---------------------------------------------------------------------- a model without values

MIXTURES = {
    "experts in one parameter": lambda: of("MixtralForCausalLM", **DECODER | {"num_local_experts": 4}),
    "experts stored the other way round, with biases": lambda: of(
        "GptOssForCausalLM", **DECODER | {"num_local_experts": 4, "head_dim": 8, "num_experts_per_tok": 2}
    ),
}


@pytest.mark.parametrize("name", [*MODELS, *MIXTURES])
def test_partners_do_not_depend_on_values(name):
    build, inputs, _ = MODELS[name] if name in MODELS else (MIXTURES[name], None, None)
    model = build()
    inputs = inputs and inputs()
    expected = probed(model, inputs)
    model.to("meta")
    held = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    assert probed(model, inputs) == expected
    assert {id(tensor) for tensor in [*model.parameters(), *model.buffers()]} == held
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert not any("forward" in vars(module) for module in model.modules())


def test_experts_in_half_precision_without_values():
    model = MIXTURES["experts in one parameter"]()
    expected = probed(model)
    assert probed(model.bfloat16().to("meta")) == expected


def test_attaching_to_a_model_without_values():
    with torch.device("meta"):
        model = llama()
    assert {n: s.axis for n, s in active_slices(attached(model)).items()} == {
        n: s.axis for n, s in active_slices(attached(llama())).items()
    }


class Unusual(nn.Module):
    """Does what models of transformers do not: calls by keyword, a buffer in another shape, one that is made in the forward pass."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 5)
        self.register_buffer("table", torch.randn(2, 4))
        self.register_buffer("turns", torch.randn(8, dtype=torch.complex64))
        self.scale = 1.0
        self.made = None

    def forward(self, x):
        if self.made is None:
            self.made = torch.ones(8)
        h = self.first(input=x) * self.table.view(-1) * self.made
        return self.last((h * self.turns).real * self.scale)


class Masked(nn.Module):
    """Attention with a mask in which true means hidden."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(6, 6) for _ in range(4))
        self.register_buffer("hidden", torch.ones(5, 5, dtype=torch.bool).triu(1))

    def forward(self, x):
        scores = (self.q(x) @ self.k(x).transpose(-1, -2)).masked_fill(self.hidden, float("-inf"))
        return self.o(scores.softmax(-1) @ self.v(x))


def finder(model, x):
    places = find_targets(model, SliceFineConfig(target_modules=[name for name, _ in model.named_children()]))
    return lambda: find_couplings(model, places, {"x": x})


def test_stand_ins_for_models_that_do_what_few_do():
    model = Unusual()
    find = finder(model, torch.randn(4, 6))
    expected = find()
    assert set(expected) == {"first", "last"}
    model.made = None
    model.to("meta")
    order = [[*model._buffers], [*model.first._parameters]]
    assert find() == expected
    assert model.made is None
    assert order == [[*model._buffers], [*model.first._parameters]]
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_masks_without_values():
    model = Masked()
    find = finder(model, torch.randn(4, 5, 6))
    expected = find()
    assert {"v", "o"} <= set(expected)
    model.to("meta")
    assert find() == expected


def test_gradients_that_tell_nothing_are_an_error_and_not_an_answer():
    model = Unusual()
    model.scale = float("nan")
    with pytest.raises(SliceFineError, match="NaN or infinite"):
        finder(model, torch.randn(4, 6))()


def test_experts_of_other_models_compute_as_ever_while_one_is_probed():
    usual = ExpertsInterface.get_interface
    model, other = MIXTURES["experts in one parameter"](), MIXTURES["experts in one parameter"]()
    model.to("meta")
    with torch.no_grad():
        expected = other(input_ids=tokens()).logits
        with stand_ins(model, []):
            assert torch.equal(other(input_ids=tokens()).logits, expected)
    assert ExpertsInterface.get_interface is usual


def test_a_model_of_which_a_part_has_no_values():
    model = llama()
    model.model.layers[1].to("meta")
    with pytest.raises(SliceFineError, match=r"a part of this model is on the meta device.*take `couplings` from the"):
        attached(model)
    given = {name: str(layout) for name, layout in probed(llama()).items()}
    assert len(active_slices(attached(model, couplings=given))) == 14


# ---------------------------------------------------------------------- whatever the model is like at the time


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "name",
    ["Llama, groups of two", "GPT-2", "BERT, its own inputs", "ViT", "VideoMAE", "Phi-3", "GPT-NeoX", "Gemma 3", "T5"],
)
def test_other_dtypes(name, dtype):
    build, _, _ = MODELS[name]
    assert probed(build().to(dtype)) == probed(build())


def test_convolutions_in_half_precision():
    inputs = {"input": torch.randn(4, 6, 8, 8)}
    assert probed(mobile().bfloat16(), {"input": inputs["input"].bfloat16()}) == probed(mobile(), inputs)


@pytest.mark.parametrize(
    "context",
    [torch.no_grad, torch.enable_grad, lambda: torch.device("meta"), lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "enable_grad", "default device", "autocast"],
)
def test_within_any_context(context):
    model = llama()
    with context():
        found = probed(model)
    assert found == probed(llama())


def test_with_gradient_checkpointing_and_everything_frozen():
    model = llama().requires_grad_(False).train()
    model.activation_checkpointing_enable()
    assert probed(model) == probed(llama())


def state_of(model):
    """Whatever the probe could change."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()}.__repr__(),
        {name: (p.requires_grad, p.grad is None, p.data_ptr(), p._version) for name, p in model.named_parameters()},
        {name: (b.data_ptr(), b._version) for name, b in model.named_buffers()},
        {
            name: (
                module.training,
                sorted(vars(module)),
                *(len(h) for key, h in vars(module).items() if "_hooks" in key),
            )
            for name, module in model.named_modules()
        },
        model.config.to_dict() if hasattr(model, "config") else None,
        torch.get_rng_state().tolist(),
        random.getstate(),
        torch.is_grad_enabled(),
    )


STATEFUL = {
    "dropout": lambda: of("BertModel", **ENCODER | {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}),
    "a cache": lambda: llama(use_cache=True),
    "batch norms": MODELS["ResNet"][0],
    "masks at random": lambda: of("ViTMAEModel", **ARCHITECTURES["ViT"].settings),
    "layer drop": lambda: of("OPTModel", **DECODER | {"ffn_dim": 24, "word_embed_proj_dim": 16, "layerdrop": 0.5}),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_the_probe_leaves_no_trace(name):
    model = STATEFUL[name]().train()
    [*model.modules()][-1].eval()  # some of it has been put into another mode
    next(model.parameters()).requires_grad_(False)
    model.register_forward_hook(lambda *arguments: None)
    before = state_of(model)
    found = probed(model)
    assert state_of(model) == before
    assert found == probed(STATEFUL[name]().eval())
    assert found


def test_the_probe_is_the_same_every_time():
    torch.manual_seed(1)
    first = probed(llama())
    torch.manual_seed(2)
    assert probed(llama()) == first


# ---------------------------------------------------------------------- models that have slicefine layers already


def test_a_second_coupled_adapter():
    model = attached(llama())
    with torch.no_grad():
        expected = model(tokens()).logits
    model.add_adapter("other", config_for(llama(), r=3))
    couplings = [config.couplings for config in model.peft_config.values()]
    assert couplings[0] == couplings[1]
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, expected)
    model.set_adapter("other")
    assert active_slices(model)["model.layers.0.self_attn.o_proj"].count == 6


def test_a_second_adapter_on_other_layers():
    model = attached(llama(), target_modules=["q_proj", "v_proj", "o_proj"])
    model.add_adapter("other", config_for(llama(), target_modules=["up_proj", "down_proj"]))
    assert {name.rpartition(".")[2] for name in model.peft_config["other"].couplings} == {"up_proj", "down_proj"}


def test_a_second_adapter_that_is_refused_leaves_the_first_one():
    model = attached(llama())
    before = state_of(model)
    with pytest.raises(SliceFineError, match="none of the 2 targets"):
        model.add_adapter("other", config_for(llama(), target_modules=["v_proj"]))
    assert [*model.peft_config] == ["default"]
    assert state_of(model) == before


# ---------------------------------------------------------------------- routing


def test_experts_that_nobody_is_sent_to_have_no_partners():
    model = Experts(experts=12)
    with torch.no_grad():
        model.gate.weight.zero_()
        model.gate.bias.copy_(torch.arange(12.0))
    assert {name.split(".")[1] for name in probed(model, SEQUENCE, target_modules=["up", "down"])} == {"10", "11"}


@pytest.mark.parametrize("seed", range(5))
def test_no_wrong_partners_whatever_the_router_does(seed):
    model = Experts(experts=6)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    for name, layout in probed(model, SEQUENCE).items():
        assert str(layout) == {"up": "row 0+10", "down": "column 0+10"}[name.rpartition(".")[2]]


# ---------------------------------------------------------------------- what it costs


@pytest.fixture
def calls(monkeypatch):
    """For each backward pass, how many leaves are asked for."""
    made = []
    grad = torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd,
        "grad",
        lambda x, leaves, *more, **options: made.append(len(leaves)) or grad(x, leaves, *more, **options),
    )
    return made


def test_where_one_block_has_no_partners_its_likes_are_not_asked(calls):
    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_heads": 4,
        "head_dim": 8,
        "n_groups": 1,
        "state_size": 8,
        "chunk_size": 4,
    }
    made = []
    for layers in (1, 3):
        calls.clear()
        assert not probed(of("Mamba2ForCausalLM", **sizes, num_hidden_layers=layers))
        made.append(len(calls))
    assert made[0] == made[1] > 0


def test_the_work_grows_with_the_layers_and_no_faster(calls):
    """Backward passes, each through a piece of the graph, and leaves that are asked for: as many for each layer."""
    work = []
    for layers in (1, 2, 4):
        calls.clear()
        probed(of("LlamaForCausalLM", **DECODER | GROUPED | {"num_hidden_layers": layers}))
        work.append((len(calls), sum(calls)))
    for one, two, four in zip(*work, strict=True):
        assert two < 2 * one  # the size of a head is known from the first
        assert four - two == 2 * (two - one)
    assert work[0][0] < 30
