"""The highest moment of many layers, from those of few: beside a walk through all of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slicefine.benchmarking.longer_models import with_more_layers
from slicefine.benchmarking.saved_bytes import FORWARD, HEAD, LAYERS, StepMemory

SIZES = st.tuples(st.integers(0, 100), st.integers(0, 100), st.integers(0, 100))
"""Of a kind of layers: what one saves, its gradients, and what its backward pass takes meanwhile."""


def step(layers: str, sizes: dict[str, tuple[int, ...]], *, accumulating: bool) -> StepMemory:
    """That of a model of `layers`, a letter each: backward goes through them from the last to the first."""
    saved, gradients, meanwhile = ([sizes[kind][at] for kind in layers] for at in range(3))
    moments = [
        {
            "activations": sum(saved[: place + 1]),
            "temporary": meanwhile[place],
            "gradients": sum(gradients if accumulating else gradients[place + 1 :]),
        }
        for place in range(len(layers))
    ]
    return StepMemory(
        saved=sum(saved), saved_logits=0, logits=0, gradients=sum(gradients), reached=sum(gradients),
        blocks={"activations": sum(saved), "gradients": sum(gradients)},
        highest={FORWARD: {}, HEAD: {}, LAYERS: max(moments, key=lambda alive: sum(alive.values()))},
    )  # fmt: skip


def extrapolated(layers: str, sizes: dict[str, tuple[int, ...]], *, accumulating: bool) -> StepMemory:
    """From the last layer of each kind, and one more of each."""
    last = "".join(kind for place, kind in enumerate(layers) if kind not in layers[place + 1 :])
    added = [kind for place, kind in enumerate(layers) if kind in layers[place + 1 :]]
    steps = {kind: step(kind + last, sizes, accumulating=accumulating) for kind in dict.fromkeys(added)}
    start = step(last, sizes, accumulating=accumulating)
    return with_more_layers(start, [steps[kind] for kind in added], accumulating=accumulating)


@given(layers=st.text("ab", min_size=1, max_size=12), a=SIZES, b=SIZES, accumulating=st.booleans())
def test_no_moment_is_higher(layers: str, a: tuple[int, ...], b: tuple[int, ...], accumulating: bool) -> None:
    sizes = {"a": a, "b": b}
    few, all_of_them = (of(layers, sizes, accumulating=accumulating) for of in (extrapolated, step))
    assert (few.saved, few.gradients) == (all_of_them.saved, all_of_them.gradients)
    assert few.peak >= all_of_them.peak
    if len(set(layers)) == 1:
        assert few.peak == all_of_them.peak


@given(turns=st.integers(1, 10), a=SIZES, b=SIZES, accumulating=st.booleans())
def test_kinds_that_take_turns(turns: int, a: tuple[int, ...], b: tuple[int, ...], accumulating: bool) -> None:
    """To within a layer: which one the highest moment of few layers lies in is not known."""
    sizes = {"a": a, "b": b}
    few, all_of_them = (of("ab" * turns, sizes, accumulating=accumulating) for of in (extrapolated, step))
    assert few.peak <= all_of_them.peak + max(abs(saved - gradients) for saved, gradients, _ in (a, b)) + max(
        a[0], b[0]
    )


@pytest.mark.parametrize("layers", ["ab" * 20, "ba" * 20])
def test_what_one_kind_has_before_the_peak_another_has_not_after_it(layers: str) -> None:
    """Not all that `a` saves beside all gradients of `b`: when the last of those is done, half of the first is gone."""
    sizes = {"a": (10, 0, 5), "b": (0, 10, 5)}
    peak = extrapolated(layers, sizes, accumulating=False).peak
    assert step(layers, sizes, accumulating=False).peak <= peak <= 20 * 10 + 25
