from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from parrot import boolq_rows, write_rows

from slicefine import SliceFineError
from slicefine.evaluation import harness
from slicefine.evaluation.models import find, load_config, load_model, load_tokenizer
from slicefine.evaluation.run import evaluate
from slicefine.evaluation.settings import Settings
from slicefine.evaluation.suites import SUITES

needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs the extra `eval`")
# What the harness and the packages under it warn of is theirs.
pytestmark = pytest.mark.filterwarnings("ignore")


def task(path: Path) -> dict[str, Any]:
    """Boolq in files, as the harness defines a task."""
    return {
        "task": "boolq_here",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{instruction}}",
        "doc_to_choice": ["true", "false"],
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }


def test_the_harness_has_all_of_commonsense_and_little_of_math() -> None:
    names = harness.harness_names(SUITES["commonsense"].tasks)
    assert names["social_i_qa"] == "social_iqa"
    assert list(names) == [task.name for task in SUITES["commonsense"].tasks]
    with pytest.raises(SliceFineError, match=r"no task for multiarith, addsub, singleeq, svamp\. .* --tasks gsm8k\."):
        harness.harness_names(SUITES["math"].tasks)
    with pytest.raises(SliceFineError, match=r"no task for svamp\. Evaluate them with --engine generate\."):
        harness.harness_names(SUITES["math"].tasks[4:])


@needs_harness
def test_the_harness_knows_its_tasks() -> None:
    from lm_eval.tasks import TaskManager

    assert set(harness.TASKS.values()) <= set(TaskManager().all_tasks)


@needs_harness
def test_it_scores_by_log_likelihood(
    make_model: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = boolq_rows()[:2]
    path = write_rows(tmp_path / "test.jsonl", boolq_rows())
    monkeypatch.setitem(harness.TASKS, "boolq", task(path))  # that of the harness is on the hub
    name, out = make_model(chain=None), tmp_path / "out"
    settings = Settings(
        model=name, suite="commonsense", tasks=("boolq",), engine="lm-eval", output=str(out), limit=len(rows)
    )
    result = evaluate(settings)

    source = find(name)
    model, tokenizer = load_model(source, load_config(source)), load_tokenizer(source)

    def likelihood(text: str, word: str) -> float:
        ids = torch.tensor([tokenizer(f"{text} {word}")["input_ids"]])
        with torch.no_grad():
            return float(model(ids).logits[0, -2].log_softmax(-1)[ids[0, -1]])

    right = sum(
        (likelihood(row["instruction"], "true") > likelihood(row["instruction"], "false")) == (row["answer"] == "true")
        for row in rows
    )
    scores = result.tasks["boolq"]
    assert (scores["questions"], scores["right"], scores["accuracy"]) == (2, right, right / 2)
    assert 0 <= scores["acc_norm"] <= 1

    saved = json.loads((out / "results.json").read_text())
    assert saved["tasks"] == result.tasks
    assert (saved["engine"], saved["status"], saved["num_beams"], saved["limit"]) == ("lm-eval", "finished", None, 2)
    assert saved["sessions"][0]["versions"]["lm_eval"]
    assert [line.split("  ")[0] for line in result.table().splitlines()][1:] == [
        "accuracy, %", "95 % interval", "questions", "acc_norm, %",
    ]  # fmt: skip
    with pytest.raises(SliceFineError, match="has results already"):
        evaluate(settings)


@needs_harness
def test_test_sets_that_the_harness_does_not_get(make_model: Callable[..., str], tmp_path: Path) -> None:
    source = find(make_model(chain=None))
    model, tokenizer = load_model(source, load_config(source)), load_tokenizer(source)
    with pytest.raises(SliceFineError, match=r"lm-evaluation-harness did not load its test sets: .*gone\.jsonl"):
        harness.ask(model, tokenizer, {"boolq": task(tmp_path / "gone.jsonl")}, batch_size=2)
