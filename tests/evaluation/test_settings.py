from __future__ import annotations

from typing import Any

import pytest

from slicefine import SliceFineError
from slicefine.evaluation import settings as module
from slicefine.evaluation.settings import Settings
from slicefine.evaluation.suites import SUITES, get_suite, select


def test_tasks_in_the_order_of_the_papers_table() -> None:
    assert [task.title for task in SUITES["commonsense"].tasks] == [
        "BoolQ", "PIQA", "SIQA", "HellaSwag", "WinoGrande", "ARC-e", "ARC-c", "OBQA",
    ]  # fmt: skip
    assert [task.title for task in SUITES["math"].tasks] == ["MultiArith", "GSM8K", "AddSub", "SingleEq", "SVAMP"]
    chosen = select(SUITES["commonsense"], ["openbookqa", "ARC-Easy", "boolq", "boolq"])
    assert [task.name for task in chosen] == ["boolq", "arc-easy", "openbookqa"]
    assert select(SUITES["math"], []) == SUITES["math"].tasks


def test_the_longest_answer_is_the_published_one_unless_given() -> None:
    assert Settings(model="m", suite="commonsense").longest_answer == 32
    assert Settings(model="m", suite="math").longest_answer == 256
    assert Settings(model="m", suite="math", max_new_tokens=7).longest_answer == 7


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (
            {"suite": "comonsense"},
            "`--suite` is one of commonsense, math, glue, vtab-image, video; got 'comonsense'. Did you mean 'commonsense'?",
        ),
        ({"suite": "glu"}, "Did you mean 'glue'?"),
        ({"suite": "glue", "tasks": ("sst",)}, "`--tasks` of the suite 'glue' are cola, sst2, mrpc"),
        ({"suite": "glue", "tasks": ("pets",)}, "'pets' is in the suite 'vtab-image'."),
        ({"suite": "glue", "tasks": ("boolq",)}, "'boolq' is in the suite 'commonsense'."),
        ({"suite": "glue", "limit": 0}, "`--limit` is at least 1; got 0."),
        ({"suite": "glue", "max_new_tokens": 3}, "`--max_new_tokens` says how answers are generated; classes are not."),
        ({"suite": "video", "num_beams": 4}, "`--num_beams` says how answers are generated; classes are not."),
        (
            {"suite": None, "data": "d", "engine": "lm-eval"},
            "`--engine` says how answers are generated; classes are not.",
        ),
        ({"suite": None}, "`--suite` says what to score: commonsense, math, glue, vtab-image, video;"),
        ({"suite": None, "data": "d", "tasks": ("sst2",)}, "`--tasks` names tasks of a suite. Add --suite"),
        ({"tasks": ("bolq",)}, "got 'bolq'. Did you mean 'boolq'?"),
        ({"tasks": ("gsm8k",)}, "'gsm8k' is in the suite 'math'."),
        ({"limit": 0}, "`--limit` is at least 1; got 0."),
        ({"batch_size": -4}, "`--batch_size` is at least 1; got -4."),
        ({"max_new_tokens": 0}, "`--max_new_tokens` is at least 1; got 0."),
        ({"num_beams": 0}, "`--num_beams` is at least 1; got 0."),
        ({"engine": "lm_eval"}, "`--engine` is one of generate, lm-eval; got 'lm_eval'. Did you mean 'lm-eval'?"),
    ],
)
def test_what_is_refused(values: dict[str, Any], says: str) -> None:
    (problem,) = Settings(**{"model": "m", "suite": "commonsense"} | values).problems()
    assert says in problem


def test_all_problems_at_once() -> None:
    assert len(Settings(model="m", suite="maths", limit=0, batch_size=0).problems()) == 3
    assert len(Settings(model="m", suite="glue", limit=0, num_beams=2, max_new_tokens=1).problems()) == 3


def test_labelled_sets_in_the_order_of_the_paper() -> None:
    assert Settings(model="m", suite="glue", tasks=("RTE", "cola", "rte")).chosen_sets == ("cola", "rte")
    assert Settings(model="m", suite="glue").chosen_sets == ()


def test_what_the_harness_has_no_use_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: object())
    given = Settings(model="m", suite="commonsense", engine="lm-eval", data="d", num_beams=4, train_data=("a",))
    flags = [problem.split("`")[1] for problem in given.problems()]
    assert flags == ["--data", "--num_beams", "--train_data"]


def test_a_missing_harness_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    (problem,) = Settings(model="m", suite="commonsense", engine="lm-eval").problems()
    assert problem == "`--engine lm-eval` needs lm-evaluation-harness: pip install 'slicefine[eval]'"


def test_an_unknown_suite_is_an_error() -> None:
    with pytest.raises(SliceFineError, match="one of commonsense, math"):
        get_suite("glue")
