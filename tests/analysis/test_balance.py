"""The stage `balance`: what it says of weights that were made to be balanced or not."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from architectures import ARCHITECTURES
from torch import Tensor, nn

from slicefine.analysis import balance
from slicefine.analysis.settings import AnalysisSettings
from slicefine.analysis.weights import LoadedWeights, StoredWeights
from slicefine.tuner.base_layers import Place

FIGURES = {"rho", "energy_spread", "decay_distance"}
ENTRY = {
    "name", "shape", "axis", "groups", *FIGURES, "null_permuted", "null_shuffled", "stable_rank", "effective_rank", "profiles", "note",
}  # fmt: skip
SUMMARY = {
    "rho_median", "rho_greatest", "rho_shuffled_median", "rho_permuted_median", "energy_spread_median", "decay_distance_median",
}  # fmt: skip


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def silent(done: int, total: int, what: str) -> None:
    pass


def weights_of(**matrices: Tensor) -> LoadedWeights:
    """Weights that are no layers of attention."""
    model = nn.Module()
    for name, matrix in matrices.items():
        model.add_module(name, nn.Linear(matrix.shape[1], matrix.shape[0], bias=False))
        model.get_submodule(name).weight = nn.Parameter(matrix.clone())
    return LoadedWeights(model, {name: Place(model.get_submodule(name)) for name in matrices})


def analyse(source: Any, say: Callable[[int, int, str], None] = silent, **settings: Any) -> dict[str, Any]:
    result = balance.run(source, AnalysisSettings(**({"groups": 4} | settings)), say)
    json.dumps(result, allow_nan=False)  # it can be written
    return result


def by_axis(result: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    return {entry["axis"]: entry for entry in result["weights"] if entry["name"] == name}


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "BERT", "ViT", "VideoMAE"])
def test_of_files_and_of_the_model_the_same_is_said(name: str, tmp_path: Path) -> None:
    model = ARCHITECTURES[name].build()
    model.save_pretrained(tmp_path)
    stored, loaded = analyse(StoredWeights(str(tmp_path))), analyse(LoadedWeights(model))
    assert stored == loaded
    assert stored["groups"] == 4
    assert stored["poster"] == 0.001
    assert set(stored["summary"]) == {"row", "column", "head"}
    assert all(set(summary) == SUMMARY for summary in stored["summary"].values())
    assert stored["weights"]
    for entry in stored["weights"]:
        assert set(entry) == ENTRY
        assert set(entry["null_permuted"]) == set(entry["null_shuffled"]) == FIGURES
        assert set(entry["stable_rank"]) == set(entry["effective_rank"]) == {"mean", "least", "greatest"}
        profiles = entry["profiles"]
        assert set(profiles) == {"x", "mean", "low", "high", "shuffled"}
        assert {len(line) for line in profiles.values()} == {len(profiles["x"])}
        assert len(profiles["x"]) <= 32
        assert profiles["x"] == sorted(profiles["x"])
        assert (profiles["x"][0], profiles["x"][-1]) == (0, 1)
        for line in ("mean", "low", "high", "shuffled"):
            assert profiles[line] == sorted(profiles[line])
            assert (profiles[line][0], profiles[line][-1]) == (0, pytest.approx(1))
        assert all(
            low <= mean <= high
            for low, mean, high in zip(profiles["low"], profiles["mean"], profiles["high"], strict=True)
        )


def test_random_weights_are_balanced_and_an_unbalanced_one_is_found() -> None:
    """One group of rows is 3 times as large: its rows stand out, in random order less, its shuffled entries and its columns not at all."""
    plain = gaussian(64, 128)
    plain /= (
        plain.view(4, -1).square().mean(1).sqrt().repeat_interleave(16)[:, None]
    )  # the groups of rows have one energy
    marked = plain.clone()
    marked[16:32] *= 3
    result = analyse(weights_of(plain=plain, marked=marked))
    expected = 2 / (16 * 128)
    for entry in by_axis(result, "plain").values():
        for rho in (entry["rho"], entry["null_permuted"]["rho"], entry["null_shuffled"]["rho"]):
            assert rho < 6 * expected
    rows, columns = (by_axis(result, "marked")[axis] for axis in ("row", "column"))
    assert rows["rho"] == pytest.approx(4 * (9 - 1) ** 2 / (4 - 1 + 9) ** 2, rel=1e-4)
    assert rows["energy_spread"] == pytest.approx(math.sqrt(rows["rho"]), rel=1e-4)
    assert rows["null_permuted"]["rho"] < rows["rho"] / 4
    assert rows["null_shuffled"]["rho"] < rows["rho"] / 100
    assert columns["rho"] < 10 * columns["null_shuffled"]["rho"]
    assert result["summary"]["row"]["rho_greatest"] == rows["rho"]
    assert result["summary"]["head"] is None


def test_a_group_of_another_decay_is_found_though_its_energy_is_the_same() -> None:
    """16 rows in one direction of 128; in random order every group has some of them."""
    weight = gaussian(64, 128)
    weight[:16] = gaussian(16, 1, seed=1) * gaussian(1, 128, seed=2)
    weight[:16] *= weight[16:].square().mean().sqrt() / weight[:16].square().mean().sqrt()
    rows = by_axis(analyse(weights_of(w=weight)), "w")["row"]
    assert rows["rho"] < 0.02
    assert rows["decay_distance"] > 2 * rows["null_permuted"]["decay_distance"]
    assert rows["decay_distance"] > 5 * rows["null_shuffled"]["decay_distance"]
    assert rows["stable_rank"]["least"] == rows["effective_rank"]["least"] == pytest.approx(1, abs=1e-3)  # fp32 weights
    assert rows["profiles"]["high"][1] == pytest.approx(1, abs=1e-3)


def test_the_nulls_are_what_chance_gives() -> None:
    """Means over draws without replacement: the variance of what is drawn over its number, for rows and for entries."""
    weight = gaussian(64, 32) * torch.linspace(0.5, 2, 64)[:, None]
    rows = by_axis(analyse(weights_of(w=weight), draws=200), "w")["row"]
    entries, energies = weight.double().square(), weight.double().square().mean(1)
    assert rows["null_permuted"]["rho"] == pytest.approx(float(energies.var() / 16 / energies.mean() ** 2), rel=0.25)
    assert rows["null_shuffled"]["rho"] == pytest.approx(float(entries.var() / 512 / entries.mean() ** 2), rel=0.25)


def test_a_head_that_stands_out_is_found() -> None:
    model = tiny.llama()
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.v_proj.weight[4:] *= 3  # the second of two heads of 4
        attention.o_proj.weight[:, :4] *= 3  # the first of four
    result = analyse(LoadedWeights(model))
    values, output, up = (
        by_axis(result, f"model.layers.0.{name}") for name in ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj")
    )
    assert (values["head"]["groups"], output["head"]["groups"]) == (2, 4)
    assert values["head"]["rho"] > 10 * values["head"]["null_shuffled"]["rho"]
    assert output["head"]["rho"] == pytest.approx(output["column"]["rho"])
    assert output["head"]["rho"] > 10 * output["row"]["rho"]
    assert set(up) == {"row", "column"}
    assert len([entry for entry in result["weights"] if entry["axis"] == "head"]) == 2 * 4


def test_draws_depend_on_the_seed_and_the_weight_alone() -> None:
    one, two = gaussian(16, 16), gaussian(16, 24, seed=1)
    both = analyse(weights_of(one=one, two=two))
    assert both == analyse(weights_of(one=one, two=two))
    assert by_axis(analyse(weights_of(two=two)), "two") == by_axis(both, "two")
    other = by_axis(analyse(weights_of(one=one, two=two), seed=1), "two")["row"]
    assert other["rho"] == by_axis(both, "two")["row"]["rho"]
    assert other["null_shuffled"] != by_axis(both, "two")["row"]["null_shuffled"]
    source, state = weights_of(one=one), torch.get_rng_state()
    analyse(source)
    assert torch.equal(torch.get_rng_state(), state)


def test_quick_and_large_weights_draw_once(monkeypatch: pytest.MonkeyPatch) -> None:
    source = weights_of(w=gaussian(16, 16))
    quick, once = analyse(source, quick=True, draws=9), analyse(source, draws=1)
    assert quick == once
    monkeypatch.setattr(balance, "LARGE", 255)
    (large, _) = analyse(source, draws=9)["weights"]
    assert large.pop("note") == "Large: one draw of each null."
    assert large == {key: value for key, value in once["weights"][0].items() if key != "note"}


def test_the_model_is_left_as_it_was_and_threads_too() -> None:
    model = tiny.bert()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    threads = torch.get_num_threads()
    analyse(LoadedWeights(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.get_num_threads() == threads


def test_progress() -> None:
    said: list[tuple[int, int, str]] = []
    analyse(weights_of(a=gaussian(8, 8), b=gaussian(8, 8)), say=lambda *what: said.append(what))
    assert said == [(0, 2, "a"), (1, 2, "b"), (2, 2, "")]


def test_one_weight_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.llama().save_pretrained(tmp_path)
    source = StoredWeights(str(tmp_path))
    alive: list[weakref.ref[Tensor]] = []
    read = source.read

    def watched(name: str) -> Tensor:
        assert not [ref for ref in alive if ref() is not None]
        weight = read(name)
        alive.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(source, "read", watched)
    analyse(source)
    assert len(alive) == 14


# ------------------------------------------------------------------ odd weights


def test_weights_without_figures_are_skipped_with_the_reason() -> None:
    bad = gaussian(16, 16)
    bad[0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    result = analyse(weights_of(bad=bad, zero=torch.zeros(16, 16), fine=gaussian(16, 16)))
    assert {entry["name"] for entry in result["weights"]} == {"fine"}
    assert result["skipped"] == [
        {"name": "bad", "why": "3 of its entries are NaN or Inf"},
        {"name": "zero", "why": "all of its entries are zero"},
    ]


def test_a_weight_smaller_than_the_number_of_groups_is_cut_where_it_can_be() -> None:
    result = analyse(weights_of(low=gaussian(3, 16), tiny=gaussian(3, 2)))
    assert set(by_axis(result, "low")) == {"column"}
    assert result["summary"]["row"] is None
    assert result["skipped"] == [
        {"name": "low", "why": "4 groups of rows need as many rows; it has 3"},
        {"name": "tiny", "why": "4 groups of rows need as many rows; it has 3"},
        {"name": "tiny", "why": "4 groups of columns need as many columns; it has 2"},
    ]


def test_heads_of_query_key_and_value_in_one_weight_are_said_to_be() -> None:
    result = analyse(LoadedWeights(ARCHITECTURES["GPT-2"].build()))
    heads = {entry["name"].partition(".attn.")[2]: entry for entry in result["weights"] if entry["axis"] == "head"}
    assert (heads["c_attn"]["groups"], heads["c_attn"]["note"]) == (6, balance.MIXED)
    assert (heads["c_proj"]["groups"], heads["c_proj"]["note"]) == (2, "")


def test_one_head_is_nothing_to_compare() -> None:
    result = analyse(LoadedWeights(ARCHITECTURES["Llama"].build()))
    assert [entry["name"] for entry in result["skipped"]] == [
        f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("k_proj", "v_proj")
    ]
    assert {entry["why"] for entry in result["skipped"]} == {"it has one head, which there is nothing to compare with"}


def test_zero_rows_are_noted_and_a_group_of_zeros_has_no_decay() -> None:
    weight = gaussian(16, 16)
    weight[:6] = 0
    rows, columns = (by_axis(analyse(weights_of(w=weight)), "w")[axis] for axis in ("row", "column"))
    assert rows["note"] == "6 of its rows are zero. 1 of its groups are zero, and have no decay."
    assert rows["rho"] > 0.3
    assert columns["note"] == ""


def test_nothing_to_analyse() -> None:
    result = analyse(weights_of())
    assert (result["weights"], result["skipped"]) == ([], [])
    assert result["summary"] == {"row": None, "column": None, "head": None}


def test_weights_that_cannot_be_read_are_among_the_skipped(tmp_path: Path) -> None:
    with torch.device("meta"):
        source = LoadedWeights(tiny.mlp())
    assert {entry["why"] for entry in analyse(source)["skipped"]} == {"it has no values (meta device)"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_figures_are_the_same(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path)
    on_cpu, on_gpu = (analyse(StoredWeights(str(tmp_path), device=device)) for device in ("cpu", "cuda"))
    for one, other in zip(on_cpu["weights"], on_gpu["weights"], strict=True):
        for figure in ("rho", "energy_spread", "decay_distance"):
            assert one[figure] == pytest.approx(other[figure], rel=1e-4, abs=1e-9)
