"""Long series are made short, and lose nothing that can be seen."""

from __future__ import annotations

from pathlib import Path

import pytest
import reported
from hypothesis import given
from hypothesis import strategies as st

from slicefine.reporting.history import History, history
from slicefine.reporting.records import Record
from slicefine.reporting.thinning import neighbours, smooth, spaced, thin

heights = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400)


@given(heights, st.integers(4, 60))
def test_thinning_keeps_ends_extremes_and_order(values: list[float], most: int) -> None:
    points = [(float(x), y) for x, y in enumerate(values)]
    kept = thin(points, most)
    assert len(kept) <= max(most, 4)
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert [x for x, _ in kept] == sorted({x for x, _ in kept})
    assert set(kept) <= set(points)
    assert min(y for _, y in kept) == min(values)
    assert max(y for _, y in kept) == max(values)


@given(heights, st.integers(1, 30))
def test_the_mean_of_neighbours_against_sums(values: list[float], window: int) -> None:
    points = [(float(x), y) for x, y in enumerate(values)]
    for at, (x, y) in enumerate(smooth(points, window)):
        reach = min(window // 2, at, len(values) - 1 - at)
        near = values[at - reach : at + reach + 1]
        assert x == at
        assert y == pytest.approx(sum(near) / len(near), abs=1e-6 * max(1, *map(abs, values)))


def test_few_points_are_left_as_they_are() -> None:
    few = [(float(x), 0.1 * x * x) for x in range(59)]
    assert neighbours(few) == 0
    assert smooth(few, neighbours(few)) == few
    assert neighbours([*few, (59.0, 1.0)]) == 3


@given(st.integers(0, 300), st.integers(2, 40))
def test_spacing_keeps_both_ends(count: int, most: int) -> None:
    kept = spaced(list(range(count)), most)
    assert len(kept) == min(count, most)
    assert kept == sorted(set(kept))
    assert not kept or (kept[0], kept[-1]) == (0, count - 1)


def of(log: list[object], **more: object) -> History:
    record = reported.record()
    content = {"log": log, **more}
    return history(
        Record(kind="training run", file=Path("record.json"), content=record, parts={"history.json": content})
    )


def test_what_trainer_logs_becomes_series() -> None:
    found = of(
        [
            {"step": 10, "loss": 1.0, "learning_rate": 0.1, "slicefine/update_norm_mean": 0.2},
            {"step": 20, "loss": None, "learning_rate": 0.2},
            {"step": 30, "loss": float("nan")},
            {"step": 30, "eval_loss": 0.5, "eval_accuracy": 0.9, "eval_runtime": 3.0, "eval_samples_per_second": 9.0},
            {"step": "30", "loss": 2.0},
            "no entry",
        ],
        moves=[20, None, 10],
    )
    assert found.loss == [(10.0, 1.0)]
    assert found.not_finite == 3
    assert found.learning_rate == [(10.0, 0.1), (20.0, 0.2)]
    assert found.update_mean == [(10.0, 0.2)]
    assert found.moves == [10.0, 20.0]
    # The scores before training stand at step 0.
    assert found.validation == {"loss": [(0.0, 1.8213), (30.0, 0.5)], "accuracy": [(0.0, 0.1923), (30.0, 0.9)]}
    assert found.last_step == 30


def test_no_log_is_no_series() -> None:
    record = Record(kind="training run", file=Path("record.json"), content=reported.record())
    assert history(record) == History()
    assert History().last_step == 0
