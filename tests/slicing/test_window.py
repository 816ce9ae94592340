"""Depth windows as pure functions of the step. The oracle is somebody who makes every step and counts by hand."""

import pickle
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_schedule import schedule, schedules, shapes

from slicefine.slicing import Region, Window, active_size, artifact_size, touched_size
from slicefine.slicing.schedule import MOST_CHARACTERS

lowests = st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple)
windows = st.builds(Window, lowest=lowests, every=st.integers(1, 6), block=st.integers(0, 6))
windowed = st.builds(lambda schedule, window: replace(schedule, window=window), schedules, windows)


def for_all(*values):
    """`given` without a deadline: a machine that is busy takes its time."""
    return lambda test: settings(deadline=None)(given(*values)(test))


def by_hand(window, steps):
    """Whether each of the first steps trains the block."""
    found, turn = [], 0
    while len(found) < steps:
        found += [window.block >= window.lowest[turn]] * window.every
        turn = (turn + 1) % len(window.lowest)
    return found[:steps]


def walk(schedule, shape, steps):
    """After 0, 1, ... `steps` optimizer steps: own steps, moves, the slice, whether a step has trained it there, what was touched."""
    still = replace(schedule, window=None)
    own, moves, begun, touched = 0, 0, False, []
    trains = by_hand(schedule.window, steps + 1)
    for step in range(steps + 1):
        piece = still.slice_at(own, shape)
        yield step, own, moves, piece, begun, list(touched)
        if trains[step]:
            touched += [piece] if piece not in touched else []
            own, begun = own + 1, True
            if schedule.slide_every and own % schedule.slide_every == 0:
                moves, begun = moves + 1, still.slice_at(own, shape) == piece


# ---------------------------------------------------------------------- the window


@for_all(windows)
def test_active_and_own_are_a_count_step_by_step(window):
    trains = by_hand(window, 120)
    assert [window.active(step) for step in range(120)] == trains
    assert [window.own(step) for step in range(121)] == [sum(trains[:step]) for step in range(121)]


@for_all(windows)
def test_turns_are_those_that_train_the_block(window):
    assert window.turns == tuple(window.active(turn * window.every) for turn in range(len(window.lowest)))
    assert replace(schedule(), window=window).rests == (not all(by_hand(window, window.every * len(window.lowest))))


@for_all(windows, st.integers(0, 10**12), st.integers(0, 200))
def test_a_round_of_turns_is_as_long_and_as_good_as_any_other(window, rounds, step):
    length = window.every * len(window.lowest)
    assert window.own(rounds * length + step) == rounds * window.own(length) + window.own(step)
    assert window.active(rounds * length + step) == window.active(step)


@for_all(windows, st.integers(0, 200))
def test_a_block_is_trained_whenever_one_below_it_is(window, step):
    above = replace(window, block=window.block + 1)
    assert above.active(step) >= window.active(step)
    assert above.own(step) >= window.own(step)


@for_all(lowests, st.integers(1, 6))
def test_a_block_has_the_share_of_the_turns_that_begin_at_or_below_it(lowest, every):
    for block in range(7):
        share = Fraction(Window(lowest, every, block).own(every * len(lowest)), every * len(lowest))
        assert share == Fraction(sum(index <= block for index in lowest), len(lowest))


def test_the_example_of_the_documentation():
    """`[0, 2, 4]`, 25 steps each: every block for a third of the run, the last two always."""
    owns = [Window((0, 2, 4), 25, block).own(75) for block in range(6)]
    assert owns == [25, 25, 50, 50, 75, 75]


# ---------------------------------------------------------------------- schedules with a window


@for_all(windowed, shapes)
def test_a_schedule_is_what_somebody_sees_who_makes_every_step(schedule, shape):
    for step, own, moves, piece, begun, touched in walk(schedule, shape, 70):
        assert schedule.own(step) == own
        assert schedule.moves(step) == moves
        assert schedule.slice_at(step, shape) == piece
        assert schedule.begun(step, shape) == begun
        assert schedule.touched(step, shape) == touched


@for_all(windowed, shapes, st.integers(0, 200))
def test_nothing_moves_while_it_rests(schedule, shape, step):
    if not schedule.active(step):
        assert schedule.moves(step + 1) == schedule.moves(step)
        assert schedule.slice_at(step + 1, shape) == schedule.slice_at(step, shape)
        assert schedule.touched(step + 1, shape) == schedule.touched(step, shape)
        assert schedule.begun(step + 1, shape) == schedule.begun(step, shape)


@for_all(windowed, shapes, st.integers(0, 200))
def test_a_block_that_never_rests_has_the_schedule_without_a_window(schedule, shape, step):
    always = replace(schedule, window=replace(schedule.window, block=max(schedule.window.lowest)))
    plain = replace(schedule, window=None)
    assert not always.rests
    assert always.active(step)
    for asked in ("moves", "own"):
        assert getattr(always, asked)(step) == getattr(plain, asked)(step)
    for asked in ("begun", "slice_at", "touched"):
        assert getattr(always, asked)(step, shape) == getattr(plain, asked)(step, shape)


@for_all(schedules, shapes, st.integers(0, 100))
def test_without_a_window_every_step_is_its_own(schedule, shape, step):
    assert schedule.own(step) == step
    assert schedule.active(step)
    assert not schedule.rests
    assert schedule.begun(step, shape) == (
        step > 0 and schedule.slice_at(step, shape) == schedule.slice_at(step - 1, shape)
    )


def test_a_schedule_of_a_later_block_runs_ahead():
    window = Window((2, 0), 3, 0)
    low, high = (schedule(r=1, window=replace(window, block=block)) for block in (0, 2))
    starts = [[s.slice_at(step, (20, 5)).start for step in range(13)] for s in (low, high)]
    assert starts == [[0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 3], [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]]


def test_before_the_first_own_step_nothing_is_touched():
    resting = schedule(window=Window((3, 0), 10, 1))
    assert [resting.touched(step, (9, 9)) for step in (-1, 0, 9, 10)] == [[], [], [], []]
    assert not resting.begun(10, (9, 9))
    assert Region.of(resting.touched(11, (9, 9))).rows == (0, 1, 2)
    assert resting.begun(11, (9, 9))


# ---------------------------------------------------------------------- costs


@for_all(windowed, shapes, st.integers(0, 80))
def test_costs(schedule, shape, step):
    trains = by_hand(schedule.window, step + 1)[step]
    piece = schedule.slice_at(step, shape)
    assert active_size(schedule, shape, step) == (piece.size(shape) if trains else 0)
    own = schedule.own(step)
    plain = replace(schedule, window=None)
    assert touched_size(schedule, shape, step) == touched_size(plain, shape, own)
    assert artifact_size(schedule, shape, step, itemsize=2) == artifact_size(plain, shape, own, itemsize=2)


# ---------------------------------------------------------------------- as text


def test_the_text_of_a_window_is_part_of_the_file_format():
    """Saved adapters have it in their seals: a change here makes them unreadable."""
    text = str(schedule(window=Window((0, 2, 4), 25, 1)))
    assert text == "r=3 axis=row#43e89203 slide_every=2 order=sweep"
    assert str(schedule()) == "r=3 axis=row slide_every=2 order=sweep"


@for_all(windows, windows)
def test_other_windows_have_other_texts(one, other):
    texts = {str(schedule(window=window)) for window in (one, other)}
    assert len(texts) == len({one, other})


@for_all(windowed)
def test_texts_have_room_in_a_seal(schedule):
    assert len(str(schedule)) <= MOST_CHARACTERS
    assert ":" not in str(schedule)


@pytest.mark.parametrize("wide", [False, True])
def test_windows_are_values(wide):
    one = Window((0, 2), 3, 10**9 if wide else 1)
    assert one == pickle.loads(pickle.dumps(one)) == replace(one)
    assert len({one, replace(one), replace(one, block=2)}) == 2
