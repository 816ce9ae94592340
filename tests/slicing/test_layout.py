"""Where the features of coupled weights are. The oracle is the list of features, row by row or column by column."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from slicefine.errors import SliceFineError
from slicefine.slicing import ORDERS, Layout, Region, Schedule, Slice
from slicefine.slicing.budget import SEAL_BYTES
from slicefine.slicing.window import Window
from slicefine.tuner.seal import Seal

AXES = ("row", "column")


@st.composite
def feature_lists(draw):
    """Which feature each row is of: every feature equally often, in runs of adjacent ones, in any order."""
    features, copies = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    if draw(st.booleans()):  # in whole heads, as models have them
        head = draw(st.sampled_from([head for head in range(1, features + 1) if features % head == 0]))
        heads = draw(st.permutations([*range(features // head)] * copies))
        return [h * head + place for h in heads for place in range(head)]
    return draw(st.permutations([*range(features)] * copies))


layouts = st.builds(Layout.of, st.sampled_from(AXES), feature_lists())
schedules = st.builds(
    Schedule,
    r=st.integers(1, 14),
    axis=st.just("coupled"),
    slide_every=st.one_of(st.none(), st.integers(1, 4)),
    order=st.sampled_from(ORDERS),
    seed=st.integers(0, 3),
)


def shape_of(layout, other=5):
    return (layout.dimension, other) if layout.axis == "row" else (other, layout.dimension)


# ---------------------------------------------------------------------- layouts


@given(st.sampled_from(AXES), feature_lists(), st.data())
def test_a_layout_is_the_list_it_was_made_of(axis, features, data):
    layout = Layout.of(axis, features)
    assert layout.axis == axis
    assert layout.features == max(features) + 1
    assert layout.dimension == len(features)
    assert {features.count(feature) for feature in features} == {layout.copies}
    start = data.draw(st.integers(0, layout.features - 1))
    stop = data.draw(st.integers(start, layout.features))
    expected = [index for index, feature in enumerate(features) if start <= feature < stop]
    pieces = layout.pieces(start, stop)
    assert [index for first, count in pieces for index in range(first, first + count)] == expected
    assert all(sum(before) < after[0] for before, after in pairwise(pieces)), "two pieces that touch"


@given(layouts)
def test_the_text_of_a_layout_says_all(layout):
    again = Layout.parse(str(layout))
    assert again == layout
    assert hash(again) == hash(layout)
    assert again.digest == layout.digest


@given(layouts, layouts)
def test_digests_tell_layouts_apart(layout, other):
    assert (layout.digest == other.digest) == (layout == other)


@pytest.mark.parametrize(
    ("features", "text"),
    [
        (range(384), "row 0+384"),
        ([*range(8), *range(8), *range(8, 16), *range(8, 16)], "row 0+8*2 8+8*2"),
        ([0, 1, 0, 1, 2, 3, 2, 3], "row 0+2*2 2+2*2"),
        ([1, 0], "row 1+1 0+1"),
        ([0, 0, 1, 1], "row 0+1*2 1+1*2"),
    ],
)
def test_texts(features, text):
    assert str(Layout.of("row", [*features])) == text


def test_few_heads_in_few_words():
    """A value head of 64 features that four query heads read, eight times; and query, key and value of twelve heads, head by head."""
    columns = [head * 64 + place for head in range(8) for _ in range(4) for place in range(64)]
    assert str(Layout.of("column", columns)) == "column " + " ".join(f"{head * 64}+64*4" for head in range(8))
    rows = [head * 64 + place for head in range(12) for _ in range(3) for place in range(64)]
    assert len(str(Layout.of("row", rows))) < 12 * 10


@pytest.mark.parametrize(
    ("features", "why"),
    [
        ([], "no features"),
        ([1, 2], "the first feature is left out"),
        ([0, 2], "a gap"),
        ([0, 0, 1], "one more often than the other"),
        ([0, 1, 2, 0, 1], "the last less often"),
        ([0, 1, 2, 3, 1, 2], "those in the middle more often"),
        ([-1, 0], "a negative feature"),
    ],
)
def test_uneven_features_are_refused(features, why):
    with pytest.raises(SliceFineError, match="every feature from 0 on equally often"):
        Layout.of("row", features)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8))
def test_exactly_the_even_lists_are_taken(features):
    even = len({features.count(feature) for feature in range(max(features) + 1)}) == 1
    try:
        Layout.of("column", features)
    except SliceFineError:
        assert not even
    else:
        assert even


@pytest.mark.parametrize(
    "text",
    [
        "",
        "row",
        "row ",
        "rows 0+4",
        "alternate 0+4",
        "row 0+4 ",
        " row 0+4",
        "row  0+4",
        "row 0-4",
        "row 0+0",
        "row 0+4*0",
        "row -1+4",
        "row 0+4\n",
        "row 0+4,4+4",
        "row 0+4*",
        "row +4",
        "row 0+1e3",
        "row 0+1234567890",
        "row \N{ARABIC-INDIC DIGIT ZERO}+\N{ARABIC-INDIC DIGIT FOUR}",
        "row 0+4;column 0+4",
    ],
)
def test_malformed_texts_are_refused(text):
    with pytest.raises(SliceFineError, match=r"is written as `row 0\+384` or `column .*got"):
        Layout.parse(text)


@pytest.mark.parametrize("text", ["row 4+4", "row 0+4 8+4", "column 0+4 0+3", "row 0+999999999 0+1"])
def test_texts_of_uneven_features_are_refused(text):
    with pytest.raises(SliceFineError, match="every feature from 0 on equally often"):
        Layout.parse(text)


def test_a_text_that_would_fill_the_memory_is_refused():
    with pytest.raises(SliceFineError, match="at most 1,048,576 runs"):
        Layout.parse("row 0+1*999999999")


@given(feature_lists(), st.data())
def test_however_it_is_written_a_layout_is_the_same(features, data):
    """A text by hand is not another layout than what the probe has found."""
    layout, parts = Layout.of("row", features), []
    for first, count in layout.runs:
        cut = data.draw(st.integers(0, count - 1))
        parts += [(first, cut), (first + cut, count - cut)] if cut else [(first, count)]
    text = "row " + " ".join(f"{first}+{count}" for first, count in parts)
    assert Layout.parse(text) == layout


def test_many_runs_take_no_time():
    """Gate and up row by row in turn, as wide as they come."""
    layout = Layout.of("row", [feature for feature in range(28672) for _ in range(2)])
    assert Layout.parse(str(layout)) == layout
    assert layout.pieces(10, 12) == ((20, 4),)


@given(st.text(alphabet="rowclumn 0123+*", max_size=30))
def test_no_text_does_anything_but_parse_or_be_refused(text):
    try:
        layout = Layout.parse(text)
    except SliceFineError:
        return
    assert Layout.parse(str(layout)) == layout


# ---------------------------------------------------------------------- slices


@given(feature_lists(), st.sampled_from(AXES), st.integers(1, 5), st.data())
def test_a_slice_of_features(features, axis, other, data):
    layout = Layout.of(axis, features)
    start = data.draw(st.integers(0, layout.features - 1))
    width = data.draw(st.integers(1, layout.features - start))
    piece, shape = Slice(axis, start, width, layout), shape_of(layout, other)
    expected = [index for index, feature in enumerate(features) if start <= feature < start + width]
    assert [*piece.indices] == expected
    assert piece.count == len(expected)
    assert [i for first, count in piece.runs for i in range(first, first + count)] == expected
    assert piece.size(shape) == piece.size((*shape, 1)) == len(expected) * other
    assert piece.size((*shape, 3, 3)) == 9 * len(expected) * other
    assert piece.check(shape) is piece
    assert Region.of([piece]).along(axis) == tuple(expected)


def test_a_plain_slice_is_one_run():
    piece = Slice("column", 3, 4)
    assert piece.runs == ((3, 4),)
    assert piece.count == 4
    assert [*piece.indices] == [3, 4, 5, 6]


@pytest.mark.parametrize(
    ("piece", "shape"),
    [
        (Slice("row", 0, 2, Layout.parse("row 0+4*2")), (4, 8)),
        (Slice("row", 0, 2, Layout.parse("row 0+4*2")), (9, 8)),
        (Slice("row", 3, 2, Layout.parse("row 0+4*2")), (8, 8)),
        (Slice("column", 0, 2, Layout.parse("column 0+4*2")), (8, 4)),
    ],
    ids=str,
)
def test_a_slice_of_another_weight_is_refused(piece, shape):
    with pytest.raises(SliceFineError, match="A slice lies within its weight: features"):
        piece.check(shape)


# ---------------------------------------------------------------------- schedules


@given(schedules, layouts, st.integers(0, 200))
def test_features_move_as_rows_would(schedule, layout, step):
    """A feature is to a coupled weight what a row is to one whose rows are trained."""
    piece = schedule.along(layout).slice_at(step, shape_of(layout))
    rows = replace(schedule, axis="row").slice_at(step, (layout.features, 1))
    assert (piece.start, piece.width, piece.axis, piece.layout) == (rows.start, rows.width, layout.axis, layout)
    piece.check(shape_of(layout))


@given(schedules, st.integers(1, 12), st.integers(0, 200), st.data())
def test_partners_train_the_same_features_at_every_step(schedule, features, step, data):
    """Whatever their widths, the order of their features, and on which side they are."""
    slices = []
    for _ in range(3):
        of = data.draw(st.permutations([*range(features)] * data.draw(st.integers(1, 4))))
        layout = Layout.of(data.draw(st.sampled_from(AXES)), of)
        piece = schedule.along(layout).slice_at(step, shape_of(layout, data.draw(st.integers(1, 9))))
        slices.append({of[index] for index in piece.indices})
    assert slices[0] == slices[1] == slices[2]
    assert len(slices[0]) == min(schedule.r, features)


@given(schedules, layouts, st.integers(0, 60))
def test_touched_is_what_a_walk_through_the_steps_visits(schedule, layout, step):
    own, shape = schedule.along(layout), shape_of(layout)
    assert own.touched(step, shape) == list(dict.fromkeys(own.slice_at(s, shape) for s in range(step)))


@given(schedules, layouts)
def test_one_pass_trains_every_row_or_column(schedule, layout):
    own, shape = replace(schedule, slide_every=1).along(layout), shape_of(layout)
    visits = [own.slice_at(step, shape) for step in range(-(-layout.features // own.r))]
    assert Region.of(visits).along(layout.axis) == tuple(range(layout.dimension))
    assert len(set(visits)) == len(visits)


@given(schedules, layouts, st.integers(1, 9), st.integers(0, 60))
def test_the_widest_matrix_holds_every_slice_and_no_more(schedule, layout, other, step):
    own, shape = schedule.along(layout), shape_of(layout, other)
    piece = own.slice_at(step, shape)
    assert own.widest(shape) == (piece.count, other)
    assert own.widest((*shape, 3, 3)) == (piece.count, other, 3, 3)


@given(schedules, st.integers(1, 17), st.integers(0, 60))
def test_a_weight_without_a_partner_trains_rows(schedule, rows, step):
    assert schedule.along(None) == replace(schedule, axis="row")
    assert schedule.along(None).slice_at(step, (rows, 3)).axis == "row"


@given(schedules, layouts, st.sampled_from(["row", "column", "alternate"]))
def test_a_layout_means_nothing_to_other_axes(schedule, layout, axis):
    other = replace(schedule, axis=axis)
    assert other.along(layout) == other


def test_coupled_is_a_word_for_the_axis():
    schedule = Schedule(r=1, axis="coupled", slide_every=None, order="sweep", seed=0)
    assert not schedule.problems()
    assert "Did you mean 'coupled'" in replace(schedule, axis="cuopled").problems()[0]


@given(schedules, layouts, layouts)
def test_the_text_of_a_schedule_tells_layouts_apart(schedule, layout, other):
    same = str(schedule.along(layout)) == str(schedule.along(other))
    assert same == (layout == other)
    assert str(schedule.along(layout)) != str(schedule.along(None))


# ---------------------------------------------------------------------- what a seal has room for


@given(
    st.builds(
        Schedule,
        r=st.integers(1, 10**9),
        axis=st.just("coupled"),
        slide_every=st.none() | st.integers(1, 10**18),
        order=st.sampled_from(ORDERS),
        seed=st.integers(0, 2**63 - 1),
        window=st.none() | st.builds(Window, st.just((0, 2, 4)), st.integers(1, 10**9), st.integers(0, 999)),
    ),
    st.none() | layouts,
    st.integers(0, 10**9 - 1),
)
@example(
    Schedule(r=16, axis="coupled", slide_every=150, order="random", seed=2**63 - 1), Layout.parse("column 0+64*4"), 1
)
def test_a_seal_holds_the_text_of_any_schedule(schedule, layout, step):
    seal = Seal(step, str(schedule.along(layout)), "bfloat16", *["0" * 32] * 3)
    assert Seal.parse(str(seal)) == seal
    assert seal.tensor().shape == (SEAL_BYTES,)
    assert Seal.from_tensor(seal.tensor()) == seal


def test_what_a_text_has_no_room_for_is_told_apart():
    schedule = Schedule(r=16, axis="coupled", slide_every=150, order="random", seed=2**63 - 1)
    layout = Layout.parse("column 0+64*4")
    others = [
        replace(schedule, seed=2**63 - 2).along(layout),
        replace(schedule, slide_every=151).along(layout),
        schedule.along(Layout.parse("column 0+64*3")),
    ]
    texts = [str(each) for each in (schedule.along(layout), *others)]
    assert len(set(texts)) == len(texts)
    assert all(text.startswith("r=16 axis=column@") for text in texts)


def test_usual_schedules_are_spelled_out():
    layout = Layout.parse("column 0+64*4")
    schedule = Schedule(r=16, axis="coupled", slide_every=150, order="random", seed=42)
    assert str(schedule.along(layout)) == f"r=16 axis=column@{layout.digest} slide_every=150 order=random seed=42"
