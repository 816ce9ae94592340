"""What `bench speed` and `bench memory` do when something goes wrong: what was measured is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarked import rows_of, run, settings, tiny

from slicefine.benchmarking import bench, results, speed, timing
from slicefine.benchmarking.attaching import Attached
from slicefine.benchmarking.counting import needed
from slicefine.benchmarking.methods import method
from slicefine.benchmarking.models import MODELS, SMALL
from slicefine.benchmarking.setups import Setup
from slicefine.errors import SliceFineError


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SMALL:
        monkeypatch.setitem(MODELS, name, tiny(name))


def test_ctrl_c_keeps_what_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = speed.Step.__call__
    calls: list[int] = []

    def interrupted(step: speed.Step, number: int) -> float:
        calls.append(number)
        if len(calls) == 11:  # three methods, a round of warm-up: in the third timed round
            raise KeyboardInterrupt
        return usual(step, number)

    monkeypatch.setattr(speed.Step, "__call__", interrupted)
    report, record = run("speed", settings(tmp_path, methods=("SliceFine-2R",), rounds=9))
    assert (report.status, record["status"]) == ("interrupted", "interrupted")
    assert "Interrupted: what follows is what was measured until then." in report.path.read_text()
    assert [table["title"] for table in record["tables"]] == ["llama-3.2-3b-small: training step"]
    assert {name: len(seconds) for name, seconds in record["raw"][0]["seconds"].items()} == {
        "frozen-limit": 2,
        "LoRA-r8": 2,
        "SliceFine-2R": 2,
    }


def test_ctrl_c_between_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*given: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(speed, "moves", interrupted)
    report, record = run("speed", settings(tmp_path, methods=("full",)))
    assert report.status == record["status"] == "interrupted"
    assert [table["title"] for table in record["tables"]] == ["llama-3.2-3b-small: training step"]


def test_ctrl_c_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = Setup.attach

    def interrupted(setup: Setup, one: Any, **given: Any) -> Attached:
        if one.name == "full":
            raise KeyboardInterrupt
        return usual(setup, one, **given)

    monkeypatch.setattr(Setup, "attach", interrupted)
    report, record = run("memory", settings(tmp_path))
    assert report.status == "interrupted"
    assert [row["method"] for row in record["tables"][0]["rows"]] == ["frozen-limit", "LoRA-r8"]


@pytest.mark.parametrize("what", ["speed", "memory"])
def test_out_of_memory_in_one_method_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    usual = Setup.attach

    def too_much(setup: Setup, one: Any, **given: Any) -> Attached:
        if one.name == "SliceFine-2R":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return usual(setup, one, **given)

    monkeypatch.setattr(Setup, "attach", too_much)
    report, record = run(what, settings(tmp_path, methods=("SliceFine-2R", "SliceFine-2C", "full")))
    assert report.status == "finished"
    first, *others = record["tables"]
    reasons = {row["method"]: row["not measured"] for row in first["rows"]}
    assert reasons == dict.fromkeys(reasons, "") | {"SliceFine-2R": "out of memory"}
    assert len(reasons) == 5
    assert all(row["median ms" if what == "speed" else "saved MiB"] for row in first["rows"] if not row["not measured"])
    assert len(others) == (3 if what == "speed" else 0)  # moves, forward pass and generation of the others
    assert "SliceFine-2R" not in json.dumps([table["rows"] for table in others])
    assert "| SliceFine-2R |" in report.path.read_text()
    assert "<svg" in next(report.folder.glob("*.svg")).read_text()


def test_nothing_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(*given: Any, **named: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(Setup, "base", too_much)
    for what in ("speed", "memory"):
        report, record = run(what, settings(tmp_path / what))
        assert report.status == "finished"
        assert {row["not measured"] for table in record["tables"] for row in table["rows"]} == {"out of memory"}
        assert not list(report.folder.glob("*.svg"))


def test_on_a_cpu_what_is_larger_than_its_memory_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the system would end the process, and nothing would be left of what the others had given."""
    given = settings(tmp_path, methods=("SliceFine-2R", "full"), models=("vit-base-small",))
    setup = Setup.of_settings(given, MODELS["vit-base-small"])
    needs = {name: needed(setup, method(name)).total for name in ("frozen-limit", "LoRA-r8", "SliceFine-2R", "full")}
    monkeypatch.setattr(bench, "free_bytes", lambda device: 1)
    monkeypatch.setattr(timing, "free_bytes", lambda device: needs["full"] - 1)
    _, record = run("speed", given)
    reasons = {row["method"]: row["not measured"] for row in rows_of(record, "vit-base-small: training step")}
    too_large = {name for name in needs if needs[name] >= needs["full"]}
    assert {name for name, why in reasons.items() if why.startswith("out of memory: it takes 0.0 GiB")} == too_large
    assert reasons["SliceFine-2R"] == ""

    monkeypatch.setattr(timing, "free_bytes", lambda device: setup.weights - 1)
    with pytest.raises(SliceFineError, match="out of memory"):
        setup.base()


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("a-file", r"`--output` is a folder; .*a-file is a file. Name another."),
        ("a-file/sub", r"`--output` is a folder that can be written; nothing can be made in .*sub \(Not a directory\)"),
        ("/proc/x", r"nothing can be made in /proc/x"),
    ],
)
@pytest.mark.parametrize("what", ["speed", "memory"])
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, output: str, says: str
) -> None:
    (tmp_path / "a-file").write_text("mine")
    monkeypatch.setattr(Setup, "base", lambda setup: pytest.fail("a model was made"))
    with pytest.raises(SliceFineError, match=says):
        run(what, settings(tmp_path, output=str(tmp_path / output)))
    assert (tmp_path / "a-file").read_text() == "mine"


def test_files_of_two_runs_have_names_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting takes seconds: the next run may begin in the same minute."""
    times = iter(["2026-01-02T03:04:05+00:00", "2026-01-02T03:04:06+00:00"])
    monkeypatch.setattr(results, "now", lambda: next(times))
    names = [run("memory", settings(tmp_path, methods=("full",)))[0].name for _ in range(2)]
    assert [name.rpartition("threads-")[2] for name in names] == ["20260102-030405", "20260102-030406"]
    assert len(list((tmp_path / "out").glob("*.json"))) == 2
