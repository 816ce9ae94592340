import pytest

from slicefine import SliceFineError
from slicefine.slicing import Region, Slice


def test_a_slice_knows_its_indices_and_size():
    piece = Slice("column", 2, 3)
    assert list(piece.indices) == [2, 3, 4]
    assert piece.size((7, 5)) == 21
    assert Slice("row", 2, 3).size((7, 5)) == 15


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("rwo", 0, 1), ["'row' or 'column'", "'rwo'", "Did you mean 'row'"]),
        (("row", -1, 1), ["index 0 or later", "start=-1"]),
        (("row", 0, 0), ["at least one", "width=0"]),
    ],
)
def test_what_is_no_slice_is_refused(arguments, words):
    with pytest.raises(SliceFineError) as error:
        Slice(*arguments)
    assert all(word in str(error.value) for word in words)


def test_a_slice_beyond_its_weight_is_refused():
    assert Slice("row", 4, 3).check((7, 5)) == Slice("row", 4, 3)
    with pytest.raises(SliceFineError, match=r"rows 5 to 7 do not exist in a weight of shape \(7, 5\)"):
        Slice("row", 5, 3).check((7, 5))
    with pytest.raises(SliceFineError, match="columns 4 to 5"):
        Slice("column", 4, 2).check((7, 5))


def test_a_region_counts_crossings_once():
    region = Region.of([Slice("row", 0, 2), Slice("row", 1, 2), Slice("column", 3, 2)])
    assert region == Region(rows=(0, 1, 2), columns=(3, 4))
    assert region.size((7, 5)) == len({(i, j) for i in range(7) for j in range(5) if i < 3 or j >= 3})
