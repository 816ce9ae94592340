from __future__ import annotations

import functools
import json
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
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from slicefine import SliceFineError, SliceFineWarning
from slicefine.training import export_source
from slicefine.training.export import export
from slicefine.training.export_source import Source, Trained

CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "llama": (tiny.llama, {}),
    "llama, tied, biases": (
        functools.partial(tiny.llama, tie_word_embeddings=True, attention_bias=True),
        {"bias": "slicefine_only"},
    ),
    "llama, bf16, in 3 files": (lambda: tiny.llama().to(torch.bfloat16), {"shards": "5KB"}),
    "llama, fp32 files, trained in bf16": (tiny.llama, {"dtype": torch.bfloat16, "shards": "5KB"}),
    "llama, tied, head trained": (
        functools.partial(tiny.llama, tie_word_embeddings=True),
        {"modules_to_save": ["lm_head"]},
    ),
    "llama, tied, embeddings trained": (
        functools.partial(tiny.llama, tie_word_embeddings=True),
        {"modules_to_save": ["embed_tokens"]},
    ),
    "llama classifies": (tiny.llama, {"task": "SEQ_CLS", "load": {"num_labels": 3, "pad_token_id": 0}}),
    "gpt2, stored transposed, biases": (tiny.gpt2, {"bias": "slicefine_only"}),
    "bert, new head, biases, files without prefix": (
        lambda: tiny.bert().bert,
        {"task": "SEQ_CLS", "load": {"num_labels": 4}, "bias": "slicefine_only"},
    ),
    "electra, old head": (tiny.electra, {"task": "SEQ_CLS"}),
    "gemma3": (lambda: exporting.gemma3().to(torch.bfloat16), {}),
    "gemma3 with images, other names in its files": (
        exporting.gemma3_with_images,
        {"target_modules": r".*language_model.*_proj", "shards": "8KB"},
    ),
    "mixtral, experts stored one by one": (exporting.mixtral, {"shards": "5KB"}),
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The trained adapter of every case, with its export beside it as `merged`."""
    made = {}
    for number, (name, (build, settings)) in enumerate(CASES.items()):
        made[name] = exporting.trained_adapter(tmp_path_factory.mktemp(f"case{number}"), build(), **settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of PEFT about tied heads; there is no tokenizer
            export(made[name], "merged", made[name].parent / "merged")
    return made


def task_of(name: str) -> str:
    return CASES[name][1].get("task", "CAUSAL_LM")


@pytest.fixture(scope="module", autouse=True)
def elsewhere(
    adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that computes the logits of all exports, and the file they go to. Started early: it imports for seconds."""
    code = """
import sys, json, torch
sys.modules["slicefine"] = sys.modules["peft"] = None
import transformers
from safetensors.torch import save_file
torch.set_num_threads(int(sys.argv[2]))
logits = {}
for name, (folder, kind) in json.loads(sys.argv[3]).items():
    model, report = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), (name, report)
    for parameter in model.requires_grad_(False).parameters():  # as `same_kernels` does
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        logits[name] = model(input_ids=torch.tensor(%r)).logits
save_file(logits, sys.argv[1])
"""
    kinds = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_CLS": "AutoModelForSequenceClassification"}
    asked = {name: (str(folder.parent / "merged"), kinds[task_of(name)]) for name, folder in adapters.items()}
    out = tmp_path_factory.mktemp("elsewhere") / "logits"
    arguments = [code % tiny.tokens(size=1).tolist(), str(out), str(torch.get_num_threads()), json.dumps(asked)]
    with subprocess.Popen([sys.executable, "-c", *arguments], stderr=subprocess.PIPE, text=True) as process:
        yield process, out
        process.kill()


@pytest.mark.parametrize("name", CASES)
def test_it_is_what_merging_in_memory_would_save_bit_by_bit(
    name: str, adapters: dict[str, Path], tmp_path: Path
) -> None:
    trained = Trained(adapters[name])
    steps = {seal.step for seal in trained.seals.values()}
    touched = trained.config.schedule.touched(min(steps), (16, 16))
    assert {piece.axis for piece in touched} == {"row", "column"}  # they cross

    exporting.merged_by_peft(adapters[name], task_of(name)).save_pretrained(tmp_path)
    merged = adapters[name].parent / "merged"
    assert exporting.differing(merged, tmp_path) == []
    assert exporting.differing(merged, adapters[name].parent / "base") != []
    written, expected = (json.loads((folder / "config.json").read_text()) for folder in (merged, tmp_path))
    assert written == expected


def test_files_are_cut_as_those_of_the_base(adapters: dict[str, Path]) -> None:
    folder = adapters["llama, fp32 files, trained in bf16"].parent
    base, merged = (
        json.loads((folder / name / "model.safetensors.index.json").read_text()) for name in ("base", "merged")
    )
    assert len(set(base["weight_map"].values())) > 1
    assert merged["weight_map"] == base["weight_map"]
    assert merged["metadata"]["total_parameters"] == base["metadata"]["total_parameters"]
    assert merged["metadata"]["total_size"] * 2 == base["metadata"]["total_size"]


def test_a_file_of_which_nothing_is_needed_is_left_out(tmp_path: Path) -> None:
    """Of a language model that was made to classify, the head stays behind."""
    adapter = exporting.trained_adapter(
        tmp_path, tiny.llama(), task="SEQ_CLS", load={"num_labels": 3, "pad_token_id": 0}, shards="3KB"
    )
    base = json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text())["weight_map"]
    alone = [file for file in base.values() if file == base["lm_head.weight"]]
    assert len(alone) == 1
    with pytest.warns(SliceFineWarning, match="no tokenizer"):
        export(adapter, "merged", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*"))) == len(set(base.values())) - 1
    assert "lm_head.weight" not in exporting.weights(tmp_path / "out")


def test_both_names_of_tied_weights_stay_where_the_base_stores_both(tmp_path: Path) -> None:
    """Loading ties them if they are equal, and only then: so it must find them as it found them in the base."""
    adapter = exporting.trained_adapter(tmp_path, tiny.llama(tie_word_embeddings=True))
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file, metadata={"format": "pt"})
    expected = exporting.logits(exporting.merged_by_peft(adapter))
    with pytest.warns(SliceFineWarning, match="no tokenizer"):
        export(adapter, "merged", tmp_path / "out")
    assert torch.equal(exporting.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected)


def test_what_transformers_keeps_in_fp32_stays_so(tmp_path: Path) -> None:
    """T5 in fp16, an encoder and a decoder; its `wo` would overflow."""
    config = T5Config(
        vocab_size=50,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    model = T5ForConditionalGeneration(config).half()
    adapter = exporting.trained_adapter(tmp_path, model, task="SEQ_2_SEQ_LM", steps=0)
    with pytest.warns(SliceFineWarning, match="no tokenizer"):
        export(adapter, "merged", tmp_path / "out")
    exporting.merged_by_peft(adapter, "SEQ_2_SEQ_LM").save_pretrained(tmp_path / "expected")
    assert exporting.differing(tmp_path / "out", tmp_path / "expected") == []
    dtypes = {key.split(".")[-2]: tensor.dtype for key, tensor in exporting.weights(tmp_path / "out").items()}
    assert (dtypes["wo"], dtypes["wi"]) == (torch.float32, torch.float16)


@pytest.mark.parametrize("piece", [1, 200])
def test_reading_in_pieces_changes_nothing(
    piece: int, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_source, "PIECE", piece)
    adapter = adapters["mixtral, experts stored one by one"]
    with pytest.warns(SliceFineWarning, match="no tokenizer"):
        export(adapter, "merged", tmp_path / "out")
    assert exporting.differing(tmp_path / "out", adapter.parent / "merged") == []


def test_without_verification_no_model_is_loaded(
    adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_base(self: Source) -> None:
        raise AssertionError

    monkeypatch.setattr(Source, "load_base", load_base)
    adapter = adapters["llama"]
    with pytest.warns(SliceFineWarning, match="no tokenizer"):
        export(adapter, "merged", tmp_path / "out", verify=False)
    assert exporting.differing(tmp_path / "out", adapter.parent / "merged") == []
    with pytest.raises(AssertionError), pytest.warns(SliceFineWarning, match="no tokenizer"):
        export(adapter, "merged", tmp_path / "again")


def test_pickled_weights_are_loaded_as_a_whole_with_a_word(adapters: dict[str, Path], tmp_path: Path) -> None:
    adapter = exporting.trained_adapter(tmp_path, tiny.llama())
    base = tmp_path / "base"
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.warns(SliceFineWarning) as said:
        export(adapter, "merged", tmp_path / "out")
    assert "loaded as a whole, which needs memory for all of it: its weights are not stored as safetensors" in str(
        said[0].message
    )
    assert exporting.differing(tmp_path / "out", adapters["llama"].parent / "merged") == []


def test_a_wrong_patch_is_found_by_its_logits_and_leaves_nothing(
    adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch = Trained.patch

    def wrong(self: Trained, values: Any, weight: torch.Tensor) -> None:
        patch(self, values, weight)
        weight[0, 0] += 1

    monkeypatch.setattr(Trained, "patch", wrong)
    with (
        pytest.warns(SliceFineWarning, match="no tokenizer"),
        pytest.raises(
            SliceFineError, match=r"does not compute what the trained one does.* differ by up to [\d.e-]+; nothing"
        ),
    ):
        export(adapters["llama"], "merged", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["value", "shape", "truncated", "gone"])
def test_another_base_is_refused_and_leaves_nothing(change: str, tmp_path: Path) -> None:
    adapter = exporting.trained_adapter(tmp_path, tiny.llama())
    file = tmp_path / "base" / "model.safetensors"
    key = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    if change == "value":
        tensors[key][0, 0] += 1
        says = r"model\.layers\.1\.mlp\.up_proj: the adapter was trained on a base with other values"
    else:
        tensors[key] = tensors[key][1:].contiguous()
        says = r"up_proj\.weight has shape \(23, 16\) in the file, \(24, 16\) in the model"
    save_file(tensors, file, metadata={"format": "pt"})
    if change == "truncated":
        file.write_bytes(file.read_bytes()[:-10])
        says = r"base model .* did not load: .* Put it back there"
    if change == "gone":
        file.rename(tmp_path / "elsewhere")
        (tmp_path / "base").rename(tmp_path / "moved")
        says = r"base model .* did not load: .* Put it back there"
    before = exporting.fingerprints(tmp_path)
    with pytest.raises(SliceFineError, match=says):
        export(adapter, "merged", tmp_path / "deep" / "out")
    assert exporting.fingerprints(tmp_path) == before
    assert not (tmp_path / "deep").exists()


def test_values_that_no_file_holds_are_refused(tmp_path: Path) -> None:
    adapter = exporting.trained_adapter(tmp_path, tiny.llama())
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(SliceFineError, match=r"model\.norm\.weight: neither the base model nor the adapter has values"):
        export(adapter, "merged", tmp_path / "out")


def test_a_dtype_other_than_that_of_training_is_refused(tmp_path: Path) -> None:
    adapter = exporting.trained_adapter(tmp_path, tiny.llama())
    config = json.loads((adapter / "config.json").read_text())
    (adapter / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    with pytest.raises(SliceFineError, match=r"q_proj: it was trained in float32, config\.json says bfloat16"):
        export(adapter, "merged", tmp_path / "out")


def test_the_generation_config_is_copied_even_if_transformers_would_not_write_it_today(tmp_path: Path) -> None:
    adapter = exporting.trained_adapter(tmp_path, tiny.llama())
    text = json.dumps({"temperature": 0.6, "do_sample": False, "eos_token_id": [3, 4]})
    (tmp_path / "base" / "generation_config.json").write_text(text)
    with pytest.warns(SliceFineWarning, match="no tokenizer"):
        export(adapter, "merged", tmp_path / "out")
    assert (tmp_path / "out" / "generation_config.json").read_text() == text
    (adapter / "generation_config.json").write_text("{}")  # that of the run wins
    with pytest.warns(SliceFineWarning, match="no tokenizer"):
        export(adapter, "merged", tmp_path / "again")
    assert (tmp_path / "again" / "generation_config.json").read_text() == "{}"


def test_it_computes_the_same_where_slicefine_and_peft_cannot_be_imported(
    adapters: dict[str, Path], elsewhere: tuple[subprocess.Popen[str], Path]
) -> None:
    process, out = elsewhere
    _, complaints = process.communicate()
    assert process.returncode == 0, complaints
    computed = load_file(out)
    for name, adapter in adapters.items():
        expected = exporting.logits(exporting.merged_by_peft(adapter, task_of(name)))
        assert computed[name].dtype == expected.dtype
        assert torch.equal(computed[name], expected), name
