from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarked import tiny

from slicefine.benchmarking.models import MODELS, SMALL
from slicefine.benchmarking.speed import Step
from slicefine.cli.main import main


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in SMALL:
        monkeypatch.setitem(MODELS, name, tiny(name))


def arguments(tmp_path: Path, what: str, *more: str) -> list[str]:
    small = ["--models", "vit-base-small", "--methods", "SliceFine-2C,full", "--device", "cpu"]
    timed = ["--rounds", "1", "--warmup", "1"] if what == "speed" else []
    return ["bench", what, *small, *timed, "--output", str(tmp_path / "out"), *more]


def error_of(capsys: pytest.CaptureFixture[str], *given: str) -> str:
    assert main(given) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize("what", ["speed", "memory"])
def test_the_tables_on_stdout_and_in_the_files(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(tmp_path, what)
    monkeypatch.setattr(sys, "argv", ["slicefine", *given])
    assert main(given) == 0
    captured = capsys.readouterr()
    (page,) = (tmp_path / "out").glob("*.md")
    assert captured.out == page.read_text() + "\n"
    assert captured.err.splitlines()[-2:] == [f"{page} (and .json)", f"report: {page.with_suffix('.html')}"]
    record = json.loads(page.with_suffix(".json").read_text())
    assert record["provenance"]["command"].startswith(f"slicefine bench {what} --models vit-base-small")
    methods = [row["method"] for row in record["tables"][0]["rows"]]
    assert methods == ["frozen-limit", "LoRA-r8", "SliceFine-2C", "full"]


def test_ctrl_c_is_130_and_keeps_what_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(step: Step, number: int) -> float:
        if number:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(Step, "__call__", interrupt)
    assert main(arguments(tmp_path, "speed")) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "Interrupted; what was measured is written."
    (record,) = (tmp_path / "out").glob("*.json")
    assert json.loads(record.read_text())["status"] == "interrupted"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["sped"], "There is no benchmark 'sped'; there are speed, memory, quality. Did you mean 'speed'?"),
        (["speed", "--method", "full"], "There is no argument '--method' here. Did you mean '--methods'? See --help."),
        (["memory", "--rounds", "3"], "There is no argument '--rounds' here. It is a flag of `slicefine bench speed`."),
        (["speed", "--rounds", "many"], "`--rounds` takes whole numbers; got many."),
        (["speed", "--values", "1", "two", "--sweep", "r"], "`--values` takes whole numbers; got two."),
        (["quality", "--learning_rates", "1e-3", "abc"], "`--learning_rates` takes finite numbers; got abc."),
        (["quality", "--learning_rates", "nan"], "`--learning_rates` takes finite numbers; got nan."),
        (["quality", "--held_out", "x"], "`--held_out` takes finite numbers; got x."),
        (["quality", "--seeds", "1.5"], "`--seeds` takes whole numbers; got 1.5."),
        (["quality", "--model.dtype", "half"], "`model.dtype` is one of auto, float32, bfloat16, float16; got half."),
        (
            ["quality", "--suite", "sets", "--methods", "LoRA-r8", "--r", "8", "--axis", "row"],
            "`--r`, `--axis` change SliceFine alone; `--methods` are LoRA-r8.",
        ),
        (["quality", "--suite", "sets", "--extend", "x"], "`--extend` takes whole numbers; got x."),
        (
            ["quality", "--suite", "sets", "--extend", "2", "--learning_rates", "1e-3"],
            "`--extend 2` goes on by the factor between two rates; `--learning_rates` has one.",
        ),
        (
            ["speed", "--methods", "SliceFine-5R-w12", "--rounds", "9"],
            "`--rounds` is at least 12, the turns of SliceFine-5R-w12, each of which is other work; got 9.",
        ),
        (["speed", "--rounds", "0"], "`--rounds` is at least 1; got 0."),
        (["quality", "--slice.r", "3"], "There is no argument '--slice.r' here. Did you mean '--r'? See --help."),
        (
            ["quality", "--suite", "no/sets", "--steps", "4"],
            "1. `--steps` is at least 8; got 4.\n  2. `--suite` is a folder",
        ),
        (["speed", "--models"], "--models takes a value"),
        (["memory", "--models", "lama-3.2-3b"], "There is no model 'lama-3.2-3b'; there are llama-3.2-3b, "),
        (["memory", "--methods", "full,LoRa-8"], "Did you mean 'LoRA-r8'?"),
        (
            ["memory", "--sweep", "widht"],
            "`--sweep` is one of r, length, width, depth, batch; got 'widht'. Did you mean 'width'?",
        ),
        (["memory", "--values", "3"], "`--values` are those of a sweep"),
        (["memory", "--sweep", "r", "--equal_parameters", "LoRA"], "chooses ranks, and so does `--sweep r`"),
        (["memory", "--sweep", "r", "--values", "0"], "`--values` are at least 1; got 0."),
        (
            ["memory", "--dtype", "bf16"],
            "`--dtype` is one of float32, bfloat16, float16; got 'bf16'. Did you mean 'bfloat16'?",
        ),
        (["memory", "--device", "gpu"], "`--device` is one of cpu, cuda; got 'gpu'."),
        (["memory", "--equal_parameters", "LoRRA"], "There is no method 'LoRRA'"),
        (["speed", "--output", "/dev/null"], "`--output` is a folder; /dev/null is a file. Name another."),
        (
            ["memory", "--output", "/proc/x"],
            "`--output` is a folder that can be written; nothing can be made in /proc/x",
        ),
        (
            ["memory", "--models", "vit-base-small", "--sweep", "length", "--values", "3"],
            "is a multiple of its patch_size",
        ),
    ],
)
def test_errors(capsys: pytest.CaptureFixture[str], given: list[str], says: str) -> None:
    assert says in error_of(capsys, "bench", *given)


def test_all_that_is_wrong_is_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    said = error_of(capsys, "bench", "speed", "--models", "a", "--methods", "b", "--sweep", "c", "--rounds", "0")
    assert "slicefine bench: 4 problems" in said


def test_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "`--device cuda` needs a GPU" in error_of(capsys, "bench", "memory", "--device", "cuda")


def test_without_a_benchmark_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 0
    assert re.search(r"speed +Time of a training step", capsys.readouterr().out)


FLAGS = {
    "help", "models", "methods", "threads", "device", "dtype", "checkpointing", "compile", "sweep", "values",
    "equal_parameters", "seed", "output",
}  # fmt: skip


@pytest.mark.parametrize(("what", "more"), [("speed", {"rounds", "warmup", "generate"}), ("memory", set())])
def test_help_shows_flags_and_defaults(capsys: pytest.CaptureFixture[str], what: str, more: set[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", what, "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert set(re.findall(r"--([\w-]+)", text)) == FLAGS | more
    for shown in ("llama-3.2-3b-small", "SliceFine-5RC", "null = float32 on a CPU, bfloat16 on a GPU"):
        assert shown in text
    assert ("Timed rounds; a round is one step of every method (type: int, default: 9)" in text) == (what == "speed")


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from slicefine.cli.main import main\n"
        "try: main(['bench', 'speed', '--help'])\nexcept SystemExit: pass\n"
        "sys.exit(bool({'torch', 'transformers', 'peft', 'matplotlib'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
