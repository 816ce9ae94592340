"""The maths of spectral balance against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slicefine.analysis.spectrum import Spectra, cut

shapes = st.tuples(st.integers(4, 24), st.integers(1, 24))
groups = st.integers(2, 4)
seeds = st.integers(0, 2**31)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def orthogonal(size: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(gaussian(size, size, seed=seed).double())[0]


def with_singular_values(values: Tensor, rows: int, across: int, seed: int = 0) -> Tensor:
    """A matrix `(rows, across)` with these singular values, fp64."""
    count = len(values)
    return orthogonal(rows, seed)[:, :count] * values.double() @ orthogonal(across, seed + 1)[:count]


def spectra(weight: Tensor, count: int, axis: str = "row") -> Spectra:
    return Spectra.of(cut(weight, axis, count))


@pytest.mark.parametrize(("rows", "across"), [(6, 9), (9, 6), (6, 6), (1, 5), (5, 1)])
def test_the_eigenvalues_are_the_squares_of_known_singular_values(rows: int, across: int) -> None:
    values = torch.linspace(3, 0.5, min(rows, across))
    found = Spectra.of([with_singular_values(values, rows, across)])
    assert torch.allclose(found.eigenvalues[0], values.double().square(), rtol=1e-12)
    assert float(found.energy) == pytest.approx(float(values.double().square().sum()) / (rows * across))


def test_ranks_of_known_singular_values() -> None:
    """Equal ones: both ranks are their number, a matrix of rank 1 has rank 1. Else by hand: values 2, 1, 1."""
    equal, one = torch.ones(4), torch.ones(1)
    for values, stable, effective in [
        (equal, 4, 4),
        (one, 1, 1),
        (torch.tensor([2.0, 1.0, 1.0]), 6 / 4, math.exp(0.5 * math.log(2) + 2 * 0.25 * math.log(4))),
    ]:
        found = Spectra.of([with_singular_values(values, 5, 8)])
        assert float(found.stable_rank) == pytest.approx(stable)
        assert float(found.effective_rank) == pytest.approx(effective)


def test_what_rounding_leaves_of_a_zero_eigenvalue_is_zero() -> None:
    found = Spectra.of([torch.outer(torch.arange(1.0, 40.0), torch.arange(1.0, 200.0))])
    assert int((found.eigenvalues > 0).sum()) == 1


@given(rows=st.integers(1, 8), across=st.integers(1, 12), count=groups, seed=seeds)
@settings(max_examples=30, deadline=None)
def test_identical_groups_are_balanced(rows: int, across: int, count: int, seed: int) -> None:
    found = spectra(gaussian(rows, across, seed=seed).repeat(count, 1), count)
    assert found.rho == pytest.approx(0, abs=1e-24)
    assert found.decay_distance == pytest.approx(0, abs=1e-12)


@given(count=st.integers(2, 12), factor=st.just(0.0) | st.floats(1e-100, 100), seed=seeds)  # whose square is above 0
@settings(max_examples=50, deadline=None)
def test_rho_grows_in_a_known_way_when_one_group_is_scaled(count: int, factor: float, seed: int) -> None:
    """Energies 1, ..., 1, s^2: rho = k (s^2 - 1)^2 / (k - 1 + s^2)^2, at most k."""
    weight = gaussian(3, 5, seed=seed).double().repeat(count, 1)
    weight[-3:] *= factor
    found = spectra(weight, count)
    square = factor**2
    assert found.rho == pytest.approx(count * (square - 1) ** 2 / (count - 1 + square) ** 2, rel=1e-9, abs=1e-15)
    assert found.energy_spread == pytest.approx(math.sqrt(found.rho))
    assert found.decay_distance == pytest.approx(0, abs=1e-9)  # a scale has no decay


def test_rho_grows_with_the_scale_of_one_group() -> None:
    base = gaussian(8, 64)
    scaled = [torch.cat([base[:6], base[6:] * factor]) for factor in (1, 1.5, 2, 4, 8)]
    rhos = [spectra(weight, 4).rho for weight in scaled]
    assert rhos == sorted(rhos)


def test_the_distance_of_known_decays() -> None:
    """Of shares (1, 0) and (1/2, 1/2) the mean is (3/4, 1/4), and each is 1/4 away; the mean squared entry is the same."""
    found = Spectra.of([torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])])
    assert found.decay.tolist() == [[1, 0], [0.5, 0.5]]
    assert found.decay_distance == pytest.approx(0.25)
    assert found.cumulative.tolist() == [[0, 1, 1], [0, 0.5, 1]]
    assert found.energy.tolist() == [0.5, 0.5]


def test_decays_that_share_nothing_are_as_far_apart_as_can_be() -> None:
    """Of k groups with k equal eigenvalues or one, distances approach 1 from below; none is above."""
    found = Spectra.of([torch.eye(64), torch.outer(torch.ones(64), torch.ones(64))])
    assert found.decay_distance == pytest.approx((1 - 1 / 64) / 2)


@given(shape=shapes, count=groups, seed=seeds, scale=st.sampled_from([1e-15, 0.3, 7.0, 1e15]))
@settings(max_examples=50, deadline=None)
def test_scaling_the_weight_changes_nothing(shape: tuple[int, int], count: int, seed: int, scale: float) -> None:
    weight = gaussian(*shape, seed=seed)
    assert_same(spectra(weight, count), spectra(weight * scale, count), tolerance=1e-4)


@given(shape=shapes, count=groups, seed=seeds)
@settings(max_examples=50, deadline=None)
def test_turning_the_other_side_changes_nothing(shape: tuple[int, int], count: int, seed: int) -> None:
    weight = gaussian(*shape, seed=seed).double()
    assert_same(spectra(weight, count), spectra(weight @ orthogonal(shape[1], seed), count))


@given(shape=shapes, count=groups, seed=seeds)
@settings(max_examples=30, deadline=None)
def test_the_order_within_a_group_does_not_matter_and_columns_are_rows_of_the_transpose(
    shape: tuple[int, int], count: int, seed: int
) -> None:
    weight = gaussian(*shape, seed=seed)
    flipped = torch.cat([group.flip(0) for group in cut(weight, "row", count)])
    assert_same(spectra(weight, count), spectra(flipped, count))
    assert_same(spectra(weight, count), spectra(weight.T.contiguous(), count, "column"))


@given(shape=shapes, count=groups, seed=seeds)
@settings(max_examples=50, deadline=None)
def test_the_bounds(shape: tuple[int, int], count: int, seed: int) -> None:
    found = spectra(gaussian(*shape, seed=seed), count)
    rank = -(-shape[0] // count)
    assert 0 <= found.rho <= count
    assert 0 <= found.decay_distance <= 1
    assert torch.allclose(found.decay.sum(1), torch.ones(count, dtype=torch.float64))
    assert bool((found.stable_rank >= 1 - 1e-9).all())
    assert bool((found.stable_rank <= found.effective_rank + 1e-9).all())
    assert bool((found.effective_rank <= min(rank, shape[1]) + 1e-9).all())


@pytest.mark.parametrize("axis", ["row", "column"])
def test_a_random_gaussian_has_the_rho_of_its_number_of_entries(axis: str) -> None:
    """2 / entries of a group, whatever the number of groups is; over 200 matrices the mean is 5 standard errors near."""
    for count in (2, 8):
        rhos = torch.tensor([spectra(gaussian(64, 32, seed=seed), count, axis).rho for seed in range(200)])
        expected = 2 / (64 * 32 / count)
        assert abs(float(rhos.mean()) - expected) < 5 * float(rhos.std()) / math.sqrt(len(rhos))


def test_shuffled_entries_have_the_rho_of_their_values() -> None:
    """The variance of a mean of n of N numbers drawn without replacement, over all groups: variance of the squares / n."""
    values = gaussian(32, 32) ** 3
    squares = values.double().square().flatten()
    expected = float(squares.var() / 256 / squares.mean().square())
    generator = torch.Generator().manual_seed(0)
    rhos = torch.tensor(
        [spectra(values.flatten()[torch.randperm(1024, generator=generator)].view(32, 32), 4).rho for _ in range(400)]
    )
    assert abs(float(rhos.mean()) - expected) < 5 * float(rhos.std()) / math.sqrt(len(rhos))


def test_groups_of_different_sizes() -> None:
    """Of 7 rows in 3 groups the first has one more; all ranks of rows with one direction each are their number."""
    weight = torch.eye(7)
    parts = cut(weight, "row", 3)
    assert [len(part) for part in parts] == [3, 2, 2]
    found = Spectra.of(parts)
    assert found.eigenvalues.tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 0]]
    assert found.stable_rank.tolist() == pytest.approx([3, 2, 2])
    assert found.rho == pytest.approx(0, abs=1e-24)


def test_a_group_of_zeros_has_no_decay_and_counts_as_energy() -> None:
    found = Spectra.of([torch.ones(2, 3), torch.zeros(2, 3)])
    assert found.energy.tolist() == [1, 0]
    assert found.rho == pytest.approx(2)
    assert len(found.decay) == len(found.stable_rank) == len(found.effective_rank) == 1
    assert found.decay_distance == 0


def test_no_energy_or_one_group_has_no_rho() -> None:
    assert math.isnan(Spectra.of([torch.zeros(2, 3), torch.zeros(2, 3)]).rho)
    assert math.isnan(Spectra.of([torch.ones(2, 3)]).rho)


def test_16_bit_weights_are_computed_with_in_64() -> None:
    weight = gaussian(16, 48).bfloat16()
    assert_same(spectra(weight, 4), spectra(weight.double(), 4))
    assert spectra(weight, 4).eigenvalues.dtype == torch.float64


def assert_same(one: Spectra, other: Spectra, tolerance: float = 1e-9) -> None:
    assert one.rho == pytest.approx(other.rho, rel=tolerance, abs=1e-12)
    assert one.energy_spread == pytest.approx(other.energy_spread, rel=tolerance, abs=1e-6)
    assert one.decay_distance == pytest.approx(other.decay_distance, abs=tolerance)
    assert torch.allclose(one.decay, other.decay, rtol=0, atol=tolerance)
    assert torch.allclose(one.stable_rank, other.stable_rank, rtol=tolerance)
    assert torch.allclose(one.effective_rank, other.effective_rank, rtol=max(tolerance, 1e-6))
