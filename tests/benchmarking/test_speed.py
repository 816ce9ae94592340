"""`bench speed` and `bench memory` on tiny models: what they measure, and the files they write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarked import METHODS, rows_of, run, settings, tiny
from torch import nn

from slicefine.benchmarking import bench, charts, speed
from slicefine.benchmarking.attaching import Attached
from slicefine.benchmarking.methods import method
from slicefine.benchmarking.models import MODELS, SMALL
from slicefine.benchmarking.setups import Setup
from slicefine.errors import SliceFineError
from slicefine.tuner.layer import SliceLayer


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SMALL:
        monkeypatch.setitem(MODELS, name, tiny(name))


# ----------------------------------------------------------------------- speed


def test_speed_of_steps_moves_and_inference(tmp_path: Path) -> None:
    report, record = run("speed", settings(tmp_path, models=("llama-3.2-3b-small", "roberta-base-small"), rounds=2))
    assert (report.status, record["status"], record["version"]) == ("finished", "finished", 1)
    for model in ("llama-3.2-3b-small", "roberta-base-small"):
        language = model.startswith("llama")
        steps = {row["method"]: row for row in rows_of(record, f"{model}: training step")}
        assert list(steps) == ["frozen-limit", "LoRA-r8", *METHODS]
        reasons = {name for name, row in steps.items() if row["not measured"]}
        assert reasons == ({"head-only"} if language else {"prefix-r3"})
        (raw,) = (raw for raw in record["raw"] if (raw["title"], raw["model"]) == ("training step", model))
        assert raw["arrangement"] == "together"
        for name in steps.keys() - reasons:
            row, seconds = steps[name], raw["seconds"][name]
            assert len(seconds) == 2
            assert row["median ms"] == pytest.approx(500 * sum(seconds))
            assert row["min ms"] == 1e3 * min(seconds)
            limit = raw["seconds"]["frozen-limit"]
            assert row["/ frozen-limit"] == pytest.approx(sum(seconds) / sum(limit))
            assert row["/ frozen-limit, max"] == max(a / b for a, b in zip(seconds, limit, strict=True))
            assert row["tokens/s"] == pytest.approx(2 * 16 / (row["median ms"] / 1e3))
        assert steps["LoRA-r8"]["/ LoRA-r8"] == 1
        assert steps["SliceFine-2R"]["active"] == 2 * (2 * (6 * 32 + 48) if language else 2 * (5 * 32 + 48))

        moves = rows_of(record, f"{model}: moving every slice once")
        assert [row["method"] for row in moves] == ["SliceFine-2R", "SliceFine-2C"]
        (raw,) = (raw for raw in record["raw"] if (raw["title"], raw["model"]) == ("moving every slice once", model))
        for row in moves:
            name, step = row["method"], steps[row["method"]]["median ms"] / 1e3
            still, moving = (raw["seconds"][f"{name}, {every}"] for every in (speed.NEVER, speed.EVERY_STEP))
            within = [(b - a) / step for a, b in zip(still, moving, strict=True)]
            assert row["a move / training step"] == pytest.approx(sum(within) / 2)
            assert row["a move / training step, min"] == pytest.approx(min(within))
            assert row["a move / training step, max"] == pytest.approx(max(within))
        forward = {row["model"]: row for row in rows_of(record, f"{model}: forward pass without gradients")}
        adapted = ["LoRA-r8", "SliceFine-2R", "SliceFine-2C", "LoRA-r2", *(["prefix-r3"] if language else [])]
        assert list(forward) == ["base", "SliceFine-2R, exported", *(f"{name}, adapted" for name in adapted)]
        (raw,) = (raw for raw in record["raw"] if raw["title"].startswith("forward") and raw["model"] == model)
        for name, row in forward.items():
            within = [a / b for a, b in zip(raw["seconds"][name], raw["seconds"]["base"], strict=True)]
            assert row["/ base"] == pytest.approx(sum(raw["seconds"][name]) / sum(raw["seconds"]["base"]))
            assert (row["/ base, min"], row["/ base, max"]) == (min(within), max(within))
        generation = [table for table in record["tables"] if table["title"] == f"{model}: generating 3 tokens"]
        assert len(generation) == language
    page = report.path.read_text()
    assert page == report.markdown()
    assert "| SliceFine-2R |" in page
    assert "Measured together." in page
    (chart,) = report.folder.glob("*.svg")
    assert f"]({chart.name})" in page
    provenance = record["provenance"]
    assert provenance["command"] == "slicefine bench"
    assert provenance["settings"]["dtype"] == "float32"
    assert provenance["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("name", ["SliceFine-2RC", "AdaLoRA-r2", "full", "random-mask", "prefix-r3"])
def test_a_step_is_a_whole_training_step(tmp_path: Path, name: str) -> None:
    """The same weights, to the bit, as a training loop written out; AdaLoRA's budget included."""
    setup = Setup.of_settings(settings(tmp_path), MODELS["llama-3.2-3b-small"])
    counts: dict[str, Any] = {}
    step = speed.Step(setup, method(name), counts, slide_every=2)
    assert all(step(number) > 0 for number in range(3))
    by_hand = setup.attach(method(name), slide_every=2)
    optimizer = torch.optim.AdamW(by_hand.trainable, lr=speed.LEARNING_RATE, weight_decay=0.0, fused=True)
    for number in range(3):
        by_hand.model(**setup.batch(number)).loss.backward()
        optimizer.step()
        if by_hand.after_step is not None:
            by_hand.after_step(number)
        optimizer.zero_grad()
    expected, found = by_hand.model.state_dict(), step._attached.model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert counts == {method(name).name: by_hand.counts}
    if name.startswith("AdaLoRA"):
        model: Any = step._attached.model
        importances = model.base_model.rankallocator.ipt.values()
        assert importances
        assert all(importance.abs().sum() > 0 for importance in importances)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SMALL)
def test_what_is_exported_is_the_base(tmp_path: Path, name: str, dtype: str) -> None:
    """The same code and the same weights, read from files by transformers alone; the adapter where nothing is merged."""
    setup = Setup.of_settings(settings(tmp_path, dtype=dtype), MODELS[name])
    one = method("SliceFine-2RC")
    base = speed.Inference(setup, None, speed.BASE, folder=tmp_path, generate=0)
    adapted, exported = (
        speed.Inference(setup, one, form, folder=tmp_path, generate=0) for form in (speed.ADAPTED, speed.EXPORTED)
    )
    assert (tmp_path / speed.EXPORTED / "model.safetensors").is_file()
    assert [type(module) for module in exported._model.modules()] == [type(module) for module in base._model.modules()]
    expected, found = setup.base().state_dict(), exported._model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], expected[key]) and found[key].dtype == setup.dtype for key in expected)
    assert any(isinstance(module, SliceLayer) for module in adapted._model.modules())
    for made in (base, adapted, exported):
        assert not made._model.training
        assert made(0) > 0


def test_exported_are_the_trained_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained before it is exported, it is not the base any more."""
    usual = Setup.attach

    def trained(setup: Setup, one: Any, **given: Any) -> Attached:
        attached = usual(setup, one, **given)
        optimizer = attached.optimizer(0.1)
        assert optimizer is not None
        attached.model(**setup.batch(0)).loss.backward()
        optimizer.step()
        return attached

    monkeypatch.setattr(Setup, "attach", trained)
    setup = Setup.of_settings(settings(tmp_path), MODELS["vit-base-small"])
    exported = speed.Inference(setup, method("SliceFine-2R"), speed.EXPORTED, folder=tmp_path, generate=0)
    expected, found = setup.base().state_dict(), exported._model.state_dict()
    key = "vit.layers.0.attention.q_proj.weight"
    changed = (found[key] != expected[key]).any(1)
    assert changed.tolist() == [True, True, *[False] * 30]
    assert not torch.equal(found["classifier.weight"], expected["classifier.weight"])


def test_exported_models_are_removed_also_after_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def interrupted(one: speed.Inference, number: int) -> float:
        (folder,) = (tmp_path / "out").glob(".exported-*")
        seen.append(sorted(path.name for path in folder.iterdir()))
        raise KeyboardInterrupt

    monkeypatch.setattr(speed.Inference, "__call__", interrupted)
    report, _ = run("speed", settings(tmp_path, methods=("SliceFine-2R",)))
    assert seen == [["base", "exported"]]
    assert report.status == "interrupted"
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".md", ".svg"}


# torch's own compiler makes use of what torch has deprecated
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("generate", "compiled"), [(0, True), (3, False)])
def test_what_is_compiled_for_inference(tmp_path: Path, generate: int, compiled: bool) -> None:
    """The forward pass of all, the base among them; generation, whose shapes change with every token, of none."""
    setup = Setup.of_settings(settings(tmp_path, compile=True), MODELS["llama-3.2-3b-small"])
    forms = [(None, speed.BASE), *((method("SliceFine-2R"), form) for form in (speed.ADAPTED, speed.EXPORTED))]
    for one, form in forms:
        model = speed.Inference(setup, one, form, folder=tmp_path, generate=generate)._model
        assert [module._compiled_call_impl is not None for module in model.modules()].count(True) == compiled


def test_generation_makes_as_many_tokens_as_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup.of_settings(settings(tmp_path), MODELS["llama-3.2-3b-small"])
    one = speed.Inference(setup, method("prefix-r3"), speed.ADAPTED, folder=tmp_path, generate=5)
    made: list[torch.Tensor] = []
    usual = one._model.generate
    monkeypatch.setattr(one._model, "generate", lambda **given: made.append(usual(**given)))
    assert one(0) > 0
    assert made[0].shape == (2, 16 + 5)


def test_in_turns_where_all_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "free_bytes", lambda device: 1000)
    _, record = run("speed", settings(tmp_path, models=("vit-base-small",), methods=("SliceFine-2RC",), rounds=3))
    assert {raw["arrangement"] for raw in record["raw"]} == {"in turns"}
    rows = rows_of(record, "vit-base-small: training step")
    assert all(len(seconds) == 3 for seconds in record["raw"][0]["seconds"].values())
    assert all(row["/ frozen-limit"] and row["/ frozen-limit, min"] is None for row in rows)  # of no common round


def test_adalora_is_timed_while_it_cuts_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[speed.Step] = []
    usual = speed.Step.__init__

    def remembered(step: speed.Step, *given: Any, **named: Any) -> None:
        usual(step, *given, **named)
        built.append(step)

    monkeypatch.setattr(speed.Step, "__init__", remembered)
    given = settings(tmp_path, rounds=4)
    setup = Setup.of_settings(given, MODELS["llama-3.2-3b-small"])
    speed.steps(setup, [method("AdaLoRA-r4")], given, together=True)
    values = [p for key, p in built[0]._attached.model.named_parameters() if "lora_E" in key]
    zeros = sum(int((value == 0).sum()) for value in values)
    assert 0 < zeros < sum(value.numel() for value in values)


def test_slices_move_once_halfway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that those that alternate are measured along both axes."""
    seen: list[str] = []
    usual = SliceLayer.slide

    def slide(layer: SliceLayer, adapter: str) -> None:
        usual(layer, adapter)
        seen.append(layer.slicefine_state[adapter].active.axis)

    monkeypatch.setattr(SliceLayer, "slide", slide)
    of = Setup.of_settings(settings(tmp_path), MODELS["vit-base-small"])
    speed.steps(of, [method("SliceFine-2RC")], settings(tmp_path, rounds=4, warmup=2), together=True)
    assert seen == ["column"] * 12  # two layers of six weights, each once


def test_a_method_whose_gradients_go_nowhere_is_not_timed(tmp_path: Path) -> None:
    class Unreached(Setup):
        def attach(self, one: Any, **given: Any) -> Attached:
            attached = super().attach(one, **given)
            if one.name == "head-only":
                attached.model.classifier = nn.Linear(32, 100).requires_grad_(False)
                attached.model.enable_input_require_grads()
                attached.model.unused = nn.Parameter(torch.zeros(3))
            return attached

    given = settings(tmp_path)
    setup = Unreached(**vars(Setup.of_settings(given, MODELS["vit-base-small"])))
    rows, _ = speed.steps(setup, [method("full"), method("head-only")], given, together=True)
    assert [row["not measured"] for row in rows] == ["", "no gradient reaches what it trains"]


def test_equal_parameters(tmp_path: Path) -> None:
    given = settings(tmp_path, methods=("LoRA", "HRA", "SliceFine-5R", "full"), equal_parameters="SliceFine-5R")
    _, record = run("memory", given)
    rows = {row["method"]: row["active"] for row in rows_of(record, "llama-3.2-3b-small: memory")}
    # 2400 are trained by SliceFine-5R: LoRA of rank 3 has 2784, of rank 2 1856; HRA of rank 4 1920, of rank 6 2880.
    assert rows.pop("LoRA-r8") > 0  # measured in any case
    assert rows == {"frozen-limit": 0, "LoRA-r3": 2784, "HRA-r4": 1920, "SliceFine-5R": 2400, "full": 17568}


def test_equal_parameters_leaves_ranks_that_are_named(tmp_path: Path) -> None:
    given = settings(tmp_path, methods=("LoRA-r8", "LoRA-r1", "LoRA", "HRA-r2"), equal_parameters="SliceFine-5R")
    _, record = run("memory", given)
    names = [row["method"] for row in rows_of(record, "llama-3.2-3b-small: memory")]
    assert names == ["frozen-limit", "LoRA-r8", "LoRA-r1", "LoRA-r3", "HRA-r2"]


# torch's own compiler makes use of what torch has deprecated
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("flag", ["checkpointing", "compile"])
def test_how_models_run(tmp_path: Path, flag: str) -> None:
    setup = Setup.of_settings(settings(tmp_path, **{flag: True}), MODELS["vit-base-small"])
    for name in ("SliceFine-2R", "LoRA-r2", "frozen-limit", "full"):
        model: Any = setup.attach(method(name), slide_every=5).model
        if flag == "checkpointing":
            assert model.is_activation_checkpointing
            model(**setup.batch(0)).loss.backward()
        else:
            assert model._compiled_call_impl is not None


def test_dtype_of_weights_and_pixels(tmp_path: Path) -> None:
    setup = Setup.of_settings(settings(tmp_path, dtype="bfloat16"), MODELS["vit-base-small"])
    assert setup.batch(0)["pixel_values"].dtype is setup.base().dtype is torch.bfloat16
    for name in (
        "SliceFine-2R",
        "LoRA-r2",
        "VeRA-r4",
        "HRA",
        "SHiRA-r2",
        "AdaLoRA-r2",
        "random-mask",
        "block-mask",
        "split-rows",
    ):
        attached = setup.attach(method(name), slide_every=5)
        attached.model(**setup.batch(0)).loss.backward()


def test_the_same_batches_and_weights_for_all(tmp_path: Path) -> None:
    setup = Setup.of_settings(settings(tmp_path), MODELS["llama-3.2-3b-small"])
    assert torch.equal(setup.batch(3)["input_ids"], setup.batch(3)["input_ids"])
    assert not torch.equal(setup.batch(3)["input_ids"], setup.batch(4)["input_ids"])
    first, second = setup.base(), setup.base()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


# ---------------------------------------------------------------------- sweeps


def test_a_sweep_over_ranks(tmp_path: Path) -> None:
    given = settings(tmp_path, methods=("SliceFine-5R", "HRA", "full"), sweep="r", values=(1, 2, 4))
    report, record = run("speed", given)
    (table,) = record["tables"]
    names = [row["method"] for row in table["rows"]]
    slices = ["SliceFine-1R", "SliceFine-2R", "SliceFine-4R"]
    assert names == ["frozen-limit", "LoRA-r8", *slices, "HRA-r2", "HRA-r4", "full"]
    assert len(list(report.folder.glob("speed-sweep-r-*.svg"))) == 2
    lines = bench._lines(bench._measured_rows(report, "speed"), "median ms", given)["llama-3.2-3b-small"]
    assert [x for x, _ in lines["SliceFine-row"]] == [1, 2, 4]
    assert [x for x, _ in lines["full"]] == [1, 8]  # flat: it has no rank


@pytest.mark.parametrize("what", ["speed", "memory"])
def test_a_sweep_over_sizes(tmp_path: Path, what: str) -> None:
    report, record = run(what, settings(tmp_path, methods=("SliceFine-2C",), sweep="length"))
    titles = [table["title"].rpartition(": ")[0] for table in record["tables"]]
    assert titles == [f"llama-3.2-3b-small, length {tokens}" for tokens in (8, 16, 32)]
    assert [raw["value"] for raw in record["raw"]] == [8, 16, 32]
    assert len(list(report.folder.glob(f"{what}-sweep-length-*.svg"))) == 2
    if what == "memory":
        saved = [table["rows"][-1]["saved MiB"] for table in record["tables"]]
        assert saved[0] < saved[1] < saved[2]


def test_sizes_that_do_not_exist_are_found_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(SliceFineError, match="is a multiple of 16, for whole heads; got 17"):
        run("speed", settings(tmp_path, sweep="width", values=(32, 17)))
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------- memory


def test_memory_by_method(tmp_path: Path) -> None:
    report, record = run("memory", settings(tmp_path, models=("roberta-base-small",)))
    rows = {row["method"]: row for row in rows_of(record, "roberta-base-small: memory")}
    mib = 2**20
    size = sum(
        p.numel() for p in Setup.of_settings(settings(tmp_path), MODELS["roberta-base-small"]).base().parameters()
    )
    assert rows["full"]["gradients MiB"] == 4 * size / mib
    tensors = len(list(Setup.of_settings(settings(tmp_path), MODELS["roberta-base-small"]).base().parameters()))
    assert rows["full"]["moments MiB"] == (2 * 4 * size + 4 * tensors) / mib  # and Adam's step of each
    assert rows["frozen-limit"]["gradients MiB"] == rows["frozen-limit"]["moments MiB"] == 0
    assert rows["LoRA-r8"]["saved MiB / LoRA-r8"] == rows["frozen-limit"]["saved MiB / frozen-limit"] == 1
    # Columns keep only their part of the inputs.
    saved = {name: row["saved MiB"] for name, row in rows.items()}
    assert saved["SliceFine-2C"] < saved["SliceFine-2R"] <= saved["LoRA-r8"]
    assert saved["head-only"] < saved["frozen-limit"]
    assert rows["prefix-r3"]["not measured"].startswith("prefix tuning needs a decoder")
    assert rows["prefix-r3"]["saved MiB"] is None
    assert "| peak MiB" not in report.path.read_text()  # no GPU


def test_checkpointing_keeps_less_and_prefix_tuning_says_why_not(tmp_path: Path) -> None:
    methods = ("SliceFine-2R", "full", "prefix-r3")
    tables = []
    for checkpointing in (False, True):
        _, record = run("memory", settings(tmp_path, methods=methods, checkpointing=checkpointing))
        tables.append({row["method"]: row for row in record["tables"][0]["rows"]})
    for name in ("SliceFine-2R", "full", "LoRA-r8", "frozen-limit"):
        assert tables[1][name]["saved MiB"] < 0.5 * tables[0][name]["saved MiB"], name
    assert tables[0]["prefix-r3"]["not measured"] == ""
    assert "does not work with activation checkpointing" in tables[1]["prefix-r3"]["not measured"]


# ---------------------------------------------------------------------- charts


def test_without_matplotlib_there_are_no_charts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(charts, "find_spec", lambda name: None)
    report, _ = run("memory", settings(tmp_path, methods=("full",)))
    assert not list(report.folder.glob("*.svg"))
    assert "![" not in report.path.read_text()
    assert "pip install 'slicefine[report]'" in capsys.readouterr().err


def test_charts_name_every_method() -> None:
    drawn = charts.bars({"a model": [("full", 1.5, 1.4, 1.7), ("SliceFine-5R", 1.0, None, None)]}, "ratio")
    assert drawn.count("<svg") == 1
    assert all(f"<!-- {text} -->" in drawn for text in ("full", "SliceFine-5R", "a model", "ratio"))
    drawn = charts.growth({"a model": {"full": [(1, 2.0), (4, 3.0)], "LoRA": [(4, 5.0)]}}, "length", "ms")
    assert all(f"<!-- {text} -->" in drawn for text in ("full", "LoRA", "length", "ms"))
