"""Local winners: where a slice provably wins and where it cannot, and the stage on tiny models of every kind."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from analysed import AMOUNTS, CLASSIFIERS, LANGUAGE, Made, language, same_bits, silent, state_of, subject_of
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from slicefine.analysis import winners
from slicefine.analysis.settings import AnalysisSettings
from slicefine.analysis.winners import Effort, draw_sites, quantile
from slicefine.evaluation.scoring import wilson

LEAST = Effort(amounts=AMOUNTS, iterations=2, rates=(0.03,), each=1, untrained=1, compared=1, kinds=1)


@pytest.fixture(autouse=True)
def little_effort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winners, "QUICK", LEAST)


def run(subject: Any, **given: Any) -> Any:
    """What the stage finds, as it is in a file."""
    wanted: dict[str, Any] = {"ranks": (1, 4), "quick": True, **given}
    return json.loads(json.dumps(winners.run(subject, AnalysisSettings(**wanted), silent), allow_nan=False))


class HalfDead(PreTrainedModel):
    """Squared error of a sum over two layers, one of which is multiplied by zero: it cannot win, whatever is done to it."""

    config_class = PretrainedConfig
    base_model_prefix = ""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.alive, self.dead = nn.Linear(6, 5, bias=False), nn.Linear(6, 5, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        x_TI = input_ids.float() / 50
        y_T = self.alive(x_TI).sum(1) + 0 * self.dead(x_TI).sum(1)
        return SequenceClassifierOutput(loss=((y_T - 3) ** 2).mean())


def half_dead() -> Any:
    torch.manual_seed(0)
    subject = Made(HalfDead(PretrainedConfig()))
    plain = subject.batches

    def without_mask(*given: Any, **named: Any) -> Any:
        return [batch | {"attention_mask": torch.ones_like(batch["input_ids"])} for batch in plain(*given, **named)]

    subject.batches = without_mask  # pyright: ignore[reportAttributeAccessIssue]
    return subject


def test_a_slice_that_cannot_win_and_one_that_does() -> None:
    subject = half_dead()
    assert set(subject.places) == {"alive", "dead"}
    found = run(subject, ranks=(1, 2, 5), quick=False, seed=1)
    assert found["margin"] >= 0.01
    for trial in found["trials"]:
        if trial["name"] == "dead":
            assert (trial["gradient"], trial["gradient_share"], trial["change"], trial["wins"]) == (0, None, 0, False)
        elif trial["choice"] == "gradient":
            assert trial["gradient"] > 0
            assert trial["wins"]
    assert {trial["name"] for trial in found["trials"]} == {"alive", "dead"}


def test_rows_and_summary_count_the_trials() -> None:
    found = run(half_dead(), quick=False)
    random = [trial for trial in found["trials"] if trial["choice"] == "random"]
    for row in found["rows"]:
        of = [t for t in found["trials"] if all(t[key] == row[key] for key in ("model", "choice", "axis", "r"))]
        assert (row["trials"], row["winners"]) == (len(of), sum(t["wins"] for t in of))
        assert row["interval"] == pytest.approx(list(wilson(row["winners"], row["trials"])))
        assert row["share"] == pytest.approx(row["winners"] / row["trials"])
    assert sum(row["trials"] for row in found["rows"]) == len(found["trials"])
    for model, name in (("pretrained", "share_by_rank"), ("untrained", "share_untrained")):
        for r, (share, low, high) in found["summary"][name].items():
            of = [t["wins"] for t in random if t["model"] == model and t["r"] == int(r)]
            assert share == pytest.approx(sum(of) / len(of))
            assert (low, high) == pytest.approx(wilson(sum(of), len(of)))
    assert set(found["summary"]["share_by_rank"]) == {"1", "4"}


@pytest.mark.parametrize("task", [*CLASSIFIERS, LANGUAGE])
def test_every_kind_of_model(task: str, tmp_path: Path) -> None:
    subject = subject_of(task, tmp_path)
    state = state_of(subject.model)
    found = run(subject)
    assert same_bits(subject.model, state)
    choices = {(trial["model"], trial["choice"]) for trial in found["trials"]}
    assert choices == {("pretrained", name) for name in ("random", "mask", "magnitude", "gradient")} | {
        ("untrained", "random")
    }
    assert len(found["trials"]) == 2 * 2 * 5  # ranks, axes; four choices, and the twin
    assert found["noise"]["trials"] == 2 * 4  # those of the twin too
    sites: dict[int, set[int]] = {}
    for trial in found["trials"]:
        place = subject.places[trial["name"]]
        width = min(trial["r"], place.shape[0 if trial["axis"] == "row" else 1])
        assert trial["parameters"] == width * place.shape[1 if trial["axis"] == "row" else 0]
        assert (trial["start"] is None) is (trial["choice"] == "mask")
        assert 0 <= trial["gradient_share"] <= 1 + 1e-6
        sites.setdefault(trial["site"], set()).add(trial["parameters"])
    assert all(len(sizes) == 1 for sizes in sites.values())
    assert (found["heads"]["pretrained"]["before"] is None) is (task == LANGUAGE)
    assert ("head" in found["baseline"]) is (task != LANGUAGE)


def test_the_same_seed_finds_the_same() -> None:
    first = run(language(), seed=3)
    assert run(language(), seed=3) == first
    assert run(language(), seed=4)["trials"] != first["trials"]


def test_the_chosen_slices_are_the_greatest() -> None:
    subject = language()
    found = run(subject, quick=True, seed=2)
    for trial in found["trials"]:
        if trial["choice"] != "magnitude":
            continue
        matrix = subject.places[trial["name"]].matrix.double().square()
        energy = matrix.sum(1) if trial["axis"] == "row" else matrix.sum(0)
        width = min(trial["r"], len(energy))
        sums = [float(energy[at : at + width].sum()) for at in range(len(energy) - width + 1)]
        assert sums[trial["start"]] == pytest.approx(max(sums))
    norms = {(t["site"], t["choice"]): t["gradient"] for t in found["trials"] if t["model"] == "pretrained"}
    for site, choice in norms:
        if choice == "gradient":
            assert norms[site, "gradient"] >= norms[site, "random"] - 1e-9


def test_a_twin_has_no_twin_beside_it() -> None:
    found = run(language(), untrained=True)
    assert {trial["model"] for trial in found["trials"]} == {"untrained"}
    assert found["summary"]["share_untrained"] == {}
    assert set(found["summary"]["share_by_rank"]) == {"1", "4"}


def test_an_interruption_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = language()
    state = state_of(subject.model)
    told: list[tuple[int, int]] = []

    def say(done: int, total: int, what: str) -> None:
        told.append((done, total))
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        winners.run(subject, AnalysisSettings(quick=True), say)
    assert same_bits(subject.model, state)
    assert [done for done, _ in told] == [1, 2, 3]
    assert len({total for _, total in told}) == 1


def test_sites_are_spread_over_kinds_axes_ranks_and_layers() -> None:
    places = language().places
    sites = draw_sites(places, (1, 4, 100), each=3, kinds=None, seed=0)
    kinds = {name.split(".", 3)[-1] for name in places}
    assert len(sites) == 3 * 2 * 3 * len(kinds)
    assert [site.index for site in sites] == list(range(len(sites)))
    for site in sites:
        site.piece.check(places[site.name].shape)
        assert site.piece.width == min(site.r, places[site.name].shape[site.piece.dim])
    layers: dict[Any, list[str]] = {}
    for site in sites:
        layers.setdefault((site.name.split(".", 3)[-1], site.piece.axis, site.r), []).append(site.name.split(".")[2])
    assert all(sorted(set(of)) == ["0", "1"] for of in layers.values())
    assert sites == draw_sites(places, (1, 4, 100), each=3, kinds=None, seed=0)
    assert sites != draw_sites(places, (1, 4, 100), each=3, kinds=None, seed=1)
    assert len(draw_sites(places, (1,), each=1, kinds=2, seed=0)) == 2 * 2


def test_the_margin_is_above_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [quantile(list(range(1, 41)), share) for share in (0.5, 0.95, 1.0)] == [20, 38, 40]
    assert quantile([0.3], 0.95) == 0.3
    monkeypatch.setattr(winners, "MARGIN", -math.inf)
    found = run(language())
    random = found["noise"]
    # Of four trials the 95th percentile is the greatest; the greater one of the two models counts.
    assert found["margin"] == pytest.approx(random["greatest_drop"])
    assert random["winners"] == 0


def test_a_solved_task_is_said_to_be_one() -> None:
    assert winners.note_of({"before": None, "after": None}) == ""
    assert winners.note_of({"before": 1.8, "after": 1.2}) == ""
    assert "from 1.8 to 0.01: the task is as good as solved" in winners.note_of({"before": 1.8, "after": 0.01})
