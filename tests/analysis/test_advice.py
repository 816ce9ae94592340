"""Advice from figures that are made up, its check, and the stage on tiny models of every kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from analysed import AMOUNTS, CLASSIFIERS, LANGUAGE, language, same_bits, silent, state_of, subject_of

from slicefine.analysis import advice
from slicefine.analysis.advice import Effort, advise, beside, judged
from slicefine.analysis.settings import AnalysisSettings

LEAST = Effort(amounts=AMOUNTS, iterations=2, points=2, rates=(1e-2,))
RANKS = (1, 5, 16)


def winners(shares: dict[int, float], rows: float = 0.02, columns: float = 0.02) -> dict[str, Any]:
    """Of a stage that found these shares of winners, and these median drops."""
    drops = {"row": rows, "column": columns}
    found = [
        {"model": model, "choice": choice, "axis": axis, "r": r, "median_drop": drop if model == "pretrained" else 9.0}
        for model in ("pretrained", "untrained")
        for choice in ("random", "mask")
        for r in shares
        for axis, drop in drops.items()
    ]
    shares_with_ends = {str(r): [share, share - 0.1, share + 0.05] for r, share in shares.items()}
    return {"summary": {"share_by_rank": shares_with_ends}, "rows": found}


def energy(directions: float | None) -> dict[str, Any]:
    return {"summary": {"k90_median": directions}}


@pytest.mark.parametrize(
    ("shares", "directions", "r", "moves", "says"),
    [
        ({1: 0.95, 5: 1.0, 16: 1.0}, 4, 1, 5, "the narrowest that were tried suffice"),
        ({1: 0.5, 5: 0.93, 16: 1.0}, 4, 5, 5, "at r = 1 it was 50%, less than 90%"),
        ({1: 0.1, 5: 0.2, 16: 0.6}, 4, 16, 5, "no sure winner"),
        ({1: 0.95, 5: 1.0, 16: 1.0}, 8, 1, 7, "7 moves visit 8 rows"),
        ({1: 0.95, 5: 1.0, 16: 1.0}, 30, 5, 5, "r = 1 visits 11 rows or columns"),
        ({1: 0.95, 5: 1.0, 16: 1.0}, 49.5, 5, 9, "for 50 directions"),
        ({1: 0.95, 5: 1.0, 16: 1.0}, 300, 16, 10, "10 moves visit 176 rows"),
        ({1: 0.95, 5: 1.0, 16: 1.0}, None, 1, 5, "Task energy was not measured"),
    ],
)
def test_rank_and_moves(shares: dict[int, float], directions: float | None, r: int, moves: int, says: str) -> None:
    found = advise(winners(shares), energy(directions), RANKS)
    assert (found.r, found.moves) == (r, moves)
    assert says in " ".join(found.reasons)


@pytest.mark.parametrize(
    ("rows", "columns", "axis", "says"),
    [
        (0.03, 0.02, "row", "rows are clearly better"),
        (0.02, 0.031, "column", "columns are clearly better"),
        (0.02, 0.025, "alternate", "neither is clearly better"),
        (0.0, 0.0, "alternate", "neither is clearly better"),
        (0.01, -0.01, "row", "rows are clearly better"),
        (-0.01, -0.02, "alternate", "neither is clearly better"),
    ],
)
def test_axis(rows: float, columns: float, axis: str, says: str) -> None:
    found = advise(winners({1: 1.0, 5: 1.0, 16: 1.0}, rows, columns), None, RANKS)
    assert found.axis == axis
    assert says in found.reasons[-1]


def test_advice_without_earlier_stages() -> None:
    found = advise(None, None, (16, 5))
    assert (found.r, found.axis, found.moves) == (5, "alternate", 5)
    assert "Local winners were not measured" in found.reasons[0]
    assert (advise(None, energy(100), RANKS).r, advise(None, energy(100), RANKS).moves) == (16, 6)


@pytest.mark.parametrize(
    ("after", "favoured", "says"),
    [
        ({1: 0.8, 5: 0.5, 16: 0.48}, 5, "A wider slice hardly does better, a narrower one clearly worse."),
        ({5: 0.5, 16: 0.48}, 5, "A wider slice hardly does better."),
        ({1: 0.8, 5: 0.5}, 5, "A narrower slice does clearly worse."),
        ({1: 0.8, 5: 0.5, 16: 0.3}, 16, "r = 5 is too narrow here, try r = 16"),
        ({1: 0.52, 5: 0.5, 16: 0.5}, 1, "r = 5 is wider than it has to be here, try r = 1"),
        ({1: 1.0, 5: 0.995, 16: 0.6}, 16, "r = 5 is too narrow here, try r = 16"),
        ({1: 1.0, 5: 0.999, 16: 0.998}, None, "At the advised rank it hardly fell"),
        ({1: 1.1, 5: 1.2, 16: 1.3}, None, "At the advised rank it hardly fell"),
    ],
)
def test_the_check_bears_the_advice_out_or_contradicts_it(
    after: dict[int, float], favoured: int | None, says: str
) -> None:
    found, words = judged(5, 1.0, after, 0.01)
    assert found == favoured
    assert words.startswith("From 1.000, the held-out loss came to ")
    assert words.endswith(says) if says.endswith(".") else says in words


def test_ranks_beside_the_advised_one() -> None:
    assert beside(5, RANKS, 384) == [1, 5, 16]
    assert beside(1, RANKS, 384) == [1, 5]
    assert beside(16, RANKS, 384) == [5, 16, 32]
    assert beside(16, (16,), 384) == [8, 16, 32]
    assert beside(16, RANKS, 24) == [5, 16]
    assert beside(1, (1,), 384) == [1, 2]


@pytest.mark.parametrize("task", [*CLASSIFIERS, LANGUAGE])
def test_every_kind_of_model(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice, "QUICK", LEAST)
    subject = subject_of(task, tmp_path)
    state = state_of(subject.model)
    earlier = {"winners": winners({1: 0.1, 2: 0.95, 4: 1.0}), "energy": energy(2)}
    settings = AnalysisSettings(quick=True, ranks=(1, 2, 4))
    found = json.loads(json.dumps(advice.run(subject, settings, silent, earlier), allow_nan=False))
    assert same_bits(subject.model, state)
    assert (found["r"], found["axis"], found["moves"]) == (2, "alternate", 5)
    assert [entry["r"] for entry in found["check"]] == [1, 2, 4]
    assert all(entry["curve"][-1][1] == entry["loss_after"] for entry in found["check"])
    assert len({entry["curve"][0][1] for entry in found["check"]}) == 1
    assert isinstance(found["confirmed"], bool)
    assert found["words"].startswith(f"From {found['check'][0]['loss_before']:.3f}")


def test_nothing_came_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice, "QUICK", LEAST)
    found = advice.run(language(), AnalysisSettings(quick=True, ranks=(4, 2)), silent, {})
    assert (found["r"], found["axis"]) == (2, "alternate")
    assert [entry["r"] for entry in found["check"]] == [1, 2, 4]
