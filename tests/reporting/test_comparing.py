"""Several runs in one page, and which may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import reported
from paging import Tags, text_of

from slicefine.errors import SliceFineError
from slicefine.reporting.run import write

pytestmark = pytest.mark.usefixtures("undrawn")


def compared(tmp_path: Path, *runs: Path) -> str:
    page = write(runs, tmp_path / "both.html")
    content = page.read_text()
    assert Tags(content).open == []
    return text_of(page)


def run(folder: Path, accuracy: float, **changes: Any) -> Path:
    metrics = {"before": {"accuracy": 0.2}, "after": {"accuracy": accuracy}}
    return reported.training(folder, metrics=metrics, **changes)


def test_runs_side_by_side(tmp_path: Path) -> None:
    one, two = run(tmp_path / "one", 0.9), run(tmp_path / "two", 0.8, steps=320)
    reported.write(two, "recipe.yaml", reported.RECIPE.replace("r: 5", "r: 1").replace("/runs/trec", "/runs/other"))
    said = compared(tmp_path, one, two)
    assert "one has the best accuracy on the validation set, 90.0 %; then two 80.0 %." in said
    assert "slices r 5, alternate, every 80, sweep r 1, alternate, every 80, sweep" in said
    assert "steps 640 320" in said
    assert "What differs in their recipes setting one two slice.r 5 1" in said
    assert "/runs/other" not in said


def test_runs_that_end_level_and_runs_without_an_end(tmp_path: Path) -> None:
    three = run(tmp_path / "three", 0.0, status="failed")
    reported.write(three, "record.json", reported.record(metrics={}, status="failed"))
    said = compared(tmp_path, run(tmp_path / "one", 0.9), run(tmp_path / "two", 0.9), three)
    assert "one and two have the best accuracy on the validation set, 90.0 %." in said
    assert "Not finished: three (failed)." in said


def test_validation_sets_that_differ_are_said(tmp_path: Path) -> None:
    two = run(tmp_path / "two", 0.8, data={"validation": {"fingerprint": "other", "examples": 3}})
    assert "Their validation sets are not the same examples" in compared(tmp_path, run(tmp_path / "one", 0.9), two)
    fractions = [
        run(tmp_path / str(count), 0.8, data={"validation": {"fingerprint": "of train", "examples": count}})
        for count in (10, 20)
    ]
    assert "Their validation sets are not the same examples" in compared(tmp_path, *fractions)


def test_runs_without_logs_or_recipes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        reported.write(tmp_path / name, "record.json", reported.record())
    said = compared(tmp_path, tmp_path / "one", tmp_path / "two")
    assert "Nothing was logged, or the log was not kept: one and two." in said
    assert "slices not known not known" in said


@pytest.mark.parametrize(("logged", "smoothed"), [(30, False), (120, True)])
def test_means_are_spoken_of_where_they_are_drawn(logged: int, smoothed: bool, tmp_path: Path) -> None:
    one, two = run(tmp_path / "one", 0.9), run(tmp_path / "two", 0.8)
    reported.write(one, "history.json", reported.history(100, every=5))
    reported.write(two, "history.json", reported.history(logged, every=1))
    said = compared(tmp_path, one, two)
    assert ("Of 60 and more logged losses, means of neighbours are drawn." in said) == smoothed


def test_an_analysis_beside_runs_of_its_model(tmp_path: Path) -> None:
    said = compared(tmp_path, run(tmp_path / "run", 0.9), reported.analysis(tmp_path / "analysis"))
    assert "run and its model" in said
    assert "The hypothesis on this model Of 5 properties" in said
    said = compared(tmp_path, run(tmp_path / "one", 0.9), run(tmp_path / "two", 0.9), tmp_path / "analysis")
    assert "2 runs side by side" in said


def test_an_analysis_of_another_model_is_refused(tmp_path: Path) -> None:
    other = run(tmp_path / "run", 0.9, model="bert-base")
    with pytest.raises(SliceFineError, match="An analysis stands beside runs of its own model") as error:
        compared(tmp_path, other, reported.analysis(tmp_path / "analysis"))
    assert reported.MODEL in str(error.value)
    assert "bert-base" in str(error.value)
    assert not (tmp_path / "both.html").exists()


def test_a_folder_is_the_same_model_by_any_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    analysis = reported.analysis(tmp_path / "a", model={"name": "model"})
    assert "and its model" in compared(tmp_path, run(tmp_path / "run", 0.9, model=str(tmp_path / "model")), analysis)


def test_kinds_that_cannot_be_compared(tmp_path: Path) -> None:
    with pytest.raises(SliceFineError, match="Runs of one kind are compared") as error:
        compared(
            tmp_path, run(tmp_path / "run", 0.9), reported.plan(tmp_path / "plan"), reported.plan(tmp_path / "plan2")
        )
    assert "got 1 training run and 2 plans. Make a page of each kind." in str(error.value)


def test_benchmarks_of_one_theme(tmp_path: Path) -> None:
    speed = reported.benchmark(tmp_path / "speed")
    quality = reported.benchmark(tmp_path / "quality", reported.quality_content())
    with pytest.raises(SliceFineError, match="Benchmarks of one theme are compared") as error:
        compared(tmp_path, speed, quality)
    assert "is of speed" in str(error.value)
    assert "is of quality" in str(error.value)
    other = reported.benchmark(tmp_path / "other", reported.speed_content(status="interrupted"))
    said = compared(tmp_path, speed, other)
    assert "speed: 2 benchmarks side by side" in said
    assert "Not finished: other/speed-xeon-20261129-180000." in said
    assert "full speed/speed-xeon-20261129-180000 105,600" in said
    assert "full other/speed-xeon-20261129-180000 105,600" in said


def test_evaluations(tmp_path: Path) -> None:
    one, two = reported.generation(tmp_path / "one"), reported.generation(tmp_path / "two", average=0.5)
    assert "Over 5 sets, the best first: one 74.0 and two 50.0." in compared(tmp_path, one, two)
    fewer = {"gsm8k": reported.generation_results()["tasks"]["gsm8k"]}
    three = reported.generation(tmp_path / "three", tasks=fewer, average=0.46, status="running")
    said = compared(tmp_path, one, three)
    assert "They share 1 set; averages are over different sets" in said
    assert "Not finished: three (running)." in said


def test_evaluations_of_other_examples_under_one_name(tmp_path: Path) -> None:
    sets = {name: {"fingerprint": "sha256:1"} for name in reported.classification_results()["tasks"]}
    one = reported.classification(tmp_path / "one", sets=sets)
    two = reported.classification(tmp_path / "two", sets=sets)
    three = reported.classification(tmp_path / "three", sets={name: {"fingerprint": "sha256:2"} for name in sets})
    assert "the best first" in compared(tmp_path, one, two)
    assert "averages are over different sets" in compared(tmp_path, one, three)


def test_analyses(tmp_path: Path) -> None:
    judged = [{**one, "verdict": "fails"} for one in reported.verdicts()]
    twin = reported.analysis(tmp_path / "twin", untrained=True, verdicts=judged)
    said = compared(tmp_path, reported.analysis(tmp_path / "model"), twin)
    assert "model: 1 holds, 1 holds partly, 2 fail and 1 was not measured; twin: 5 fail." in said
    assert "Local winners holds 0.92 fails 0.92" in said


def test_plans(tmp_path: Path) -> None:
    recipe = reported.plan_content()["recipe"] | {"slice.r": 1}
    said = compared(
        tmp_path, reported.plan(tmp_path / "one"), reported.plan(tmp_path / "two", recipe=recipe, memory=None)
    )
    assert "At the peak of a step, the least first: one 46.69 GiB and two 46.69 GiB." in said
    assert "slice.r 5 1" in said
