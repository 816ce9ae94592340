"""Parts of weights that are trained alone: on linear models, where gradients and losses are known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from slicefine.analysis.losses import gradients
from slicefine.analysis.slices import Part, Trials, clamped, heaviest
from slicefine.errors import SliceFineError
from slicefine.slicing import Slice
from slicefine.tuner.base_layers import Place

RATE = 0.01
DEAD = 1
"""The row whose outputs are multiplied by zero."""


def weight_of(kind: str = "linear", dtype: torch.dtype = torch.float32) -> Place:
    """A layer from 3 to 4 features, (4, 3), whose weight wants no gradient."""
    torch.manual_seed(0)
    layer = (nn.Linear(3, 4, bias=False) if kind == "linear" else Conv1D(4, 3)).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape))
    return Place(layer.requires_grad_(False))


OUT_O = torch.tensor([1.0, 0.0, -2.0, 0.5])
"""What the outputs of the layer are multiplied by before they are summed."""


def loss_of(place: Place) -> Callable[[dict[str, Tensor]], Tensor]:
    """Squared error of `out . (W x)`, linear in every entry of W."""
    return lambda batch: ((place.module(batch["x"]).float() @ OUT_O - batch["y"]) ** 2).mean()


def batch(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(8, 3, generator=generator)
    return {"x": x_TI.to(dtype), "y": torch.randn(8, generator=generator) + 3}


def trials(place: Place, *, steps: int = 1, rates: tuple[float, ...] = (RATE,), loss: Any = None) -> Trials:
    dtype = place.stored.dtype
    train = [batch(seed, dtype) for seed in range(steps)]
    shares = tuple(rate / root_mean_square(place) for rate in rates)
    return Trials(loss or loss_of(place), train, [batch(10, dtype)], [batch(11, dtype)], shares)


def root_mean_square(place: Place) -> float:
    return float(place.stored.double().square().mean().sqrt())


def by_hand(place: Place) -> Tensor:
    """Gradient of the loss of the first batch with respect to W, `(4, 3)`: 2 mean(error * out_o * x_i)."""
    given = batch(0)
    error_T = given["x"] @ place.matrix.T @ OUT_O - given["y"]
    return 2 * torch.einsum("t,o,ti->oi", error_T, OUT_O, given["x"]) / 8


SLICES = [Slice("row", 0, 1), Slice("row", 2, 2), Slice("column", 1, 1), Slice("column", 0, 2), Slice("row", 0, 4)]


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("piece", SLICES, ids=str)
def test_the_restricted_gradient_is_the_masked_full_gradient(kind: str, piece: Slice) -> None:
    place = weight_of(kind)
    mask_OI = torch.zeros(4, 3)
    mask_OI[
        list(piece.indices) if piece.axis == "row" else slice(None),
        list(piece.indices) if piece.axis == "column" else slice(None),
    ] = 1
    part = Part.of(place, piece)
    (full,) = trials(place).gradients([place])
    torch.testing.assert_close(place.oriented(full), by_hand(place))
    assert part.norm(full) == pytest.approx(float((mask_OI * by_hand(place)).norm()))
    assert len(part.entries) == piece.size(place.shape) == int(mask_OI.sum())
    assert sorted(part.values().tolist()) == sorted(place.matrix[mask_OI.bool()].tolist())
    part.put(torch.full((len(part.entries),), 7.0))
    assert torch.equal(place.matrix == 7, mask_OI.bool())


def test_a_slice_lies_within_its_weight() -> None:
    with pytest.raises(SliceFineError, match="lies within its weight"):
        Part.of(weight_of(), Slice("row", 3, 2))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("piece", [Slice("row", 2, 1), Slice("column", 1, 2)], ids=str)
def test_the_loss_after_one_step_is_known(kind: str, piece: Slice) -> None:
    place = weight_of(kind)
    rows, columns = (piece.indices, range(3)) if piece.axis == "row" else (range(4), piece.indices)
    after = place.matrix.clone()
    for row in rows:
        for column in columns:  # Adam's first step has the length of the rate, whatever the gradient is
            after[row, column] -= RATE * by_hand(place)[row, column].sign()
    given = batch(11)
    expected = ((given["x"] @ after.T @ OUT_O - given["y"]) ** 2).mean()
    outcome = trials(place).train_alone(Part.of(place, piece))
    assert outcome.after == pytest.approx(float(expected), rel=1e-5)
    assert outcome.before == pytest.approx(float(loss_of(place)(given)))
    assert outcome.change == pytest.approx((outcome.after - outcome.before) / outcome.before)
    assert outcome.rate == pytest.approx(RATE)


def test_rows_whose_outputs_are_multiplied_by_zero_cannot_win() -> None:
    place = weight_of()
    many = trials(place, steps=3, rates=(0.01, 0.1))
    (full,) = many.gradients([place])
    dead, alive = Part.of(place, Slice("row", DEAD, 1)), Part.of(place, Slice("row", 2, 1))
    assert dead.norm(full) == 0
    outcome = many.train_alone(dead)
    assert (outcome.change, outcome.rate, outcome.after) == (0.0, None, outcome.before)
    outcome = many.train_alone(dead, noise=torch.Generator().manual_seed(0))
    assert (outcome.change, outcome.rate) == (0.0, None)
    assert alive.norm(full) > 0
    assert many.train_alone(alive).change < -0.01


def test_rates_are_shares_of_the_root_mean_square_of_the_weight() -> None:
    """A weight ten times as large whose outputs count a tenth learns the same, in steps ten times as long."""
    place, large = weight_of(), weight_of()
    with torch.no_grad():
        large.stored.mul_(10)
    train = [batch(seed) for seed in range(3)]
    piece, rates = Slice("row", 2, 1), (0.05, 0.5)

    def tenth(given: dict[str, Tensor]) -> Tensor:
        return loss_of(large)({"x": given["x"] / 10, "y": given["y"]})

    one = Trials(loss_of(place), train, [batch(10)], [batch(11)], rates).train_alone(Part.of(place, piece))
    other = Trials(tenth, train, [batch(10)], [batch(11)], rates).train_alone(Part.of(large, piece))
    assert one.rate is not None
    assert other.rate == pytest.approx(10 * one.rate)
    assert other.change == pytest.approx(one.change, rel=1e-4)


def test_a_weight_of_zeros_has_rates_all_the_same() -> None:
    place = weight_of()
    with torch.no_grad():
        place.stored.zero_()
    assert (
        Trials(loss_of(place), [batch(0)], [batch(0)], [batch(11)], (0.1,))
        .train_alone(Part.of(place, Slice("row", 2, 1)))
        .rate
        == 0.1
    )


def test_the_gradient_of_the_first_step_is_found_once() -> None:
    place, seen = weight_of(), list[bool]()

    def loss(given: dict[str, Tensor]) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return loss_of(place)(given)

    many = trials(place, steps=3, rates=(0.01, 0.02), loss=loss)
    many.train_alone(Part.of(place, Slice("row", 0, 1)))
    assert sum(seen) == 1 + 2 * 2
    many.train_alone(Part.of(place, Slice("column", 1, 2)))
    assert sum(seen) == 1 + 2 * 2 + 2 * 2


def test_a_weight_that_the_loss_does_not_depend_on() -> None:
    place, other = weight_of(), weight_of()
    many = trials(place, loss=loss_of(other))
    assert many.gradients([place])[0].abs().max() == 0
    assert many.train_alone(Part.of(place, Slice("row", 0, 1))).rate is None


def test_the_rate_is_chosen_by_other_examples_than_judge() -> None:
    place = weight_of()
    part = Part.of(place, Slice("row", 0, 4))
    alone = {rate: trials(place, steps=4, rates=(rate,)).train_alone(part) for rate in (0.01, 0.1, 30.0)}
    assert alone[30.0].rate is None  # steps so long lower no loss, so nothing is changed
    assert trials(place, steps=4, rates=(0.01, 30.0, 0.1)).train_alone(part) == alone[0.1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_bit_is_put_back(dtype: torch.dtype) -> None:
    place = weight_of(dtype=dtype)
    before = place.stored.clone()
    many = trials(place, steps=3, rates=(0.01, 0.1))
    for part in (Part.of(place, Slice("column", 0, 2)), Part.at_random(place, 5, torch.Generator())):
        many.train_alone(part)
        many.train_alone(part, noise=torch.Generator())
        many.gradients([place])
    assert torch.equal(place.stored, before)
    assert not place.stored.requires_grad
    assert place.stored.grad is None


@pytest.mark.parametrize("call", range(11))
def test_every_bit_is_put_back_after_an_interruption(call: int) -> None:
    place = weight_of()
    before = place.stored.clone()
    calls = 0

    def loss(given: dict[str, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == call + 3:  # two losses are computed once for all trials
            raise KeyboardInterrupt
        return loss_of(place)(given)

    many = trials(place, steps=4, rates=(0.01, 0.02), loss=loss)
    if call < 10:
        with pytest.raises(KeyboardInterrupt):
            many.train_alone(Part.of(place, Slice("row", 0, 2)))
    else:
        many.train_alone(Part.of(place, Slice("row", 0, 2)))
    assert torch.equal(place.stored, before)
    assert not place.stored.requires_grad


def test_what_is_rounded_away_is_kept_in_fp32() -> None:
    place = weight_of(dtype=torch.bfloat16)
    part, steps = Part.of(place, Slice("row", 2, 1)), 40
    tiny = float(part.values().float().abs().min()) * 2**-11  # each step is less than half of what bf16 can tell apart
    one = trials(place, steps=1, rates=(tiny,)).train_alone(part)
    assert one.rate is None
    assert trials(place, steps=steps, rates=(tiny,)).train_alone(part).rate == pytest.approx(tiny)


def test_a_loss_that_is_not_finite_is_not_chosen() -> None:
    place = weight_of()
    before = place.stored.clone()

    def loss(given: dict[str, Tensor]) -> Tensor:
        return loss_of(place)(given) * (1 if torch.equal(place.stored, before) else math.nan)

    outcome = trials(place, steps=3, loss=loss).train_alone(Part.of(place, Slice("row", 0, 1)))
    assert (outcome.rate, outcome.change) == (None, 0.0)
    assert torch.equal(place.stored, before)


@pytest.mark.parametrize("count", [1, 5, 6, 7, 12])
def test_a_random_mask_has_as_many_entries(count: int) -> None:
    place = weight_of("conv1d")
    part = Part.at_random(place, count, torch.Generator().manual_seed(0))
    assert len(set(part.entries.tolist())) == count
    assert set(part.entries.tolist()) <= set(range(12))
    assert torch.equal(part.entries, Part.at_random(place, count, torch.Generator().manual_seed(0)).entries)


def test_random_masks_are_spread_evenly() -> None:
    place, generator = Place(nn.Linear(10, 20)), torch.Generator().manual_seed(0)
    counts = torch.zeros(200)
    for _ in range(500):
        counts[Part.at_random(place, 20, generator).entries] += 1
    assert counts.sum() == 500 * 20
    assert abs(float(counts.mean()) - 50) < 1e-3
    assert float(counts.std()) < 1.3 * math.sqrt(50 * 0.9)


def test_the_heaviest_slice() -> None:
    matrix = torch.zeros(4, 5)
    matrix[2, 1], matrix[3, 1], matrix[0, 3] = 2, 2, 2.5
    assert (heaviest(matrix, "row", 1), heaviest(matrix, "row", 2)) == (0, 2)
    assert (heaviest(matrix, "column", 1), heaviest(matrix, "column", 3)) == (1, 1)
    assert heaviest(matrix, "column", 5) == 0


def test_a_slice_is_no_wider_than_its_weight() -> None:
    assert [clamped((4, 3), axis, 16) for axis in ("row", "column")] == [4, 3]
    assert clamped((4, 3), "row", 2) == 2


def test_gradients_leave_what_wants_gradients_as_it_was() -> None:
    place = weight_of()
    loss, (gradient,) = gradients(loss_of(place), [place.stored], batch(0))
    torch.testing.assert_close(gradient, by_hand(place))
    assert loss == pytest.approx(float(loss_of(place)(batch(0))))
    assert not place.stored.requires_grad
