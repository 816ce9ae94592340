"""Properties of positions. The oracle for `touched` is to walk through every step."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slicefine.slicing import AXES, ORDERS, Region, Schedule, Slice

schedules = st.builds(
    Schedule,
    r=st.integers(1, 12),
    axis=st.sampled_from(AXES),
    slide_every=st.one_of(st.none(), st.integers(1, 5)),
    order=st.sampled_from(ORDERS),
    seed=st.integers(0, 3),
)
shapes = st.tuples(st.integers(1, 17), st.integers(1, 17))


def schedule(**changes):
    return Schedule(**({"r": 3, "axis": "row", "slide_every": 2, "order": "sweep", "seed": 0} | changes))


@given(schedules, shapes, st.integers(0, 300))
def test_nothing_is_out_of_bounds_and_every_slice_is_full(schedule, shape, step):
    piece = schedule.slice_at(step, shape)
    assert piece.check(shape).width == min(schedule.r, shape[piece.dim])


@given(schedules, shapes)
@settings(max_examples=200)
def test_full_coverage_in_one_pass_and_revisits_after_it(schedule, shape):
    if schedule.slide_every is None:
        assert {schedule.slice_at(step, shape) for step in range(50)} == {schedule.slice_at(0, shape)}
        return
    for dim, axis in enumerate(("row", "column")):
        if schedule.axis not in (axis, "alternate"):
            continue
        blocks = -(-shape[dim] // min(schedule.r, shape[dim]))
        turns = range(
            0 if axis == "row" or schedule.axis == "column" else 1, 10**6, 2 if schedule.axis == "alternate" else 1
        )
        for start in (0, blocks):  # the first and the second pass
            visited = [schedule.slice_at(turns[start + k] * schedule.slide_every, shape) for k in range(blocks)]
            assert {piece.axis for piece in visited} == {axis}
            assert set().union(*(piece.indices for piece in visited)) == set(range(shape[dim]))
            assert len(set(visited)) == blocks, "a block came twice in one pass"


@given(schedules, shapes, st.integers(0, 120))
@settings(max_examples=200)
def test_touched_is_what_a_walk_through_the_steps_visits(schedule, shape, step):
    walked = list(dict.fromkeys(schedule.slice_at(s, shape) for s in range(step)))
    assert schedule.touched(step, shape) == walked


@given(schedules, shapes)
def test_confined_is_what_stays_though_it_is_moved(schedule, shape):
    moving = replace(schedule, slide_every=1)
    assert schedule.confined(shape) == (len({moving.slice_at(step, shape) for step in range(40)}) == 1)


@given(schedules, shapes, st.integers(0, 10))
def test_same_answer_in_any_order_of_asking(schedule, shape, seed):
    steps = list(range(40))
    asked = {step: schedule.slice_at(step, shape) for step in steps}
    random.Random(seed).shuffle(steps)
    assert {step: schedule.slice_at(step, shape) for step in steps} == asked


@given(schedules, st.integers(1, 17), st.integers(1, 17), st.integers(1, 17), st.integers(0, 60))
def test_weights_of_equal_size_move_together(schedule, d_out, d_in, other, step):
    piece = schedule.slice_at(step, (d_out, d_in))
    twin = schedule.slice_at(step, (d_out, other) if piece.axis == "row" else (other, d_in))
    assert twin == piece


@given(st.integers(1, 12), st.sampled_from(ORDERS), st.integers(1, 17), st.integers(0, 60))
def test_rows_and_columns_of_equal_size_move_together(r, order, dimension, step):
    rows = schedule(axis="row", r=r, order=order).slice_at(step, (dimension, 3))
    columns = schedule(axis="column", r=r, order=order).slice_at(step, (5, dimension))
    assert list(rows.indices) == list(columns.indices)


@given(schedules, shapes, st.integers(0, 60))
def test_the_widest_matrix_holds_every_slice(schedule, shape, step):
    width, length = schedule.widest(shape)
    piece = schedule.slice_at(step, shape)
    assert piece.width <= width
    assert shape[1 - piece.dim] <= length


def test_the_last_block_is_moved_back_so_that_it_is_full():
    pieces = [schedule().slice_at(step, (7, 5)) for step in (0, 2, 4, 6)]
    assert pieces == [Slice("row", 0, 3), Slice("row", 3, 3), Slice("row", 4, 3), Slice("row", 0, 3)]


def test_alternate_goes_row_column_row():
    pieces = [schedule(axis="alternate").slice_at(step, (7, 5)) for step in (0, 1, 2, 4, 6)]
    assert [(piece.axis, piece.start) for piece in pieces] == [
        ("row", 0),
        ("row", 0),
        ("column", 0),
        ("row", 3),
        ("column", 2),
    ]


def test_the_random_order_is_part_of_the_file_format():
    """Saved adapters rely on these positions: a change here makes them unreadable."""
    starts = [schedule(r=1, slide_every=1, order="random", seed=7).slice_at(step, (6, 6)).start for step in range(12)]
    assert starts == [5, 3, 4, 0, 2, 1, 3, 1, 2, 0, 5, 4]


def test_seeds_and_passes_give_other_orders():
    def order(seed, turn):
        return [
            schedule(r=1, slide_every=1, order="random", seed=seed).slice_at(turn * 50 + k, (50, 1)).start
            for k in range(50)
        ]

    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1)


@pytest.mark.parametrize("step", [0, 1, 2, 3, 4])
def test_touched_and_active_around_a_move(step):
    touched = schedule().touched(step, (7, 5))
    assert Region.of(touched).rows == tuple(range({0: 0, 1: 3, 2: 3, 3: 6, 4: 6}[step]))


def test_all_problems_at_once():
    problems = schedule(r=0, axis="rows", slide_every=0, order="swep", seed="x").problems()
    assert len(problems) == 5
    assert "Did you mean 'row'" in problems[1]
    assert "Did you mean 'sweep'" in problems[3]
    assert schedule().problems() == []
    assert schedule(r=True).problems()
