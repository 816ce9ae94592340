"""Weights that are read one at a time, of files and of models in memory."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tiny
import torch
from architectures import ARCHITECTURES
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    PreTrainedModel,
    ViTModel,
)

from slicefine import SliceFineError
from slicefine.analysis import weights as module
from slicefine.analysis.heads import Heads, find_heads
from slicefine.analysis.weights import LoadedWeights, StoredWeights, backbone_places


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    def save(model: PreTrainedModel, **settings: Any) -> Path:
        model.save_pretrained(tmp_path / "model", **settings)
        return tmp_path / "model"

    return save


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_files_hold_what_the_model_has(name: str, saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = ARCHITECTURES[name].build()
    folder = saved(model)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", must_not_load)
    stored, loaded = StoredWeights(str(folder)), LoadedWeights(model)
    assert list(stored.shapes) == list(loaded.shapes)
    assert (stored.shapes, stored.heads) == (loaded.shapes, loaded.heads)
    assert stored.left_out == loaded.left_out == {}
    for target, shape in stored.shapes.items():
        weight = stored.read(target)
        assert tuple(weight.shape) == shape
        assert weight.dtype == torch.float32
        assert torch.equal(weight, loaded.read(target))


def must_not_load(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("the model was loaded")


@pytest.mark.parametrize(
    ("model", "weights", "none_of"),
    [
        (tiny.llama, 2 * 7, ("lm_head", "embed_tokens", "norm")),
        (tiny.gpt2, 2 * 4, ("lm_head", "wte", "wpe", "ln_")),
        (tiny.bert, 2 * 6 + 1, ("classifier", "embeddings", "LayerNorm")),
    ],
)
def test_which_weights(model: Callable[[], PreTrainedModel], weights: int, none_of: tuple[str, ...]) -> None:
    """All linear layers but the output head."""
    names = list(LoadedWeights(model()).shapes)
    assert len(names) == weights
    assert not [name for name in names if any(part in name for part in none_of)]


def test_what_is_asked_for_is_taken_from_a_model(saved: Callable[..., Path]) -> None:
    model = tiny.bert().bfloat16()
    places = backbone_places(model)
    chosen = {name: places[name] for name in list(places)[:2]}
    weights = LoadedWeights(model, chosen, name="mine")
    assert weights.name == "mine"
    assert list(weights.shapes) == list(chosen)
    read = weights.read(next(iter(chosen)))
    assert read.dtype == torch.float32
    assert not read.requires_grad


def test_the_weights_of_a_gpt_2_are_turned() -> None:
    model = tiny.gpt2()
    weight = LoadedWeights(model).read("transformer.h.0.attn.c_attn")
    assert weight.shape == (48, 16)
    assert torch.equal(weight, model.transformer.h[0].attn.c_attn.weight.T)


HEADS = {
    "Llama": {"q_proj": Heads("row", 8, 2), "k_proj": Heads("row", 8, 1), "v_proj": Heads("row", 8, 1), "o_proj": Heads("column", 8, 2)},
    "Qwen3": {"q_proj": Heads("row", 8, 2), "o_proj": Heads("column", 8, 2)},
    "Phi": {"q_proj": Heads("row", 8, 2), "dense": Heads("column", 8, 2)},
    "GPT-2": {"c_attn": Heads("row", 8, 6, fused=True), "attn.c_proj": Heads("column", 8, 2), "mlp.c_proj": None},
    "Mamba": {"in_proj": None, "out_proj": None},
    "T5": {"EncDecAttention.k": Heads("row", 8, 2), "SelfAttention.o": Heads("column", 8, 2), "wo": None},
    "BERT": {"query": Heads("row", 8, 2), "attention.output.dense": Heads("column", 8, 2), "intermediate.dense": None, "pooler.dense": None},
    "RoBERTa": {"value": Heads("row", 8, 2), "attention.output.dense": Heads("column", 8, 2), "0.output.dense": None},
    "DeBERTa-v2": {"query_proj": Heads("row", 8, 2), "pos_key_proj": Heads("row", 8, 2), "attention.output.dense": Heads("column", 8, 2)},
    "ALBERT": {"key": Heads("row", 8, 2), "attention.dense": Heads("column", 8, 2), "ffn_output": None},
    "ViT": {"q_proj": Heads("row", 8, 2), "o_proj": Heads("column", 8, 2), "fc1": None},
    "Swin": {
        "layers.0.blocks.0.attention.q_proj": Heads("row", 4, 2), "layers.1.blocks.0.attention.q_proj": Heads("row", 8, 2),
        "layers.1.blocks.0.attention.o_proj": Heads("column", 8, 2), "reduction": None,
    },
    "ConvNeXt": {"pwconv1": None},
    "CLIP": {"text_model.encoder.layers.0.self_attn.q_proj": Heads("row", 8, 2), "visual_projection": None},
    "VideoMAE": {"attention.attention.query": Heads("row", 8, 2), "attention.output.dense": Heads("column", 8, 2)},
    "Whisper": {"encoder_attn.v_proj": Heads("row", 8, 2), "encoder_attn.out_proj": Heads("column", 8, 2), "fc2": None},
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_where_heads_are(name: str) -> None:
    model = ARCHITECTURES[name].build()
    places = backbone_places(model)
    found = find_heads(model, places)
    for ending, heads in HEADS[name].items():
        targets = [target for target in places if target.endswith(f".{ending}") or target == ending]
        assert targets
        assert {found.get(target) for target in targets} == {heads}


def test_heads_of_grouped_query_attention() -> None:
    found = LoadedWeights(tiny.llama()).heads
    layer = "model.layers.0.self_attn."
    assert {name.removeprefix(layer): heads for name, heads in found.items() if name.startswith(layer)} == {
        "q_proj": Heads("row", 4, 4),
        "k_proj": Heads("row", 4, 2),
        "v_proj": Heads("row", 4, 2),
        "o_proj": Heads("column", 4, 4),
    }


def test_shards(saved: Callable[..., Path]) -> None:
    model = tiny.llama()
    folder = saved(model, max_shard_size="5KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    stored, loaded = StoredWeights(str(folder)), LoadedWeights(model)
    assert list(stored.shapes) == list(loaded.shapes)
    assert all(torch.equal(stored.read(name), loaded.read(name)) for name in stored.shapes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_stored_values_of_any_width(dtype: torch.dtype, saved: Callable[..., Path]) -> None:
    model = tiny.llama().to(dtype)
    stored = StoredWeights(str(saved(model)))
    name = "model.layers.1.mlp.up_proj"
    assert torch.equal(stored.read(name), model.get_submodule(name).weight.float())


def test_names_with_and_without_the_prefix_of_a_base_model(saved: Callable[..., Path]) -> None:
    """Files of a model without a head are read for one with a head, and the other way round."""
    model = tiny.bert()
    folder = saved(model.bert)
    for named in ("BertModel", "BertForSequenceClassification", "BertForMaskedLM", None):
        say(folder, architectures=None if named is None else [named])
        stored = StoredWeights(str(folder))
        prefix = "" if named in ("BertModel", None) else "bert."
        pooler = [] if named == "BertForMaskedLM" else ["pooler.dense"]
        layers = [name for name in LoadedWeights(model.bert).shapes if name != "pooler.dense"]
        assert list(stored.shapes) == [f"{prefix}{name}" for name in [*layers, *pooler]]
        query = "encoder.layer.0.attention.self.query"
        assert torch.equal(stored.read(prefix + query), model.bert.get_submodule(query).weight)

    shutil.rmtree(folder)
    saved(tiny.llama())
    say(folder, architectures=["LlamaModel"])
    assert "layers.0.mlp.up_proj" in StoredWeights(str(folder)).shapes


def say(folder: Path, **settings: Any) -> None:
    """Change `config.json`; None takes a setting out."""
    file = folder / "config.json"
    said = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({key: value for key, value in said.items() if value is not None}))


def test_only_the_backbone_of_a_model_with_a_head(saved: Callable[..., Path]) -> None:
    folder = saved(BertForMaskedLM(tiny.bert().config))
    assert all(name.startswith("bert.encoder.") for name in StoredWeights(str(folder)).shapes)


def test_layers_without_values_are_left_out_with_the_reason(saved: Callable[..., Path]) -> None:
    folder = saved(ARCHITECTURES["ViT"].build())
    say(folder, architectures=[ViTModel.__name__])
    stored = StoredWeights(str(folder))
    assert stored.left_out == {"pooler.dense": "the files have no values for it: a new layer"}
    assert "pooler.dense" not in stored.shapes
    with torch.device("meta"):
        empty = LoadedWeights(tiny.mlp())
    assert empty.shapes == {}
    assert set(empty.left_out.values()) == {"it has no values (meta device)"}


def test_packed_values_are_left_out_with_the_reason(saved: Callable[..., Path]) -> None:
    folder = saved(tiny.llama())
    change(folder, lambda tensors: {n: t.to(torch.float8_e4m3fn) if "up_proj" in n else t for n, t in tensors.items()})
    left_out = StoredWeights(str(folder)).left_out
    assert left_out == {f"model.layers.{i}.mlp.up_proj": "it is stored as F8_E4M3, which is quantized" for i in (0, 1)}


def change(folder: Path, how: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    file = folder / "model.safetensors"
    save_file(how(load_file(file)), file, metadata={"format": "pt"})


def test_one_weight_is_in_memory_at_a_time(saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the files gave before is gone when the next one is read, and so is the mapping of a file of which much was read."""
    monkeypatch.setattr("slicefine.training.export_source.PIECE", 1)
    stored = StoredWeights(str(saved(tiny.llama(), max_shard_size="5KB")))
    files = stored._files.tensors
    alive: list[weakref.ref[Any]] = []
    for name in stored.shapes:
        assert not [ref for ref in alive if ref() is not None]
        weight = stored.read(name)
        alive.append(weakref.ref(weight))
        assert files._open is not None
        assert files._open[0] == files.file_of[f"{name}.weight"]
        del weight
    stored.close()
    assert files._open is None


# ------------------------------------------------------------------ what is refused


def test_without_safetensors(saved: Callable[..., Path]) -> None:
    model = tiny.bert()
    folder = saved(model)
    (folder / "model.safetensors").unlink()
    with pytest.raises(SliceFineError, match=r"has no model\.safetensors: it has no weights"):
        StoredWeights(str(folder))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(SliceFineError) as error:
        StoredWeights(str(folder))
    message = str(error.value)
    assert "it has pytorch_model.bin instead" in message
    # What it says to do works.
    AutoModelForSequenceClassification.from_pretrained(folder).save_pretrained(folder.parent / "converted")
    assert f"from_pretrained('{folder}').save_pretrained('converted')" in message
    assert StoredWeights(str(folder.parent / "converted")).shapes


def test_an_adapter_is_no_model(saved: Callable[..., Path]) -> None:
    folder = saved(tiny.llama())
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(SliceFineError, match=f"slicefine export {folder} "):
        StoredWeights(str(folder))


def test_a_place_without_a_model(tmp_path: Path, saved: Callable[..., Path]) -> None:
    folder = saved(tiny.llama())
    (tmp_path / "empty").mkdir()
    for name, says in [
        (folder / "model.safetensors", f"is a file. Give its folder, {folder}"),
        (tmp_path / "empty", "has no config.json in it"),
        (tmp_path / "modle", "Did you mean"),
    ]:
        with pytest.raises(SliceFineError, match=says):
            StoredWeights(str(name))


@pytest.mark.parametrize("damage", ["truncated", "no shard", "a shard elsewhere", "no map", "empty map"])
def test_damaged_files(damage: str, saved: Callable[..., Path]) -> None:
    folder = saved(tiny.llama(), max_shard_size="5KB")
    index = folder / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    shard = sorted(folder.glob("*.safetensors"))[0]
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "no shard":
        shard.unlink()
    else:
        name = next(iter(said["weight_map"]))
        changed = {
            "a shard elsewhere": {"weight_map": said["weight_map"] | {name: f"../{folder.name}/{shard.name}"}},
            "no map": {},
            "empty map": {"weight_map": {}},
        }
        index.write_text(json.dumps(changed[damage]))
    says = {"truncated": "cannot be read", "no map": "names the file of each tensor"}.get(damage, "in its own folder")
    with pytest.raises(SliceFineError, match=says):
        StoredWeights(str(folder))


def test_files_of_another_model(saved: Callable[..., Path]) -> None:
    folder = saved(tiny.llama())
    say(folder, intermediate_size=32)
    with pytest.raises(
        SliceFineError, match=r"6 problems(.|\n)*gate_proj.weight has shape \(24, 16\) in the files, \(32, 16\) by"
    ):
        StoredWeights(str(folder))
    shutil.rmtree(folder)
    saved(tiny.llama())
    change(folder, lambda tensors: {f"other.{name}": tensor for name, tensor in tensors.items()})
    with pytest.raises(SliceFineError, match=r"of the 14 of LlamaForCausalLM, .* none can be read"):
        StoredWeights(str(folder))


def test_configurations_that_build_nothing(saved: Callable[..., Path]) -> None:
    folder = saved(tiny.llama())
    for settings, says in [
        ({"quantization_config": {"quant_method": "fp8"}}, "is quantized. Name the model it was made from"),
        ({"quantization_config": None, "hidden_size": "wide"}, "config.json"),
        ({"hidden_size": 16, "model_type": "unheard-of"}, "cannot read .*config.json: .*unheard-of"),
    ]:
        say(folder, **settings)
        with pytest.raises(SliceFineError, match=says):
            StoredWeights(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(SliceFineError, match="cannot read"):
        StoredWeights(str(folder))


# ------------------------------------------------------------------ models of the hub


def test_of_a_model_of_the_hub_only_weights_are_fetched(
    saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tiny.llama())
    asked: dict[str, Any] = {}

    def fetch(name: str, **settings: Any) -> str:
        asked.update(settings, name=name)
        return str(folder)

    monkeypatch.setattr(module, "model_problem", lambda name: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert StoredWeights("owner/model").shapes
    assert asked["name"] == "owner/model"
    chosen = huggingface_hub.utils.filter_repo_objects(
        [
            "config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
            "onnx/model.safetensors", "consolidated.safetensors", "tokenizer.json", "modeling_own.py",
        ],
        allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"],
    )  # fmt: skip
    assert list(chosen) == [
        "config.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
    ]


def test_a_model_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SliceFineError, match="no folder 'nobody/nothing', and a model of that name was not downloaded"):
        StoredWeights("nobody/nothing")
