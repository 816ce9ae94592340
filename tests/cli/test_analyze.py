"""`slicefine analyze` as its users call it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from classifiers import reviews, text_model, write_table

from slicefine.cli.main import main


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(text_model(tmp_path / "model"))


def analysis(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "analysis.json").read_text())


def test_a_model_alone(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", model, "--output", str(tmp_path / "out"), "--groups", "2"]) == 0
    shown = capsys.readouterr()
    assert "spectral balance: " in shown.out
    assert "The other stages need examples: name a recipe, or --data.train FILE." in shown.err
    assert f"report: {tmp_path / 'out' / 'report.html'}" in shown.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["analysis.json", "report.html"]


def test_settings_of_the_data_make_a_task(model: str, tmp_path: Path) -> None:
    """The task is what the class of the model says."""
    rows = write_table(tmp_path / "rows.jsonl", reviews(range(12)))
    flags = ["--data.train", str(rows), "--data.max_length", "16", "--stages", "energy", "--quick", "--ranks", "1", "2"]
    assert main(["analyze", model, *flags, "--output", str(tmp_path / "out")]) == 0
    found = analysis(tmp_path / "out")
    assert (found["task"], list(found["stages"])) == ("text-classification", ["energy"])
    assert found["settings"]["ranks"] == [1, 2]


def test_a_stage_that_fails_is_told_and_is_no_success(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> dict[str, Any]:
        raise RuntimeError("There is no room.")

    monkeypatch.setattr("slicefine.analysis.balance.run", broken)
    assert main(["analyze", model, "--output", str(tmp_path / "out")]) == 1
    assert "The stage balance failed: RuntimeError: There is no room." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{model}", "--stages", "energi"], "got 'energi'. Did you mean 'energy'?"),
        (["{model}", "--stages", "energy"], "The stages energy need examples"),
        (["{model}", "minilm-sst3"], "Did you mean 'minilm-sst2'?"),
        (["{model}", "--task", "text-clasification", "--data.train", "x.jsonl"], "Did you mean 'text-classification'?"),
        (["{model}", "--data.train", "{model}/nothing.jsonl", "--task", "text-classification"], "nothing.jsonl"),
        (["{model}/config.json"], "is a file. Give its folder"),
        (["{model}", "--quik"], "Did you mean '--quick'?"),
        (["{model}", "--groups", "two"], "`--groups`"),
        ([], "MODEL is missing"),
    ],
)
def test_what_is_refused(
    arguments: list[str], says: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word.format(model=model) for word in arguments]
    assert main(["analyze", *given, *(["--output", str(tmp_path / "out")] if given else [])]) == 2
    shown = capsys.readouterr().err
    assert says in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "out").exists()


def test_a_folder_without_safetensors(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (Path(model) / "model.safetensors").rename(Path(model) / "pytorch_model.bin")
    assert main(["analyze", model, "--output", str(tmp_path / "out")]) == 2
    assert "transformers converts a model that you trust" in capsys.readouterr().err
