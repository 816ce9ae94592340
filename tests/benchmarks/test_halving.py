from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml
from classifiers import reviews, text_model, write_table


@pytest.fixture
def model(tmp_path: Path) -> Path:
    text_model(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    tasks = {}
    for number, task in enumerate(("first", "second")):
        first = 1000 * number
        tables = {"train": range(first, first + 40), "test": range(first + 100, first + 108)}
        for part, rows in tables.items():
            write_table(tmp_path / f"{task}-{part}.jsonl", reviews(rows))
        named = {"recipe": "minilm-text-classification", "data.max_length": 16}
        tasks[task] = named | {"data.train": f"{task}-train.jsonl", "test": f"{task}-test.jsonl"}
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump({"tasks": tasks}))
    return path


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Spare the seconds in which another process imports everything; returns the runs that are made."""
    import halving

    made: list[object] = []

    def here(run, jobs, **_):
        for job in jobs:
            made.append(job)
            yield job, run(job)

    monkeypatch.setattr(halving, "in_processes", here)
    return made


def test_the_better_half_goes_on_until_one_is_left_and_no_run_is_made_twice(
    tmp_path, model, suite, in_this_process, monkeypatch
):
    import halving

    monkeypatch.setattr(halving, "RATES", halving.RATES[:2])
    arguments = f"--suite {suite} --model {model} --shapes SliceFine-2R SliceFine-2C --each 2 --steps 2 --rungs 2 --batch 4 --held-out 0.2"
    arguments = [*arguments.split(), "--cells", str(tmp_path / "cells"), "--output", str(tmp_path / "out")]
    halving.main(arguments)
    (path,) = (tmp_path / "out").glob("halving-*.json")
    figures, *rungs = json.loads(path.read_text())["tables"]
    assert [len(rung["rows"]) for rung in rungs] == [4, 2]
    for rung, following in zip(rungs, [*rungs[1:], None], strict=True):
        means = [row["loss / least, mean"] for row in rung["rows"]]
        assert means == sorted(means)
        kept = {(row["setting"], row["learning rate"]) for row in rung["rows"] if row["goes on"]}
        assert kept == {(row["setting"], row["learning rate"]) for row in (following or {"rows": []})["rows"]}
        for row in rung["rows"]:
            least = [min(other[task] for other in rung["rows"]) for task in ("first", "second")]
            ratio = math.sqrt(row["first"] / least[0] * row["second"] / least[1])
            assert row["loss / least, mean"] == pytest.approx(ratio)
    winner = rungs[-1]["rows"][0]
    assert [winner["setting"] in row["figure"] for row in figures["rows"]] == [True, True]
    assert len(in_this_process) == 2 * (4 + 2) + 2 * (2 + 1)  # slices, and LoRA's rates
    assert {job.steps for _, job in in_this_process} == {2, 4}

    made = len(in_this_process)
    halving.main(arguments)
    assert len(in_this_process) == made
    assert json.loads(path.read_text())["tables"] == [figures, *rungs]

    # Other examples are other runs, at rates of the task's own.
    write_table(tmp_path / "first-train.jsonl", reviews(range(1, 41)))
    tasks = yaml.safe_load(suite.read_text())
    tasks["tasks"]["first"]["rate_scale"] = 0.5
    suite.write_text(yaml.safe_dump(tasks))
    halving.main(arguments)
    again = [job for _, job in in_this_process[made:]]
    assert {job.task.name for job in again} == {"first"}
    assert {job.learning_rate for job in again} <= {rate / 2 for rate in halving.RATES}


def test_settings_are_drawn_once_each_and_say_nothing_of_moves_where_there_are_none():
    import halving

    found = halving.drawn(halving.SHAPES, 20, 400, 0)
    assert len(set(found)) == len(found) == 80
    assert found == halving.drawn(halving.SHAPES, 20, 400, 0) != halving.drawn(halving.SHAPES, 20, 400, 1)
    staying = [one.variant for one in found if one.variant.slide_every is None]
    assert staying
    assert {(one.order, one.moments, one.rewarm) for one in staying} == {("sweep", halving.RESET, 0)}
    assert {one.variant.slide_every for one in found} == {None, halving.EIGHTH, 25}


@pytest.mark.parametrize(
    ("own", "more", "says"),
    [
        ({"steps": 8}, [], "no `steps` and `grid_steps` for first"),
        ({}, ["--each", "137"], "a shape has 136 settings; got --each 137"),
    ],
)
def test_what_halving_cannot_do_is_refused(suite, model, tmp_path, capsys, own, more, says):
    import halving

    tasks = yaml.safe_load(suite.read_text())
    tasks["tasks"]["first"] |= own
    suite.write_text(yaml.safe_dump(tasks))
    with pytest.raises(SystemExit):
        halving.main(["--suite", str(suite), "--model", str(model), "--cells", str(tmp_path / "cells"), *more])
    assert says in capsys.readouterr().err
    assert not (tmp_path / "cells").exists()


def test_what_diverges_comes_last():
    import halving

    first, second = halving.drawn(["SliceFine-2R"], 2, 16, 0)
    found = halving.ratios({first: [1.0, math.inf], second: [2.0, 3.0]})
    assert found == {first: math.inf, second: pytest.approx(math.sqrt(2))}
