"""The registry of methods: names, exact counts, equal sizes, and that each trains a step or says why it cannot."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any, cast

import pytest
import tiny as tiny_models
import torch
from benchmarked import tiny
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from slicefine.benchmarking.attaching import (
    Attached,
    adapter_size,
    attach,
    equal_in_size,
    find_norms,
    find_places,
    why_not,
)
from slicefine.benchmarking.masks import diagonal_blocks, diagonal_size, random_places, train_masked
from slicefine.benchmarking.methods import HEAD_ONLY, KINDS, MASKS, METHODS, Method, method
from slicefine.benchmarking.models import SMALL, batch_of, build
from slicefine.benchmarking.split_weight import SplitLinear
from slicefine.benchmarking.timing import release
from slicefine.errors import SliceFineError
from slicefine.slicing import ALTERNATE

LEARNING_RATE = 1e-2
RANKS = {"VeRA": 16, "SHiRA": 4}
"""Ranks that fit into tiny weights, where the usual one does not."""


def tiny_method(name: str) -> Method:
    found = method(name)
    return found.of_rank(RANKS.get(found.kind, found.r or 0))


def attached(name: str, model: str, **settings: Any) -> Attached:
    of = tiny(model)
    return attach(tiny_method(name), build(of), task=of.task, heads=of.heads, **settings)


def step(adapted: Attached, model: str, number: int = 0) -> None:
    optimizer = adapted.optimizer(LEARNING_RATE)
    adapted.model(**batch_of(tiny(model), seed=number)).loss.backward()
    if optimizer is not None:
        optimizer.step()
    if adapted.after_step is not None:
        adapted.after_step(number)


# --------------------------------------------------------------------- memory


@pytest.mark.parametrize("name", [name for name in METHODS if name != HEAD_ONLY])
def test_nothing_keeps_a_model_that_is_done_with(name: str) -> None:
    """Runs follow each other in a process."""
    adapted = attached(name, "llama-3.2-3b-small", total_steps=20)
    layers = weakref.WeakSet(adapted.model.modules())
    step(adapted, "llama-3.2-3b-small")
    assert layers
    del adapted
    release()
    assert not [type(layer).__name__ for layer in layers]


# --------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name", ["SliceFine-5S", "SliceFine-5RC-w3", "SliceFine-6S-w2", "SliceFine-5R-w12", "RoCoFT-1C"]
)
def test_names_that_are_not_among_the_usual_ones(name: str) -> None:
    assert method(name.lower()).name == name


@pytest.mark.parametrize(
    "name", ["SliceFine-5RC-w1", "SliceFine-5RC-w02", "RoCoFT-5R-w3", "SliceFine-5S-w", "LoRA-r8-w3", "RoCoFT-5S"]
)
def test_windows_and_axes_that_there_are_not(name: str) -> None:
    with pytest.raises(SliceFineError, match="There is no method"):
        method(name)


@pytest.mark.parametrize("name", METHODS)
def test_a_name_is_read_back(name: str) -> None:
    found = method(name)
    assert found.name == {"LoRA": "LoRA-r8"}.get(name, name)
    assert method(name.upper()) == method(found.name) == found
    assert found.kind in KINDS


@pytest.mark.parametrize(
    ("name", "kind", "r", "axis"),
    [
        ("SliceFine-17RC", "SliceFine", 17, "alternate"),
        ("slicefine-2c", "SliceFine", 2, "column"),
        ("RoCoFT", "RoCoFT", 5, "row"),
        ("RoCoFT-3C", "RoCoFT", 3, "column"),
        ("LoRA", "LoRA", 8, None),
        ("LoRA-r64", "LoRA", 64, None),
        ("prefix-r4", "prefix", 4, None),
        ("random-mask-r2", "random-mask", 2, None),
        ("full", "full", None, None),
    ],
)
def test_ranks_are_part_of_the_name(name: str, kind: str, r: int | None, axis: str | None) -> None:
    found = method(name)
    assert (found.kind, found.r, found.axis) == (kind, r, axis)
    assert method(found.name) == found


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("SliceFin-4S", "no method 'SliceFin-4S'.*Did you mean 'SliceFine-4S'"),
        ("LoRa-8", "no method 'LoRa-8'.*Did you mean 'LoRA-r8'"),
        ("SliceFine", "no method 'SliceFine'.*SliceFine-<r>R"),
        ("SliceFine-0R", "no method"),
        ("RoCoFT-5RC", "no method 'RoCoFT-5RC'.*Did you mean 'RoCoFT-5R'"),
        ("full-r3", "no method 'full-r3'"),
        ("HRA-r3", "HRA takes even ranks"),
        ("", "no method ''"),
    ],
)
def test_unknown_methods(name: str, says: str) -> None:
    with pytest.raises(SliceFineError, match=says):
        method(name)


# ------------------------------------------------------- attaching and training


@pytest.mark.parametrize("model", SMALL)
@pytest.mark.parametrize("name", METHODS)
def test_it_trains_a_step_or_says_why_not(name: str, model: str) -> None:
    language = model.startswith(("llama", "gemma", "deepseek"))
    if (name == "head-only" and language) or (name == "prefix" and not language):
        with pytest.raises(SliceFineError, match=r"no new head|needs a decoder"):
            attached(name, model)
        return
    of = tiny(model)
    base = build(of)
    size = adapter_size(tiny_method(name), base, find_places(base, of.heads), of.heads)
    adapted = attached(name, model)
    before = {key: value.detach().clone() for key, value in adapted.model.named_parameters()}
    step(adapted, model)

    # Counts are exact: from shapes, and from what wants a gradient.
    wanted = sum(p.numel() for p in adapted.trainable)
    assert adapted.counts.active == size
    if adapted.method.axis == ALTERNATE:  # one parameter as long as the longer side
        assert wanted >= adapted.counts.active + adapted.counts.head
    elif name not in MASKS:  # the whole weight wants a gradient
        assert wanted == adapted.counts.active + adapted.counts.head
    assert adapted.counts.total == sum(p.numel() for p in base.parameters())
    assert (adapted.counts.head > 0) == (not language and name != "frozen-limit")
    assert adapted.counts.added in (0, adapted.counts.active)

    # A gradient reaches everything that wants one; the step changes something, and nothing that is frozen.
    assert all(p.grad is not None for p in adapted.trainable)
    changed = {key for key, value in adapted.model.named_parameters() if not torch.equal(value, before[key])}
    trainable = {key for key, value in adapted.model.named_parameters() if value.requires_grad}
    if adapted.method.has_slices:  # slices are written back into frozen weights
        trainable |= {key for key in before if key.endswith("base_layer.weight")}
    assert changed <= trainable
    assert changed or name == "frozen-limit"


def test_gradients_flow_through_all_blocks_of_the_frozen_limit() -> None:
    for model in SMALL:
        adapted = attached("frozen-limit", model)
        first = next(m for m in adapted.model.modules() if isinstance(m, nn.ModuleList))[0]
        seen: list[torch.Tensor] = []
        first.register_full_backward_hook(lambda module, into, out, seen=seen: seen.append(into[0]))
        step(adapted, model)
        assert adapted.trainable == []
        assert len(seen) == 1
        assert bool(seen[0].abs().sum() > 0), model


@pytest.mark.parametrize("name", ["full", "head-only", *MASKS, "SliceFine-5RC", "SliceFine-4S", "LoRA-r2"])
def test_a_head_of_several_layers_is_trained_in_full_and_is_no_target(name: str) -> None:
    """Of RoBERTa `new_modules` has the names of both layers of the head."""
    heads, of = ("classifier.dense", "classifier.out_proj"), tiny("roberta-base-small")
    model = build(of)
    head = sum(p.numel() for p in cast(Any, model).classifier.parameters())
    assert not any("classifier" in place for place in find_places(model, heads))
    adapted = attach(method(name), model, task=of.task, heads=heads)
    assert adapted.counts.head == head
    trained = {key for key, p in adapted.model.named_parameters() if p.requires_grad and "classifier" in key}
    assert len(trained) == 4
    if name == "head-only":
        assert adapted.counts.active == 0


def test_all_methods_get_the_same_matrices() -> None:
    """Those of SliceFine, the head left out; PEFT gets them by name."""
    for model in ("llama-3.2-3b-small", "roberta-base-small", "vit-base-small"):
        of = tiny(model)
        names = set(find_places(build(of), of.heads))
        assert not any("classifier" in name or "lm_head" in name for name in names)
        for kind, marker in (("SliceFine-1R", "slicefine_weight"), ("LoRA-r8", "lora_A"), ("HRA", "hra_u")):
            modules = attached(kind, model).model.named_modules()
            found = {name.removesuffix(f".{marker}") for name, _ in modules if name.endswith(f".{marker}")}
            assert {name.removeprefix("base_model.model.") for name in found} == names, kind


def test_adalora_is_trained_with_its_own_term_and_its_budget() -> None:
    """Also where PEFT has no name for the task and would call the base model past it."""
    for model in ("llama-3.2-3b-small", "vit-base-small"):
        adapted = attached("AdaLoRA", model, total_steps=10)
        with torch.no_grad():
            plain = build(tiny(model)).eval()(**batch_of(tiny(model))).loss
            judged = adapted.model.eval()(**batch_of(tiny(model))).loss
            trained = adapted.model.train()(**batch_of(tiny(model))).loss
        assert judged.equal(plain), model  # the term is none of the task's loss; B starts at zero
        assert bool(trained > plain + 0.1), model
        for number in range(10):
            step(adapted, model, number)
        values = [p for key, p in adapted.model.named_parameters() if "lora_E" in key]
        zeros = sum(int((value == 0).sum()) for value in values)
        assert zeros == len(values) * 4  # of 12 ranks 8 are left on average


@pytest.mark.parametrize("model", ["llama-3.2-3b-small", "roberta-base-small", "vit-base-small"])
def test_normalisations_are_trained_beside_the_slices_and_counted(model: str) -> None:
    base = build(tiny(model))
    vectors = [p for name in find_norms(base) for p in base.get_submodule(name).parameters()]
    assert {p.dim() for p in vectors} == {1}
    plain, more = attached("SliceFine-2R", model), attached("SliceFine-2R", model, norms=True)
    assert more.counts.active - plain.counts.active == sum(p.numel() for p in vectors) > 0
    assert (more.counts.head, more.counts.added) == (plain.counts.head, 0)
    before = {key: p.detach().clone() for key, p in more.model.named_parameters() if "orm" in key and p.requires_grad}
    step(more, model)
    assert len(before) == len(vectors)
    assert not any(torch.equal(p, before[key]) for key, p in more.model.named_parameters() if key in before)


def test_a_move_is_made_where_it_is_asked_for() -> None:
    from slicefine import active_slices

    sliding, static = (attached(name, "llama-3.2-3b-small", slide_every=2) for name in ("SliceFine-5RC", "RoCoFT-5R"))
    for number in range(2):
        for adapted in (sliding, static):
            step(adapted, "llama-3.2-3b-small", number)
    assert {piece.axis for piece in active_slices(sliding.model).values()} == {"column"}
    assert {(piece.axis, piece.start) for piece in active_slices(static.model).values()} == {("row", 0)}


@pytest.mark.parametrize("name", ["HRA", "SHiRA-r1", "split-rows-r1", "split-columns-r1"])
def test_layers_that_a_method_does_not_take(name: str) -> None:
    with pytest.raises(SliceFineError, match=r"takes nn.Linear alone; .*c_attn.* Conv1D"):
        attach(method(name), tiny_models.gpt2(), task="causal-lm")


@pytest.mark.parametrize("name", ["LoRA-r2", "AdaLoRA-r2", "VeRA-r8", "SliceFine-2RC", "random-mask-r2"])
def test_layers_with_transposed_weights(name: str) -> None:
    model = tiny_models.gpt2()
    size = adapter_size(method(name), model, find_places(model))
    adapted = attach(method(name), model, task="causal-lm")
    tokens = tiny_models.tokens()
    adapted.model(input_ids=tokens, labels=tokens).loss.backward()
    assert adapted.counts.active == size


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("SliceFine-33R", "r = 33 is more than the 32 rows of model.layers.0.self_attn.q_proj"),
        ("SliceFine-33C", "r = 33 is more than the 32 columns"),
        ("SliceFine-17RC", "r = 17 is more than the 16 rows of model.layers.0.self_attn.k_proj"),
        ("random-mask-r33", "r = 33 is more than the 32 rows"),
        ("block-mask-r33", "r = 33 is more than the 32 rows"),
        ("split-columns-r33", "r = 33 is more than the 32 columns"),
        ("SHiRA", r"32 x \(32 \+ 32\) weights are more than model.layers.0.self_attn.q_proj"),
    ],
)
def test_ranks_that_are_too_large(name: str, says: str) -> None:
    model = build(tiny("llama-3.2-3b-small"))
    with pytest.raises(SliceFineError, match=says):
        attach(method(name), model, task="causal-lm")


def test_what_peft_refuses_is_a_reason() -> None:
    model = build(tiny("llama-3.2-3b-small"))
    model.activation_checkpointing_enable()
    with pytest.raises(SliceFineError, match="prefix tuning does not work with activation checkpointing"):
        attach(method("prefix"), model, task="causal-lm")
    with pytest.raises(SliceFineError, match="AdaLoRA does not work"):
        attach(method("AdaLoRA-r2"), build(tiny("llama-3.2-3b-small")), task="causal-lm", total_steps=-1)


# ------------------------------------------------------------------ equal sizes


@pytest.mark.parametrize("name", ["LoRA", "AdaLoRA", "VeRA", "prefix", "HRA", "SHiRA", *MASKS])
@pytest.mark.parametrize("reference", ["SliceFine-5R", "SliceFine-1C", "LoRA-r8"])
def test_equal_size_is_the_nearest_there_is(name: str, reference: str) -> None:
    model = build(tiny("llama-3.2-3b-small"))
    places = find_places(model)
    size = adapter_size(method(reference), model, places)
    found = equal_in_size(method(name).of_rank(2), size, model, places)
    distance = abs(adapter_size(found, model, places) - size)
    assert found.r is not None
    others = [adapter_size(found.of_rank(r), model, places) for r in range(max(1, found.r - 3), found.r + 4)]
    assert distance == min(abs(other - size) for other in others)
    assert distance <= max(others) - min(others)  # and not at an end of what was tried


def test_what_has_its_size_in_its_name_keeps_it() -> None:
    model = build(tiny("llama-3.2-3b-small"))
    named = ("LoRA-r8", "LoRA-r64", "VeRA-r16", "HRA-r2", "random-mask-r5")
    for name in ("full", "frozen-limit", "SliceFine-5R", "RoCoFT-5R", "split-rows", "head-only", *named):
        assert equal_in_size(method(name), 7, model, find_places(model)) == method(name)
    encoder = build(tiny("roberta-base-small"))
    assert why_not(method("prefix"), encoder, find_places(encoder, ["classifier"])) is not None
    assert equal_in_size(method("prefix"), 7, encoder, find_places(encoder)) == method("prefix")


def test_a_usual_rank_that_is_too_large_is_made_smaller_where_sizes_are_to_be_equal() -> None:
    model = build(tiny("llama-3.2-3b-small"))
    places = find_places(model)
    assert why_not(method("SHiRA"), model, places) is not None
    found = equal_in_size(method("SHiRA"), adapter_size(method("LoRA-r2"), model, places), model, places)
    assert found == method("SHiRA-r2")
    assert why_not(found, model, places) is None


def test_a_rank_that_is_named_makes_no_other_method() -> None:
    assert method("LoRA-r8") == method("LoRA")
    assert len({method("LoRA-r8"), method("LoRA"), method("VeRA"), method("VeRA-r256")}) == 2
    assert [method(name).sizable for name in ("LoRA", "LoRA-r8", "VeRA", "VeRA-r256")] == [True, False, True, False]


# --------------------------------------------------- the split form, random masks


@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("r", [1, 5, 12])
def test_the_split_form_computes_the_layer_and_trains_its_slice(axis: str, bias: bool, r: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(12, 20, bias=bias).requires_grad_(False)
    x = torch.randn(3, 4, 12)
    split = SplitLinear(linear, axis, r)
    y, expected = split(x), nn.functional.linear(x, linear.weight.requires_grad_(), linear.bias)
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(y)
    y.backward(g)
    expected.backward(g)
    start = ((20 if axis == "row" else 12) - r) // 2
    dense = linear.weight.grad
    assert dense is not None
    of_slice = dense[start : start + r] if axis == "row" else dense[:, start : start + r]
    torch.testing.assert_close(split.slice.grad, of_slice)
    assert [p.grad is None for p in (split.before, split.after)] == [True, True]


def test_a_random_mask_trains_as_many_weights_and_no_other() -> None:
    """After steps of Adam, exactly those in the mask differ."""
    torch.manual_seed(0)
    linear = nn.Linear(12, 20).requires_grad_(False)
    start = linear.weight.detach().clone()
    mask = random_places((20, 12), 37, seed=3)
    train_masked(linear.weight, mask)
    optimizer = torch.optim.AdamW([linear.weight], lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        linear(torch.randn(8, 12)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert int(mask.sum()) == 37
    assert torch.equal(linear.weight != start, mask)


def test_a_random_mask_goes_where_its_gradient_is() -> None:
    """Trainer moves a model to the GPU after it was made ready; here the GPU is one without values."""
    weight = nn.Parameter(torch.zeros(2, 3))
    train_masked(weight, random_places((2, 3), 2, seed=0))
    (keep_masked,) = cast(Any, weight)._post_accumulate_grad_hooks.values()
    with FakeTensorMode(allow_non_fake_inputs=True):
        keep_masked(SimpleNamespace(grad=torch.ones(2, 3, device="cuda")))


@pytest.mark.parametrize(("rows", "columns", "r"), [(12, 12, 4), (24, 6, 3), (5, 13, 2), (7, 7, 7), (4, 9, 1)])
def test_diagonal_blocks_reach_every_row_and_column_once(rows: int, columns: int, r: int) -> None:
    mask = diagonal_blocks((rows, columns), r)
    assert int(mask.sum()) == diagonal_size((rows, columns), r)
    kinds = mask.int().unique(dim=0)  # the rows of a block are alike, and no column is in two blocks
    assert (kinds.sum(0) == 1).all()
    assert len(kinds) == min(rows, columns) // r
    if rows % len(kinds) == columns % len(kinds) == 0:
        blocks = torch.block_diag(*[torch.ones(rows // len(kinds), columns // len(kinds))] * len(kinds))
        assert torch.equal(mask, blocks.bool())


def test_random_masks_of_a_model_differ_by_weight_and_by_seed() -> None:
    model = "llama-3.2-3b-small"

    def changed(seed: int) -> dict[str, torch.Tensor]:
        start = dict(build(tiny(model)).named_parameters())
        adapted = attached("random-mask", model, seed=seed)
        step(adapted, model)
        return {key: value != start[key] for key, value in adapted.model.named_parameters() if value.requires_grad}

    first, again, other = changed(1), changed(1), changed(2)
    assert len(first) == 14
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)
    queries = [mask for key, mask in first.items() if "q_proj" in key]
    assert [int(mask.sum()) for mask in queries] == [5 * 32, 5 * 32]
    assert not torch.equal(*queries)


# --------------------------------------------------------------------- depth windows


def test_a_depth_window_is_spread_over_the_depth() -> None:
    adapted = attached("SliceFine-2R-w2", "roberta-base-small", depth_every=3)
    config: Any = adapted.model.peft_config["default"]
    assert (config.depth_window, config.depth_every) == ([0, 1], 3)
    plain = attached("SliceFine-2R", "roberta-base-small")
    assert adapted.counts == plain.counts


def test_more_turns_than_blocks() -> None:
    with pytest.raises(
        SliceFineError, match=r"3 turns of a depth window are more than the 2 blocks of roberta\.encoder\.layer"
    ):
        attached("SliceFine-2R-w3", "roberta-base-small")
