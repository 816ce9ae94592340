"""Comparisons whose runs are made."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarked import quality_of
from classifiers import write_table
from parrot import make_tokenizer, random_llama

from slicefine.benchmarking import quality, quality_report
from slicefine.benchmarking.attaching import attach
from slicefine.benchmarking.cells import Outcome
from slicefine.benchmarking.fitting import prepare
from slicefine.benchmarking.methods import method
from slicefine.benchmarking.processes import KILLED, in_processes
from slicefine.benchmarking.quality_settings import TRAINED, QualitySettings
from slicefine.tuner import parameter_counts


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., QualitySettings]:
    return quality_of(tmp_path, evaluations=2)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Runs that are made; in this process, which spares the seconds in which another one imports everything."""
    runs: list[Any] = []

    def here(run: Any, jobs: Sequence[Any], **how: Any) -> Iterator[tuple[Any, Outcome]]:
        for job in jobs:
            runs.append(job)
            yield job, run(job)

    monkeypatch.setattr(quality, "in_processes", here)
    return runs


# -------------------------------------------------------------------- the runs


@pytest.mark.filterwarnings("ignore::UserWarning")  # of methods; processes ignore them too
def test_every_method_begins_as_the_same_model_and_has_a_row(
    settings: Callable[..., QualitySettings], made: list[Any]
) -> None:
    """At a rate of nothing the loss is that of the pretrained model with its new head, whatever the method."""
    methods = [
        name if name != "SHiRA" else "SHiRA-r4" for name in TRAINED
    ]  # its usual rank takes more than a weight here has
    given = settings(methods=tuple(methods), learning_rates=(1e-20,))
    report = quality_report.run(given, "slicefine bench quality")
    record = json.loads(report.path.with_suffix(".json").read_text())
    final = {one["cell"]["method"]: one["outcome"] for one in record["raw"] if "cell" in one and one["cell"]["final"]}
    assert set(final) == {one.name for one in given.known_methods} - {"prefix"}
    losses = {name: outcome["loss"] for name, outcome in final.items()}
    assert losses == pytest.approx(dict.fromkeys(losses, losses["full"]), abs=1e-6)
    (scores,) = (table["rows"] for table in record["tables"] if table["title"] == "Scores")
    (prefix,) = (row for row in scores if row["method"] == "prefix")
    assert prefix["not measured"].startswith("prefix tuning needs a decoder")
    before = len(made)
    quality_report.run(given, "slicefine bench quality")
    assert [job[0].method for job in made[before:]] == [
        "prefix"
    ]  # what could not be run is tried again, and nothing else


def test_training_lowers_the_loss_and_each_final_run_is_on_the_board(
    settings: Callable[..., QualitySettings], made: list[Any], tmp_path: Path
) -> None:
    given = settings(
        methods=("full", "SliceFine-4R", "LoRA-r8"),
        learning_rates=(1e-2,),
        steps=24,
        seeds=2,
        board=str(tmp_path / "board"),
    )
    found = quality.compare(given, lambda changed: None)
    quality_report.run(given, "slicefine bench quality")
    for name in ("full", "SliceFine-4R", "LoRA-r8"):
        first, second = found.of("words", name)
        assert first.curve[-1]["loss"] < first.curve[0]["loss"] < 0.7
        assert [entry["step"] for entry in first.curve] == [12, 24]
        assert first.predicted != []
        assert first.labels == second.labels
        assert first.loss != second.loss
    assert len(list((tmp_path / "board").rglob("*.json"))) == 6


def test_normalisations_that_are_trained_change_what_comes_of_a_run(
    settings: Callable[..., QualitySettings], made: list[Any]
) -> None:
    given = settings(methods=("SliceFine-1R",), learning_rates=(1e-1,), ablations={"norms": ["frozen", "trained"]})
    found = quality.compare(given, lambda changed: None)
    (plain,), (more,) = found.of("words", "SliceFine-1R"), found.of("words", "SliceFine-1R, norms trained")
    assert (
        more.active - plain.active == more.touched - plain.touched == 5 * 2 * 32
    )  # two in each block, one of the embeddings
    assert more.loss != plain.loss


@pytest.mark.filterwarnings("ignore::slicefine.SliceFineWarning")  # of what has no partner
@pytest.mark.parametrize("name", ["SliceFine-3RC", "SliceFine-4S-w2"])
def test_touched_is_what_the_run_has_trained(
    name: str, settings: Callable[..., QualitySettings], made: list[Any]
) -> None:
    """Also where a step trains more at one place than at another."""
    found = quality.compare(settings(methods=(name,), steps=60), lambda changed: None)
    (outcome,), (task,) = found.of("words", name), found.tasks
    prepared = prepare(task.recipe, 0)
    heads = prepared.new_modules
    again = attach(method(name), prepared.model, task=task.recipe.task, heads=heads, slide_every=8, total_steps=60)
    optimizer = again.optimizer(1e-3)
    assert optimizer is not None
    for parameter in again.trainable:
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(60):
        optimizer.step()
    assert outcome.touched == parameter_counts(again.model).touched


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the trainer
def test_the_curve_of_a_language_model_is_of_the_examples_that_choose(tmp_path: Path, made: list[Any]) -> None:
    text = "one two three four five six seven eight nine ten"
    tokenizer = make_tokenizer([text])
    tokenizer.save_pretrained(tmp_path / "model")
    random_llama(tokenizer).save_pretrained(tmp_path / "model")
    words = text.split()
    write_table(tmp_path / "sets/words/train.jsonl", [{"text": " ".join(words[i % 10 :])} for i in range(40)])
    write_table(tmp_path / "sets/words/test.jsonl", [{"text": " ".join([words[0], words[i]] * 3)} for i in range(10)])
    files = "data.train: sets/words/train.jsonl, test: sets/words/test.jsonl"
    (tmp_path / "suite.yaml").write_text(f"tasks:\n  words: {{recipe: llama-3.2-3b-math, {files}}}\n")
    overrides = {
        "model.name": str(tmp_path / "model"),
        "data.format": "text",
        "data.max_length": 32,
        "training.bf16": False,
    }
    given = QualitySettings(
        suite=str(tmp_path / "suite.yaml"), methods=("SliceFine-2R",), learning_rates=(1e-3,), seeds=1, steps=9, evaluations=2,
        rounds=0, cells=str(tmp_path / "cells"), output=str(tmp_path / "out"), overrides=overrides,
    )  # fmt: skip
    found = quality.compare(given, lambda changed: None)
    (outcome,) = found.of("words", "SliceFine-2R")
    assert [point["step"] for point in outcome.curve] == [4, 8, 9]
    assert outcome.loss != outcome.curve[-1]["loss"]
    assert outcome.scores.keys() == {"perplexity", "token_accuracy"}


# ---------------------------------------------------------------- the processes


def square(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number**2


def test_a_process_that_is_killed_takes_no_other_run_with_it() -> None:
    found = dict(in_processes(square, range(5), processes=2, threads=1, wanted=lambda number: number != 4))
    assert found == {0: 0, 1: 1, 2: 4, 3: KILLED}


def test_closing_ends_the_processes() -> None:
    made = in_processes(square, [1, 2], processes=1, threads=1)
    assert next(made) == (1, 1)
    made.close()
    assert multiprocessing.active_children() == []


def test_ctrl_c_leaves_finished_runs_and_nothing_else(settings: Callable[..., QualitySettings], tmp_path: Path) -> None:
    command = f"""bench quality --suite {settings().suite} --model.name {tmp_path}/model --data.max_length 16 --methods LoRA-r8 --learning_rates 1e-3
        --steps 4000 --grid_steps 8 --seeds 1 --rounds 0 --processes 1 --cells {tmp_path}/cells --output {tmp_path}/out"""
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "slicefine.cli.main", *command.split()], stdout=log, stderr=log
        )
        deadline = time.monotonic() + 120
        while "seed 0, 8 steps: loss" not in (tmp_path / "log").read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text().splitlines()
    assert (
        said[0]
        == "1 runs choose learning rates (0 are there already), 1 are final; 4,008 steps in all, those of kept runs among them"
    )
    assert said[-1].startswith(
        f"Interrupted; what is finished is in {tmp_path}/cells: the same command goes on with the rest."
    )
    assert len(said) == 5, said  # also the run that was made, and where the results and their page are
    assert len(list((tmp_path / "cells").iterdir())) == 1
