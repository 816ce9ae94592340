from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

WORDS = {0: ["bread", "soup", "salt"], 1: ["star", "moon", "orbit"]}
TINY = "--processes 1 --short-steps 2 --steps 9 --batch 4 --max-length 8 --held-out 6 --resamples 20"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS[0], *WORDS[1]]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=16, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    draw = random.Random(0)
    for name in ("sst2", "cola", "mrpc", "trec"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for part, count in (("train", 40), ("validation", 10)):
            rows = []
            for number in range(count):
                row = {"text": " ".join(draw.choices(WORDS[number % 2], k=3)), "label": number % 2}
                if name == "mrpc":
                    row["text_pair"] = " ".join(draw.choices(WORDS[number % 2], k=2))
                if name == "trec":
                    row["label"] = ["FOOD", "SPACE"][number % 2]
                rows.append(json.dumps(row) + "\n")
            (tmp_path / "data" / name / f"{part}.jsonl").write_text("".join(rows))
    return tmp_path / "data"


@pytest.fixture
def arguments(tmp_path: Path, model: Path, data: Path) -> list[str]:
    folders = {"--model": model, "--data": data, "--cells": tmp_path / "cells", "--output": tmp_path / "out"}
    return [*TINY.split(), *(str(part) for pair in folders.items() for part in pair)]


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the seconds in which another process imports everything."""
    import concurrent.futures

    import classification

    def pool(processes: int, _: object) -> concurrent.futures.ThreadPoolExecutor:
        return concurrent.futures.ThreadPoolExecutor(processes)

    monkeypatch.setattr(classification, "ProcessPoolExecutor", pool)


@pytest.mark.usefixtures("in_this_process")
def test_it_runs_writes_every_table_and_goes_on_where_it_was(tmp_path, arguments, monkeypatch, capsys):
    import classification

    for name, method in list(classification.METHODS.items()):
        few = classification.Method(method.attach, method.rates[:2])
        monkeypatch.setitem(classification.METHODS, name, few)
    classification.main(arguments)
    (path,) = (tmp_path / "out").glob("classification-*.json")
    first = json.loads(path.read_text())["tables"]
    figures, means, *of_sets, sizes, grid = first
    names = [classification.COMMONEST, *classification.METHODS]
    assert [row["method"] for row in means["rows"]] == names
    assert [table["title"] for table in of_sets] == list(classification.SETS) == [row["set"] for row in sizes["rows"]]
    for table in of_sets:
        counts = {row["method"]: (row["active"], row["touched"]) for row in table["rows"]}
        assert counts["head only"] == (0, 0)
        active, touched = counts["SliceFine-5RC"]
        assert active < touched
        biases = 6 * 16 + 24  # query, key, value, two outputs, pooler; intermediate
        assert counts["SliceFine-5RC with biases"] == (active + biases, touched + biases)
        assert counts["full"][0] == counts["full"][1] > counts["LoRA r8"][0]
    assert len(grid["rows"]) == 4 * 5 * 2
    assert sum(row["chosen"] != "" for row in grid["rows"]) == 4 * 5
    assert len(figures["rows"]) == 4

    monkeypatch.delattr(classification, "fit")  # a second run makes no step
    classification.main(arguments)
    assert json.loads(path.read_text())["tables"] == first
    with pytest.raises(NameError, match="fit"):
        classification.main([*arguments, "--steps", "10"])


@pytest.fixture
def options(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """What the script makes of its arguments."""
    import classification

    found = []
    monkeypatch.setattr(classification, "run_all", lambda options: found.append(options) or sys.exit())
    with pytest.raises(SystemExit):
        classification.main([*arguments, "--steps", "60"])
    return found[0]


@pytest.mark.parametrize("method", ["SliceFine-5RC", "SliceFine-5RC with biases", "LoRA r8", "full"])
def test_a_method_learns_what_can_be_learned(options, method):
    import classification

    run = classification.run_once(options, classification.Cell("trec", method, 2e-2, 0, final=True))
    assert run.predicted == run.labels == [0, 1] * 5


def test_short_runs_are_judged_on_train_and_final_ones_on_validation(options):
    import classification

    judged = {
        final: classification.run_once(options, classification.Cell("sst2", "full", 1e-3, 0, final)).labels
        for final in (False, True)
    }
    assert (len(judged[False]), judged[True]) == (options.held_out, [0, 1] * 5)


def test_a_choice_at_the_edge_of_the_grid_is_called_so():
    from classification import METHODS, SLICES, Cell, verdict

    first, second, *_, last = METHODS[SLICES].rates
    said = {rate: verdict(Cell("cola", SLICES, rate, 0, False), rate) for rate in METHODS[SLICES].rates}
    assert (said[first], said[second], said[last]) == ("at the edge", "yes", "at the edge")
    assert verdict(Cell("cola", SLICES, first, 0, False), second) == ""


def test_examples_held_out_are_not_trained_on(data):
    from classification import SETS, read_rows, split

    options = argparse.Namespace(held_out=6, seed=0)
    for name in SETS:
        rows = [row | {"number": i} for i, row in enumerate(read_rows(data / name / "train.jsonl"))]
        train, held_out = split(rows, options)
        assert len(held_out) == 6
        assert sorted(row["number"] for row in train + held_out) == list(range(40))


def test_batches_hold_near_lengths_and_every_example_once_an_epoch():
    import itertools

    from classification import batches

    lengths = [random.Random(0).randrange(5, 60) for _ in range(64)]
    epoch = list(itertools.islice(batches(lengths, 4, seed=0), 16))
    assert sorted(i for batch in epoch for i in batch) == list(range(64))
    assert (
        epoch
        == list(itertools.islice(batches(lengths, 4, seed=0), 16))
        != list(itertools.islice(batches(lengths, 4, seed=1), 16))
    )
    assert [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in epoch] < [8] * 16


def test_missing_data_are_named(tmp_path, arguments):
    import classification

    with pytest.raises(SystemExit, match=r"there is no .*sst2/train\.jsonl"):
        classification.read_rows(tmp_path / "sst2" / "train.jsonl")
