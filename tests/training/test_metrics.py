from __future__ import annotations

import numpy as np
import pytest
from transformers import EvalPrediction

from slicefine.training import labels, metrics
from slicefine.training.named import NAMED
from slicefine.training.recipe import DataSettings


def outputs(predicted: list[int], classes: int = 2) -> np.ndarray:
    return np.eye(classes)[predicted]


def test_accuracy_and_macro_f1() -> None:
    prediction = outputs([0, 1, 2, 2], 3)
    truth = np.array([0, 1, 2, 1])
    # F1 by class: 1, 2/3, 2/3
    for predictions in (prediction, (prediction, np.zeros(1))):
        found = labels.scores(EvalPrediction(predictions=predictions, label_ids=truth))
        assert found == pytest.approx({"accuracy": 0.75, "f1_macro": 7 / 9})


# Of the four: two true positives, one false, none missed.
TRUTH, PREDICTED = np.array([1, 1, 0, 0]), [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cola", {"matthews_correlation": 2 * 1 / (3 * 2 * 2 * 1) ** 0.5}),
        ("sst2", {"accuracy": 0.75}),
        ("mrpc", {"accuracy": 0.75, "f1": 4 / 5}),
        ("qqp", {"accuracy": 0.75, "f1": 4 / 5}),
        ("pets", {"accuracy": 0.75}),
    ],
)
def test_a_named_set_has_its_own_scores(name: str, expected: dict[str, float]) -> None:
    compute = metrics.scores_of(DataSettings(name=name), ["0", "1"])
    assert compute(EvalPrediction(predictions=outputs(PREDICTED), label_ids=TRUTH)) == pytest.approx(expected)


def test_f1_counts_the_class_that_means_the_same() -> None:
    # In a file of strings, classes are in alphabetical order: the positive one comes first.
    compute = metrics.scores_of(DataSettings(name="mrpc", train="a.jsonl"), ["equivalent", "not_equivalent"])
    found = compute(EvalPrediction(predictions=outputs([1 - n for n in PREDICTED]), label_ids=1 - TRUTH))
    assert found["f1"] == pytest.approx(4 / 5)
    three = compute(EvalPrediction(predictions=outputs([0, 1, 2, 0], 3), label_ids=np.array([0, 1, 2, 1])))
    assert three["f1"] == pytest.approx(2 / 3)


def test_numbers() -> None:
    truth, found = np.array([1.0, 2.0, 4.0]), np.array([[1.0], [3.0], [9.0]], dtype=np.float32)
    named = metrics.scores_of(DataSettings(name="stsb"), [])
    own = metrics.scores_of(DataSettings(train="a.jsonl", label_kind="number"), [])
    prediction = EvalPrediction(predictions=found, label_ids=truth)
    pearson = np.corrcoef(truth, found[:, 0])[0, 1]
    assert named(prediction) == pytest.approx({"pearson": pearson, "spearman": 1.0})
    assert own(prediction) == pytest.approx({"pearson": pearson, "spearman": 1.0, "mse": 26 / 3})


@pytest.mark.parametrize("name", sorted(metrics.METRICS))
def test_a_score_of_constant_predictions_is_a_number_and_no_warning(name: str) -> None:
    of_numbers = name in ("pearson", "spearman", "mse")
    for truth in ([0, 1, 1], [1, 1, 1], [0, 0, 0]):
        constant = np.full((3, 1), 0.5) if of_numbers else outputs([0, 0, 0])
        found = metrics.scores((name,))(EvalPrediction(predictions=constant, label_ids=np.array(truth)))[name]
        assert np.isfinite(found)
        if name in ("pearson", "spearman", "matthews_correlation", "f1"):
            assert found == 0.0


def test_one_example() -> None:
    for name in metrics.METRICS:
        single = np.array([[0.5]]) if name in ("pearson", "spearman", "mse") else outputs([1])
        assert np.isfinite(metrics.scores((name,))(EvalPrediction(predictions=single, label_ids=np.array([1])))[name])


def test_every_named_score_is_one_there_is() -> None:
    assert {score for named in NAMED.values() for score in named.metrics} <= metrics.METRICS.keys()
