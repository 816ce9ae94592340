"""What counts as an answer, and as a right one: the rules of LLM-Adapters' `commonsense_evaluate.py` and `evaluate.py`.

They are simple, and kept as they are, because published figures were made with them:

- commonsense: the first of the task's words that occurs anywhere, also inside of another word ("untrue" answers true),
  upper and lower case kept apart ("True" answers nothing);
- math: commas are dropped, and the last number is the answer, wherever it stands ("7 apples, not 8" answers 8, "10-3"
  answers -3, "1/2" answers 2, "50%" answers 50); it is right within 0.001.
"""

from __future__ import annotations

import math
import re
from statistics import NormalDist

from slicefine.evaluation.suites import Task
from slicefine.training.prompts import RESPONSE

TOLERANCE = 0.001
_NUMBER = re.compile(r"-?\d+\.?\d*")


def response(generated: str) -> str:
    """What is scored of the generated text: all up to the next prompt that a model writes itself, if it does."""
    return generated.partition(RESPONSE)[0].strip()


def extract(task: Task, text: str) -> str | None:
    """The answer in `text`, as it is written there (numbers without commas); None if there is none."""
    if task.answers:
        found = re.search("|".join(task.answers), text)
        return found[0] if found else None
    numbers = _NUMBER.findall(text.replace(",", ""))
    return numbers[-1] if numbers else None


def is_right(task: Task, answer: str | None, gold: str) -> bool:
    """Whether `answer`, from `extract`, is `gold`. No answer is wrong."""
    if answer is None:
        return False
    if task.answers:
        return answer == gold
    return abs(float(gold) - float(answer)) <= TOLERANCE


def gold_problem(task: Task, gold: object) -> str | None:
    """What is wrong with the answer that a test set gives; None if nothing is."""
    if task.answers:
        known = ", ".join(task.answers)
        return None if gold in task.answers else f"the answer is one of {known}; got {gold!r}"
    try:
        finite = math.isfinite(float(str(gold)))
    except ValueError:
        finite = False
    return None if finite else f"the answer is a number; got {gold!r}"


def wilson(right: int, total: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson, 1927), 95 %, ends from 0 to 1; the whole range if `total` is 0."""
    if not total:
        return 0.0, 1.0
    z2 = NormalDist().inv_cdf(0.975) ** 2
    centre = (right + z2 / 2) / (total + z2)
    half = math.sqrt(z2 * (right * (total - right) / total + z2 / 4)) / (total + z2)
    return max(0.0, centre - half), min(1.0, centre + half)
