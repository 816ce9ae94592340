from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from slicefine import SliceFineError
from slicefine.training import record
from slicefine.training.record import RunRecord


def test_round_trip_leaves_one_file(tmp_path: Path) -> None:
    made = RunRecord(task="t", model="é", seed=1, started=record.now(), metrics={"before": {"accuracy": 0.5}})
    made.write(tmp_path)
    made.write(tmp_path)
    assert RunRecord.read(tmp_path) == made
    assert os.listdir(tmp_path) == ["record.json"]


def test_what_is_no_record(tmp_path: Path) -> None:
    with pytest.raises(SliceFineError, match=r"A run folder holds record\.json; there is none in"):
        RunRecord.read(tmp_path)
    for text in ("{", '{"colour": 1}', "[]"):
        (tmp_path / "record.json").write_text(text)
        with pytest.raises(SliceFineError, match=r"record\.json is not the record of a run"):
            RunRecord.read(tmp_path)


def test_commit_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert record.commit() is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    (tmp_path / "file").write_text("a")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "m"]):
        subprocess.run([*git, *command], check=True)
    clean = record.commit()
    assert clean is not None
    assert len(clean["hash"]) == 40
    assert clean["modified"] is False
    (tmp_path / "file").write_text("b")
    assert record.commit() == clean | {"modified": True}


def test_what_ran_where() -> None:
    assert set(record.versions()) == {"python", *record.PACKAGES}
    assert record.hardware()["cpu"]
