from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from parrot import (
    TEXTS,
    TRUE,
    boolq_rows,
    make_tokenizer,
    parrot,
    piqa_rows,
    random_llama,
    save,
    write_rows,
)

from slicefine.cli.main import main
from slicefine.evaluation.generation import Generator

SLICEFINE = [sys.executable, "-m", "slicefine.cli.main"]


@pytest.fixture
def model(tmp_path: Path) -> str:
    tokenizer = make_tokenizer(TEXTS)
    return str(save(tmp_path / "model", parrot(tokenizer, TRUE), tokenizer))


@pytest.fixture
def arguments(model: str, tmp_path: Path) -> list[str]:
    write_rows(tmp_path / "data" / "boolq" / "test.jsonl", boolq_rows())
    write_rows(tmp_path / "data" / "piqa" / "test.jsonl", piqa_rows())
    where = ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
    return ["evaluate", model, "--suite", "commonsense", "--tasks", "boolq", "piqa", *where]


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


def test_as_a_user_does(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table on stdout, the bars on stderr, nothing else; the same command goes on, with other batches too."""
    command = [*SLICEFINE, *arguments, "--limit", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["BoolQ", "PIQA", "average"]
    assert lines[1].split() == ["accuracy,", "%", "50.0", "0.0", "25.0"]
    assert re.fullmatch(r"greedy, at most 32 tokens; 4 answers in \d+\.\d s, \d+ tokens/s", lines[-1])
    bars = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
    assert all(line.startswith(("boolq: ", "piqa: ")) for line in bars[:-1])
    assert bars[-1].startswith("report: ")
    assert "accuracy 50.0 %, unanswered 0" in done.stderr

    assert main([*arguments, "--batch_size", "1"]) == 0
    again = capsys.readouterr().out
    assert again.splitlines()[1].split() == ["accuracy,", "%", "66.7", "0.0", "33.3"]
    assert "; 1 answers in" in again
    assert len((tmp_path / "out" / "answers.jsonl").read_text().splitlines()) == 5


def test_ctrl_c_keeps_what_is_finished(arguments: list[str], tmp_path: Path) -> None:
    tokenizer = make_tokenizer(TEXTS)
    save(tmp_path / "model", random_llama(tokenizer, max_position_embeddings=4096), tokenizer)
    write_rows(tmp_path / "data" / "boolq" / "test.jsonl", boolq_rows() * 200)
    answers = tmp_path / "out" / "answers.jsonl"
    process = subprocess.Popen(
        [*SLICEFINE, *arguments, "--batch_size", "1", "--max_new_tokens", "300"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (answers.is_file() and answers.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out.splitlines()[-1] == "Interrupted; finished answers are kept. The same command goes on."
    kept = [json.loads(line) for line in answers.read_text().splitlines()]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["status"], results["tasks"]["boolq"]["questions"]) == ("interrupted", len(kept))
    assert 0 < len(kept) < 600


def test_an_interrupted_evaluation_exits_with_130(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*given: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "__call__", interrupt)
        assert main(arguments) == 130
    assert capsys.readouterr().out.splitlines()[-1].startswith("Interrupted;")
    assert main(arguments) == 0


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ["--suite", "comonsense"],
            "`--suite` is one of commonsense, math, glue, vtab-image, video; got 'comonsense'. Did you mean 'commonsense'?",
        ),
        (["--tasks", "boolq,pica"], "got 'pica'. Did you mean 'piqa'?"),
        (["--limit", "0"], "`--limit` is at least 1; got 0."),
        (["--limit", "many"], "`--limit` is a whole number; got many."),
        (["--batch_size", "-1"], "`--batch_size` is at least 1; got -1."),
        (["--batch_size", "2.5"], "`--batch_size` is a whole number; got 2.5."),
        (["--bach_size", "2"], "There is no argument '--bach_size' here. Did you mean '--batch_size'?"),
        (["--num_beams"], "--num_beams takes a value"),
        (["--tasks", "--limit", "2"], "--tasks takes a value"),
        (["--data", "absent"], "absent does not exist"),
        (["--engine", "vllm"], "`--engine` is one of generate, lm-eval; got 'vllm'"),
    ],
)
def test_errors(capsys: pytest.CaptureFixture[str], arguments: list[str], flags: list[str], says: str) -> None:
    assert says in error_of(capsys, *arguments, *flags)


def test_what_is_missing(capsys: pytest.CaptureFixture[str], model: str) -> None:
    assert "MODEL is missing" in error_of(capsys, "evaluate", "--suite", "math")
    assert "`--suite` says what to score: commonsense, math, glue" in error_of(capsys, "evaluate", model)


def test_training_examples_that_are_questions(
    capsys: pytest.CaptureFixture[str], arguments: list[str], tmp_path: Path
) -> None:
    train = str(write_rows(tmp_path / "train.jsonl", boolq_rows()[:1]))
    assert f"{train}:1 -> boolq, row 1" in error_of(capsys, *arguments, "--train_data", train)
    assert main([*arguments, "--train_data", train, "--allow_contamination"]) == 0
    assert "contaminated: questions that the model was trained on: boolq 1" in capsys.readouterr().out


def test_help_shows_defaults_and_imports_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for shown in (
        "null = 32 for commonsense, 256 for math",
        "Questions, or examples, per forward pass (type: int, default: 32)",
        "1 = greedy",
    ):
        assert shown in text
    assert set(re.findall(r"--([\w-]+)", text)) == {
        "help", "suite", "tasks", "data", "limit", "output", "batch_size", "max_new_tokens", "num_beams", "train_data",
        "allow_contamination", "overwrite", "engine",
    }  # fmt: skip
    code = (
        "import sys; from slicefine.cli.main import main\ntry: main(['evaluate', '--help'])\nexcept SystemExit: pass\n"
        "sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
