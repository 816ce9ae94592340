"""From names of runs to a file: where it goes, what is refused, and that nothing is half-written."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import reported

from slicefine.cli.main import main
from slicefine.errors import SliceFineError
from slicefine.reporting import extras, run
from slicefine.reporting.run import write, write_beside

pytestmark = pytest.mark.usefixtures("undrawn")


def test_where_pages_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = reported.plan(tmp_path / "one"), reported.plan(tmp_path / "two")
    assert write([one]) == one / "report.html"
    assert write([one, two]) == Path("report.html")
    speed = reported.benchmark(tmp_path / "bench")
    assert write([speed]) == speed.with_suffix(".html"), "a folder may have several"
    assert write([one], tmp_path / "other.HTML") == tmp_path / "other.HTML"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench", "one", "other.HTML", "report.html", "two"]
    assert sorted(path.name for path in one.iterdir()) == ["plan.json", "report.html"]


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("run", "`--output` is a file; run is a folder. Name a file in it: run/report.html."),
        ("page.txt", "`--output` is an HTML file, whose name ends in .html; got page.txt."),
        ("run/plan.json", "whose name ends in .html; got run/plan.json"),
        ("nowhere/page.html", "`--output` is a file in a folder that exists; there is no folder nowhere."),
    ],
)
def test_outputs_that_are_refused(output: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reported.plan(tmp_path / "run")
    before = (tmp_path / "run/plan.json").read_text()
    with pytest.raises(SliceFineError) as error:
        write([Path("run")], Path(output))
    assert says in str(error.value)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["plan.json"]
    assert (tmp_path / "run/plan.json").read_text() == before


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    one = reported.training(tmp_path / "one")
    reported.write(one, "history.json", "{")
    with pytest.raises(SliceFineError, match="slicefine report: 3 problems") as error:
        write([one, tmp_path / "absent"], tmp_path / "page.txt")
    assert all(f"\n  {number}. " in str(error.value) for number in (1, 2, 3))


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = reported.plan(tmp_path / "run")

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refused)
    with pytest.raises(SliceFineError, match=r"report\.html cannot be written \(Permission denied\)"):
        write([folder])


def test_a_page_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = reported.plan(tmp_path / "run")
    page = write([folder])
    before = page.read_bytes()
    reported.plan(folder, steps=1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SliceFineError, match=r"cannot be written \(No space left on device\)"):
        write([folder])
    assert page.read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["plan.json", "report.html"]


def test_a_page_in_the_way(tmp_path: Path) -> None:
    folder = reported.plan(tmp_path / "run")
    (folder / "report.html").mkdir()
    with pytest.raises(SliceFineError, match=r"report\.html cannot be written"):
        write([folder])


# ---------------------------------------------------------------- records that were changed by hand


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key and index in a JSON value; of a list the first alone."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key)
            yield from places(inner, (*path, key))
    elif isinstance(value, list) and value:
        yield (*path, 0)
        yield from places(value[0], (*path, 0))


def spoil(content: Any, path: tuple[Any, ...], draw: random.Random) -> Any:
    """A copy with something else at a place, or with nothing there."""
    made = copy.deepcopy(content)
    inside = made
    for key in path[:-1]:
        inside = inside[key]
    if draw.random() < 0.4:
        del inside[path[-1]]
    else:
        inside[path[-1]] = draw.choice(
            [None, "text", -1, 0, 10**400, 1.5, [], {}, [[]], {"a": 1}, True, [1, 2, 3], float("nan")]
        )
    return made


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((kind, name) for kind, name in (("training", n) for n in ("record.json", "history.json", "slices.json", "memory.json"))),
        ("classification", "results.json"),
        ("generation", "results.json"),
        ("analysis", "analysis.json"),
        ("benchmark", "speed-xeon-20261129-180000.json"),
        ("plan", "plan.json"),
    ],
)  # fmt: skip
def test_a_record_that_was_changed_is_a_page_or_an_error_in_words(kind: str, name: str, tmp_path: Path) -> None:
    named = reported.MAKE[kind](tmp_path / "run")
    folder = named if named.is_dir() else named.parent
    content = json.loads((folder / name).read_text())
    if kind == "analysis":
        content["stages"]["balance"]["weights"] = content["stages"]["balance"]["weights"][:9]
        content["stages"]["winners"]["trials"] = content["stages"]["winners"]["trials"][:9]
    draw = random.Random(name)
    every = list(places(content))
    outcomes = set()
    for path in draw.sample(every, min(len(every), 60)):
        reported.write(folder, name, json.dumps(spoil(content, path, draw)))
        try:
            write([named])
            outcomes.add("page")
        except SliceFineError as error:
            outcomes.add(str(error))
    assert "page" in outcomes
    assert all(name in outcome for outcome in outcomes - {"page"})


@pytest.mark.parametrize("recipe", ["", "just text", "[1, 2", "a: &a [*a]", "slice: 3", "slice: {r: 1}"])
def test_a_recipe_that_was_changed_is_shown_as_it_is(recipe: str, tmp_path: Path) -> None:
    folder = reported.training(tmp_path / "run")
    reported.write(folder, "recipe.yaml", recipe)
    assert recipe.replace("&", "&amp;") in write([folder]).read_text()


# ---------------------------------------------------------------- at the end of other commands


def test_what_keeps_a_page_from_being_made_is_said_and_nothing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    folder = reported.plan(tmp_path / "run")
    assert write_beside(folder, said.append) == folder / "report.html"
    assert said == []
    assert write_beside(tmp_path / "absent", said.append) is None
    assert said.pop().startswith("No report.html. slicefine report: RUN is a folder that slicefine train")

    def broken(*_: object) -> None:
        raise RuntimeError("a mistake of ours")

    with monkeypatch.context() as changed:
        changed.setattr(run, "html", broken)
        assert write_beside(folder, said.append) is None
    assert said.pop() == "No report.html. RuntimeError: a mistake of ours"
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "jinja2" else object())
    assert write_beside(folder, said.append) is None
    assert said == ["No report.html. A report needs jinja2: pip install 'slicefine[report]'"]


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(
        SliceFineError, match=r"A report needs jinja2, matplotlib, pyyaml: pip install 'slicefine\[report\]'"
    ):
        write([tmp_path])


# ---------------------------------------------------------------- the command


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = reported.plan(tmp_path / "one"), reported.plan(tmp_path / "two")
    assert main(["report", str(one)]) == 0
    assert capsys.readouterr().out == f"{one / 'report.html'}\n"
    assert main(["report", str(one), str(two), "--output", str(tmp_path / "both.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'both.html'}\n"
    assert main(["report"]) == 2
    assert "RUN is missing." in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2
    assert "has no record (record.json" in capsys.readouterr().err
    assert main(["report", str(one), "--out", "x.html"]) == 2
    assert "no argument '--out' here. Did you mean '--output'?" in capsys.readouterr().err


def test_the_flags_are_a_decision(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["report", "--help"])
    printed = capsys.readouterr().out
    assert {word for word in printed.replace("[", " ").replace("]", " ").split() if word.startswith("--")} == {
        "--help",
        "--output",
    }


def test_a_page_is_made_without_torch(tmp_path: Path) -> None:
    reported.training(tmp_path / "run")
    code = (
        "import sys; from slicefine.cli.main import main; code = main(['report', sys.argv[1]]); "
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'accelerate'} & set(sys.modules); print(heavy); sys.exit(code or bool(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
