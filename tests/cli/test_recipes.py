from __future__ import annotations

import json
from pathlib import Path

import pytest

from slicefine.cli.main import main
from slicefine.training.shipped import shipped


def test_recipes_lists_names_lines_and_the_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    for name, path in shipped().items():
        assert f"\n{name} " in f"\n{out}"
        assert str(path.parent) in out
    assert "Tune Llama-3.2-3B to math word problems" in out


def test_a_recipe_by_name_and_a_smoke_test(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    data = tmp_path / "rows.jsonl"
    data.write_text((json.dumps({"instruction": "Add 1 and 2.", "output": "3"}) + "\n") * 50)
    assert main(["train", "llama-3.2-3b-math", "--data.train", str(data), "--data.validation", "0.2", "--smoke"]) == 0
    out = capsys.readouterr().out
    assert "finished: 4 steps" in out
    (folder,) = tmp_path.glob("slicefine-smoke-*")
    assert str(folder) in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "llama-math"], "those that ship: "),
        (["train", "llama-3.2-3b-math", "--smoke", "--resume"], "Leave out --smoke or --resume."),
        (["train", "llama-3.2-3b-math", "--smoke"], "math_10k.json does not exist"),
    ],
)
def test_what_is_refused(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(arguments) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
