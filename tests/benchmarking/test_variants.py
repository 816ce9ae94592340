"""Methods with the settings of an ablation."""

import pytest

from slicefine.benchmarking.methods import method
from slicefine.benchmarking.variants import Variant, problems, unmoved, unused, variants


def test_a_variant_is_named_by_what_is_not_as_usual():
    plain = method("SliceFine-5RC")
    assert Variant(method=plain).name == "SliceFine-5RC"
    assert (
        Variant(method=plain, slide_every=None, moments="carried").name
        == "SliceFine-5RC, slide_every null, moments carried"
    )


def test_every_combination_for_those_that_slide_and_the_others_once():
    methods = [method(name) for name in ("SliceFine-5R", "SliceFine-5C", "LoRA-r8", "RoCoFT-5R")]
    found = variants(methods, {"order": ["sweep", "random"], "bias": ["none", "slicefine_only"]})
    assert [one.name for one in found] == [
        *(
            f"SliceFine-5{letter}{order}{bias}"
            for letter in "RC"
            for order in ("", ", order random")
            for bias in ("", ", bias slicefine_only")
        ),
        "LoRA-r8",
        "RoCoFT-5R",
    ]


def test_ranks_and_axes_of_an_ablation_take_the_place_of_those_in_the_name():
    found = variants([method("SliceFine-5RC")], {"r": [1, 16], "axis": ["row", "coupled"]})
    assert [one.name for one in found] == ["SliceFine-1R", "SliceFine-1S", "SliceFine-16R", "SliceFine-16S"]
    assert variants([method("SliceFine-5R"), method("SliceFine-5C")], {"axis": ["row"]}) == [
        Variant(method=method("SliceFine-5R"))
    ]


@pytest.mark.parametrize("slide_every", ["eighth", 50])
@pytest.mark.parametrize("steps", [400, 80])
def test_a_shorter_run_makes_as_many_moves(slide_every, steps):
    every = Variant(method=method("SliceFine-5RC"), slide_every=slide_every).every(steps, 400)
    assert every is not None
    assert (steps - 1) // every == 7


def test_a_slice_that_does_not_move_does_so_in_no_run():
    assert Variant(method=method("SliceFine-5RC"), slide_every=None).every(100, 400) is None


def test_an_ablation_that_changes_no_method():
    others = [method("LoRA-r8"), method("RoCoFT-5R")]
    (said,) = unused({"r": [8], "axis": ["row"]}, others)
    assert "`--r`, `--axis` change SliceFine alone; `--methods` are LoRA-r8, RoCoFT-5R. Add SliceFine-5RC" in said
    assert unused({"r": [8]}, [*others, method("SliceFine-1R")]) == []
    assert unused({}, others) == []


def test_all_that_is_wrong_with_an_ablation():
    found = problems(
        {
            "order": ["swep"],
            "r": [0],
            "rewarm": [-1],
            "slide_every": ["never", 0],
            "moments": ["kept"],
            "axis": ["row"],
        },
    )
    assert len(found) == 6
    for part in (
        "`--order` is one of sweep, random; got 'swep'. Did you mean 'sweep'?",
        "`--moments` is one of reset, carried; got 'kept'.",
        "`--r` is at least 1; got 0.",
        "`--rewarm` is at least 0 steps; got -1.",
        "got 'never'",
        "or null for no move; got 0.",
    ):
        assert any(part in problem for problem in found), part


def test_an_interval_as_long_as_the_run():
    assert unmoved({"slide_every": [None, "eighth", 399]}, 400) == []
    (said,) = unmoved({"slide_every": [399, 400]}, 400)
    assert said.startswith("`--slide_every` 400 moves nothing in a run of 400 steps.")
