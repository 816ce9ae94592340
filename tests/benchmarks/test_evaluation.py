from __future__ import annotations

import argparse
import json

import pytest

TINY = (
    "--threads 1 --rounds 2 --prompts 7 --batch 3 --median 6 --new-tokens 5 --layers 1 --hidden 16 "
    "--intermediate 24 --heads 2 --vocab 40 --widths 8"
)


def test_it_runs_and_writes_every_figure(tmp_path):
    import evaluation as script

    script.main([*TINY.split(), "--output", str(tmp_path)])
    (path,) = tmp_path.glob("evaluation-*.json")
    figures, rounds, widths = json.loads(path.read_text())["tables"]
    ratio, unsorted, differing = figures["rows"]
    assert ratio["target"] == "at least 3"
    assert min(ratio["value"], unsorted["value"]) > 0
    assert (differing["value"], differing["verdict"]) == (0, "met")
    assert len(rounds["rows"]) == 2
    assert [row["hidden"] for row in widths["rows"]] == [8]


def test_an_answer_that_batching_changes_is_counted(tmp_path, monkeypatch):
    import evaluation as script

    usual = script.Generator.__call__

    def lossy(self, prompts):
        answers = usual(self, prompts)
        changed = argparse.Namespace(tokens=answers[0].tokens)
        return answers if len(prompts) == 1 else [changed, *answers[1:]]

    monkeypatch.setattr(script.Generator, "__call__", lossy)
    script.main([*TINY.split(), "--output", str(tmp_path)])
    (path,) = tmp_path.glob("evaluation-*.json")
    differing = json.loads(path.read_text())["tables"][0]["rows"][2]
    assert (differing["value"], differing["verdict"]) == (2, "**missed**")


@pytest.mark.parametrize("way", ["one by one", "batched", "batched and sorted"])
def test_every_way_answers_every_prompt_once(way):
    import evaluation as script

    prompts = [[1] * length for length in (3, 9, 1, 7, 7)]
    order = script.orders(prompts, 2)[way]
    assert sorted(index for batch in order for index in batch) == [0, 1, 2, 3, 4]
