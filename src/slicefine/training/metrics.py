"""Scores of predictions, by the names that GLUE gives them. All are 0 to 1, the correlations -1 to 1, `mse` 0 or above.

A score that is not defined, since all predictions (or all labels) are the same, is 0: nothing was found out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats
from sklearn import metrics
from transformers import EvalPrediction

from slicefine.training.named import NAMED

if TYPE_CHECKING:
    from slicefine.training.recipe import DataSettings

Values = np.ndarray[Any, Any]
Scores = Callable[[EvalPrediction], dict[str, float]]


def scores_of(data: DataSettings, classes: list[str]) -> Scores:
    """What computes the scores of the data set `data.name`, or, without a name, accuracy and macro F1 (Pearson, Spearman and mean
    squared error for numbers)."""
    if data.name:
        named = NAMED[data.name]
        positive = classes.index(named.positive) if named.positive in classes else 1
        return scores(named.metrics, positive=positive)
    return scores(("pearson", "spearman", "mse") if data.label_kind == "number" else ("accuracy", "f1_macro"))


def scores(names: tuple[str, ...], *, positive: int = 1) -> Scores:
    """What computes the scores `names` (keys of `METRICS`); `positive` is the number of the class that `f1` counts.

    It takes predictions `(examples, outputs)`, or a tuple that begins with them, and labels `(examples,)`. The prediction for
    an example is the number of its highest output, or for the scores of numbers its one output.
    """

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        found = prediction.predictions
        outputs: Values = np.asarray(found[0] if isinstance(found, tuple) else found)
        labels: Values = np.asarray(prediction.label_ids)
        predicted = outputs[:, 0].astype(np.float64) if outputs.shape[-1] == 1 else np.argmax(outputs, axis=-1)
        return {name: float(METRICS[name](labels, predicted, positive)) for name in names}

    return compute


def _f1(labels: Values, predicted: Values, positive: int) -> float:
    # Of the one class: "binary" is refused where there are three.
    settings: Any = {"labels": [positive], "average": "macro", "zero_division": 0.0}  # annotated as a string there
    return metrics.f1_score(labels, predicted, **settings)


def _matthews(labels: Values, predicted: Values, positive: int) -> float:
    if _constant(labels) or _constant(predicted):
        return 0.0
    return metrics.matthews_corrcoef(labels, predicted)


def _pearson(labels: Values, predicted: Values, positive: int) -> float:
    return _correlation(stats.pearsonr, labels, predicted)


def _spearman(labels: Values, predicted: Values, positive: int) -> float:
    return _correlation(stats.spearmanr, labels, predicted)


def _correlation(of: Callable[..., Any], labels: Values, predicted: Values) -> float:
    return 0.0 if _constant(labels) or _constant(predicted) else of(labels, predicted).statistic


def _constant(values: Values) -> bool:
    return bool(np.all(values == values[0]))


METRICS: dict[str, Callable[[Values, Values, int], float]] = {
    "accuracy": lambda labels, predicted, positive: metrics.accuracy_score(labels, predicted),
    "f1": _f1,
    "f1_macro": lambda labels, predicted, positive: metrics.f1_score(labels, predicted, average="macro"),
    "matthews_correlation": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
    "mse": lambda labels, predicted, positive: metrics.mean_squared_error(labels, predicted),
}
