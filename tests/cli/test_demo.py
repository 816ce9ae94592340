"""The demo on its real model, with few examples."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from classifiers import reviews, write_table

from slicefine.cli.main import main
from slicefine.demo import run as demo
from slicefine.demo.docstrings import DocstringData
from slicefine.errors import SliceFineError
from slicefine.training.progress import StepTimer


def few_examples(folder: Path, more: int = 0) -> DocstringData:
    train = write_table(folder / "train.jsonl", reviews(range(32 + more)))
    validation = write_table(folder / "validation.jsonl", reviews(range(100, 104)))
    return DocstringData(train, validation, {"negative": 36, "positive": 36})


def interrupt_at(step: int) -> Callable[..., None]:
    """`StepTimer.on_step_end` that sends us SIGINT, as Ctrl-C does, after `step` steps."""
    end_step = StepTimer.on_step_end

    def on_step_end(self: StepTimer, *given: Any, **more: Any) -> None:
        end_step(self, *given, **more)
        if len(self.seconds) == step:
            signal.raise_signal(signal.SIGINT)

    return on_step_end


@pytest.mark.filterwarnings("ignore:The run ends after:slicefine.SliceFineWarning")
def test_an_interrupted_demo_is_gone_on_with_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "write_docstrings", few_examples)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.delenv("OMP_WAIT_POLICY")  # what the command sets is put back after the test
    command = ["demo", "--output", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(StepTimer, "on_step_end", interrupt_at(2))
        assert main(command) == 130
    assert "Stopped after step 2 of 12: the same command goes on." in capsys.readouterr().err
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert main(command) == 0
    assert "exported model equals the trained one: yes" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/record.json").read_text())["resumed_from"] == [2]
    assert main(command) == 2
    assert "The demo starts in a new folder" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:The run ends after:slicefine.SliceFineWarning")
def test_a_demo_that_cannot_go_on_begins_anew_or_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "write_docstrings", few_examples)
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(StepTimer, "on_step_end", interrupt_at(2))
        with pytest.raises(KeyboardInterrupt):
            demo.run_demo(tmp_path)
        monkeypatch.setattr(demo, "write_docstrings", lambda folder: few_examples(folder, more=1))
        with pytest.raises(
            SliceFineError, match=f"interrupted in {tmp_path} cannot go on. Remove the folder, and it starts"
        ):
            demo.run_demo(tmp_path)
        shutil.rmtree(run / "checkpoints")  # as one that was stopped before the first
        with pytest.raises(KeyboardInterrupt):
            demo.run_demo(tmp_path)
    assert json.loads((run / "record.json").read_text())["resumed_from"] == []
