from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
import yaml
from transformers import BertConfig, BertModel, BertTokenizerFast

WORDS = (["bread", "soup", "salt"], ["star", "moon", "orbit"])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS[0], *WORDS[1]]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=16, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    draw, tasks = random.Random(0), {}
    for task in ("first", "second"):
        named = {}
        for part, count in (("train", 40), ("test", 8)):
            rows = [{"text": " ".join(draw.choices(WORDS[i % 2], k=3)), "label": i % 2} for i in range(count)]
            named[part] = tmp_path / f"{task}-{part}.jsonl"
            named[part].write_text("".join(json.dumps(row) + "\n" for row in rows))
        tasks[task] = {
            "recipe": "minilm-sst2",
            "data.name": "sst2",
            "data.train": str(named["train"]),
            "data.max_length": 16,
        }
        tasks[task]["test"] = str(named["test"])
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


def test_settings_are_drawn_once_each_and_say_nothing_of_moves_where_there_are_none():
    import halving

    found = halving.drawn(halving.SHAPES, 20, 400, 0)
    assert len(set(found)) == len(found) == 80
    assert found == halving.drawn(halving.SHAPES, 20, 400, 0) != halving.drawn(halving.SHAPES, 20, 400, 1)
    staying = [one.variant for one in found if one.variant.slide_every is None]
    assert staying
    assert {(one.order, one.moments, one.rewarm) for one in staying} == {("sweep", halving.RESET, 0)}
    assert {one.variant.slide_every for one in found} == {None, halving.EIGHTH, 25}


def test_what_diverges_comes_last():
    import halving

    first, second = halving.drawn(["SliceFine-2R"], 2, 16, 0)
    found = halving.ratios({first: [1.0, math.inf], second: [2.0, 3.0]})
    assert found == {first: math.inf, second: pytest.approx(math.sqrt(2))}
