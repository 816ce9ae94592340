"""Which file tells of a run, what it is of, and what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import reported

from slicefine.reporting import records
from slicefine.reporting.records import Record


def read(*paths: Path) -> list[Record]:
    problems: list[str] = []
    found = records.read(paths, problems)
    assert problems == []
    return found


def problems_of(*paths: Path) -> list[str]:
    problems: list[str] = []
    records.read(paths, problems)
    return problems


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        ("training", "training run"),
        ("classification", "evaluation"),
        ("generation", "evaluation"),
        ("analysis", "analysis"),
        ("benchmark", "benchmark"),
        ("plan", "plan"),
    ],
)
def test_a_kind_is_seen_from_the_content(made: str, kind: str, tmp_path: Path) -> None:
    named = reported.MAKE[made](tmp_path / "some run")
    (found,) = read(named)
    assert found.kind == kind
    (same,) = read(found.file if named.is_dir() else named.parent)
    assert same == found, "a folder and the file in it are the same run"
    renamed = found.file.rename(found.folder / "other.json")
    assert read(renamed)[0].kind == kind, "the name of a file says nothing"


def test_names_of_runs(tmp_path: Path) -> None:
    runs = [reported.plan(tmp_path / name) for name in ("a/one", "b/one", "b/two")]
    speed = reported.benchmark(tmp_path / "bench")
    found = read(*runs, speed)
    assert [record.name for record in found] == ["one", "one", "two", "speed-xeon-20261129-180000"]
    assert records.names(found) == ["a/one", "b/one", "b/two", "bench/speed-xeon-20261129-180000"]
    assert records.names(found[1:3]) == ["one", "two"]


def test_the_parts_of_a_run_are_read(tmp_path: Path) -> None:
    (run,) = read(reported.training(tmp_path / "run"))
    assert run.made_from == ["record.json", "history.json", "slices.json", "memory.json", "recipe.yaml"]
    assert run.parts["recipe.yaml"] == reported.RECIPE
    (evaluation,) = read(reported.generation(tmp_path / "answers"))
    assert len(evaluation.parts["answers.jsonl"]) == 15


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    folder = reported.generation(tmp_path / "run")
    with (folder / "answers.jsonl").open("a") as file:
        file.write('{"task": "gsm8k", "ro')
    assert len(read(folder)[0].parts["answers.jsonl"]) == 15


def test_characters_that_no_page_may_have_are_replaced(tmp_path: Path) -> None:
    (run,) = read(reported.training(tmp_path / "run", model="a\x00b\x1b[31m\ud800c\td\ne"))
    assert run.content["model"] == "a\ufffdb\ufffd[31m\ufffdc\td\ne"


# ---------------------------------------------------------------- what is wrong


def changed(tmp_path: Path, made: str, name: str, content: Any) -> Path:
    folder = reported.MAKE[made](tmp_path / made)
    folder = folder if folder.is_dir() else folder.parent
    reported.write(folder, name, content)
    return folder


@pytest.mark.parametrize(
    ("made", "name", "content", "says"),
    [
        ("training", "record.json", '{"status": "fin', "is damaged: line 1, column 12: Unterminated string starting at"),
        ("training", "record.json", "", "is damaged: line 1, column 1: Expecting value"),
        ("training", "record.json", "null", "is damaged: it holds nothing (null)"),
        ("training", "record.json", "[" * 100_000, "is damaged: it is nested too deeply"),
        ("training", "record.json", "[1, 2]", "is no record that is known here. Was it changed by hand? Run the command again."),
        ("training", "record.json", '{"a": 1}', "is no record that is known here"),
        ("analysis", "analysis.json", {"kind": "banana", "version": 1}, "is no record that is known here (kind 'banana')"),
        ("training", "record.json", reported.record(status=None, task=3), "is not a whole record of a training run: `status`, `task` are missing"),
        ("analysis", "analysis.json", reported.analysis_content(stages=[]), "a whole record of an analysis: `stages` is missing or of another type"),
        ("analysis", "analysis.json", reported.analysis_content(version=2), "is a record of version 2; this slicefine reads version 1."),
        ("plan", "plan.json", reported.plan_content(format=7), "is a record of version 7"),
        ("training", "history.json", {"version": 3, "log": []}, "history.json is a record of version 3"),
        ("training", "history.json", "{", "history.json is damaged: line 1, column 2"),
        ("training", "slices.json", "[]", "slices.json holds an object, {...}; got list"),
        ("classification", "predictions.jsonl", '{"a": 1}\n[]\nx\n{"b"', "predictions.jsonl is damaged: line 2: no object"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(made: str, name: str, content: Any, says: str, tmp_path: Path) -> None:
    problems = problems_of(changed(tmp_path, made, name, content))
    assert says in problems[0]
    assert name in problems[0]


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    folder = reported.training(tmp_path / "run")
    (folder / "recipe.yaml").write_bytes(b"task: \xff\xfe")
    assert problems_of(folder) == [f"{folder / 'recipe.yaml'} is damaged: byte 6 is not UTF-8. Run the command again."]


def test_folders_without_a_record(tmp_path: Path) -> None:
    reported.plan(tmp_path / "runs/one")
    reported.training(tmp_path / "runs/two")
    (tmp_path / "empty").mkdir()
    absent, empty, runs = problems_of(tmp_path / "absent", tmp_path / "empty", tmp_path / "runs")
    assert absent == f"{records.RULE}; there is nothing at {tmp_path / 'absent'}. Name one that is there."
    assert (
        empty == f"{records.RULE}; {tmp_path / 'empty'} is empty. Name the folder that the command wrote, its --output."
    )
    assert (
        f"{tmp_path / 'runs'} has no record (record.json, results.json, analysis.json, plan.json, or the JSON" in runs
    )
    assert runs.endswith(f"Runs are in it: name {tmp_path / 'runs/one'}, say.")


def test_what_no_command_has_written(tmp_path: Path) -> None:
    run, speed = reported.training(tmp_path / "run"), reported.benchmark(tmp_path / "bench")
    rows = reported.write(tmp_path, "rows.jsonl", '{"text": "a"}\n{"text": "b"}\n')
    same = reported.write(tmp_path, "same.json", rows.read_text())
    table = reported.write(tmp_path, "table.json", [{"text": "a"}])
    model = reported.write(tmp_path / "model", "config.json", {}).parent
    adapter = reported.write(run / "checkpoints/checkpoint-8", "adapter_config.json", {}).parent
    page = reported.write(run, "report.html", "<!doctype html>")
    beside = reported.write(speed.parent, f"{speed.stem}.html", "<!doctype html>")
    wrote = "Name the folder that the command wrote, its --output."
    given = (rows, same, table, model, adapter, page, beside)
    said = dict(zip(given, problems_of(*given), strict=True))
    assert said[rows] == f"{records.RULE}; {rows} is neither. {wrote}"
    assert said[same] == (
        f"{same} is damaged: line 2, column 1: Extra data. Run the command again; if no command wrote it: {records.RULE}."
    )
    assert said[table] == f"{records.RULE}; {table} is no record that is known here. {wrote}"
    assert said[model].endswith(
        f"It is a model: name the folder that `slicefine analyze {model}` or another command with it wrote."
    )
    assert said[adapter].endswith(f"It is in the folder of a run: name {run}.")
    assert said[page] == f"{records.RULE}; {page} is neither. It is in the folder of a run: name {run}."
    assert said[beside] == f"{records.RULE}; {beside} is neither. Name {speed}."


def test_a_folder_with_several_records_is_asked_about(tmp_path: Path) -> None:
    first = reported.benchmark(tmp_path, name="speed-1.json")
    reported.benchmark(tmp_path, name="speed-2.json")
    reported.write(tmp_path, "other.json", {"no": "record"})
    (problem,) = problems_of(tmp_path)
    assert "holds several records: speed-1.json, speed-2.json." in problem
    assert str(first) in problem
    assert read(first)[0].kind == "benchmark"


def test_a_part_is_not_a_run(tmp_path: Path) -> None:
    folder = reported.training(tmp_path / "run")
    (problem,) = problems_of(folder / "history.json")
    assert problem.endswith(f"It is a part of a run; name the run's folder: {folder}.")


def test_a_run_is_named_once(tmp_path: Path) -> None:
    folder = reported.plan(tmp_path / "run")
    assert problems_of(folder, folder / "plan.json") == [f"{folder / 'plan.json'} is named twice. Name each run once."]


def test_every_problem_of_every_run_is_found(tmp_path: Path) -> None:
    one = changed(tmp_path, "training", "history.json", "{")
    reported.write(one, "slices.json", "{")
    two = changed(tmp_path, "plan", "plan.json", json.dumps(reported.plan_content(format=2)))
    assert len(problems_of(one, tmp_path / "absent", two)) == 4


def test_the_folder_one_is_in_without_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "notes.txt").write_text("nothing")
    monkeypatch.chdir(tmp_path / "here")
    (problem,) = problems_of(Path("."))
    assert "has no record" in problem
