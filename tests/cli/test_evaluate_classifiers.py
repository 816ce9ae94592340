"""`slicefine evaluate` of classifiers, as a user types it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from classifiers import reviews, text_model, trained, write_table
from parrot import TEXTS, make_tokenizer, random_llama, save

from slicefine.cli.main import main

SLICEFINE = [sys.executable, "-m", "slicefine.cli.main"]


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained for sst2, on a file."""
    root = tmp_path_factory.mktemp("classifier")
    data = write_table(root / "train.jsonl", reviews(range(24)))
    return trained("text-classification", text_model(root / "model"), data, root / "run", **{"data.name": "sst2"})


def test_a_classifier_as_a_user_does(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table on stdout, the bars on stderr, nothing else; the same command goes on."""
    write_table(tmp_path / "glue" / "sst2" / "validation.jsonl", reviews(range(100, 110)))
    command = ["evaluate", str(run), "--suite", "glue", "--data", str(tmp_path / "glue")]
    done = subprocess.run([*SLICEFINE, *command, "--limit", "8"], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines[:4]] == ["", "accuracy, %", "95 % interval", "examples"]
    assert lines[0].split() == ["SST-2"]
    assert [line.split()[:1] for line in lines[4:9]] == [[], ["class"], ["negative"], ["positive"], []]
    assert lines[9] == f"results: {run / 'evaluation' / 'glue' / 'results.json'}"
    assert re.fullmatch(r"8 examples in \d+\.\d s, \d+ examples/s", lines[10])
    assert len(lines) == 11
    bars = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
    assert all(line.startswith("sst2: ") for line in bars[:-1])
    assert bars[-1] == f"report: {run / 'evaluation' / 'glue' / 'report.html'}"
    assert len((run / "evaluation" / "glue" / "predictions.jsonl").read_text().splitlines()) == 8
    assert main([*command, "--batch_size", "3"]) == 0
    assert "\n12 examples in" in capsys.readouterr().out


def test_ctrl_c_keeps_finished_predictions(run: Path, tmp_path: Path) -> None:
    data = write_table(tmp_path / "many.jsonl", reviews(range(100, 110)) * 1000)
    out = tmp_path / "out"
    command = ["evaluate", str(run), "--data", str(data), "--output", str(out), "--batch_size", "1"]
    process = subprocess.Popen(
        [*SLICEFINE, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )  # fmt: skip
    deadline, predictions = time.monotonic() + 60, out / "predictions.jsonl"
    while not (predictions.is_file() and predictions.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert printed.splitlines()[-1] == "Interrupted; finished answers are kept. The same command goes on."
    results = json.loads((out / "results.json").read_text())
    kept = len(predictions.read_text().splitlines())
    assert (results["status"], results["tasks"]["many"]["examples"]) == ("interrupted", kept)
    assert 0 < kept < 20000


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--suite", "glue", "--max_new_tokens", "8"], "`--max_new_tokens` says how answers are generated; classes are not"),
        (["--suite", "glue", "--num_beams", "4"], "`--num_beams` says how answers are generated"),
        (["--suite", "glue", "--engine", "lm-eval"], "`--engine` says how answers are generated"),
        (["--suite", "commonsense"], "is for text-classification; got --suite commonsense. Give --suite glue"),
        (["--suite", "glue", "--tasks", "pets"], "'pets' is in the suite 'vtab-image'"),
        (["--data", "absent.jsonl"], "absent.jsonl does not exist"),
        ([], "`--suite` says what to score"),
    ],
)  # fmt: skip
def test_errors_of_classifiers(capsys: pytest.CaptureFixture[str], run: Path, flags: list[str], says: str) -> None:
    assert says in error_of(capsys, "evaluate", str(run), *flags)


def test_a_language_model_is_no_classifier(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tokenizer = make_tokenizer(TEXTS)
    model = str(save(tmp_path / "model", random_llama(tokenizer), tokenizer))
    data = str(write_table(tmp_path / "held.jsonl", reviews([1])))
    wanted = "Give --suite commonsense or --suite math."
    assert wanted in error_of(capsys, "evaluate", model, "--data", data, "--output", "out")
    assert wanted in error_of(capsys, "evaluate", model, "--suite", "glue", "--tasks", "sst2", "--output", "out")
