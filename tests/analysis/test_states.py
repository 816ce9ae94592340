"""PCA of hidden states: closed forms, any batching, planted outliers, pad tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from classifiers import clip_model, image_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import VideoMAEForVideoClassification, ViTForImageClassification

from slicefine.analysis.explained import all_directions, curve, directions, effective_rank, participation_ratio, shares
from slicefine.analysis.states import OUTLIER, Moments, collect, figures, layer_names, outliers, tokens


def rotation(dimension: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dimension, dimension, generator=generator, dtype=torch.float64)).Q


def states_of(variances: list[float], *, turned: bool = True, mean: float = 0.0) -> torch.Tensor:
    """2 D vectors whose covariance has exactly these eigenvalues."""
    scales = torch.diag((torch.tensor(variances, dtype=torch.float64) * len(variances)).sqrt())
    vectors = torch.cat([scales, -scales])
    return (vectors @ rotation(len(variances)) if turned else vectors) + mean


def moments_of(vectors: torch.Tensor) -> Moments:
    moments = Moments(vectors.shape[1])
    moments.add(vectors)
    return moments


def test_figures_of_known_shares() -> None:
    parts = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    assert all_directions(parts) == {"0.8": 2, "0.9": 3, "0.95": 3}
    assert (directions(parts, 0.5), directions(parts, 0.51), directions(parts, 1.0)) == (1, 2, 4)
    assert participation_ratio(parts) == pytest.approx(1 / (0.25 + 0.09 + 0.0225 + 0.0025))
    assert curve(parts) == [[1, 0.5], [2, 0.8], [3, pytest.approx(0.95)], [4, pytest.approx(1.0)]]


@pytest.mark.parametrize("count", [1, 7, 10, 300])
def test_equal_eigenvalues_need_their_share_of_the_directions(count: int) -> None:
    parts = shares(3 * torch.eye(count))
    assert parts is not None
    assert [directions(parts, tau) for tau in (0.8, 0.9, 0.95)] == [math.ceil(count * n / 20) for n in (16, 18, 19)]
    assert participation_ratio(parts) == pytest.approx(count)
    assert effective_rank(parts) == pytest.approx(count)
    points = curve(parts)
    assert len(points) <= 40
    assert (points[0], points[-1]) == ([1, pytest.approx(1 / count)], [count, pytest.approx(1)])


@pytest.mark.parametrize("matrix", [torch.zeros(3, 3), torch.full((2, 2), math.nan), torch.zeros(0, 0)])
def test_nothing_has_no_shares(matrix: torch.Tensor) -> None:
    assert shares(matrix) is None


def test_explained_variance_of_a_known_covariance() -> None:
    variances = [8.0, 4.0, 2.0, 1.0, 0.6, 0.4]
    layer = figures("layer 3", moments_of(states_of(variances, mean=5.0)))
    assert layer is not None
    assert (layer["name"], layer["dimension"], layer["samples"], layer["truncated"]) == ("layer 3", 6, 12, False)
    assert layer["note"].startswith("There are 12 tokens for 6 dimensions. With fewer than 10 for each")
    many = figures("layer 3", moments_of(torch.cat([states_of(variances, mean=5.0)] * 5)))
    assert many is not None
    assert many["note"] == ""
    assert layer["variance"]["with"]["k"] == {"0.8": 3, "0.9": 4, "0.95": 5}
    shares_of = [share for _, share in layer["variance"]["with"]["cumulative"]]
    assert shares_of == pytest.approx([0.5, 0.75, 0.875, 0.9375, 0.975, 1.0])
    assert layer["participation_ratio"] == pytest.approx(16**2 / sum(v * v for v in variances))


def test_a_planted_outlier_is_found_and_left_out() -> None:
    variances = [1.0, 1.0, 1.0, 1.0, 1.0, 500.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    layer = figures("layer 0", moments_of(states_of(variances, turned=False)))
    assert layer is not None
    assert layer["outliers"] == [5]
    assert layer["variance"]["with"]["k"] == {"0.8": 1, "0.9": 1, "0.95": 1}
    without = layer["variance"]["without"]
    assert (without["dimension"], without["k"]) == (10, {"0.8": 8, "0.9": 9, "0.95": 10})
    assert without["participation_ratio"] == pytest.approx(10)
    assert layer["participation_ratio"] == pytest.approx(510**2 / (500**2 + 10))


def test_what_is_an_outlier() -> None:
    variances = torch.tensor([1.0, 1.0, 1.0, OUTLIER, OUTLIER + 0.01])
    assert outliers(variances) == [4]
    assert outliers(torch.tensor([0.0, 0.0, 3.0])) == []


def test_fewer_tokens_than_dimensions_are_said() -> None:
    vectors = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    layer = figures("layer 0", moments_of(vectors))
    assert layer is not None
    assert layer["truncated"]
    assert "fewer tokens (5)" in layer["note"]
    assert "At most 4 directions" in layer["note"]
    assert layer["variance"]["with"]["k"]["0.95"] <= 4


@pytest.mark.parametrize("value", [0.0, 3.0, math.nan, math.inf])
def test_states_that_do_not_vary_or_are_not_finite_have_no_figures(value: float) -> None:
    assert figures("layer 0", moments_of(torch.full((9, 4), value))) is None


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=7),
    mean=st.sampled_from([0.0, 1e3, -1e6]),
    seed=st.integers(0, 99),
)
def test_any_batching_gives_the_covariance_of_all_at_once(sizes: list[int], mean: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(sum(sizes), 4, generator=generator, dtype=torch.float64) + mean
    streamed, merged = Moments(4), Moments(4)
    for part in vectors.split(sizes):
        streamed.add(part)
        merged.merge(moments_of(part))
    expected = torch.cov(vectors.T, correction=0) if len(vectors) else torch.zeros(4, 4, dtype=torch.float64)
    for moments in (streamed, merged):
        assert moments.count == len(vectors)
        assert torch.allclose(moments.covariance, expected, rtol=1e-8, atol=1e-9)
        assert not len(vectors) or torch.allclose(moments.mean, vectors.mean(0), rtol=1e-12)


def test_tokens_leaves_out_padding_alone() -> None:
    states = torch.arange(24.0).reshape(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert torch.equal(tokens(states, mask), torch.stack([states[0, 0], states[0, 1], states[1, 1], states[1, 2]]))
    assert torch.equal(tokens(states, None), states.reshape(6, 4))
    assert torch.equal(tokens(states, torch.ones(2, 160)), states.reshape(6, 4))  # of the samples of a sound, say


def test_places_of_a_feature_map_are_tokens() -> None:
    maps = torch.arange(48.0).reshape(2, 3, 2, 4)
    assert tokens(maps, None).shape == (16, 3)
    assert torch.equal(tokens(maps, None)[0], maps[0, :, 0, 0])


def padded(model: Any) -> list[dict[str, torch.Tensor]]:
    """Two batches, of 3 texts padded on the right and of 2."""
    first = {"input_ids": tiny.tokens(3, 6), "attention_mask": torch.ones(3, 6, dtype=torch.int64)}
    first["attention_mask"][1, 4:] = 0
    first["attention_mask"][2, 2:] = 0
    return [first, {"input_ids": tiny.tokens(2, 5, seed=2), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}]


@pytest.mark.parametrize("make", [tiny.bert, tiny.llama, tiny.gpt2])
def test_padding_of_texts_changes_nothing(make: Any) -> None:
    model = make().eval()
    ticks: list[int] = []
    found = collect(model, padded(model), lambda: ticks.append(1))
    single = []
    for batch in padded(model):
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            kept = ids[: int(mask.sum())][None]
            with torch.no_grad():
                single.append(model.base_model(input_ids=kept, output_hidden_states=True).hidden_states)
    assert len(found) == len(single[0]) == len(layer_names(len(found))) == 3
    assert len(ticks) == 2
    for number, moments in enumerate(found):
        every = torch.cat([states[number][0] for states in single]).double()
        assert moments.count == len(every) == 6 + 4 + 2 + 2 * 5
        assert torch.allclose(moments.covariance, torch.cov(every.T, correction=0), atol=1e-6)


def test_all_patches_of_images_and_clips_count(tmp_path: Path) -> None:
    image = ViTForImageClassification.from_pretrained(image_model(tmp_path / "image"), num_labels=2).eval()
    clip = VideoMAEForVideoClassification.from_pretrained(clip_model(tmp_path / "clip"), num_labels=2).eval()
    labels = torch.zeros(3, dtype=torch.int64)
    of_images = collect(image, [{"pixel_values": torch.randn(3, 3, 8, 8), "labels": labels}], lambda: None)
    of_clips = collect(clip, [{"pixel_values": torch.randn(3, 4, 3, 16, 16), "labels": labels}], lambda: None)
    assert [moments.count for moments in of_images] == [3 * (4 + 1)] * 3
    assert [moments.count for moments in of_clips] == [3 * 2 * 4] * 3


def test_a_model_without_states_has_no_layers() -> None:
    class Stateless(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_model = lambda x, output_hidden_states: (x,)

    model: Any = Stateless()
    assert collect(model, [{"x": torch.ones(1, 2)}], lambda: None) == []
    assert layer_names(0) == []
    assert layer_names(3) == ["embeddings", "layer 0", "layer 1"]
