"""The tables of a comparison, from runs whose tables are known."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from slicefine.benchmarking import quality_intervals, quality_tables
from slicefine.benchmarking.cells import Cell, Outcome
from slicefine.benchmarking.methods import method
from slicefine.benchmarking.quality import Comparison
from slicefine.benchmarking.quality_settings import QualitySettings
from slicefine.benchmarking.timing import Measured
from slicefine.benchmarking.variants import Variant

LORA, OURS, BROKEN = "LoRA-r8", "SliceFine-5RC", "prefix"
LABELS = [0, 1] * 50


def outcome(right, *, curve=(), loss=0.5, active=10):
    """A run that has the first `right` of a hundred examples right."""
    predicted = [label if number < right else 1 - label for number, label in enumerate(LABELS)]
    points = [{"step": step, "loss": 1 - score, "accuracy": score} for step, score in curve]
    return Outcome(
        active=active, touched=3 * active, head=2, added=0, total=1000, steps=100, loss=loss, scores={"accuracy": right / 100},
        curve=points, predicted=predicted, labels=LABELS,
    )  # fmt: skip


def cell(task, name, seed, *, rate=1e-3, final=True):
    return Cell(task=task, method=name, learning_rate=rate, seed=seed, steps=100 if final else 25, final=final)


@pytest.fixture
def found():
    tasks = [
        SimpleNamespace(
            name=name,
            steps=None,
            grid_steps=None,
            rate_scale=1.0,
            recipe=SimpleNamespace(task="text-classification", data=SimpleNamespace(name=None)),
        )
        for name in ("one", "two")
    ]
    settings = QualitySettings(suite=".", methods=(OURS, LORA, BROKEN), seeds=2, steps=100)
    variants = [Variant(method=method(name)) for name in (OURS, LORA, BROKEN)]
    summary = {"train": {"examples": 90}, "validation": {"examples": 100}, "classes": ["a", "b"]}
    comparison = Comparison(
        settings=settings,
        tasks=tasks,  # pyright: ignore[reportArgumentType]
        variants={task.name: variants for task in tasks},
        sources={task.name: {"choose": summary, "judge": summary} for task in tasks},
    )
    for task in ("one", "two"):
        for seed, (ours, theirs) in enumerate([(60, 90), (64, 94)]):
            comparison.final[cell(task, OURS, seed)] = outcome(ours, curve=[(50, 0.7), (100, 0.8)])
            comparison.final[cell(task, LORA, seed)] = outcome(theirs, curve=[(50, 0.6), (100, 0.75)], active=20)
        for name in (OURS, LORA):
            comparison.rates[task, name] = 1e-3
            for rate, loss in ((1e-3, 0.4), (3e-3, 0.6)):
                comparison.grid[cell(task, name, 0, rate=rate, final=False)] = outcome(50, loss=loss)
        comparison.failed[task, BROKEN] = "it needs a decoder"
        comparison.timed[task] = Measured(
            arrangement="together", rounds=3, seconds={OURS: [1.0, 1.0, 1.2], LORA: [2.0, 2.0, 9.0]}
        )
    return comparison


def table(found, title):
    return {
        row["method"]: row for row in next(t for t in quality_tables.tables(found) if t.title.startswith(title)).rows
    }


def note(found, title):
    return next(t for t in quality_tables.tables(found) if t.title == title).note


def test_the_posters_table(found):
    rows = table(found, "Scores")
    assert rows[OURS] | {"not measured": ""} == {
        "method": OURS, "#TTPs (active)": 10, "touched": 30, "added": 0,
        "one, accuracy": "62.0 ± 2.8", "two, accuracy": "62.0 ± 2.8", "Avg.": "62.0 ± 2.8", "not measured": "",
    }  # fmt: skip
    assert rows[BROKEN]["not measured"] == "it needs a decoder"
    assert (rows[BROKEN]["one, accuracy"], rows[BROKEN]["Avg."]) == ("x", None)


def test_a_difference_beyond_chance_is_said_and_one_within_it_is_not(found):
    row = table(found, "Against")[OURS]
    assert row[f"mean score - {LORA}"] == pytest.approx(-30)
    assert (row["least, by seed"], row["greatest, by seed"]) == (pytest.approx(-30), pytest.approx(-30))
    assert row["other examples, low"] < -30 < row["other examples, high"] < 0
    assert (row["other seeds, low"], row["other seeds, high"]) == (pytest.approx(-30), pytest.approx(-30))
    assert row["verdict"] == "behind"
    for task in ("one", "two"):
        for seed, right in enumerate((90, 94)):
            found.final[cell(task, OURS, seed)] = outcome(right)
    assert table(found, "Against")[OURS]["verdict"] == "level"


def test_what_other_seeds_may_turn_round_is_level_and_one_seed_says_nothing(found):
    """Far behind with these examples, whichever are drawn; by seed it is -50 and -6."""
    for task in ("one", "two"):
        for seed, (ours, theirs) in enumerate([(40, 90), (84, 90)]):
            found.final[cell(task, OURS, seed)], found.final[cell(task, LORA, seed)] = outcome(ours), outcome(theirs)
    row = table(found, "Against")[OURS]
    assert row["other examples, high"] < 0
    reach = 12.706 * 22  # of Student's t with one degree of freedom, times the error of the mean
    assert row["other seeds, low"] == pytest.approx(-28 - reach, rel=1e-3)
    assert row["other seeds, high"] == pytest.approx(-28 + reach, rel=1e-3)
    assert row["verdict"] == "level"
    for task in ("one", "two"):
        del found.final[cell(task, OURS, 1)]
    row = table(found, "Against")[OURS]
    assert (row["other seeds, low"], row["verdict"], row["seeds"]) == (None, None, 1)


def test_of_a_language_model_less_loss_is_better(found):
    for task in found.tasks:
        task.recipe.task = "causal-lm"
    for run, made in found.final.items():
        loss = 3.0 if run.method == OURS else 4.0
        curve = [{"step": 50, "loss": loss + 1, "perplexity": 90.0}, {"step": 100, "loss": loss, "perplexity": 50.0}]
        scores = {"perplexity": 50.0, "token_accuracy": 0.3}
        found.final[run] = dataclasses.replace(made, loss=loss, scores=scores, curve=curve, predicted=[], labels=[])
    assert table(found, "Scores")[OURS]["one, loss"] == "3.000 ± 0.000"
    assert table(found, "Against")[OURS][f"mean score - {LORA}"] == pytest.approx(-1)
    assert table(found, "Time to")[OURS]["one: steps to 4.0"] == 50
    row = table(found, "one")[OURS]
    assert (row["loss"], row["perplexity"], row["token_accuracy"]) == (3, 50, 30)


def test_scores_beside_the_first_do_not_hang_on_the_reference(found):
    found.final = {
        run: dataclasses.replace(made, scores=made.scores | {"f1": 0.5})
        for run, made in found.final.items()
        if run.method != LORA
    }
    assert table(found, "one")[OURS]["f1"] == 50


def test_of_models_of_two_sizes_both_numbers_are_given(found):
    for seed in (0, 1):
        run = cell("two", OURS, seed)
        found.final[run] = dataclasses.replace(found.final[run], active=1200)
    row = table(found, "Scores")[OURS]
    assert (row["#TTPs (active)"], row["touched"], row["added"]) == ("10 to 1,200", 30, 0)


def test_other_examples_of_one_task_are_drawn_apart_from_those_of_another(found):
    """Two tasks that trend alike by the place of an example: were the same places drawn in both, the mean would vary as one."""
    one, two = (quality_intervals._draws(tuple(LABELS), (0,) * 100, "accuracy", 1, name) for name in ("one", "two"))
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.1
    assert (quality_intervals._draws(tuple(LABELS), (0,) * 100, "accuracy", 1, "one") == one).all()


def test_a_depth_window_is_timed_by_whole_turns(found):
    """Of turns of 1 and of 3 seconds five rounds have three of the first; what it is compared with is of the same four rounds."""
    name = "SliceFine-5RC-w2"
    for task in ("one", "two"):
        found.variants[task] = [*found.variants[task], Variant(method=method(name))]
        seconds = {name: [1.0, 3.0, 1.0, 3.0, 1.0], LORA: [2.0, 6.0, 4.0, 4.0, 9.0]}
        found.timed[task] = Measured(arrangement="together", rounds=5, seconds=seconds)
    assert quality_tables.Tasks(found).paces(found.tasks[0], name) == [0.5, 0.5]
    assert quality_tables.Tasks(found).seconds(found.tasks[0], name) == 5 / 2


def test_times_are_compared_batch_by_batch(found):
    """Of batches of 1, 2 and 9 tokens, say. What one round takes more than usual is not part of all others."""
    found.timed["one"].seconds = {OURS: [0.5, 30.0, 4.5], LORA: [1.0, 2.0, 9.0], "alone": [1.0, 3.0, 5.0]}
    row = table(found, "one")[OURS]
    assert [row[f"a step / {LORA}{end}"] for end in ("", ", min", ", max")] == [0.5, 0.5, 15]
    assert row["ms a step"] == pytest.approx(1000 * 0.5 * 4)
    assert row["minutes of training"] == pytest.approx(100 * 2 / 60)
    assert "the median, and the ends, of ratios on the same batch, timed together" in note(found, "one")
    del found.timed["one"].seconds[LORA]
    row = table(found, "one")[OURS]
    assert (row[f"a step / {LORA}"], row["ms a step"]) == (None, pytest.approx(35_000 / 3))
    assert note(found, "one") == "ms a step: the mean, timed together; minutes: as many steps as a final run has."


def test_in_turns_ratios_have_no_ends(found):
    """Both ran on the same batch, but minutes apart."""
    found.timed["one"] = dataclasses.replace(found.timed["one"], arrangement="in turns")
    row = table(found, "one")[OURS]
    assert [row[f"a step / {LORA}{end}"] for end in ("", ", min", ", max")] == [0.5, None, None]
    assert "the median of ratios on the same batch, timed in turns" in note(found, "one")


def test_a_grid_that_could_not_go_on_is_told(found):
    found.ended["one", OURS] = "0.03: out of memory"
    assert table(found, "one")[OURS]["not measured"] == "its grid ends before 0.03: out of memory"


def test_why_there_are_no_times(found):
    found.timed["one"] = Measured(
        arrangement="together", rounds=3, failed={OURS: "out of memory", BROKEN: "out of memory"}
    )
    assert table(found, "one")[OURS]["not measured"] == "no times: out of memory"
    assert table(found, "one")[BROKEN]["not measured"] == "it needs a decoder"


def test_time_to_a_score_is_steps_by_the_time_of_a_step(found):
    rows = table(found, "Time to")
    assert rows[OURS]["one: steps to 75.0"] == 100
    assert rows[OURS]["one: time / LoRA-r8"] == pytest.approx(100 * 1.0 / (100 * 2.0))
    assert rows[LORA]["one: time / LoRA-r8"] == 1
    assert rows[OURS]["mean of time"] == pytest.approx(0.5)
    for task in ("one", "two"):
        for seed in (0, 1):
            found.final[cell(task, OURS, seed)] = outcome(60, curve=[(50, 0.7), (100, 0.74)])
    assert table(found, "Time to")[OURS]["one: steps to 75.0"] == "never"
    assert table(found, "Time to")[OURS]["mean of time"] is None


def test_a_rate_at_the_end_of_its_grid_is_marked_and_runs_that_diverged_are_counted(found):
    found.final[cell("one", OURS, 1)] = Outcome(
        active=10,
        touched=30,
        head=2,
        added=0,
        total=1000,
        steps=7,
        loss=None,
        scores={},
        curve=[],
        diverged="the loss is nan",
    )
    row = table(found, "one")[OURS]
    assert (row["learning rate"], row["of the grid"]) == (1e-3, "lowest")
    assert (row["accuracy"], row["std"], row["min"], row["max"]) == (60, None, 60, 60)
    assert row["not measured"] == "1 of 2 runs diverged"
    seconds = 13 / 3 / 2  # half of the mean of LoRA
    assert (row["ms a step"], row["minutes of training"]) == (
        pytest.approx(1000 * seconds),
        pytest.approx(100 * seconds / 60),
    )


def test_seeds_are_compared_with_the_same_seeds_where_a_run_has_no_score(found):
    """Every seed is equal on both sides, and runs of seed 0 diverged, or were never made."""
    diverged = Outcome(
        active=10, touched=30, head=2, added=0, total=1000, steps=7, loss=None, scores={}, curve=[], diverged="the loss is nan"
    )  # fmt: skip
    for task in ("one", "two"):
        for name in (OURS, LORA):
            for seed, right in enumerate((20, 60, 80)):
                found.final[cell(task, name, seed)] = outcome(right)
    found.settings = dataclasses.replace(found.settings, seeds=3)
    found.final[cell("one", OURS, 0)] = diverged
    row = table(found, "Against")[OURS]
    assert (row["least, by seed"], row["greatest, by seed"], row["seeds"]) == (0, 0, 2)
    assert (row[f"mean score - {LORA}"], row["other examples, low"], row["other examples, high"]) == (0, 0, 0)
    assert (row["other seeds, low"], row["other seeds, high"]) == (0, 0)
    assert row["verdict"] == "level"
    scores = table(found, "Scores")[OURS]
    assert scores["Avg."] == "70.0 ± 14.1"
    assert scores["not measured"] == "one: 2 of 3 seeds, 1 diverged"

    del found.final[cell("one", OURS, 0)], found.final[cell("two", LORA, 1)]
    row = table(found, "Against")[OURS]
    assert (row["least, by seed"], row["greatest, by seed"], row["seeds"]) == (0, 0, 1)
    assert table(found, "Scores")[OURS]["not measured"] == "one: 2 of 3 seeds"
    assert table(found, "Scores")[LORA]["not measured"] == "two: 2 of 3 seeds"


def test_nothing_found_yet_is_no_table(found):
    found.grid, found.final, found.failed = {}, {}, {}
    assert quality_tables.tables(found) == []
