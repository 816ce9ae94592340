"""Rounds: who runs when, on which batch, and what is kept when something goes wrong."""

from __future__ import annotations

import gc
import mmap
import platform
import subprocess
import sys
import time
import weakref
from collections.abc import Callable

import psutil
import pytest
import torch

from slicefine.benchmarking import timing
from slicefine.benchmarking.timing import Build, Measured, Ratio, free_bytes, measure, refuse_too_large, seconds_of
from slicefine.errors import SliceFineError

Log = list[tuple[str, int]]


def logged(log: Log, name: str, seconds: float = 1.0) -> Build:
    """A thing that writes down on which batches it has run, and says it took `seconds`."""

    def run(number: int) -> float:
        log.append((name, number))
        return seconds

    return lambda: run


def rounds_of(builds: dict[str, Build], *, rounds: int = 4, warmup: int = 2, together: bool = True) -> Measured:
    return measure(builds, rounds=rounds, warmup=warmup, seed=0, together=together, title="test")


def test_every_round_runs_all_on_one_batch_in_an_order_of_its_own() -> None:
    log: Log = []
    measured = rounds_of({name: logged(log, name, seconds) for seconds, name in enumerate("abc", 1)}, rounds=6)
    assert measured.seconds == {"a": [1] * 6, "b": [2] * 6, "c": [3] * 6}  # without the rounds of the warm-up
    assert [number for _, number in log] == [number for number in range(8) for _ in "abc"]
    orders = ["".join(name for name, _ in log[start : start + 3]) for start in range(0, 24, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(set(orders)) > 2
    assert (measured.arrangement, measured.failed, measured.interrupted) == ("together", {}, False)


def test_what_does_other_work_in_every_round_is_averaged_over_whole_cycles() -> None:
    seconds = {"a": [1.0, 2.0, 6.0, 3.0, 4.0, 8.0, 9.0], "b": []}
    together = Measured(arrangement="together", rounds=7, seconds=seconds)
    assert together.cycles("a", 1) == seconds["a"]
    assert together.cycles("a", 3) == [3, 5]  # and not the seventh, a cycle's first round
    assert together.cycles("a", 8) == []  # there is no whole one
    assert (together.cycles("b", 2), together.cycles("c", 2)) == ([], [])
    in_turns = Measured(arrangement="in turns", rounds=7, seconds=seconds)  # four rounds, then three that begin anew
    assert in_turns.cycles("a", 3) == [3, 7]
    assert in_turns.cycles("a", 2) == [1.5, 4.5, 6]
    assert in_turns.cycles("a", 4) == [3]


def test_interrupted_in_turns_a_cycle_does_not_go_over_to_the_second_half() -> None:
    """Of ten rounds the second five were to begin anew; the third of them was not made."""
    seconds = {"a": [1.0, 2.0, 1.0, 2.0, 1.0, 5.0, 7.0], "b": [2.0] * 5}
    measured = Measured(arrangement="in turns", rounds=10, seconds=seconds, interrupted=True)
    assert measured.cycles("a", 2) == [1.5, 1.5, 6]
    assert measured.ratios("a", "b", 2) == [0.75, 0.75]
    assert measured.ratios("a", "b", 1) == [0.5, 1, 0.5, 1, 0.5]
    assert measured.reason("c") == "interrupted"


def test_in_turns_each_is_alone_once_in_each_order() -> None:
    log: Log = []
    alive: weakref.WeakSet[object] = weakref.WeakSet()

    class Alone:
        def __init__(self, name: str) -> None:
            alive.add(self)
            self.name = name

        def __call__(self, number: int) -> float:
            assert len(alive) == 1
            log.append((self.name, number))
            return 1.0

    builds: dict[str, Build] = {name: (lambda name=name: Alone(name)) for name in "ab"}
    measured = rounds_of(builds, rounds=5, warmup=1, together=False)
    assert "".join(name for name, _ in log) == "aaaabbbbbbbaaa"
    # One that is not timed, three that are; one that is not timed, and the two batches that are left.
    assert [number for name, number in log if name == "a"] == [0, 1, 2, 3, 0, 4, 5]
    assert measured.seconds == {"a": [1.0] * 5, "b": [1.0] * 5}
    assert measured.arrangement == "in turns"


@pytest.mark.parametrize(("together", "rounds"), [(True, 4), (False, 7)])
def test_what_does_other_work_in_more_rounds_than_there_are_is_not_begun(together: bool, rounds: int) -> None:
    """In turns a cycle has to fit into the first half of the rounds."""
    log: Log = []
    builds = {name: logged(log, name) for name in "ab"}

    def measured(rounds: int) -> Measured:
        return measure(builds, rounds=rounds, warmup=1, seed=0, together=together, title="test", turns={"a": 4, "b": 1})

    enough = measured(rounds)
    assert (len(enough.cycles("a", 4)), enough.failed) == (1, {})
    log.clear()
    short = measured(rounds - 1)
    assert {name for name, _ in log} == {"b"}
    assert short.reason("a") == f"4 turns, measured {short.arrangement}, take `--rounds {rounds}` or more"


def test_one_round_in_turns() -> None:
    assert rounds_of({"a": logged([], "a")}, rounds=1, together=False).seconds == {"a": [1.0]}


def too_much() -> float:
    torch.empty(2**50, dtype=torch.uint8)
    return 0.0


def wrong() -> float:
    raise RuntimeError("a first line\na second one")


def refused() -> float:
    raise SliceFineError("it does not fit this model")


@pytest.mark.parametrize(
    ("fail", "says", "failing_round", "together"),
    [
        (too_much, "out of memory", 3, True),
        (wrong, "RuntimeError: a first line", 3, True),
        *[(refused, "it does not fit this model", when, how) for when in (None, 0, 3) for how in (True, False)],
    ],
)
def test_what_fails_is_left_out_with_its_reason(
    fail: Callable[[], float], says: str, failing_round: int | None, together: bool
) -> None:
    log: Log = []

    def build() -> Callable[[int], float]:
        if failing_round is None:
            fail()
        return lambda number: fail() if number == failing_round else 1.0

    measured = rounds_of({"a": logged(log, "a"), "bad": build, "c": logged(log, "c")}, together=together)
    assert measured.failed == {"bad": says}
    assert measured.seconds == {"a": [1.0] * 4, "c": [1.0] * 4}


def test_a_gpu_without_memory_is_told_as_such() -> None:
    def build() -> Callable[[int], float]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    assert rounds_of({"a": build}).failed == {"a": "out of memory"}


def test_ctrl_c_keeps_whole_rounds() -> None:
    log: Log = []

    def build() -> Callable[[int], float]:
        def run(number: int) -> float:
            if number == 5:  # two of warm-up, three timed
                raise KeyboardInterrupt
            return 1.0

        return run

    measured = rounds_of({"a": logged(log, "a"), "b": build, "c": logged(log, "c")}, rounds=9)
    assert measured.interrupted
    assert measured.seconds == {name: [1.0] * 3 for name in "abc"}
    assert gc.isenabled()


def test_ctrl_c_in_turns_keeps_what_was_measured() -> None:
    def interrupted() -> Callable[[int], float]:
        raise KeyboardInterrupt

    measured = rounds_of({"a": logged([], "a"), "b": interrupted}, rounds=4, together=False)
    assert measured.interrupted
    assert measured.seconds == {"a": [1.0, 1.0]}


def test_the_collector_is_left_as_it_was_and_does_not_run_within_a_measurement() -> None:
    collected: list[str] = []
    running = False

    def watch(phase: str, info: dict[str, int]) -> None:
        if running:
            collected.append(phase)

    def build() -> Callable[[int], float]:
        def run(number: int) -> float:
            nonlocal running
            running = True
            for _ in range(2000):  # enough for the collector, if it is on
                cycle: list[object] = []
                cycle.append(cycle)
            running = False
            return 1.0

        return run

    gc.unfreeze()  # what tests/conftest.py has frozen, for the count below
    gc.callbacks.append(watch)
    try:
        rounds_of({"a": build})
    finally:
        gc.callbacks.remove(watch)
    assert collected == []
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_ratios_are_those_of_medians_and_of_single_rounds() -> None:
    ratio = Ratio.of([2.0, 4.0, 9.0], [1.0, 4.0, 3.0])
    assert (ratio.value, ratio.low, ratio.high) == (4 / 3, 1.0, 3.0)


def test_the_clock() -> None:
    assert 0.02 <= seconds_of(lambda: time.sleep(0.02), "cpu") < 1


def test_memory_that_this_process_has_is_free_to_it() -> None:
    """What was freed stays with it, to be used again."""
    own, machine = psutil.Process().memory_info().rss, psutil.virtual_memory()
    assert own < free_bytes("cpu") < machine.total + own
    held = mmap.mmap(-1, 2**28)  # 256 MiB that are new: a tensor may get what was freed before
    held.write(bytes(len(held)))
    assert abs(free_bytes("cpu") - psutil.virtual_memory().available - own) > 0.9 * len(held)


HEAP = """
import resource, sys
import torch
from slicefine.benchmarking.timing import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for size in (3, 5, 2, 7):  # MiB
    blocks = [torch.ones(size, 2**18) for _ in range(16)]
    blocks.clear()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's memory that is kept")
def test_a_heap_does_not_grow_while_the_clock_runs() -> None:
    """Every new page would cost the method that comes first a fault."""
    faults = {
        how: int(subprocess.run([sys.executable, "-c", HEAP, how], capture_output=True, text=True, check=True).stdout)
        for how in ("kept", "as it is")
    }
    assert faults["kept"] * 5 < faults["as it is"]  # huge pages make fewer of them


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "free_bytes", lambda device: 2**30)
    refuse_too_large(2**30, "cpu")
    with pytest.raises(SliceFineError, match=r"^out of memory: it takes 2\.0 GiB at least, and 1\.0 GiB are free$"):
        refuse_too_large(2**31, "cpu")
