"""What slices are to reach: for which settings there are limits, and what is met."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarked import tiny

from slicefine.benchmarking import bench, targets
from slicefine.benchmarking.models import MODELS, SMALL
from slicefine.benchmarking.settings import Settings


def limits(wanted: list[targets.Target]) -> dict[str, float | None]:
    return {target.figure: target.at_least if target.at_most is None else target.at_most for target in wanted}


def test_methods_with_targets() -> None:
    assert tuple(f"SliceFine-{r}{axis}" for r in (1, 5) for axis in ("R", "C", "RC")) == targets.JUDGED


@pytest.mark.parametrize(("threads", "throughput"), [(1, None), (2, 1.2), (3, 1.2), (4, 1.3), (16, 1.3)])
@pytest.mark.parametrize("model", SMALL)
def test_on_a_cpu_every_small_model_has_targets(model: str, threads: int, throughput: float | None) -> None:
    found = limits(targets.of_speed(model, gpu=False, dtype="float32", threads=threads))
    assert found.pop("throughput / LoRA-r8", None) == throughput
    assert found == {"step / frozen-limit": 1.05, "a move / step": 1.0}
    assert targets.of_memory(model, gpu=False, dtype="float32") == []  # no peak is measured there


def test_on_a_gpu_the_model_of_the_board_has_targets() -> None:
    of: dict[str, Any] = {"model": "llama-3.2-3b", "gpu": True, "dtype": "bfloat16"}
    found = limits(targets.of_speed(**of, threads=1))
    assert found == {"step / frozen-limit": 1.05, "throughput / LoRA-r8": 1.25, "a move / step": 1.0}
    assert limits(targets.of_memory(**of)) == {"peak / LoRA-r8": 0.8}


@pytest.mark.parametrize(
    ("model", "gpu", "dtype"),
    [
        ("llama-3.2-3b", True, "float32"),
        ("gemma-3-12b", True, "bfloat16"),
        ("llama-3.2-3b-small", True, "bfloat16"),
        ("llama-3.2-3b", False, "float32"),
        ("llama-3.2-3b-small", False, "bfloat16"),
    ],
)
def test_elsewhere_there_are_none(model: str, gpu: bool, dtype: str) -> None:
    assert targets.of_speed(model, gpu=gpu, dtype=dtype, threads=4) == []
    assert targets.of_memory(model, gpu=gpu, dtype=dtype) == []


STEPS = {"method": "SliceFine-1R", "/ frozen-limit": 1.05, "/ frozen-limit, min": 0.9, "/ frozen-limit, max": 1.2} | {
    "/ LoRA-r8": 0.8,
    "/ LoRA-r8, min": 0.5,
    "/ LoRA-r8, max": 1.0,
}


def judged(**changed: Any) -> dict[str, dict[str, Any]]:
    wanted = targets.of_speed("vit-base-small", gpu=False, dtype="float32", threads=2)
    moves = {"method": "SliceFine-1R", "a move / training step": 0.1}
    rows = targets.judge(wanted, [{"method": "full", "/ frozen-limit": 3.0}, STEPS | changed], [moves])
    return {row["figure"]: row for row in rows}


def test_a_verdict_has_figure_target_and_spread() -> None:
    found = judged()
    assert list(found) == ["step / frozen-limit", "throughput / LoRA-r8", "a move / step"]
    assert found["step / frozen-limit"] == {
        "method": "SliceFine-1R",
        "figure": "step / frozen-limit",
        "target": "at most 1.05",
        "result": 1.05,
        "min": 0.9,
        "max": 1.2,
        "verdict": "met",
    }
    throughput = found["throughput / LoRA-r8"]  # the inverse of the ratio of times
    assert throughput["target"] == "at least 1.2"
    assert [throughput[key] for key in ("result", "min", "max")] == [1.25, 1.0, 2.0]
    assert found["a move / step"]["min"] is None  # in turns there are no rounds in common


@pytest.mark.parametrize(
    ("changed", "figure", "verdict"),
    [
        ({"/ frozen-limit": 1.0501}, "step / frozen-limit", "missed"),
        ({"/ LoRA-r8": 1 / 1.2}, "throughput / LoRA-r8", "met"),
        ({"/ LoRA-r8": 1 / 1.19}, "throughput / LoRA-r8", "missed"),
        ({"/ LoRA-r8": None}, "throughput / LoRA-r8", "not measured"),
        ({"a move / training step": 1.01}, "a move / step", "met"),  # the table of moves has its own
    ],
)
def test_verdicts(changed: dict[str, Any], figure: str, verdict: str) -> None:
    assert judged(**changed)[figure]["verdict"] == verdict


@pytest.mark.parametrize(("ratio", "verdict"), [(0.8, "met"), (0.81, "missed"), (-0.1, "met")])
def test_the_peak(ratio: float, verdict: str) -> None:
    (row,) = targets.judge([targets.PEAK], [{"method": "SliceFine-5RC", "peak MiB / LoRA-r8": ratio}])
    assert (row["result"], row["verdict"]) == (ratio, verdict)


# ------------------------------------------------------------------- in reports


def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str = "speed", **given: Any) -> dict[str, Any]:
    for name in SMALL:
        monkeypatch.setitem(MODELS, name, tiny(name))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    usual = {
        "models": ("vit-base-small", "roberta-base-small"),
        "methods": ("SliceFine-1C", "SliceFine-5R", "SliceFine-2R", "full"),
        "rounds": 2,
        "warmup": 1,
        "device": "cpu",
        "output": str(tmp_path),
    }
    report = bench.run(what, Settings(**usual | given), "slicefine bench")
    assert report.path.read_text() == report.markdown()
    return json.loads(report.path.with_suffix(".json").read_text())


def test_the_report_has_the_targets_after_the_tables_of_each_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = measured(tmp_path, monkeypatch)
    titles = [table["title"] for table in record["tables"]]
    assert [titles.index(f"{model}: targets") for model in ("vit-base-small", "roberta-base-small")] == [3, 7]
    for at in (3, 7):
        steps, moves, _, verdicts = (table["rows"] for table in record["tables"][at - 3 : at + 1])
        step, move = ({row["method"]: row for row in rows} for rows in (steps, moves))
        found = {(row["method"], row["figure"]): row for row in verdicts}
        assert {name for name, _ in found} == {"SliceFine-1C", "SliceFine-5R"}
        assert len(found) == 6
        for name in ("SliceFine-1C", "SliceFine-5R"):
            assert found[name, "step / frozen-limit"]["result"] == step[name]["/ frozen-limit"]
            throughput = found[name, "throughput / LoRA-r8"]
            assert throughput["result"] == 1 / step[name]["/ LoRA-r8"]
            assert throughput["min"] <= throughput["max"]
            assert throughput["target"] == "at least 1.3"
            assert found[name, "a move / step"]["max"] == move[name]["a move / training step, max"]


@pytest.mark.parametrize(
    "given", [{"sweep": "r", "values": (1,)}, {"checkpointing": True}, {"dtype": "bfloat16"}], ids=str
)
def test_other_settings_have_no_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]) -> None:
    record = measured(tmp_path, monkeypatch, models=("vit-base-small",), methods=("SliceFine-1R",), rounds=1, **given)
    assert not any("targets" in table["title"] for table in record["tables"])


def test_compiled_models_have_no_targets(tmp_path: Path) -> None:
    given = Settings(compile=True, device="cpu", output=str(tmp_path))
    setup = bench.Setup.of_settings(given, MODELS["vit-base-small"])
    report = bench._report("speed", given, "cpu", "")
    for compiled in (given, Settings(device="cpu", output=str(tmp_path))):
        bench._judge(report, setup, compiled, [targets.STEP], [STEPS])
    assert [table.title for table in report.tables] == ["vit-base-small: targets"]
