"""The lazy kernel: closed forms of linear models, slices that add up, and gradients against slow ones."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from classifiers import clip_model, image_model
from torch import nn
from transformers import VideoMAEForVideoClassification, ViTForImageClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from slicefine.analysis import gradients, kernel
from slicefine.analysis.gradients import LOOP, VMAP, ExampleGradients
from slicefine.analysis.kernel import (
    ELSEWHERE,
    PROBES,
    Cut,
    alignment,
    gram_matrices,
    label_kernel,
    labels_figures,
    outputs_of,
    spectrum,
    trace_share,
    why_no_full,
    without,
)
from slicefine.analysis.subject import places_of
from slicefine.slicing import Slice
from slicefine.tuner.base_layers import Place
from slicefine.tuner.targets import weight_name


class Linear(nn.Module):
    """Logits W x, of 4 classes."""

    def __init__(self, features: int = 6, classes: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(features, classes, bias=False)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(logits=self.layer(x))  # pyright: ignore[reportArgumentType]


def vectors(count: int = 5, features: int = 6) -> torch.Tensor:
    return torch.randn(count, features, generator=torch.Generator().manual_seed(1))


def linear_grams(cuts: list[Cut], *, seed: int = 0) -> kernel.Grams:
    model = Linear()
    examples = [{"x": row[None]} for row in vectors()]
    outputs = outputs_of(model, examples[0], seed=0)
    return gram_matrices(model, {"layer": Place(model.layer)}, examples, outputs, cuts, full=True, seed=seed)


def text(length: int, seed: int) -> dict[str, torch.Tensor]:
    ids = tiny.tokens(1, length, seed=seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([seed % 3])}


def of_texts(model: Any) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    return model, [text(length, seed) for seed, length in enumerate((5, 7, 5, 6))]


def of_language() -> tuple[Any, list[dict[str, torch.Tensor]]]:
    model, examples = of_texts(tiny.llama())
    return model, [{**example, "labels": example["input_ids"]} for example in examples]


def of_images(folder: Path) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    model = ViTForImageClassification.from_pretrained(image_model(folder / "image"), num_labels=2)
    generator = torch.Generator().manual_seed(0)
    return model, [{"pixel_values": torch.randn(1, 3, 8, 8, generator=generator)} for _ in range(3)]


def of_clips(folder: Path) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    model = VideoMAEForVideoClassification.from_pretrained(clip_model(folder / "clip"), num_labels=2)
    generator = torch.Generator().manual_seed(0)
    return model, [{"pixel_values": torch.randn(1, 4, 3, 16, 16, generator=generator)} for _ in range(3)]


@pytest.fixture(params=["bert", "gpt2", "llama", "vit", "videomae"])
def task(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """A tiny model in eval mode that wants no gradients, with examples."""
    model, examples = {
        "bert": lambda: of_texts(tiny.bert()),
        "gpt2": lambda: (tiny.gpt2(), of_language()[1]),
        "llama": of_language,
        "vit": lambda: of_images(tmp_path),
        "videomae": lambda: of_clips(tmp_path),
    }[request.param]()
    return model.requires_grad_(False).eval(), examples


def slow_gradients(model: Any, place: Place, examples: Any, scalar: Any) -> torch.Tensor:
    """`(n, d_out, d_in)` by ordinary backward passes of a copy of the model."""
    twin = copy.deepcopy(model)
    name = next(name for name, module in model.named_modules() if module is place.module)
    weight = twin.get_submodule(name).weight.requires_grad_()
    found = []
    for example in examples:
        weight.grad = None
        scalar(twin(**example)).backward()
        assert weight.grad is not None
        found.append(place.oriented(weight.grad))
    return torch.stack(found)


def test_the_kernel_of_a_linear_model() -> None:
    row, column = Cut(axis="row", r=3), Cut(axis="column", r=2)
    grams = linear_grams([row, column])
    x = vectors().double()
    assert grams.names == ["layer"]
    assert grams.full is not None
    assert torch.allclose(grams.full[0], 4 * x @ x.T, atol=1e-5)  # each of 4 logits has the gradient x in its row
    assert torch.allclose(grams.slices[row][0], 3 * x @ x.T, atol=1e-5)
    assert torch.allclose(grams.slices[column][0], 4 * x[:, :2] @ x[:, :2].T, atol=1e-5)
    assert (grams.sizes, grams.method) == ({row: 3 * 6, column: 2 * 4}, VMAP)


def test_disjoint_slices_add_up_to_the_weight() -> None:
    for axis, r, count in (("row", 2, 2), ("column", 2, 3)):
        cut = Cut(axis=axis, r=r, position=ELSEWHERE)
        found = {}
        for seed in range(12):
            found[cut.of((4, 6), r, seed).start] = linear_grams([cut], seed=seed).slices[cut]
        assert len(found) == count
        full = linear_grams([cut]).full
        assert full is not None
        assert torch.allclose(sum(found.values(), torch.zeros(1, 5, 5)), full, atol=1e-5)


def test_slices_as_wide_as_the_weights_have_the_full_kernel(task: Any) -> None:
    model, examples = task
    outputs = outputs_of(model, examples[0], seed=0)
    cuts = [Cut(axis="row", r=1000), Cut(axis="column", r=1000, position=ELSEWHERE)]
    grams = gram_matrices(model, places_of(model), examples, outputs, cuts, full=True, seed=0)
    assert grams.full is not None
    for cut in cuts:
        assert torch.allclose(grams.slices[cut], grams.full, rtol=1e-5)


@pytest.mark.parametrize("vmapped", [True, False])
def test_gradients_are_those_of_single_backward_passes(task: Any, vmapped: bool) -> None:
    model, examples = task
    before = copy.deepcopy(model.state_dict())
    scalar = outputs_of(model, examples[0], seed=0).scalars[0]
    places = places_of(model)
    found = {name: torch.zeros(len(examples), *place.shape) for name, place in places.items()}
    names = {weight_name(name, place): name for name, place in places.items()}

    def keep(full_name: str, numbers: Any, values: torch.Tensor) -> None:
        name = names[full_name]
        for number, value in zip(numbers, values, strict=True):
            found[name][number] = places[name].oriented(value)

    how = ExampleGradients(model, examples, vmapped=vmapped)
    how.each({weight_name(name, place): place.stored for name, place in places.items()}, scalar, keep)
    assert (how.method, how.why_loop) == (VMAP if vmapped else LOOP, "")
    for name in list(places)[:: max(len(places) // 4, 1)]:
        slow = slow_gradients(model, places[name], examples, scalar)
        assert slow.abs().max() > 0
        assert torch.allclose(found[name], slow, rtol=1e-4, atol=1e-6 * slow.abs().max().item()), name
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def pairwise_kernel(model: Any, places: dict[str, Place], examples: Any, scalars: Any) -> torch.Tensor:
    """The full kernels, `(weights, n, n)`, without a gradient of a weight: sums over pairs of tokens of (x . x') (g . g')."""
    seen: list[dict[str, tuple[torch.Tensor, list[torch.Tensor]]]] = []
    inputs: dict[str, torch.Tensor] = {}
    made: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: Any, given: Any, output: torch.Tensor) -> torch.Tensor:
            inputs[name] = given[0].detach().flatten(0, -2).double()
            made[name] = output if output.requires_grad else output.requires_grad_()
            return made[name]

        return hook

    for example in examples:
        hooks = [place.module.register_forward_hook(watch(name)) for name, place in places.items()]
        output = model(**example)
        for handle in hooks:
            handle.remove()
        tokens: dict[str, tuple[torch.Tensor, list[torch.Tensor]]] = {name: (inputs[name], []) for name in places}
        for scalar in scalars:
            found = torch.autograd.grad(scalar(output), list(made.values()), retain_graph=True)
            for name, gradient in zip(made, found, strict=True):
                tokens[name][1].append(gradient.flatten(0, -2).double())
        seen.append(tokens)
    total = torch.zeros(len(places), len(examples), len(examples), dtype=torch.float64)
    for number, name in enumerate(places):
        for i, one in enumerate(seen):
            for j, other in enumerate(seen):
                alike = one[name][0] @ other[name][0].T
                for g, h in zip(one[name][1], other[name][1], strict=True):
                    total[number, i, j] += (alike * (g @ h.T)).sum()
    return total


def test_the_full_kernel_is_the_sum_over_pairs_of_tokens(task: Any) -> None:
    model, examples = task
    outputs = outputs_of(model, examples[0], seed=0)
    grams = gram_matrices(model, places_of(model), examples, outputs, [Cut(axis="row", r=1)], full=True, seed=0)
    expected = pairwise_kernel(model, places_of(model), examples, outputs.scalars)
    assert grams.full is not None
    for found, wanted in zip(grams.full, expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-6 * wanted.abs().max().item())


def test_slices_of_rows_and_columns_are_parts_of_the_gradients(task: Any) -> None:
    model, examples = task
    outputs = outputs_of(model, examples[0], seed=0)
    name, place = list(places_of(model).items())[-1]
    cuts = [
        Cut(axis=axis, r=r, position=position)
        for axis in ("row", "column")
        for r in (1, 4)
        for position in kernel.POSITIONS
    ]
    grams = gram_matrices(model, {name: place}, examples, outputs, cuts, full=False, seed=3)
    assert grams.full is None
    slow = [slow_gradients(model, place, examples, scalar) for scalar in outputs.scalars]
    for cut in cuts:
        piece = cut.of(place.shape, 4, 3)
        parts = [found.narrow(1 + piece.dim, piece.start, piece.width).flatten(1).double() for found in slow]
        expected = sum(part @ part.T for part in parts)
        assert torch.allclose(grams.slices[cut][0], torch.as_tensor(expected), rtol=1e-4, atol=1e-12)
        assert grams.sizes[cut] == piece.size(place.shape)


def test_positions_are_those_of_the_schedule_and_narrow_slices_lie_within_wide_ones() -> None:
    assert Cut(axis="row", r=5).of((12, 7), 5, seed=1) == Slice("row", 0, 5)
    assert Cut(axis="column", r=9).of((12, 7), 9, seed=1) == Slice("column", 0, 7)
    starts = {Cut(axis="row", r=2, position=ELSEWHERE).of((12, 7), 4, seed).start for seed in range(30)}
    assert starts == {0, 4, 8}
    for seed in range(5):
        wide, narrow = (Cut(axis="row", r=r, position=ELSEWHERE).of((12, 7), 4, seed) for r in (4, 1))
        assert (wide.start, wide.width, narrow.width) == (narrow.start, 4, 1)


def test_weights_in_groups_have_the_same_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = of_texts(tiny.bert().requires_grad_(False).eval())
    outputs = outputs_of(model, examples[0], seed=0)
    told: list[float] = []

    def grams() -> kernel.Grams:
        return gram_matrices(
            model, places_of(model), examples, outputs, [Cut(axis="row", r=2)], full=True, seed=0, tell=told.append
        )

    at_once = grams()
    calls = len(told)
    monkeypatch.setattr(kernel, "HELD_BYTES", 10_000)
    in_groups = grams()
    assert at_once.full is not None
    assert in_groups.full is not None
    assert torch.allclose(at_once.full, in_groups.full, rtol=1e-5)
    assert told[:calls] == sorted(told[:calls])
    assert told[calls - 1] == told[-1] == 1.0


def test_a_model_that_looks_at_its_inputs_gets_single_passes() -> None:
    class Looking(Linear):
        def forward(self, x: torch.Tensor) -> SequenceClassifierOutput:
            return super().forward(x if x.sum() > 1e9 else x + 0)

    model = Looking()
    examples = [{"x": row[None]} for row in vectors()]
    outputs = outputs_of(model, examples[0], seed=0)
    cut = Cut(axis="row", r=3)
    grams = gram_matrices(model, {"layer": Place(model.layer)}, examples, outputs, [cut], full=False, seed=0)
    assert grams.method.startswith(f"{LOOP} (vmap: It looks like")
    assert torch.allclose(grams.slices[cut][0], 3 * vectors().double() @ vectors().double().T, atol=1e-5)


def test_weights_too_large_for_several_gradients_get_single_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "BYTES_AT_ONCE", 90)
    assert linear_grams([Cut(axis="row", r=1)]).method == f"{LOOP} (the gradients for one example take 0 MiB)"


def test_a_weight_that_an_example_does_not_use_has_no_gradient() -> None:
    model = Linear()
    model.unused = nn.Linear(6, 4, bias=False).requires_grad_(False)
    examples = [{"x": row[None]} for row in vectors()]
    outputs = outputs_of(model, examples[0], seed=0)
    grams = gram_matrices(
        model, {"unused": Place(model.unused)}, examples, outputs, [Cut(axis="row", r=1)], full=True, seed=0
    )
    assert grams.full is not None
    assert not grams.full.any()
    found = spectrum(grams.full.sum(0))
    assert found == {"eigenvalues": [], "k": None, "effective_rank": None, "mean_share": None, "by_examples": []}


def test_padding_that_masks_something_stays() -> None:
    example = text(5, 0)
    assert "attention_mask" not in gradients.without_idle_mask(example)
    example["attention_mask"][0, 0] = 0
    assert gradients.without_idle_mask(example) is example


def test_many_classes_are_looked_at_along_some_directions() -> None:
    model = Linear(classes=50)
    x = vectors()[:1]
    logits = model.layer(x)[0]
    for seed in (0, 1):
        outputs = outputs_of(model, {"x": x}, seed=seed)
        assert outputs.words == "8 orthogonal random directions of the 50 logits"
        assert len(outputs.scalars) == PROBES
        found = [scalar(model(x)) for scalar in outputs.scalars]
        assert torch.stack(found).norm() < logits.norm()
    few = outputs_of(Linear(classes=8), {"x": x}, seed=0)
    assert (len(few.scalars), few.words) == (8, "the 8 logits")
    assert outputs_of(Linear(classes=1), {"x": x}, seed=0).words == "the output"


def random_kernel(count: int = 6, seed: int = 0) -> torch.Tensor:
    rows = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows @ rows.T


def test_alignment() -> None:
    one, other = random_kernel(), random_kernel(seed=1)
    assert alignment(one, one) == pytest.approx(1)
    assert alignment(one, 7 * one) == pytest.approx(1)
    assert alignment(one, one + 3) == pytest.approx(1)  # a constant is centred away
    between = alignment(one, other)
    assert between is not None
    assert -1 < between < 1
    assert alignment(other, 0.1 * one) == pytest.approx(between)
    assert alignment(one, torch.ones(6, 6)) is None
    assert alignment(one, torch.full((6, 6), math.nan)) is None
    assert alignment(one[:3, :3], other[:3, :3]) is None


def test_alignment_is_the_unbiased_estimate() -> None:
    """Of HSIC, by the sums of Song et al. (2007), eq. 5."""
    one, other = random_kernel(9), random_kernel(9, seed=1)

    def hsic(a: torch.Tensor, b: torch.Tensor) -> float:
        n, ones = len(a), torch.ones(len(a), dtype=torch.float64)
        a, b = a - torch.diag(a.diagonal()), b - torch.diag(b.diagonal())
        sums = (a @ b).trace() + (ones @ a @ ones) * (ones @ b @ ones) / ((n - 1) * (n - 2))
        return float(sums - 2 / (n - 2) * (ones @ a @ b @ ones)) / (n * (n - 3))

    expected = hsic(one, other) / math.sqrt(hsic(one, one) * hsic(other, other))
    assert alignment(one, other) == pytest.approx(expected)


def test_unrelated_kernels_are_not_aligned() -> None:
    """Few examples and many weights: kernels that are nearly diagonal, so that plain centred alignment takes them for one another."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        a, b = (rows @ rows.T for rows in torch.randn(2, 64, 2000, generator=generator).double())
        plain = (kernel.centred(a) * kernel.centred(b)).sum() / (kernel.centred(a).norm() * kernel.centred(b).norm())
        assert plain > 0.95
        assert alignment(a, b) == pytest.approx(0, abs=0.1)


def test_the_spectrum_of_a_known_kernel() -> None:
    basis = torch.linalg.qr(torch.cat([torch.ones(6, 1), torch.randn(6, 5)], 1).double()).Q  # the first is constant
    values = torch.tensor([100.0, 6.0, 3.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    found = spectrum(basis @ torch.diag(values) @ basis.T)
    assert found["eigenvalues"] == pytest.approx([0.6, 0.3, 0.1, 0, 0, 0], abs=1e-9)
    assert found["k"] == {"0.8": 2, "0.9": 2, "0.95": 3}
    assert found["effective_rank"] == pytest.approx(math.exp(-sum(p * math.log(p) for p in (0.6, 0.3, 0.1))))
    assert found["mean_share"] == pytest.approx(100 / 110)
    assert found["by_examples"] == [[6, found["effective_rank"]]]


def test_the_rank_grows_with_the_examples_as_far_as_there_are_directions() -> None:
    unlike = spectrum(torch.eye(32))["by_examples"]
    assert unlike == [[count, pytest.approx(count - 1)] for count in (8, 16, 32)]
    line = torch.arange(32.0)
    assert spectrum(torch.outer(line, line))["by_examples"] == [[count, pytest.approx(1)] for count in (8, 16, 32)]


def test_labels() -> None:
    labels = [torch.tensor([number]) for number in (0, 1, 0, 2)]
    made = label_kernel([{"labels": label} for label in labels])
    assert made is not None
    assert made.tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]
    numbers = label_kernel([{"labels": torch.tensor([value])} for value in (2.0, -1.0)])
    assert numbers is not None
    assert numbers.tolist() == [[4, -2], [-2, 1]]
    assert label_kernel([{"labels": torch.ones(1, 5, dtype=torch.int64)}] * 2) is None
    assert label_kernel([{"x": torch.ones(1)}] * 2) is None
    of_five = label_kernel([{"labels": torch.tensor([number])} for number in (0, 1, 0, 2, 3)])
    assert of_five is not None
    found = labels_figures(of_five, of_five, seed=0)
    assert found["alignment_with_labels"] == pytest.approx(1)
    assert found["alignment_with_shuffled_labels"] is not None
    assert -0.3 < found["alignment_with_shuffled_labels"] < 0.3
    assert found["p_of_labels"] is not None
    assert 0.05 < found["p_of_labels"] < 0.2  # a tenth of all orders keep the pair
    nothing = {"alignment_with_labels": None, "alignment_with_shuffled_labels": None, "p_of_labels": None}
    assert labels_figures(made, None, seed=0) == labels_figures(made, torch.ones(4, 4), seed=0) == nothing


def test_weights_apart() -> None:
    kernels = torch.stack([torch.eye(3), 3 * torch.eye(3), 4 * torch.eye(3)]).double()
    assert [trace_share(kernels, number) for number in range(3)] == [0.125, 0.375, 0.5]
    assert torch.equal(without(kernels, 1), 5 * torch.eye(3).double())
    assert trace_share(0 * kernels, 0) is None


def test_large_models_have_no_full_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    places = {"layer": Place(Linear().layer)}
    assert why_no_full(places, 48) == ""
    monkeypatch.setattr(kernel, "MOST_NUMBERS", 100)
    assert "48 gradients" in why_no_full(places, 48)
    monkeypatch.setattr(kernel, "MOST_WEIGHTS", 10)
    assert "at most 0 M weights" in why_no_full(places, 1)
