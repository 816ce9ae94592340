"""Which examples are trained on, which choose, and which judge."""

import json
import re

import pytest

from slicefine.benchmarking.suite import load_suite
from slicefine.errors import SliceFineError


def write(folder, *names, pair=False):
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        row = {"text": f"a text {number}", "label": 0} | ({"text_pair": "another"} if pair else {})
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")


def test_what_judges_never_chooses(tmp_path):
    write(tmp_path / "both", "train", "validation", "test")
    write(tmp_path / "tested", "train", "test")
    write(tmp_path / "validated", "train", "validation")
    both, tested, validated = load_suite(tmp_path, held_out=0.2)
    assert (both.recipe.data.validation, both.test) == (
        str(tmp_path / "both/validation.jsonl"),
        str(tmp_path / "both/test.jsonl"),
    )
    assert (tested.recipe.data.validation, tested.test) == (0.2, str(tmp_path / "tested/test.jsonl"))
    assert (validated.recipe.data.validation, validated.test) == (0.2, str(tmp_path / "validated/validation.jsonl"))
    for task in (both, tested, validated):
        assert task.judging.data.validation == task.test
        assert task.judging.data.train == task.recipe.data.train


def test_a_folder_named_as_a_set_has_its_scores_and_pairs_are_seen(tmp_path):
    write(tmp_path / "mrpc", "train", "test", pair=True)
    write(tmp_path / "mine", "train", "test")
    mine, mrpc = load_suite(tmp_path)
    assert (mrpc.recipe.data.name, mrpc.recipe.data.text_pair) == ("mrpc", "text_pair")
    assert (mine.recipe.data.name, mine.recipe.data.text_pair) == (None, None)


def test_flags_win_over_every_recipe(tmp_path):
    write(tmp_path / "one", "train", "test")
    write(tmp_path / "two", "train", "test")
    tasks = load_suite(tmp_path, {"data.max_length": 17, "training.bf16": True})
    assert {(task.recipe.data.max_length, task.recipe.training.bf16) for task in tasks} == {(17, True)}


def test_a_file_names_recipes_and_paths_beside_it(tmp_path):
    write(tmp_path / "sets" / "one", "train", "test")
    (tmp_path / "suite.yaml").write_text(
        "tasks:\n"
        "  one: {recipe: minilm-trec, data.train: sets/one/train.jsonl, test: sets/one/test.jsonl}\n"
        "  hub: {recipe: roberta-base-glue-mrpc}\n",
        encoding="utf-8",
    )
    one, hub = load_suite(tmp_path / "suite.yaml")
    assert one.recipe.data.train == str(tmp_path / "sets/one/train.jsonl")
    assert one.test == str(tmp_path / "sets/one/test.jsonl")
    assert (hub.recipe.data.train, hub.recipe.data.validation, hub.test) == ("nyu-mll/glue", 0.1, "validation")


def test_a_place_without_a_suite(tmp_path):
    """What else lies beside it, a script say, is none that could have been meant."""
    for name in ("fours.sh", "four.yaml"):
        (tmp_path / name).touch()
    for name, says in (("four.yml", "nothing there. Did you mean 'four.yaml'?"), ("fours.sh", "neither a folder nor")):
        with pytest.raises(SliceFineError, match=re.escape(f"{tmp_path / name} is {says}")):
            load_suite(tmp_path / name)


def test_every_problem_of_every_task_at_once(tmp_path):
    write(tmp_path / "alone", "train")
    write(tmp_path / "untrained", "test")
    write(tmp_path / "fine", "train", "test")
    with pytest.raises(SliceFineError) as caught:
        load_suite(tmp_path)
    assert "Task alone" in str(caught.value)
    assert "no split beside train.jsonl" in str(caught.value)
    assert "Task untrained" in str(caught.value)
    assert "no training examples" in str(caught.value)
    assert "fine" not in str(caught.value).replace("defined", "")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("tasks: {}\n", "`tasks` maps the name of each task to its settings"),
        ("task: {}\n", "a suite has the one key `tasks`; got task."),
        ("tasks: {a: 3}\n", "Task a: its settings are a mapping"),
        ("tasks: {a: {recipe: minilm-trek}}\n", "There is no recipe 'minilm-trek'. Did you mean 'minilm-trec'?"),
        (
            "tasks: {a: {recipe: minilm-trec, steps: 7}}\n",
            "Task a: `steps` is a whole number, at least 8; got 7.",
        ),
        (
            "tasks: {a: {recipe: minilm-trec, grid_steps: half}}\n",
            "Task a: `grid_steps` is a whole number, at least 1; got 'half'.",
        ),
        (
            "tasks: {a: {recipe: minilm-trec, rate_scale: no}}\n",
            "Task a: `rate_scale` is a number above 0; got False.",
        ),
        ("tasks: {a: {recipe: minilm-trec, slice.r: 3}}\n", "`slice.r` is decided by the benchmark"),
        (
            "tasks: {a: {recipe: minilm-trec, training.learning_rate: 1.0e-3}}\n",
            "`training.learning_rate` is decided by the benchmark",
        ),
        (
            "tasks: {a: {recipe: minilm-trec, data.trian: x.jsonl}}\n",
            "there is no setting 'data.trian'. Did you mean 'data.train'?",
        ),
        ("tasks: {a: {recipe: minilm-trec, data.train: x.jsonl, data.validation: 0.1}}\n", "no split to judge by"),
    ],
)
def test_a_suite_file_that_cannot_be(tmp_path, content, part):
    (tmp_path / "suite.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(SliceFineError) as caught:
        load_suite(tmp_path / "suite.yaml")
    assert part in str(caught.value)


def test_a_folder_of_data_without_a_split_is_a_problem_like_others(tmp_path):
    write(tmp_path / "fine", "train", "test")
    write(tmp_path / "alone", "train")
    write(tmp_path / "misnamed", "training", "tests")
    (tmp_path / "pictures/training/cats").mkdir(parents=True)
    (tmp_path / "pictures/training/cats/1.png").touch()
    write(tmp_path / ".ipynb_checkpoints", "train-checkpoint")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/about.md").touch()
    (tmp_path / "notes/chart.svg").touch()
    with pytest.raises(SliceFineError) as caught:
        load_suite(tmp_path)
    said = str(caught.value)
    assert "3 problems" in said
    assert (
        f"Task misnamed: {tmp_path / 'misnamed'} has data, and nothing in it is called train, validation, test" in said
    )
    assert "there are tests.jsonl, training.jsonl. Rename them" in said
    assert "Task pictures" in said
    assert "there are training. Rename" in said


def test_a_suite_that_is_not_there_or_empty(tmp_path):
    with pytest.raises(SliceFineError, match="`--suite` is a folder of data sets or a YAML file"):
        load_suite(tmp_path / "missing")
    with pytest.raises(SliceFineError, match="no folder in it has train"):
        load_suite(tmp_path)
