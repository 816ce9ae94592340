"""Verdicts on figures that are made up: on both sides of every limit, and where there is none."""

from __future__ import annotations

import math
from typing import Any

import pytest

from slicefine.analysis.verdict import FAILS, HOLDS, NOT_MEASURED, PARTLY, PROPERTIES, verdicts


def balance(**rho: float) -> dict[str, Any]:
    summary: dict[str, Any] = {"row": None, "column": None, "head": None}
    for axis, value in rho.items():
        summary[axis] = {"rho_median": value, "rho_greatest": 2 * value, "rho_shuffled_median": value / 10}
    weights = [{"name": f"weight {number}", "axis": axis} for axis in rho for number in range(3)]
    return {"weights": weights, "summary": summary}


def energy(share: float, untrained: float = 0.6, alignment: float | None = 0.7) -> dict[str, Any]:
    summary = {"k90_median": 10, "dimension": 100, "share": share, "untrained_share": untrained}
    return {
        "summary": summary | {"ntk_alignment_per_weight": alignment},
        "ntk": {"r": 5, "axis": "row", "examples": 64},
    }


def winners(low: float, twin: float, *, magnitude: float = 0.5) -> dict[str, Any]:
    """`magnitude`: share of winners among slices chosen by it; of random ones in the same weights it is a half."""
    wins = {"random": 0.5, "mask": 0.7, "magnitude": magnitude, "gradient": 0.4}
    trials = [
        {"model": "pretrained", "choice": choice, "site": site, "wins": site < 10 * share}
        for choice, share in wins.items()
        for site in range(10)
    ]
    elsewhere = [{"model": "pretrained", "choice": "random", "site": 10, "wins": False}]
    twins = [{"model": "untrained", "choice": "random", "site": site, "wins": False} for site in range(10)]
    shares = {"1": [0.5, 0.4, 0.6], "16": [low + 0.02, low, low + 0.04]}
    return {
        "margin": 0.001,
        "trials": [*trials, *elsewhere, *twins],
        "summary": {
            "share_by_rank": shares,
            "share_untrained": {"1": [0.1, 0, 0.2], "16": [twin, twin - 0.1, twin + 0.1]},
            "choice_matters": dict.fromkeys(wins, 0.01),
        },
    }


def whole(best: float, one: float) -> dict[str, Any]:
    run = {"r": 5, "axis": "row", "layers": 6, "active": 100, "share_of_full_drop": best}
    return {
        "runs": [run],
        "full": {"loss_after": 0.3},
        "steps": 10,
        "summary": {"best_share": best, "best": run, "r1_all_layers_share": one},
    }


def of(title: str, stages: dict[str, Any], failed: dict[str, str] | None = None) -> dict[str, Any]:
    found = {verdict["property"]: verdict for verdict in verdicts(stages, failed or {})}
    assert len(found) == len(PROPERTIES)
    return found[title]


@pytest.mark.parametrize(
    ("title", "stage", "found", "verdict", "figure"),
    [
        ("spectral balance", "balance", balance(row=0.001, column=0.01), HOLDS, 0.01),
        ("spectral balance", "balance", balance(row=0.02, column=0.01), PARTLY, 0.02),
        ("spectral balance", "balance", balance(row=0.11), FAILS, 0.11),
        ("spectral balance of attention heads", "balance", balance(row=0.001, head=0.2), FAILS, 0.2),
        ("spectral balance of attention heads", "balance", balance(row=0.001), NOT_MEASURED, None),
        ("high task energy", "energy", energy(0.1), HOLDS, 0.1),
        ("high task energy", "energy", energy(0.31), FAILS, 0.31),
        ("task energy is due to pretraining", "energy", energy(0.1), HOLDS, pytest.approx(0.5)),
        ("task energy is due to pretraining", "energy", energy(0.4, 0.35), FAILS, pytest.approx(-0.05)),
        ("slices overlap the task subspace", "energy", energy(0.1), PARTLY, 0.7),
        ("slices overlap the task subspace", "energy", energy(0.1, alignment=None), NOT_MEASURED, None),
        ("any wide slice is a local winner", "winners", winners(0.8, 0.1), HOLDS, 0.8),
        ("any wide slice is a local winner", "winners", winners(0.5, 0.1), PARTLY, 0.5),
        ("any wide slice is a local winner", "winners", winners(0.4, 0.1), FAILS, 0.4),
        (
            "winners are due to pretraining",
            "winners",
            winners(0.9, 0.1),
            HOLDS,
            pytest.approx(0.82 - math.hypot(0.02, 0.1)),
        ),
        (
            "winners are due to pretraining",
            "winners",
            winners(0.9, 0.8),
            PARTLY,
            pytest.approx(0.12 - math.hypot(0.02, 0.1)),
        ),
        (
            "winners are due to pretraining",
            "winners",
            winners(0.9, 0.85),
            FAILS,
            pytest.approx(0.07 - math.hypot(0.02, 0.1)),
        ),
        ("which slice you pick barely matters", "winners", winners(0.9, 0.1), HOLDS, pytest.approx(0.0)),
        (
            "which slice you pick barely matters",
            "winners",
            winners(0.9, 0.1, magnitude=0.7),
            PARTLY,
            pytest.approx(0.2),
        ),
        ("which slice you pick barely matters", "winners", winners(0.9, 0.1, magnitude=0.9), FAILS, pytest.approx(0.4)),
        ("slices across layers are a global winner", "global", whole(0.8, 0.1), PARTLY, 0.8),
        ("r = 1 suffices", "global", whole(0.8, 0.79), HOLDS, pytest.approx(0.79 / 0.8)),
        ("r = 1 suffices", "global", whole(0.8, 0.2), FAILS, pytest.approx(0.25)),
    ],
)
def test_limits(title: str, stage: str, found: dict[str, Any], verdict: str, figure: Any) -> None:
    judged = of(title, {stage: found})
    assert (judged["verdict"], judged["figure"]) == (verdict, figure)
    assert "holds if" in judged["threshold"]
    assert judged["words"].endswith(".")


def test_weights_are_counted_and_not_their_cuts() -> None:
    found = {"balance": balance(row=0.01, column=0.02, head=0.03)}
    assert of("spectral balance", found)["words"].startswith("Over 3 weights, groups of rows: rho 0.01 ")
    assert of("spectral balance of attention heads", found)["words"].startswith(
        "Over 3 weights, groups of heads: rho 0.03 "
    )


def test_what_was_not_run_or_failed() -> None:
    assert of("high task energy", {})["words"] == "The stage energy was not run."
    judged = of("high task energy", {}, {"energy": "There are two examples."})
    assert (judged["verdict"], judged["words"]) == (NOT_MEASURED, "There are two examples.")


def test_choices_that_were_not_compared() -> None:
    found = winners(0.9, 0.1)
    found["trials"] = [trial for trial in found["trials"] if trial["choice"] == "random"]
    assert of("which slice you pick barely matters", {"winners": found})["verdict"] == NOT_MEASURED
    assert of("r = 1 suffices", {"global": whole(-0.1, -0.2)})["verdict"] == NOT_MEASURED


def test_nothing_wins_however_it_is_chosen() -> None:
    found = winners(0.5, 0.4)
    for trial in found["trials"]:
        trial["wins"] = False
    judged = of("which slice you pick barely matters", {"winners": found})
    assert (judged["verdict"], judged["words"]) == (NOT_MEASURED, "No slice won, however it was chosen.")


def test_full_tuning_that_lowers_nothing_is_said() -> None:
    judged = of("slices across layers are a global winner", {"global": {**whole(0.5, 0.4), "summary": {"best_share": None, "r1_all_layers_share": None}}})  # fmt: skip
    assert judged["verdict"] == NOT_MEASURED
    assert "Full tuning hardly lowers the held-out loss" in judged["words"]


def test_why_there_is_no_figure() -> None:
    found = energy(0.05)
    found["summary"]["truncated"] = True
    judged = of("high task energy", {"energy": found})
    assert (judged["verdict"], judged["figure"]) == (NOT_MEASURED, None)
    assert "fewer tokens than dimensions" in judged["words"]
    found = energy(0.05, alignment=None)
    found["ntk"]["why_no_full"] = "It has too many weights."
    assert of("slices overlap the task subspace", {"energy": found})["words"] == "It has too many weights."
