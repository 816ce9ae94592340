"""The demo on its real model, with few examples."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from classifiers import reviews, write_table

from slicefine.cli.main import main
from slicefine.demo import run as demo
from slicefine.demo.docstrings import DocstringData
from slicefine.training.progress import StepTimer


def few_examples(folder: Path) -> DocstringData:
    train = write_table(folder / "train.jsonl", reviews(range(32)))
    validation = write_table(folder / "validation.jsonl", reviews(range(100, 104)))
    return DocstringData(train, validation, {"negative": 36, "positive": 36})


@pytest.mark.filterwarnings("ignore:The run ends after:slicefine.SliceFineWarning")
def test_an_interrupted_demo_is_gone_on_with_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    end_step = StepTimer.on_step_end

    def interrupted(self: StepTimer, *given: Any, **more: Any) -> None:
        end_step(self, *given, **more)
        if len(self.seconds) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(demo, "write_docstrings", few_examples)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")  # the command sets it where it is not set; here it is put back
    command = ["demo", "--output", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(StepTimer, "on_step_end", interrupted)
        assert main(command) == 230
    assert "Stopped after step 2 of 12: the same command goes on." in capsys.readouterr().err
    assert main(command) == 0
    assert "exported model equals the trained one: yes" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/record.json").read_text())["resumed_from"] == [2]
    assert main(command) == 2
    assert "The demo starts in a new folder" in capsys.readouterr().err
