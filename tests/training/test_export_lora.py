from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import exporting
import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from slicefine import SliceFineError, SliceFineWarning
from slicefine.slicing import Region
from slicefine.training import export_lora
from slicefine.training.export import export
from slicefine.training.export_lora import factorise

CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "llama": (tiny.llama, {}),
    "llama in bf16": (lambda: tiny.llama().to(torch.bfloat16), {}),
    "gpt2, stored transposed": (tiny.gpt2, {}),
    "gpt2, some blocks, rows": (tiny.gpt2, {"target_modules": ["h.1.mlp.c_fc", "h.0.attn.c_proj"], "axis": "row"}),
    "llama, all rows and columns of narrow layers": (tiny.llama, {"r": 5, "slide_every": 1}),
    "llama, trained heads and biases": (
        functools.partial(tiny.llama, attention_bias=True),
        {"bias": "slicefine_only", "modules_to_save": ["lm_head"]},
    ),
    "gemma3 with images, other names in its files": (
        exporting.gemma3_with_images,
        {"target_modules": r".*language_model.*_proj"},
    ),
}
WHOLE = [name for name in CASES if "heads" not in name]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The trained adapter of every case, with its export beside it as `lora`, and what was said of it as `said`."""
    made = {}
    for number, (name, (build, settings)) in enumerate(CASES.items()):
        made[name] = exporting.trained_adapter(tmp_path_factory.mktemp(f"case{number}"), build(), **settings)
        said: list[str] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SliceFineWarning)
            export(
                made[name],
                "lora",
                made[name].parent / "lora",
                drop_biases_and_heads=name not in WHOLE,
                say=said.append,
            )
        (made[name].parent / "said").write_text("\n".join(said))
    return made


@pytest.fixture(scope="module", autouse=True)
def elsewhere(
    adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that computes the logits of all exports, and the file they go to. Started early: it imports for seconds."""
    code = """
import sys, json, torch, warnings
sys.modules["slicefine"] = None
warnings.simplefilter("error")
warnings.filterwarnings("ignore", category=FutureWarning)
from peft import PeftModel
from transformers import AutoModelForCausalLM
from safetensors.torch import save_file
logits = {}
for name, folder in json.loads(sys.argv[2]).items():
    base = AutoModelForCausalLM.from_pretrained(folder + "/base").float()
    model = PeftModel.from_pretrained(base, folder + "/lora").eval()
    with torch.no_grad():
        logits[name] = model(input_ids=torch.tensor(%r)).logits
        merged = model.merge_and_unload()(input_ids=torch.tensor(%r)).logits
    assert (merged - logits[name]).abs().max() < 1e-5, name
save_file(logits, sys.argv[1])
"""
    tokens = tiny.tokens(size=1).tolist()
    out = tmp_path_factory.mktemp("elsewhere") / "logits"
    arguments = [code % (tokens, tokens), str(out), json.dumps({name: str(adapters[name].parent) for name in WHOLE})]
    with subprocess.Popen([sys.executable, "-c", *arguments], stderr=subprocess.PIPE, text=True) as process:
        yield process, out
        process.kill()


@pytest.mark.parametrize(
    ("shape", "rows", "columns", "rank"),
    [
        ((6, 9), (1, 4), (), 2),
        ((6, 9), (), (0, 8), 2),
        ((6, 9), (0, 5), (3, 4, 8), 5),
        ((6, 9), (0, 1, 2, 3), (3, 4, 8), 6),
        ((9, 6), (0, 1, 2, 3), (3, 4, 5), 6),
        ((6, 9), tuple(range(6)), (2,), 6),
    ],
)
def test_the_factors_are_the_change_itself(
    shape: tuple[int, int], rows: tuple[int, ...], columns: tuple[int, ...], rank: int
) -> None:
    change = torch.zeros(shape)
    change[list(rows)] = torch.randn(len(rows), shape[1], generator=torch.Generator().manual_seed(0))
    change[:, list(columns)] = torch.randn(shape[0], len(columns), generator=torch.Generator().manual_seed(1))
    a, b = factorise(change, Region(rows, columns))
    assert a.shape == (rank, shape[1])
    assert b.shape == (shape[0], rank)
    assert torch.equal(b @ a, change)
    x = torch.randn(7, shape[1], generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(x @ a.t() @ b.t(), x @ change.t(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_what_it_says_of_exactness_is_measured(name: str, adapters: dict[str, Path]) -> None:
    ranks, measured = (adapters[name].parent / "said").read_text().splitlines()
    assert ranks.startswith("LoRA of rank ")
    found = re.search(r"computed in fp32: (\S+); with the LoRA adapter rounded to bf16: (\S+) \(", measured)
    assert found
    exact, rounded = map(float, found.groups())
    assert exact <= 1e-5
    assert exact < rounded < 1e-1


def test_ranks_and_scales_are_what_servers_read(adapters: dict[str, Path]) -> None:
    folder = adapters["llama, all rows and columns of narrow layers"].parent / "lora"
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    ranks = {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): len(tensor)
        for key, tensor in tensors.items()
        if "lora_A" in key
    }
    assert config["r"] == config["lora_alpha"] == max(ranks.values())
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["rank_pattern"] == {name: rank for name, rank in ranks.items() if rank != config["r"]}
    assert len(set(ranks.values())) > 1
    # 4 moves of rows, 3 of columns; k_proj is 8 x 16: more than its 8 rows are not needed
    assert ranks["model.layers.0.self_attn.k_proj"] == 8
    assert sorted(config["target_modules"]) == sorted({name.rpartition(".")[2] for name in ranks})
    assert config["peft_type"] == "LORA"
    assert config["bias"] == "none"
    assert config["modules_to_save"] is None


def test_layers_are_named_in_full_where_the_last_part_would_mean_others(adapters: dict[str, Path]) -> None:
    folder = adapters["gpt2, some blocks, rows"].parent / "lora"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == ["transformer.h.0.attn.c_proj", "transformer.h.1.mlp.c_fc"]
    assert config["fan_in_fan_out"] is True


def test_a_layer_that_training_did_not_change_is_left_out(tmp_path: Path) -> None:
    model = tiny.llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()  # so nothing reaches up_proj and gate_proj below it
    adapter = exporting.trained_adapter(tmp_path, model, target_modules=["up_proj", "gate_proj"])
    said: list[str] = []
    with pytest.warns(SliceFineWarning, match="no tokenizer"):
        export(adapter, "lora", tmp_path / "lora", say=said.append)
    keys = load_file(tmp_path / "lora" / "adapter_model.safetensors").keys()
    assert {key.split(".")[4] for key in keys} == {"0"}
    assert "LoRA of rank 8 in 2 layers" in said[0]
    assert "; 2 layers that training has not changed are left out" in said[0]


def test_an_adapter_that_changed_nothing_is_refused(tmp_path: Path) -> None:
    adapter = exporting.trained_adapter(tmp_path, tiny.llama(), steps=0)
    with pytest.raises(SliceFineError, match="has changed nothing in any layer"):
        export(adapter, "lora", tmp_path / "lora")


def test_trained_biases_and_heads_are_named_and_refused(adapters: dict[str, Path], tmp_path: Path) -> None:
    adapter = adapters["llama, trained heads and biases"]
    with pytest.raises(SliceFineError) as error:
        export(adapter, "lora", tmp_path / "lora")
    assert "leave them out on purpose with --drop_biases_and_heads: 9 problems" in str(error.value)
    assert "model.layers.0.self_attn.q_proj.bias was trained in full." in str(error.value)
    assert "lm_head.weight was trained in full." in str(error.value)
    assert not (tmp_path / "lora").exists()


def test_left_out_on_purpose_they_are_named_and_the_slices_are_still_exact(
    adapters: dict[str, Path], tmp_path: Path
) -> None:
    adapter = adapters["llama, trained heads and biases"]
    with pytest.warns(SliceFineWarning) as said:
        export(adapter, "lora", tmp_path / "lora", drop_biases_and_heads=True)
    assert any("Left out, as asked: model.layers.0.self_attn" in str(w.message) for w in said)
    keys = load_file(tmp_path / "lora" / "adapter_model.safetensors").keys()
    assert all("lora_A" in key or "lora_B" in key for key in keys)
    lora = PeftModel.from_pretrained(exporting.base_of(adapter), str(tmp_path / "lora")).merge_and_unload()
    trained = exporting.merged_by_peft(adapter)
    weight = "model.layers.1.self_attn.v_proj.weight"
    torch.testing.assert_close(lora.state_dict()[weight], trained.state_dict()[weight], rtol=0, atol=1e-7)
    assert torch.equal(lora.lm_head.weight, exporting.base_of(adapter).lm_head.weight)


@pytest.mark.parametrize(
    ("r", "says"),
    [
        (2, None),
        (5, r"Rank 20 is more than LoRA servers take by default \(vLLM: 16\)\. Start vLLM with --max-lora-rank 32\."),
        (150, r"Rank 600 is more than LoRA servers take \(vLLM: 512 at most\)\. Export as merged"),
    ],
)
def test_a_rank_that_servers_refuse_is_said(r: int, says: str | None, tmp_path: Path) -> None:
    size = 700 if r > 100 else 64
    config = LlamaConfig(
        vocab_size=50, hidden_size=size, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32,
    )  # fmt: skip
    adapter = exporting.trained_adapter(tmp_path, LlamaForCausalLM(config), r=r, target_modules=["q_proj"])
    with pytest.warns(SliceFineWarning) as said:
        export(adapter, "lora", tmp_path / "lora", verify=False)
    messages = [str(w.message) for w in said if "Rank" in str(w.message)]
    assert len(messages) == (says is not None)
    if says:
        assert re.search(says, messages[0])


def test_a_layer_that_lora_lacks_is_named(tmp_path: Path) -> None:
    adapter = exporting.trained_adapter(tmp_path, exporting.mamba(), target_modules=["in_proj", "out_proj"])
    with pytest.raises(
        SliceFineError, match=r"does not take every layer .*'out_proj' is incompatible with Mamba.*Export as merged"
    ):
        export(adapter, "lora", tmp_path / "lora")
    with pytest.warns(SliceFineWarning, match="no tokenizer"):
        export(adapter, "merged", tmp_path / "merged")


def test_factors_that_are_wrong_are_found_by_the_logits_and_leave_nothing(
    adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(change: torch.Tensor, region: Region) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = factorise(change, region)
        return 1.5 * a, b

    monkeypatch.setattr(export_lora, "factorise", wrong)
    with (
        pytest.warns(SliceFineWarning, match="no tokenizer"),
        pytest.raises(
            SliceFineError, match=r"differ from those of the trained model by .* more than rounding explains"
        ),
    ):
        export(adapters["llama"], "lora", tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


def test_pickled_weights_are_loaded_with_a_word(adapters: dict[str, Path], tmp_path: Path) -> None:
    adapter = exporting.trained_adapter(tmp_path, tiny.llama())
    base = tmp_path / "base"
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.warns(SliceFineWarning) as said:
        export(adapter, "lora", tmp_path / "lora")
    assert any("loaded as a whole" in str(w.message) for w in said)
    assert exporting.differing(tmp_path / "lora", adapters["llama"].parent / "lora") == []


def test_the_logits_are_those_of_the_trained_model_where_slicefine_cannot_be_imported(
    adapters: dict[str, Path], elsewhere: tuple[subprocess.Popen[str], Path]
) -> None:
    process, out = elsewhere
    _, complaints = process.communicate()
    assert process.returncode == 0, complaints
    for name, computed in load_file(out).items():
        expected = exporting.logits(exporting.merged_by_peft(adapters[name]).float())
        untrained = exporting.logits(exporting.base_of(adapters[name]).float())
        assert float((computed - expected).abs().max()) <= 1e-5, name
        assert float((computed - untrained).abs().max()) > 1e-3, name
