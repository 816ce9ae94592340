"""A comparison from its suite to its runs, which are not made here."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarked import quality_of
from classifiers import reviews, text_model, write_table
from parrot import make_tokenizer, random_llama
from safetensors.torch import load_file, save_file

from slicefine.benchmarking import quality, quality_report, quality_tables, quality_timing
from slicefine.benchmarking.cells import Cells, Outcome
from slicefine.benchmarking.fitting import Job, attach_to, prepare
from slicefine.benchmarking.methods import method
from slicefine.benchmarking.quality import Comparison, compare, decisive, model_fingerprint
from slicefine.benchmarking.quality_settings import QualitySettings
from slicefine.benchmarking.results import Report
from slicefine.benchmarking.suite import load_suite
from slicefine.benchmarking.timing import Measured
from slicefine.benchmarking.variants import Variant
from slicefine.errors import SliceFineError
from slicefine.training.checked import NotFiniteError

OUTCOME = Outcome(
    active=10, touched=30, head=2, added=0, total=100, steps=8, loss=0.25, scores={"accuracy": 0.9},
    curve=[{"step": 8, "loss": 0.3, "accuracy": 0.8}], predicted=[0, 1], labels=[0, 0],
)  # fmt: skip


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., QualitySettings]:
    """Of a suite of one set, whose model is beside it."""
    return quality_of(tmp_path, methods=("SliceFine-1R", "LoRA-r8"))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs and timings that were made, by name."""
    found: list[str] = []

    def at_once(run: Any, jobs: Sequence[Any], **how: Any) -> Iterator[tuple[Any, Outcome]]:
        for job in jobs:
            found.append(job[0].words)
            yield job, OUTCOME

    def measure(task: Any, *given: Any) -> Measured:
        found.append(f"time of {task.name}")
        return Measured(arrangement="together", rounds=2, seconds={})

    monkeypatch.setattr(quality, "in_processes", at_once)
    monkeypatch.setattr(quality_timing, "_measure", measure)
    return found


def compared(settings: QualitySettings) -> Comparison:
    return compare(settings, lambda found: None)


# ------------------------------------------------------------- what is not made again


def test_nothing_is_made_twice_unless_the_model_has_changed(
    settings: Callable[..., QualitySettings], made: list[str], tmp_path: Path
) -> None:
    compared(settings(rounds=2))
    first = list(made)
    assert len(first) == 5  # a time; two runs that choose; two that are final
    compared(settings(rounds=2))
    assert made == first
    weights = tmp_path / "model/model.safetensors"
    values = load_file(weights)
    save_file({name: value + 1 for name, value in values.items()}, weights, {"format": "pt"})
    compared(settings(rounds=2))
    assert made == first * 2
    save_file(values, weights, {"format": "pt"})
    compared(settings(rounds=2))
    assert made == first * 2


def test_the_fingerprint_of_a_model_is_of_what_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = text_model(tmp_path / "model")
    before = model_fingerprint(str(folder))
    (folder / "README.md").write_text("About it.")
    (folder / "runs").mkdir()
    assert model_fingerprint(str(folder)) == before
    (folder / "vocab.txt").write_text((folder / "vocab.txt").read_text() + "\nnew")
    assert model_fingerprint(str(folder)) != before
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "cache/models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("1" * 40)
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / ("1" * 40))
    assert model_fingerprint("owner/name") == "1" * 40


def test_a_run_that_chooses_is_no_longer_than_a_final_one(
    settings: Callable[..., QualitySettings], tmp_path: Path
) -> None:
    suite = tmp_path / "suite.yaml"
    sets = f"data.train: {tmp_path}/sets/words/train.jsonl, test: {tmp_path}/sets/words/test.jsonl"
    suite.write_text(f"tasks: {{words: {{recipe: minilm-text-classification, {sets}, grid_steps: 9}}}}")
    with pytest.raises(SliceFineError, match="Task words: `grid_steps` is at most the steps of a final run, 8; got 9"):
        compared(settings(suite=str(suite)))


# -------------------------------------------------------------------- the methods


def test_ranks_that_are_named_stay_when_those_of_others_are_chosen(
    settings: Callable[..., QualitySettings], made: list[str]
) -> None:
    """1R of this model trains 2 x (5 x 32 + 48) = 416 parameters, LoRA of rank 1 has 928, HRA of rank 2 twice 416."""
    asked = ("SliceFine-1R", "LoRA-r4", "LoRA-r8", "LoRA", "HRA-r6", "HRA")
    found = compared(settings(methods=asked, equal_parameters="SliceFine-1R"))
    names = [one.name for one in found.variants["words"]]
    assert sorted(names) == sorted(["SliceFine-1R", "LoRA-r4", "LoRA-r8", "LoRA-r1", "HRA-r6", "HRA-r2"])


def test_ranks_that_differ_from_model_to_model_are_no_rows(
    settings: Callable[..., QualitySettings], made: list[str], tmp_path: Path
) -> None:
    text_model(tmp_path / "deep", num_hidden_layers=9)
    of = f"recipe: minilm-text-classification, data.train: {tmp_path}/sets/words/train.jsonl, test: {tmp_path}/sets/words/test.jsonl"
    tasks = [f"{name}: {{{of}, model.name: {tmp_path}/{model}}}" for name, model in (("one", "model"), ("two", "deep"))]
    suite = tmp_path / "suite.yaml"
    suite.write_text(f"tasks: {{{', '.join(tasks)}}}")
    asked = {"suite": str(suite), "overrides": {"data.max_length": 16}, "methods": ("full", "VeRA")}
    with pytest.raises(SliceFineError, match="`--equal_parameters full` chooses other ranks for other models"):
        compared(settings(**asked, equal_parameters="full"))


def test_a_rewarming_of_another_length_is_another_run(settings: Callable[..., QualitySettings]) -> None:
    """A run that chooses has 250 steps of 500 or of 1000: what rewarms in it for 5 steps, or for 3, is not the same."""
    given = settings()
    (task,) = load_suite(given.suite, given.overrides)
    keys = []
    for rewarm, final_steps in ((0, 500), (0, 1000), (10, 500), (10, 1000)):
        variant = Variant(method=method("SliceFine-1R"), slide_every=final_steps // 8, rewarm=rewarm)
        job = Job(
            task=task, variant=variant, learning_rate=1e-3, seed=0, steps=250, final_steps=final_steps, evaluations=1, final=False,
        )  # fmt: skip
        keys.append({key: value for key, value in decisive(job, "sha256:1", {}).items() if key != "slide_every"})
    assert keys[0] == keys[1]
    assert [key.get("rewarm") for key in keys] == [None, None, 5, 3]


def test_a_task_may_have_a_length_and_lower_rates_of_its_own(
    settings: Callable[..., QualitySettings], made: list[str], tmp_path: Path
) -> None:
    suite = tmp_path / "suite.yaml"
    of = f"recipe: minilm-text-classification, data.train: {tmp_path}/sets/words/train.jsonl, test: {tmp_path}/sets/words/test.jsonl"
    suite.write_text(f"tasks: {{usual: {{{of}}}, hard: {{{of}, steps: 20, grid_steps: 15, rate_scale: 0.3}}}}")
    found = compared(settings(suite=str(suite), methods=("LoRA-r8",), learning_rates=(1e-3, 2e-3)))
    assert [(cell.task, cell.steps, cell.learning_rate) for cell in found.grid] == [
        ("usual", 4, 1e-3), ("usual", 4, 2e-3), ("hard", 15, 3e-4), ("hard", 15, 6e-4),
    ]  # fmt: skip
    assert [(cell.task, cell.steps) for cell in found.final] == [("usual", 8), ("hard", 20)]
    (rows,) = (table.rows for table in quality_tables.tables(found) if table.title == "The examples")
    assert [(row["steps"], row["steps to choose a rate"]) for row in rows] == [(8, 4), (20, 15)]


def test_what_others_are_compared_with_stays_beside_the_one_of_equal_size(
    settings: Callable[..., QualitySettings], made: list[str]
) -> None:
    found = compared(settings(methods=("SliceFine-1R", "LoRA"), equal_parameters="SliceFine-1R"))
    assert [one.name for one in found.variants["words"]] == ["LoRA-r8", "SliceFine-1R", "LoRA-r1"]
    assert "LoRA-r8" in [one.name for one in settings().known_methods]
    assert [one.name for one in compared(settings(methods=("LoRA", "full"))).variants["words"]] == ["LoRA-r8", "full"]


# ------------------------------------------------------------------- the examples


def test_some_examples_that_are_known_from_training_are_counted_and_many_are_refused(
    settings: Callable[..., QualitySettings], made: list[str], tmp_path: Path
) -> None:
    train, others = reviews(range(20)), reviews(range(100, 110))
    test = tmp_path / "sets/words/test.jsonl"
    same = [row | {"text": f" {row['text'].upper()}!"} for row in train]
    write_table(test, [*same[:2], *others[2:]])
    found = compared(settings())
    assert found.seen == {"words": 2}
    (row,) = next(table.rows for table in quality_tables.tables(found) if table.title == "The examples")
    assert (row["judge"], row["of these, trained on or choose"]) == (20, 2)
    write_table(test, [*same[:3], *others[3:]])
    with pytest.raises(SliceFineError, match=r"at most 10% .*; 3 of the 20 in .*test\.jsonl are") as caught:
        compared(settings())
    assert f"Leave them out of {tmp_path / 'sets/words/train.jsonl'}" in str(caught.value)


def test_examples_that_choose_do_not_judge_either(
    settings: Callable[..., QualitySettings], made: list[str], tmp_path: Path
) -> None:
    others = reviews(range(100, 110))
    write_table(tmp_path / "sets/words/validation.jsonl", [*reviews(range(50, 55)), *others[:6]])
    with pytest.raises(SliceFineError, match="6 of the 20"):
        compared(settings())


# -------------------------------------------------------------------- what is written


@pytest.mark.parametrize(
    ("place", "says"), [("a-file", "is a folder; {} is a file."), ("a-file/x", "nothing can be made in {}")]
)
@pytest.mark.parametrize("flag", ["cells", "output", "board"])
def test_folders_that_cannot_be_written_are_refused_before_anything_is_read(
    settings: Callable[..., QualitySettings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flag: str,
    place: str,
    says: str,
) -> None:
    (tmp_path / "a-file").write_text("mine")
    monkeypatch.setattr(quality_report, "compare", lambda *given: pytest.fail("it was begun"))
    with pytest.raises(SliceFineError) as caught:
        quality_report.run(settings(**{flag: str(tmp_path / place)}), "slicefine bench quality")
    assert f"`--{flag}` is a folder" in str(caught.value)
    assert says.format(tmp_path / place) in str(caught.value)
    assert (tmp_path / "a-file").read_text() == "mine"


def test_a_task_whose_name_has_a_slash_is_timed_and_kept(
    settings: Callable[..., QualitySettings], made: list[str], tmp_path: Path
) -> None:
    given = settings(rounds=1)
    (task,) = load_suite(given.suite, given.overrides)
    task = dataclasses.replace(task, name="glue/words")
    for _ in range(2):
        quality_timing.measured(Cells(tmp_path / "cells"), task, "sha256:1", [], given, 1)
    assert made == ["time of glue/words"]
    (kept,) = (tmp_path / "cells").iterdir()
    assert kept.name.startswith("glue-words-times-")


def test_times_of_another_machine_or_without_enough_memory_are_measured_again(
    settings: Callable[..., QualitySettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, count = settings(rounds=1), 0
    (task,) = load_suite(given.suite, given.overrides)

    def measure(*_: Any) -> Measured:
        nonlocal count
        count += 1
        return Measured(
            arrangement="together",
            rounds=1,
            failed={"full": "out of memory"} if count == 1 else {"prefix": "it needs a decoder"},
        )

    monkeypatch.setattr(quality_timing, "_measure", measure)
    for times in (1, 2, 2):
        quality_timing.measured(Cells(tmp_path / "cells"), task, "sha256:1", [], given, 1)
        assert count == times
    other = quality_timing.hardware() | {"cpu": "another"}
    monkeypatch.setattr(quality_timing, "hardware", lambda: other)
    quality_timing.measured(Cells(tmp_path / "cells"), task, "sha256:1", [], given, 1)
    assert count == 3


def test_a_step_is_timed_as_the_trainer_makes_it(settings: Callable[..., QualitySettings]) -> None:
    """As many batches, averaged, clipped as the recipe says, by the trainer's own optimizer."""
    given = settings(rounds=2)
    more = {
        "training.gradient_accumulation_steps": 3,
        "training.max_grad_norm": 0.0,
        "training.per_device_train_batch_size": 4,
    }
    (task,) = load_suite(given.suite, given.overrides | more)
    batches = quality_timing._batches(task, given, "cpu")
    assert len(batches) == 3 * 2
    step = quality_timing._Step(task, Variant(method=method("full")), given, batches, "cpu")
    step._optimizer = torch.optim.SGD(step._attached.trainable, lr=0.0)
    gradients: list[torch.Tensor] = []
    name = "classifier.weight"
    weight = dict(step._attached.model.named_parameters())[name]
    weight.register_post_accumulate_grad_hook(lambda p: gradients.append(p.grad.clone()))
    step._attached.model.eval()
    step(1)
    assert len(gradients) == 3
    alone = [torch.autograd.grad(step._attached.model(**batch).loss, weight)[0] for batch in batches[3:6]]
    torch.testing.assert_close(gradients[-1], torch.stack(alone).mean(0))
    assert quality_timing._Step(task, Variant(method=method("full")), given, batches, "cpu")._optimizer.defaults[
        "fused"
    ]


def test_a_timed_step_is_checked_as_one_of_training_is(settings: Callable[..., QualitySettings]) -> None:
    """The norm of all gradients takes time, of many gradients the most."""
    given = settings(rounds=1)
    (task,) = load_suite(given.suite, given.overrides)
    batches = quality_timing._batches(task, given, "cpu")
    step = quality_timing._Step(task, Variant(method=method("full")), given, batches, "cpu")
    weight = dict(step._attached.model.named_parameters())["classifier.weight"]
    weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(NotFiniteError):
        step(0)


@pytest.mark.parametrize("together", [True, False])
def test_every_batch_is_timed_once(
    settings: Callable[..., QualitySettings], monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    given = settings(rounds=5, methods=("SliceFine-1R", "LoRA-r8"))
    (task,) = load_suite(given.suite, given.overrides | {"training.per_device_train_batch_size": 4})
    trained: dict[str, list[int]] = {}

    def train(step: Any, batches: list[dict[str, Any]]) -> None:
        number = next(at for at, one in enumerate(step._batches) if one is batches[0])
        trained.setdefault(step._attached.method.name, []).append(number)

    monkeypatch.setattr(quality_timing._Step, "_train", train)
    monkeypatch.setattr(quality_timing, "free_bytes", lambda device: 2**40 if together else 0)
    variants = given.variants(given.known_methods)
    measured = quality_timing._measure(task, variants, given, 1)
    assert measured.arrangement == ("together" if together else "in turns")
    assert set(trained) == {"SliceFine-1R", "LoRA-r8"}
    for numbers in trained.values():
        assert numbers == ([0, 1, 2, 3, 4, 0, 1] if together else [0, 1, 2, 3, 4, 0, 1, 0, 1])
    assert {name: len(seconds) for name, seconds in measured.seconds.items()} == dict.fromkeys(trained, 5)


def test_timed_batches_of_texts_are_of_every_length(settings: Callable[..., QualitySettings], tmp_path: Path) -> None:
    """By length the longest come first: the first batches alone would be the longest of all. Of those that are timed they warm up."""
    rows = [{"text": " ".join(["good"] * length), "label": length % 2} for length in range(1, 25) for _ in range(4)]
    write_table(tmp_path / "sets/words/train.jsonl", rows)
    given = settings(rounds=4)
    more = {"training.per_device_train_batch_size": 4, "data.max_length": 32}
    (task,) = load_suite(given.suite, given.overrides | more)
    lengths = [batch["input_ids"].shape[1] for batch in quality_timing._batches(task, given, "cpu")]
    assert sorted(lengths) == [pytest.approx(2 + 24 * (2 * at + 1) / 8, abs=3) for at in range(4)]
    assert sorted(lengths[: quality_timing.WARMUP]) == sorted(lengths)[-quality_timing.WARMUP :]


def test_a_step_of_a_language_model_is_timed_with_the_loss_that_it_is_trained_with(tmp_path: Path) -> None:
    """TRL's: logits and loss in one, and not those of the model."""
    tokenizer = make_tokenizer(["one two three"])
    random_llama(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name, first in (("train", "one"), ("test", "two")):
        write_table(tmp_path / f"{name}.jsonl", [{"text": f"{first} two three"}] * 20)
    files = f"data.train: {tmp_path}/train.jsonl, test: {tmp_path}/test.jsonl, model.name: {tmp_path}/model"
    (tmp_path / "suite.yaml").write_text(f"tasks:\n  words: {{recipe: llama-3.2-3b-math, {files}}}\n")
    more = {
        "data.format": "text",
        "data.max_length": 32,
        "training.bf16": False,
        "training.gradient_accumulation_steps": 1,
    }
    given = QualitySettings(suite=str(tmp_path / "suite.yaml"), rounds=1, overrides=more)
    (task,) = load_suite(given.suite, given.overrides)
    batches = quality_timing._batches(task, given, "cpu")
    step = quality_timing._Step(task, Variant(method=method("SliceFine-2R")), given, batches, "cpu")
    said: list[dict[str, Any]] = []
    step._attached.model.register_forward_pre_hook(lambda _module, _inputs, more: said.append(more), with_kwargs=True)
    assert step(0) > 0
    assert [more["fused_lm_head"] for more in said] == [True]


def test_a_report_has_the_threads_of_its_runs(settings: Callable[..., QualitySettings], tmp_path: Path) -> None:
    """And not those of the process that starts them."""
    resolved = quality_report._resolved(settings(threads=3))
    report = Report(theme="quality", intro="", folder=tmp_path, command="", settings=resolved)
    assert (report.provenance["hardware"]["threads"], "-3-threads-" in report.name) == (3, True)


def test_a_model_that_is_not_there_is_told_once_for_all_tasks(
    tmp_path: Path, settings: Callable[..., QualitySettings]
) -> None:
    """Before the loaders ask the hub, which takes them most of a minute without a network."""
    given = settings()
    shutil.copytree(tmp_path / "sets/words", tmp_path / "sets/more")
    away = str(tmp_path / "away")
    with pytest.raises(SliceFineError) as refused:
        compared(dataclasses.replace(given, overrides={"model.name": away}))
    assert str(refused.value).startswith("slicefine bench quality: more, words: `model.name` is a folder")
    assert f"there is no folder {away}." in str(refused.value)


def test_a_random_mask_is_refused_where_weights_decay(settings: Callable[..., QualitySettings]) -> None:
    given = settings()
    (task,) = load_suite(given.suite, given.overrides | {"training.weight_decay": 0.1})
    job = quality_timing._job(task, Variant(method=method("random-mask")), given)
    with pytest.raises(SliceFineError, match=r"weight decay \(0.1\) would change the weights that are not of the mask"):
        attach_to(prepare(task.recipe, 0), job)


def test_no_kept_run_of_a_mask_counts_where_weights_decay(
    settings: Callable[..., QualitySettings],
    made: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = {"overrides": settings().overrides | {"training.weight_decay": 0.1}}
    given = settings(methods=("random-mask", "LoRA-r8"), **more)
    with monkeypatch.context() as without:
        without.setattr(quality, "misfit", lambda *given: None)
        assert len(compared(given).final) == 2  # as before it was refused
    assert len(made) == 4
    capsys.readouterr()
    found = compared(given)
    assert len(made) == 4
    assert {cell.method for cell in found.grid | found.final} == {"LoRA-r8"}
    assert "the weights that are not of the mask" in found.failed["words", "random-mask"]
    said = capsys.readouterr().err
    assert "words, random-mask: weight decay" in said
    assert (
        "1 runs choose learning rates (1 are there already), 1 are final; 12 steps in all, those of kept runs among them"
        in said
    )


# -------------------------------------------------------------------- learning rates


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (8e-3, [1e-3, 2e-3, 4e-3, 8e-3]),  # at the end again, and the grid went on for long enough
        (4e-3, [1e-3, 2e-3, 4e-3, 8e-3]),
        (2e-3, [1e-3, 2e-3, 4e-3]),
        (1e-3, [1e-3, 2e-3, 5e-4]),
        (2.5e-4, [1e-3, 2e-3, 5e-4, 2.5e-4]),
    ],
)
def test_a_grid_goes_on_beyond_the_end_where_its_best_lies(
    settings: Callable[..., QualitySettings], monkeypatch: pytest.MonkeyPatch, best: float, tried: list[float]
) -> None:
    runs: list[tuple[float, bool]] = []

    def at_once(run: Any, jobs: Sequence[Any], **how: Any) -> Iterator[tuple[Any, Outcome]]:
        for job in jobs:
            rate = job[0].learning_rate
            runs.append((rate, job[0].final))
            yield job, dataclasses.replace(OUTCOME, loss=abs(math.log(rate / best)))

    monkeypatch.setattr(quality, "in_processes", at_once)
    given = settings(methods=("LoRA-r8",), learning_rates=(1e-3, 2e-3), extend=2)
    found = compared(given)
    assert [rate for rate, final in runs if not final] == tried
    assert [rate for rate, final in runs if final] == [best]
    place = quality_tables.edge(found, "words", "LoRA-r8")
    assert place == ("within" if min(tried) < best < max(tried) else "lowest" if best == min(tried) else "highest")
    count = len(runs)
    compared(given)
    assert len(runs) == count  # nothing is made twice
    assert "by up to 2 more beyond the end" in quality_report.run(given, "slicefine bench quality").intro


def test_each_grid_goes_on_by_its_own_factor_and_scale(
    settings: Callable[..., QualitySettings],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Uneven, and given in no order: by the factor between the last two rates at the end where the best lies."""

    def at_once(run: Any, jobs: Sequence[Any], **how: Any) -> Iterator[tuple[Any, Outcome]]:
        for job in jobs:
            rate = job[0].learning_rate
            yield job, dataclasses.replace(OUTCOME, loss=rate if job[0].task == "low" else 1 / rate)

    monkeypatch.setattr(quality, "in_processes", at_once)
    of = f"recipe: minilm-text-classification, data.train: {tmp_path}/sets/words/train.jsonl, test: {tmp_path}/sets/words/test.jsonl"
    suite = tmp_path / "suite.yaml"
    suite.write_text(f"tasks: {{low: {{{of}}}, high: {{{of}, rate_scale: 0.5}}}}")
    given = settings(suite=str(suite), methods=("LoRA-r8",), learning_rates=(4e-3, 1e-3, 2e-2), extend=2)
    found = compared(given)
    tried = {name: sorted(cell.learning_rate for cell in found.grid if cell.task == name) for name in ("low", "high")}
    assert tried == {"low": [6.25e-5, 2.5e-4, 1e-3, 4e-3, 2e-2], "high": [5e-4, 2e-3, 1e-2, 5e-2, 0.25]}
    assert {cell.task: cell.learning_rate for cell in found.final} == {"low": 6.25e-5, "high": 0.25}
    said = capsys.readouterr().err
    assert (
        "at least 6 runs choose learning rates (0 are there already), 2 are final; at least 40 steps in all, " in said
    )
    assert "[56/56 steps, 00:00 left]" in said


def test_a_grid_stands_when_the_run_beyond_it_fails(
    settings: Callable[..., QualitySettings], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def at_once(run: Any, jobs: Sequence[Any], **how: Any) -> Iterator[tuple[Any, Outcome | str]]:
        for job in jobs:
            rate = job[0].learning_rate
            yield job, "out of memory" if rate > 2e-3 else dataclasses.replace(OUTCOME, loss=1 / rate)

    monkeypatch.setattr(quality, "in_processes", at_once)
    found = compared(settings(methods=("LoRA-r8",), learning_rates=(1e-3, 2e-3), extend=3))
    assert sorted(cell.learning_rate for cell in found.grid) == [1e-3, 2e-3]
    assert [cell.learning_rate for cell in found.final] == [2e-3]
    assert (found.failed, quality_tables.edge(found, "words", "LoRA-r8")) == ({}, "highest")
    assert found.ended == {("words", "LoRA-r8"): "0.004: out of memory"}
    said = capsys.readouterr().err
    assert "words, LoRA-r8, learning rate 0.004, seed 0, 4 steps: out of memory; the grid ends before it" in said


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"extend": -1}, "`--extend` is at least 0; got -1"),
        (
            {"extend": 2, "learning_rates": (1e-3,)},
            "`--extend 2` goes on by the factor between two rates; `--learning_rates` has one",
        ),
        (
            {"equal_parameters": "head-only"},
            "names a method that trains weights beside a new head; head-only trains none",
        ),
        ({"seed": -1}, "`--seed` is at least 0"),
        ({"seed": 2**32 - 1, "seeds": 2}, "below 2**32"),
        ({"learning_rates": (math.inf,)}, "above 0 and finite"),
        ({"rounds": 2, "methods": ("SliceFine-5RC-w4",)}, "`--rounds` is at least 4, the turns of SliceFine-5RC-w4"),
    ],
)
def test_seeds_and_rates_that_no_run_can_have(
    settings: Callable[..., QualitySettings], wrong: dict[str, Any], says: str
) -> None:
    with pytest.raises(SliceFineError, match=re.escape(says)):
        settings(**wrong)


def test_the_report_says_how_the_runs_are_trained(settings: Callable[..., QualitySettings], made: list[str]) -> None:
    more = {"training.weight_decay": 0.1, "training.lr_scheduler_type": "linear", "training.bf16": True}
    given = settings(overrides=settings().overrides | more)
    intro = quality_report.run(given, "slicefine bench quality").intro
    assert "in bfloat16 (autocast), by the trainer" in intro
    assert (
        "AdamW, weight decay 0.1, a linear schedule, warm-up of 0.06 (below 1: of the steps), gradients clipped to 1, the model's own dropout"
        in intro
    )
