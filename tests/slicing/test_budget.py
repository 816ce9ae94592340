"""Counts against sets of entries, counted one by one."""

from hypothesis import given, settings
from hypothesis import strategies as st
from test_schedule import schedules, shapes

from slicefine.slicing import active_size, touched_size


def entries(piece, shape):
    return {
        (i, j) for i in range(shape[0]) for j in range(shape[1]) if (i if piece.axis == "row" else j) in piece.indices
    }


@given(schedules, shapes, st.integers(0, 60))
@settings(max_examples=100)
def test_counts_are_exact(schedule, shape, step):
    assert active_size(schedule, shape, step) == len(entries(schedule.slice_at(step, shape), shape))
    trained = set().union(*(entries(schedule.slice_at(s, shape), shape) for s in range(step)))
    assert touched_size(schedule, shape, step) == len(trained)
