"""The file of finished predictions, `predictions.jsonl`, and what they come to: scores, and their table."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from transformers import EvalPrediction

from slicefine.errors import SHOWN
from slicefine.evaluation.results import Outcome, aligned, proportion
from slicefine.evaluation.store import Store
from slicefine.training.metrics import METRICS, scores_of
from slicefine.training.recipe import DataSettings

FILE = "predictions.jsonl"
KEPT = 2000
"""Characters of a text that are kept."""
NAMES = {
    "accuracy": "accuracy, %",
    "f1": "F1, %",
    "f1_macro": "macro F1, %",
    "matthews_correlation": "Matthews x 100",
    "pearson": "Pearson x 100",
    "spearman": "Spearman x 100",
}
"""Metric -> its row in the table, all in hundredths; the squared error has a row of its own."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a model predicted for an example."""

    task: str
    row: int
    """From 1, in the order of the set."""
    place: str
    label: str | float
    """The name of a class, or a number."""
    predicted: str | float
    score: float | None
    """Probability of the predicted class, 0 to 1; None for numbers."""
    text: str | None = None
    """See `kept`; None for images and clips."""
    text_pair: str | None = None
    """The second of a pair."""


class Predictions(Store[Prediction]):
    """The predictions in a folder."""

    FILE = FILE
    ITEM = Prediction
    TYPES: ClassVar = {
        "task": str, "row": int, "place": str, "label": (str, float), "predicted": (str, float),
        "score": (float, type(None)), "text": (str, type(None)), "text_pair": (str, type(None)),
    }  # fmt: skip
    CALLED = "a prediction"
    AGAIN = "its example is predicted again"


@dataclass(kw_only=True)
class Scores(Outcome):
    """What an evaluation of predictions came to.

    Of each set: `metrics`, those of the data set; `examples` predicted of those `asked`; and for classes `right`, `accuracy` (0 to 1),
    its 95 % `interval` (Wilson), `classes` (`examples`, `right` and `accuracy` of each) and `confusion` (class -> what was predicted
    for it -> how often). The average is that of the sets' metrics, each the mean of its own.
    """

    DECIDES = ("suite", "task", "classes", "weights", "dtype")
    ASKED = "examples"

    task: str
    """A key of `TASKS`."""
    classes: list[str]
    """Of the model; none where it predicts a number."""
    sets: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By set: `title`, `source`, `fingerprint`, number of `examples`, and `notes` of what was decided."""

    def table(self) -> str:
        """A column a set, and the average last if there are several."""
        every = list(self.tasks.values())
        shown = [name for name in METRICS if any(name in scores["metrics"] for scores in every)]
        if self.classes and "accuracy" not in shown:
            shown.append("accuracy")
        rows: dict[str, list[str]] = {"": [self.sets[name]["title"] for name in self.tasks]}
        for name in shown:
            found = [scores["metrics"].get(name, scores.get(name)) for scores in every]
            whole = [value for value in found if value is not None]
            if len(every) > 1 and self.average is not None and len(whole) == len(every):
                found.append(sum(whole) / len(whole))
            rows[NAMES.get(name, name)] = ["" if value is None else _shown(name, value) for value in found]
        if len(every) > 1:
            rows[""].append("average")
        if self.classes:
            rows["95 % interval"] = ["{:.1f}-{:.1f}".format(*(100 * end for end in s["interval"])) for s in every]
        rows["examples"] = [
            str(s["examples"]) if s["examples"] == s["asked"] else f"{s['examples']} of {s['asked']}" for s in every
        ]
        return aligned(rows)

    def details(self) -> list[str]:
        """Of each set with few classes, right answers and examples of each class."""
        tables = []
        for name, scores in self.tasks.items():
            classes = scores.get("classes", {})
            if not 0 < len(classes) <= SHOWN:
                continue
            rows = {
                each: [f"{of['right']}/{of['examples']}", f"{100 * of['accuracy']:.1f}"] for each, of in classes.items()
            }
            title = f"{self.sets[name]['title']}, class" if len(self.tasks) > 1 else "class"
            tables.append(aligned({title: ["right", "%"], **rows}))
        return tables

    def notes(self) -> list[str]:
        session = self.sessions[-1]
        speed = f"{session['examples']} examples in {session['seconds']:.1f} s, {session['examples_per_second']:.0f} examples/s"
        return [*(note for each in self.sets.values() for note in each["notes"]), speed]


def kept(text: str) -> str:
    """A text as it is kept beside its prediction: a long one is cut, and ends with an ellipsis."""
    return text if len(text) <= KEPT else f"{text[:KEPT]}\u2026"


def _shown(name: str, value: float) -> str:
    return f"{100 * value:.1f}" if name in NAMES else f"{value:.4f}"


def scores(given: Sequence[Prediction], data: DataSettings, classes: list[str]) -> dict[str, Any]:
    """Metrics and counts of the predictions of one set (see `Scores`)."""
    if not classes:
        predicted = np.asarray([[item.predicted] for item in given], dtype=np.float64)
        labels = np.asarray([item.label for item in given], dtype=np.float64)
        return {"metrics": scores_of(data, [])(EvalPrediction(predicted, labels)), "examples": len(given)}
    numbers = {name: number for number, name in enumerate(classes)}
    outputs = np.eye(len(classes))[[numbers[str(item.predicted)] for item in given]]
    labels = np.asarray([numbers[str(item.label)] for item in given])
    confusion: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for item in given:
        confusion[str(item.label)][str(item.predicted)] += 1
    whole = proportion(sum(item.label == item.predicted for item in given), len(given))
    return {
        "metrics": scores_of(data, classes)(EvalPrediction(outputs, labels)),
        "examples": whole.pop("questions"),
        **whole,
        "classes": {
            name: {
                "examples": confusion[name].total(),
                "right": confusion[name][name],
                "accuracy": confusion[name][name] / confusion[name].total(),
            }
            for name in classes
            if name in confusion
        },
        "confusion": {name: dict(confusion[name].most_common()) for name in classes if name in confusion},
    }


def average(tasks: dict[str, dict[str, Any]]) -> float | None:
    """The mean over the sets of the mean of each one's metrics, errors left out; None without a set."""
    means = [statistics.fmean(value for name, value in of["metrics"].items() if name != "mse") for of in tasks.values()]
    return sum(means) / len(means) if means else None
