"""Fitted heads, short runs from one start, and slices across layers against full tuning; on tiny models of every kind."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from analysed import AMOUNTS, CLASSIFIERS, LANGUAGE, classifier, language, same_bits, silent, state_of, subject_of

from slicefine.analysis import global_winner
from slicefine.analysis.global_winner import Effort, plans_for, share, spread, summary
from slicefine.analysis.losses import mean_value
from slicefine.analysis.material import Amounts, Material
from slicefine.analysis.settings import AnalysisSettings
from slicefine.analysis.short_runs import ShortRuns, everything, head_alone, slices
from slicefine.analysis.tuned_head import head_of, tune_head
from slicefine.errors import SliceFineError

LEAST = Effort(
    amounts=AMOUNTS, iterations=2, points=2, full=(1e-3,), head=(1e-2,), slices=(1e-2,), moving=(1e-2,), parts=True
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return classifier("text-classification", tmp_path_factory.mktemp("texts"))


def material(subject: Any, **given: int) -> Material:
    amounts: dict[str, int] = {"size": 4, "fitted": 2, "watched": 1, "steps": 4, "choosing": 1, "held_out": 2} | given
    return Material.drawn(subject, Amounts(**amounts), seed=0)


# ---------------------------------------------------------------- heads


def test_a_head_is_fitted_and_nothing_else(texts: Any) -> None:
    data, model = material(texts, fitted=3, steps=1), texts.copy()
    found = tune_head(texts, model, data.fitted, data.watched, iterations=10)
    assert found["after"] < found["before"] / 2
    assert found["after"] == pytest.approx(mean_value(lambda batch: texts.loss(model, batch), data.watched), rel=1e-5)
    assert found["before"] == pytest.approx(
        mean_value(lambda batch: texts.loss(texts.model, batch), data.watched), rel=1e-5
    )
    state, before = state_of(model), state_of(texts.model)
    changed = {name for name in state if not torch.equal(state[name], before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    assert same_bits(model, state)


def test_a_head_that_other_examples_do_not_gain_from_stays_as_it_is(texts: Any) -> None:
    data, model = material(texts, fitted=3, steps=1), texts.copy()
    tune_head(texts, model, data.fitted, data.watched, iterations=10)
    fitted = state_of(model)
    # Right is wrong for the others: whatever lowers the loss of the first raises theirs.
    wrong = [batch | {"labels": 1 - batch["labels"]} for batch in data.fitted]
    found = tune_head(texts, model, data.fitted, wrong, iterations=10)
    assert (found["penalty"], found["after"]) == (None, found["before"])
    assert same_bits(model, fitted)


def test_a_language_model_has_no_new_head() -> None:
    subject = language()
    state = state_of(subject.model)
    found = tune_head(subject, subject.model, [], [], iterations=3)
    assert found == {"penalty": None, "before": None, "after": None}
    assert same_bits(subject.model, state)


# ---------------------------------------------------------------- short runs


def runs_of(subject: Any, **given: int) -> ShortRuns:
    data = material(subject, **given)
    return ShortRuns(subject, subject.copy(), data, points=2, tell=lambda: None)


def test_a_run_of_all_weights_is_plain_adamw(texts: Any) -> None:
    data, start = material(texts), texts.copy()
    course = ShortRuns(texts, start, data, points=2, tell=lambda: None).best(everything, [1e-3])
    model = texts.copy().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    curve = [mean_value(lambda batch: texts.loss(model, batch), data.held_out)]
    for step, batch in enumerate(data.train):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / 4)
        texts.loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 2:
            curve.append(mean_value(lambda batch: texts.loss(model, batch), data.held_out))
    assert [step for step, _ in course.curve] == [0, 2, 4]
    assert [loss for _, loss in course.curve] == pytest.approx(curve, rel=1e-4)
    assert course.active == 0
    assert same_bits(start, state_of(texts.model))


def test_slices_train_what_they_are_told(texts: Any) -> None:
    start = texts.copy()
    whole = slices(texts, r=2, axis="row")(start)
    sizes = {name: 2 * place.shape[1] for name, place in texts.places.items()}
    trained = {name for name, parameter in whole.named_parameters() if parameter.requires_grad}
    assert sum("slicefine" in name for name in trained) == len(sizes)
    assert any("classifier" in name for name in trained)
    course = runs_of(texts).best(slices(texts, r=2, axis="row"), [1e-2])
    assert course.active == sum(sizes.values())
    some = runs_of(texts).best(slices(texts, r=2, axis="row", blocks=[1]), [1e-2])
    assert some.active == sum(size for name, size in sizes.items() if ".1." in name)


def test_the_best_rate_is_taken_and_none_is_an_error(texts: Any) -> None:
    runs = runs_of(texts)
    alone = {rate: runs.best(head_alone(texts), [rate]) for rate in (1e-6, 1e-2)}
    assert runs.best(head_alone(texts), [1e-6, 1e-2]) == alone[1e-2]
    with pytest.raises(SliceFineError, match=r"none of \[1e\+30\] is one"):
        runs.best(everything, [1e30])
    assert math.isfinite(runs.best(everything, [1e30, 1e-3]).loss_after)


def test_a_head_alone_leaves_the_rest(texts: Any) -> None:
    model = head_alone(texts)(texts.copy())
    wanted = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert wanted == ["classifier.weight", "classifier.bias"]
    assert len(head_of(texts, model)) == 2


# ---------------------------------------------------------------- the stage


def run(subject: Any, **given: Any) -> Any:
    wanted: dict[str, Any] = {"ranks": (1, 4), "quick": True, **given}
    return json.loads(json.dumps(global_winner.run(subject, AnalysisSettings(**wanted), silent), allow_nan=False))


@pytest.mark.parametrize("task", [*CLASSIFIERS, LANGUAGE])
def test_every_kind_of_model(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(global_winner, "QUICK", LEAST)
    subject = subject_of(task, tmp_path)
    state = state_of(subject.model)
    found = run(subject)
    assert same_bits(subject.model, state)
    assert [(run["layer_indices"], run["r"], run["axis"]) for run in found["runs"]] == [
        ([1], 1, "row"), ([1], 4, "row"), ([0, 1], 1, "row"), ([0, 1], 4, "row"), ([0, 1], 1, "alternate"), ([0, 1], 4, "alternate"),
    ]  # fmt: skip
    active = [run["active"] for run in found["runs"]]
    assert active[0] < active[1]
    assert active[0] < active[2]
    assert [run["moves"] for run in found["runs"]] == [0, 0, 0, 0, 1, 1]
    assert (found["head_only"] is None) is (task == LANGUAGE)
    reference = found["full"]["loss_before"] if task == LANGUAGE else found["head_only"]["loss_after"]
    drop = reference - found["full"]["loss_after"]
    for one in found["runs"]:
        assert one["curve"][0][1] == found["full"]["loss_before"]
        assert one["curve"][-1] == [2, one["loss_after"]]
        if one["share_of_full_drop"] is not None:
            assert one["share_of_full_drop"] == pytest.approx((reference - one["loss_after"]) / drop)


def test_runs_of_slices_by_layers_and_ranks() -> None:
    plans = plans_for(6, (1, 5), parts=True)
    assert [(plan.blocks, plan.r, plan.axis) for plan in plans] == [
        ((5,), 1, "row"), ((5,), 5, "row"), ((1, 3, 5), 1, "row"), ((1, 3, 5), 5, "row"), (None, 1, "row"), (None, 5, "row"),
        (None, 1, "alternate"), (None, 5, "alternate"),
    ]  # fmt: skip
    assert [plan.blocks for plan in plans_for(6, (1,), parts=False)] == [None]
    assert [plan.blocks for plan in plans_for(0, (1,), parts=True)] == [None, None]
    assert [plan.blocks for plan in plans_for(1, (1,), parts=False)] == [None]
    assert (spread(6, 2), spread(7, 3), spread(5, 5)) == ([2, 5], [1, 3, 6], [0, 1, 2, 3, 4])


def test_shares_count_from_the_head_alone() -> None:
    assert share(0.7, 1.0, 0.4, 0.01) == pytest.approx(0.5)
    assert share(1.1, 1.0, 0.5, 0.01) == pytest.approx(-0.2)
    assert share(0.3, 1.0, 0.4, 0.01) == pytest.approx(7 / 6)
    assert share(0.9, 1.0, 0.995, 0.01) is None
    assert share(0.9, 1.0, 1.0, 0.0) is None


def test_the_summary_of_runs() -> None:
    """What judges does not choose: the best run is the one that the other examples like best."""

    def one(layers: int, r: int, value: float | None, choosing: float) -> dict[str, Any]:
        numbers = {"layers": layers, "r": r, "share_of_full_drop": value, "loss_choosing": choosing}
        return numbers | {"axis": "row", "active": 7, "loss_after": 0.5}

    runs = [
        one(1, 16, 0.97, 0.3),
        one(6, 1, 0.6, 0.4),
        one(6, 1, 0.7, 0.5),
        one(6, 5, 0.91, 0.2),
        one(6, 16, 0.95, 0.25),
    ]
    found = summary(runs, 6)
    assert found["best"] == {"r": 5, "axis": "row", "layers": 6, "active": 7, "loss_after": 0.5}
    shares = (found["best_share"], found["r1_all_layers_share"], found["smallest_r_within_10_percent"])
    assert shares == (0.91, 0.6, 5)
    nothing = dict.fromkeys(("best_share", "best", "r1_all_layers_share", "smallest_r_within_10_percent"))
    assert summary([one(6, 1, None, 0.1)], 6) == nothing
