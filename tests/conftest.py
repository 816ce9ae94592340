"""What holds for every test."""

import gc
import signal
from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState, GradientState
from hypothesis import settings

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # a shell's background job, in which tests of Ctrl-C would wait for ever
    signal.signal(signal.SIGINT, signal.default_int_handler)


# The same examples on every machine, every time.
settings.register_profile("slicefine", derandomize=True)
settings.load_profile("slicefine")


@pytest.fixture(autouse=True, scope="module")
def quick_collector() -> Iterator[None]:
    """Spare the garbage collector what imports have made: Trainer calls it whenever it starts, for longer than a small run takes."""
    gc.freeze()
    yield
    gc.collect()


@pytest.fixture(autouse=True)
def no_settings_of_other_tests() -> Iterator[None]:
    """accelerate keeps the precision of the first run of a process, bf16 say, for all that follow."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
