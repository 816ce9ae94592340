from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parrot import TRUE, boolq_rows, write_rows
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from slicefine import SliceFineConfig, SliceFineError, SliceFineWarning
from slicefine.cli.evaluate import summary
from slicefine.evaluation import run as module
from slicefine.evaluation.generation import Generator
from slicefine.evaluation.run import evaluate
from slicefine.evaluation.settings import Settings
from slicefine.training.prompts import prompt
from slicefine.training.record import RunRecord

SOLUTION = ["the", "correct", "answer", "is", "solution2", "</s>"]


@pytest.fixture
def ask(data: str, tmp_path: Path) -> Callable[..., Any]:
    """Evaluates on boolq and piqa into `tmp_path / "out"`."""

    def call(model: str, **values: Any) -> Any:
        given = {"suite": "commonsense", "tasks": ("boolq", "piqa"), "data": data, "output": str(tmp_path / "out")}
        return evaluate(Settings(model=model, **given | values))

    return call


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def saved(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_every_prompt_output_and_verdict_is_kept(make_model: Callable[..., str], ask: Any, tmp_path: Path) -> None:
    result = ask(make_model(TRUE))
    found = {(line["task"], line["row"]): line for line in lines(tmp_path / "out")}
    assert sorted(found) == [("boolq", 1), ("boolq", 2), ("boolq", 3), ("piqa", 1), ("piqa", 2)]
    assert found["boolq", 2] == {
        "task": "boolq",
        "row": 2,
        "prompt": prompt(boolq_rows()[1]["instruction"]),
        "prompt_tokens": found["boolq", 2]["prompt_tokens"],
        "output": "the correct answer is true",
        "output_tokens": 6,
        "ended": True,
        "answer": "true",
        "gold": "false",
        "right": False,
    }
    assert found["boolq", 1]["right"] is True
    assert found["piqa", 1]["answer"] is None
    scores = saved(tmp_path / "out")
    assert scores["status"] == result.status == "finished"
    assert scores["tasks"]["boolq"] == {
        "questions": 3,
        "asked": 3,
        "right": 2,
        "accuracy": 2 / 3,
        "interval": pytest.approx([0.2077, 0.9385], abs=1e-4),
        "unanswered": 0,
        "empty": 0,
        "cut": 0,
    }
    assert scores["tasks"]["piqa"]["unanswered"] == 2
    assert scores["average"] == pytest.approx(1 / 3)
    (session,) = scores["sessions"]
    assert (session["answers"], session["generated_tokens"]) == (5, 30)
    assert session["tokens_per_second"] > 0
    assert session["versions"]["transformers"]
    assert (scores["max_new_tokens"], scores["num_beams"], scores["contamination"]) == (32, 1, None)


def test_the_table(make_model: Callable[..., str], ask: Any) -> None:
    table = ask(make_model(SOLUTION)).table().splitlines()
    assert [line.split("  ")[0] for line in table] == ["", "accuracy, %", "95 % interval", "questions", "unanswered"]
    assert table[0].split() == ["BoolQ", "PIQA", "average"]
    assert table[1].split() == ["accuracy,", "%", "0.0", "50.0", "25.0"]
    assert table[2].split() == ["95", "%", "interval", "0.0-56.1", "9.5-90.5"]
    assert table[3].split() == ["questions", "3", "of", "3270", "2", "of", "1838"]
    assert table[4].split() == ["unanswered", "3", "0"]


def test_the_same_command_goes_on(
    make_model: Callable[..., str], ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(chain=None)
    whole = ask(model, output=str(tmp_path / "whole"), batch_size=1)
    generate, calls = Generator.__call__, []

    def interrupted(self: Generator, prompts: Any) -> Any:
        calls.append(len(prompts))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return generate(self, prompts)

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "__call__", interrupted)
        first = ask(model, batch_size=1)
    assert first.status == saved(tmp_path / "out")["status"] == "interrupted"
    assert sum(scores["questions"] for scores in first.tasks.values()) == 3
    assert first.average is saved(tmp_path / "out")["average"] is None
    assert first.table().splitlines()[1].split()[-1] == "-"
    kept = lines(tmp_path / "out")
    assert len(kept) == 3

    # Batches do not decide an answer.
    second = ask(model, batch_size=2)
    assert second.tasks == whole.tasks
    assert second.average == whole.average is not None
    assert lines(tmp_path / "out")[:3] == kept

    def key(line):
        return line["task"], line["row"]

    assert sorted(lines(tmp_path / "out"), key=key) == sorted(lines(tmp_path / "whole"), key=key)
    assert [session["answers"] for session in saved(tmp_path / "out")["sessions"]] == [3, 2]

    third = ask(model)
    assert third.tasks == whole.tasks
    assert third.sessions[-1]["answers"] == 0


def test_more_questions_and_tasks_go_on_too(make_model: Callable[..., str], ask: Any, tmp_path: Path) -> None:
    model = make_model(TRUE)
    assert [scores["questions"] for scores in ask(model, limit=1).tasks.values()] == [1, 1]
    more = ask(model, tasks=("boolq",))
    assert {name: scores["questions"] for name, scores in more.tasks.items()} == {"boolq": 3, "piqa": 1}
    assert saved(tmp_path / "out")["tasks"] == more.tasks
    assert more.average == pytest.approx((2 / 3 + 0) / 2)
    assert more.sessions[-1]["answers"] == 2
    assert len(lines(tmp_path / "out")) == 4


@pytest.mark.parametrize("finished", [1, 3, 4])
def test_only_complete_tasks_have_an_average(
    finished: int, make_model: Callable[..., str], ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when another task is finished after the interruption."""
    model, generate, calls = make_model(TRUE), Generator.__call__, []

    def interrupted(self: Generator, prompts: Any) -> Any:
        calls.append(len(prompts))
        if len(calls) > finished:
            raise KeyboardInterrupt
        return generate(self, prompts)

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "__call__", interrupted)
        first = ask(model, batch_size=1)
    assert first.status == "interrupted"
    assert first.average is None
    boolq = ask(model, tasks=("boolq",))
    assert list(boolq.tasks) == (["boolq", "piqa"] if finished == 4 else ["boolq"])
    assert boolq.average == (None if finished == 4 else pytest.approx(2 / 3))
    assert ask(model).average == pytest.approx(1 / 3)


def test_a_session_that_is_killed_loses_no_results(
    make_model: Callable[..., str], ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(TRUE)
    tasks = ask(model, tasks=("piqa",)).tasks

    def look(*args: Any) -> None:
        assert saved(tmp_path / "out")["status"] == "running"
        assert saved(tmp_path / "out")["tasks"] == tasks
        raise KeyboardInterrupt

    monkeypatch.setattr(Generator, "__call__", look)
    assert ask(model, tasks=("boolq",)).tasks == tasks


def test_answers_of_a_session_that_was_killed_have_no_average(
    make_model: Callable[..., str], ask: Any, tmp_path: Path
) -> None:
    """How many questions it asked is not known."""
    model = make_model(TRUE)
    ask(model, tasks=("piqa",))
    path = tmp_path / "out" / "results.json"
    path.write_text(json.dumps(saved(tmp_path / "out") | {"status": "running", "tasks": {}, "average": None}))
    result = ask(model, tasks=("boolq",))
    assert list(result.tasks) == ["boolq", "piqa"]
    assert result.average is None
    assert ask(model).average == pytest.approx(1 / 3)


def test_an_answer_that_was_written_when_ctrl_c_came_counts(
    make_model: Callable[..., str], ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    model = make_model(TRUE)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", interrupt)
        result = ask(model, batch_size=1)
    assert len(lines(tmp_path / "out")) == result.tasks["boolq"]["questions"] == 1


def test_a_torn_line_is_asked_again(make_model: Callable[..., str], ask: Any, tmp_path: Path) -> None:
    model = make_model(chain=None)
    whole = ask(model)
    path = tmp_path / "out" / "answers.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    with pytest.warns(SliceFineWarning, match="cut off"):
        again = ask(model)
    assert again.tasks == whole.tasks
    assert again.sessions[-1]["answers"] == 1
    assert path.read_bytes() == content


def test_answers_of_another_evaluation_are_refused(
    make_model: Callable[..., str], ask: Any, data: str, tmp_path: Path
) -> None:
    model, other = make_model(TRUE), make_model(SOLUTION, name="other")
    ask(model)
    before = (tmp_path / "out" / "answers.jsonl").read_bytes()
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"model": other}, f"the weights are others: answered by {model}, asked of {other} now"),
        ({"max_new_tokens": 9}, "`max_new_tokens` was 32 and is 9 now"),
        ({"num_beams": 2}, "`num_beams` was 1 and is 2 now"),
        ({"suite": "math", "tasks": ("gsm8k",)}, "`suite` was commonsense and is math now"),
    ]
    write_rows(Path(data) / "gsm8k" / "test.jsonl", [{"instruction": "How many?", "answer": "7"}])
    for values, says in refusals:
        with pytest.raises(SliceFineError) as caught:
            ask(**{"model": model} | values)
        assert says in str(caught.value)
        assert "--overwrite" in str(caught.value)
    write_rows(Path(data) / "boolq" / "test.jsonl", boolq_rows()[::-1])
    with pytest.raises(SliceFineError, match=r"boolq, row 1: the prompt was .* and is .* now"):
        ask(model)
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == before

    result = ask(other, overwrite=True)
    assert [line["output"] for line in lines(tmp_path / "out")] == ["the correct answer is solution2"] * 5
    assert len(result.sessions) == 1


def test_a_moved_model_is_the_same(make_model: Callable[..., str], ask: Any, tmp_path: Path) -> None:
    model = make_model(TRUE)
    ask(model)
    shutil.move(model, tmp_path / "moved")
    assert ask(str(tmp_path / "moved")).sessions[-1]["answers"] == 0


def test_answers_without_results_are_nobodys(make_model: Callable[..., str], ask: Any, tmp_path: Path) -> None:
    model = make_model(TRUE)
    ask(model)
    (tmp_path / "out" / "results.json").unlink()
    with pytest.raises(
        SliceFineError, match=r"answers\.jsonl but no results\.json: whose answers they are is not known"
    ):
        ask(model)
    (tmp_path / "out" / "results.json").write_text('{"status": ')
    with pytest.raises(SliceFineError, match=r"results\.json is not of an evaluation"):
        ask(model)
    assert ask(model, overwrite=True).status == "finished"


def test_a_prompt_longer_than_the_context(make_model: Callable[..., str], ask: Any, tmp_path: Path) -> None:
    model = make_model(TRUE, max_position_embeddings=70)
    with pytest.raises(SliceFineError) as caught:
        ask(model)
    message = str(caught.value)
    assert (
        "answer of up to 32 tokens fit into the model's context of 70 tokens; 3 of 5 do not (boolq, row 2: 47 tokens, "
        in message
    )
    assert "--max_new_tokens 23 would fit" in message
    assert not (tmp_path / "out").exists()
    assert ask(model, max_new_tokens=23).status == "finished"
    with pytest.raises(SliceFineError, match="Leave their tasks out with --tasks"):
        ask(make_model(TRUE, name="short", max_position_embeddings=40), output=str(tmp_path / "other"))


def test_nothing_written_counts_as_unanswered_and_is_said(make_model: Callable[..., str], ask: Any) -> None:
    with pytest.warns(SliceFineWarning, match=r"wrote nothing at all .*\(boolq 3 of 3, piqa 2 of 2\)"):
        result = ask(make_model(["</s>"]))
    assert [(s["empty"], s["unanswered"], s["right"]) for s in result.tasks.values()] == [(3, 3, 0), (2, 2, 0)]


def test_answers_that_were_cut_are_counted(make_model: Callable[..., str], ask: Any) -> None:
    result = ask(make_model(TRUE), max_new_tokens=3)
    assert [scores["cut"] for scores in result.tasks.values()] == [3, 2]


def test_the_task_with_the_longest_prompt_comes_first(make_model: Callable[..., str], ask: Any, tmp_path: Path) -> None:
    ask(make_model(TRUE), tasks=("piqa", "boolq"), batch_size=1)
    found = lines(tmp_path / "out")
    assert [line["task"] for line in found] == ["boolq"] * 3 + ["piqa"] * 2
    lengths = [line["prompt_tokens"] for line in found[:3]]
    assert lengths == sorted(lengths, reverse=True)


def test_a_failure_is_recorded(
    make_model: Callable[..., str], ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise SliceFineError("A batch does not fit into memory.")

    monkeypatch.setattr(Generator, "__call__", fail)
    with pytest.raises(SliceFineError, match="memory"):
        ask(make_model(TRUE))
    assert saved(tmp_path / "out")["status"] == "failed"


def test_what_is_wrong_is_said_before_the_model_is_loaded(
    make_model: Callable[..., str], ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*args: Any) -> None:
        raise AssertionError("loaded")

    model = make_model(TRUE)
    monkeypatch.setattr(module.models, "load_model", loaded)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"limit": 0, "batch_size": -1}, "Evaluation: 2 problems"),
        ({"tasks": ("hellaswag",)}, "hellaswag: there is no folder"),
        ({"output": None}, "is no run. Name a folder with --output"),
        ({"output": str(tmp_path / "full")}, "full has other files in it"),
        ({"output": str(tmp_path / "full" / "mine")}, "mine is a file"),
        ({"train_data": ("gone.jsonl",)}, "the file gone.jsonl does not exist"),
        ({"model": str(tmp_path / "gone")}, "there is no folder"),
    ]
    for values, says in cases:
        with pytest.raises(SliceFineError, match=says):
            ask(**{"model": model} | values)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SliceFineError, match="runs in one process; WORLD_SIZE is 2"):
        ask(model)
    assert not (tmp_path / "out").exists()


def test_training_examples_that_are_questions(make_model: Callable[..., str], ask: Any, tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", [{"instruction": "x"}, boolq_rows()[2]])
    model = make_model(TRUE)
    with pytest.raises(
        SliceFineError, match=rf"1 training examples are test questions \(boolq 1\)\.\n  {train}:2 -> boolq, row 3"
    ):
        ask(model, train_data=(str(train),))
    result = ask(model, train_data=(str(train),), allow_contamination=True)
    assert result.contamination is not None
    assert result.contamination["questions"] == saved(tmp_path / "out")["contamination"]["questions"] == {"boolq": 1}


@pytest.fixture
def finished_run(make_model: Callable[..., str], tmp_path: Path) -> Path:
    """A run whose adapter has taught the parrot another word, and whose training examples hold a question."""
    base, run = make_model([*TRUE[:4], "false", "</s>"]), tmp_path / "run"
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer_file = Path(base) / "tokenizer.json"
    vocabulary = json.loads(tokenizer_file.read_text())["model"]["vocab"]
    config = SliceFineConfig(
        r=len(vocabulary), axis="row", slide_every=None, target_modules=["lm_head"], task_type="CAUSAL_LM"
    )
    tuned: Any = get_peft_model(model, config)
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1.0)
    ids = torch.tensor([[vocabulary[word] for word in ("is", "true", "</s>")]])
    for _ in range(20):
        tuned(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned.save_pretrained(str(run / "adapter"), save_embedding_layers=False)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(Path(base) / name, run / "adapter")
    train = write_rows(tmp_path / "train.jsonl", [{"instruction": "x", "output": "y"}])
    (run / "recipe.yaml").write_text(f"data:\n  train: {train}\n")
    RunRecord(task="causal-lm", model=base, seed=0, started="now", status="finished").write(run)
    return run


def test_a_run(finished_run: Path, ask: Any, tmp_path: Path) -> None:
    result = ask(str(finished_run), output=None)
    assert {line["output"] for line in lines(finished_run / "evaluation" / "commonsense")} == {
        "the correct answer is true"
    }
    assert result.contamination == {
        "sources": [str(tmp_path / "train.jsonl")],
        "tasks": ["boolq", "piqa"],
        "rows": {},
        "questions": {},
        "examples": [],
    }
    base = ask(str(tmp_path / "model"), output=str(tmp_path / "base"))
    assert {line["output"] for line in lines(tmp_path / "base")} == {"the correct answer is false"}
    assert (base.tasks["boolq"]["right"], result.tasks["boolq"]["right"]) == (1, 2)


def test_the_training_examples_of_a_run_are_looked_through(finished_run: Path, ask: Any, tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", boolq_rows()[:1])
    with pytest.raises(SliceFineError, match=r"train\.jsonl:1 -> boolq, row 1"):
        ask(str(finished_run), output=None)
    assert not (finished_run / "evaluation").exists()


def test_a_checkpoint_of_a_run_is_checked_too(finished_run: Path, ask: Any, tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", boolq_rows()[:1])
    checkpoint = shutil.copytree(finished_run / "adapter", finished_run / "checkpoints" / "checkpoint-9")
    with pytest.raises(SliceFineError, match=r"train\.jsonl:1 -> boolq, row 1"):
        ask(str(checkpoint))
    # The folder in the run is that of its final adapter.
    with pytest.raises(SliceFineError, match=r"checkpoint-9 is no run\. Name a folder with --output"):
        ask(str(checkpoint), output=None)


def test_an_adapter_outside_of_its_run_is_not_checked(finished_run: Path, ask: Any, tmp_path: Path) -> None:
    adapter = shutil.copytree(finished_run / "adapter", tmp_path / "copy")
    result = ask(str(adapter))
    assert result.contamination is None
    assert "contamination: not checked (name the training examples with --train_data)" in summary(result)
    checked = ask(str(adapter), train_data=(str(tmp_path / "train.jsonl"),))
    assert "contamination" not in summary(checked)


def test_contamination_of_the_other_tasks_is_kept(make_model: Callable[..., str], ask: Any, tmp_path: Path) -> None:
    model = make_model(TRUE)
    train = str(write_rows(tmp_path / "train.jsonl", boolq_rows()[:1]))
    ask(model, tasks=("boolq",), train_data=(train,), allow_contamination=True)
    result = ask(model, tasks=("piqa",))
    assert list(result.tasks) == ["boolq", "piqa"]
    assert "contaminated: questions that the model was trained on: boolq 1" in summary(result)
    assert "contamination: not checked for piqa (name the training examples" in summary(result)
    result = ask(model, tasks=("piqa",), train_data=(train,))
    assert result.contamination is not None
    assert (result.contamination["tasks"], result.contamination["rows"]) == (["boolq", "piqa"], {"boolq": 1})
    assert "not checked" not in summary(result)
