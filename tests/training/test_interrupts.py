"""Ctrl-C that a library swallows."""

from __future__ import annotations

import signal
import threading
from typing import Any

import datasets
import pytest

from slicefine.training.interrupts import not_swallowed


def swallowing() -> str:
    try:
        signal.raise_signal(signal.SIGINT)
    except:  # noqa: E722 -- everything, as `datasets` does
        return "swallowed"
    return "no signal"


def test_what_was_swallowed_is_raised_at_the_end() -> None:
    said = []
    with pytest.raises(KeyboardInterrupt), not_swallowed():
        said.append(swallowing())
    assert said == ["swallowed"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_datasets_swallows_it() -> None:
    """Else all this is not needed."""

    class Tokenizer:
        def __reduce__(self) -> Any:
            signal.raise_signal(signal.SIGINT)
            return Tokenizer, ()

    made = Tokenizer()
    rows = datasets.Dataset.from_dict({"text": ["a"]})

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        return row | {"by": type(made).__name__}

    assert rows.map(tokenize)["by"] == ["Tokenizer"]
    with pytest.raises(KeyboardInterrupt), not_swallowed():
        rows.map(tokenize)


def test_what_is_raised_goes_through() -> None:
    with pytest.raises(ValueError, match="mine"), not_swallowed():
        raise ValueError("mine")
    with not_swallowed():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_that_does_not_raise_is_still_told() -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        with pytest.raises(KeyboardInterrupt), not_swallowed():
            signal.raise_signal(signal.SIGINT)
        assert came == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("ignored", [True, False])
def test_where_no_signal_comes_nothing_changes(ignored: bool) -> None:
    """In a worker, which ignores it, and beside the main thread, where Python handles none."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if ignored else signal.getsignal(signal.SIGINT)
    within: list[Any] = []

    def use() -> None:
        with not_swallowed():
            within.append(signal.getsignal(signal.SIGINT))

    try:
        if ignored:
            use()
        else:
            thread = threading.Thread(target=use)
            thread.start()
            thread.join()
        assert within == [signal.SIG_IGN if ignored else before]
    finally:
        signal.signal(signal.SIGINT, before)
