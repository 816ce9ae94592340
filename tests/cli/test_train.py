from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import TrainerState

from slicefine.cli.main import main
from slicefine.training.progress import StepTimer
from slicefine.training.recipe import Recipe

SLICEFINE = [sys.executable, "-m", "slicefine.cli.main"]


@pytest.fixture
def recipe_file(settings: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(Recipe.from_flat(settings).to_yaml())
    return path


def test_train_and_export(recipe_file: Path, tmp_path: Path) -> None:
    """As a user does: one process a command. Nothing but our own lines is printed."""
    flags = [
        "--slice.r",
        "3",
        "--training.num_train_epochs",
        "1",
        "--training.learning_rate=2e-3",
        "--slice.slide_every",
        "9",
    ]
    done = subprocess.run([*SLICEFINE, "train", str(recipe_file), *flags], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        "loss",
        "accuracy",
        "f1_macro",
        "classes",
        "parameters",
        "steps",
        "adapter",
        "next",
    ]
    bars = ("train:", "%|")
    printed = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip(" \x1b[A")]
    others = [line for line in printed if not any(bar in line for bar in bars)]
    assert others[1:] == [f"report: {tmp_path / 'run' / 'report.html'}"]
    assert others[0].startswith("slicefine: warning: The run ends after 6 optimizer steps and the slices move every 9")
    assert "moves 0/0" in done.stderr
    saved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert (saved["slice"]["r"], saved["training"]["learning_rate"]) == (3, 2e-3)

    out = tmp_path / "model"
    done = subprocess.run(
        [*SLICEFINE, "export", str(tmp_path / "run"), "--as", "merged", str(out)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{out}\n"
    assert done.stderr.splitlines() == [
        "Writing model.safetensors (1 of 1)",
        "The logits of the exported model are those of the trained one, bit by bit",
    ]
    assert (out / "model.safetensors").is_file()


def test_ctrl_c_and_resume(recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [*SLICEFINE, "train", str(recipe_file), "--training.max_steps", "2000", "--training.eval_steps", "2000"]
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen([*command, "--training.save_steps", "2000"], stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while "moves 1/" not in (tmp_path / "log").read_text() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130, (tmp_path / "log").read_text()
    record = json.loads((run / "record.json").read_text())
    assert record["status"] == "interrupted"
    assert os.listdir(run / "checkpoints") == [f"checkpoint-{record['steps']}"]
    log_text = (tmp_path / "log").read_text()
    assert "Traceback" not in log_text
    assert (
        f"Interrupted after step {record['steps']} of 2000. Go on with: slicefine train {run}/recipe.yaml --resume"
        in log_text
    )


def test_a_run_folder_stands_for_its_recipe(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = StepTimer.on_step_begin

    def stop(self: StepTimer, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step == 6:
            raise KeyboardInterrupt
        begin(self, args, state, control, **kwargs)

    with monkeypatch.context() as stopped:
        stopped.setattr(StepTimer, "on_step_begin", stop)
        assert main(["train", str(recipe_file), "--training.save_steps", "3"]) == 130
    recipe_file.unlink()
    assert main(["train", str(tmp_path / "run"), "--resume"]) == 0
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert (record["status"], record["resumed_from"]) == ("finished", [6])
    assert "\nclasses      3: food, space, sport\n" in capsys.readouterr().out


def test_resume_of_nothing(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe_file), "--resume"]) == 2
    assert "--resume goes on with the run in `output`; there is none" in capsys.readouterr().err


def test_a_problem_of_the_recipe_names_its_file(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe_file.write_text(recipe_file.read_text().replace("axis:", "axes:"))
    assert main(["train", str(recipe_file)]) == 2
    message = capsys.readouterr().err
    assert f"Recipe {recipe_file}: there is no setting 'slice.axes'. Did you mean 'slice.axis'?" in message
