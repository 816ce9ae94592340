from __future__ import annotations

import numpy as np
import pytest


def outcome(loss: float = 0.0, predicted: list[int] | None = None, commit: str | None = None) -> object:
    import _cells

    labels = [0, 1] * 50
    return _cells.Outcome(0, 0, loss, predicted or labels, labels, 0.0, commit)


def test_the_lowest_finite_loss_chooses():
    from _cells import Cell, chosen

    losses = {1e-3: 0.5, 3e-3: 0.4, 1e-2: float("nan")}
    assert chosen({Cell("cola", "full", lr, 0, False): outcome(loss) for lr, loss in losses.items()}) == {
        ("cola", "full"): 3e-3
    }


def test_the_interval_is_that_of_the_binomial():
    """80 of 100 right: the standard error is 0.04."""
    from _cells import interval, resampled
    from sklearn.metrics import accuracy_score

    labels = [0, 1] * 50
    predicted = [1 - label if number < 20 else label for number, label in enumerate(labels)]
    low, high = interval(resampled([outcome(predicted=predicted)], accuracy_score, 400))
    assert np.isclose(low, 0.8 - 1.96 * 0.04, atol=0.02)
    assert np.isclose(high, 0.8 + 1.96 * 0.04, atol=0.02)


def test_a_run_is_made_once_and_again_where_a_setting_differs(tmp_path):
    from _cells import Cell, kept

    cell, made = Cell("cola", "full", 1e-3, 0, False), []

    def make(loss):
        made.append(loss)
        return outcome(loss)

    assert [kept(tmp_path, cell, [16], commit, lambda: make(0.5)) for commit in "ab"] == [outcome(0.5, commit="a")] * 2
    assert kept(tmp_path, cell, [17], "b", lambda: make(0.6)).loss == 0.6
    assert made == [0.5, 0.6]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_run_that_fails_leaves_nothing(tmp_path):
    from _cells import Cell, kept

    with pytest.raises(ZeroDivisionError):
        kept(tmp_path, Cell("cola", "full", 1e-3, 0, False), [], None, lambda: outcome(1 / 0))
    assert not list(tmp_path.iterdir())


def test_commits_are_named_once_each_and_marked_where_files_differed():
    from _cells import Cell, commit_of, commits

    assert [commit_of({"commit": "a", "dirty": dirty}) for dirty in (False, True)] == ["a", "a and changes"]
    runs = [
        {Cell("cola", "full", lr, 0, False): outcome(commit=commit) for lr, commit in enumerate(made)}
        for made in ("ba", "b")
    ]
    assert commits(*runs) == {"runs_made_at": "a, b"}
