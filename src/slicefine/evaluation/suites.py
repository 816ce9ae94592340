"""The suites and their tasks, in the order of the paper's tables.

Those of labelled examples are in `slicefine.training.named`. Of the others, a task asks for one of a few words (commonsense) or for a number (math); how the answer is found in a text is in `scoring`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slicefine.errors import SliceFineError, did_you_mean
from slicefine.training.named import SUITES as LABELLED


@dataclass(frozen=True, kw_only=True)
class Task:
    """One test set."""

    name: str
    """Name on the command line, and of its folder."""
    title: str
    """Column of the table."""
    questions: int
    """Questions of the published test set."""
    answers: tuple[str, ...] = ()
    """The words that are answers; none where the answer is a number."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Test sets that are reported together."""

    name: str
    tasks: tuple[Task, ...]
    max_new_tokens: int
    """Longest answer that the published protocol generates, in tokens."""


_ANSWERS = tuple(f"answer{number}" for number in range(1, 6))

SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            name="commonsense",
            max_new_tokens=32,
            tasks=(
                Task(name="boolq", title="BoolQ", questions=3270, answers=("true", "false")),
                Task(name="piqa", title="PIQA", questions=1838, answers=("solution1", "solution2")),
                Task(name="social_i_qa", title="SIQA", questions=1954, answers=_ANSWERS),
                Task(
                    name="hellaswag",
                    title="HellaSwag",
                    questions=10042,
                    answers=("ending1", "ending2", "ending3", "ending4"),
                ),
                Task(name="winogrande", title="WinoGrande", questions=1267, answers=("option1", "option2")),
                Task(name="arc-easy", title="ARC-e", questions=2376, answers=_ANSWERS),
                Task(name="arc-challenge", title="ARC-c", questions=1172, answers=_ANSWERS),
                Task(name="openbookqa", title="OBQA", questions=500, answers=_ANSWERS),
            ),
        ),
        Suite(
            name="math",
            max_new_tokens=256,
            tasks=(
                Task(name="multiarith", title="MultiArith", questions=600),
                Task(name="gsm8k", title="GSM8K", questions=1319),
                Task(name="addsub", title="AddSub", questions=395),
                Task(name="singleeq", title="SingleEq", questions=508),
                Task(name="svamp", title="SVAMP", questions=1000),
            ),
        ),
    )
}


NAMES = (*SUITES, *LABELLED)


def get_suite(name: str) -> Suite:
    """The suite of generated answers called `name`. Raises `SliceFineError` if there is none."""
    if name not in SUITES:
        raise SliceFineError(f"`--suite` is one of {', '.join(NAMES)}; got {name!r}.{did_you_mean(name, NAMES)}")
    return SUITES[name]


def select(suite: Suite, names: Sequence[str]) -> tuple[Task, ...]:
    """The tasks of a suite called `names`. As `chosen`."""
    wanted = chosen(suite.name, [task.name for task in suite.tasks], names)
    return tuple(task for task in suite.tasks if task.name in wanted)


def chosen(suite: str, known: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """Those of the `known` tasks that are called `names`, all if there are none, in the order of the table.

    Upper and lower case are the same. Raises `SliceFineError` with every unknown name.
    """
    unknown = [name for name in names if name.lower() not in known]
    if unknown:
        elsewhere = {task.name: other.name for other in SUITES.values() for task in other.tasks}
        elsewhere |= {task: other for other, tasks in LABELLED.items() for task in tasks}
        hints = "".join(
            f" {name!r} is in the suite {elsewhere[name.lower()]!r}."
            if name.lower() in elsewhere
            else did_you_mean(name.lower(), known)
            for name in unknown
        )
        raise SliceFineError(
            f"`--tasks` of the suite {suite!r} are {', '.join(known)}; got {', '.join(map(repr, unknown))}.{hints}"
        )
    wanted = {name.lower() for name in names} or set(known)
    return tuple(name for name in known if name in wanted)
