"""Bases that change under an adapter or beside it: resized, replaced by a state dict, cast piece by piece, tied, on other devices."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from tiny import adapted_mlp, batch, differences, fit, llama, mlp, outputs
from torch import nn

from slicefine import SliceFineConfig, SliceFineError, SliceFineWarning
from slicefine.training.export import export
from slicefine.tuner import artifact, guards
from slicefine.tuner.layer import SliceLayer


def trained_on(tokens: torch.Tensor, model: Any, steps: int = 3) -> Any:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    model.train()
    for _ in range(steps):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.filterwarnings("ignore:There is no tokenizer beside:slicefine.SliceFineWarning")
@pytest.mark.parametrize("heads", [None, ["embed_tokens", "lm_head"]], ids=["beside", "trained"])
def test_resized_embeddings_are_saved_loaded_and_exported(heads: list[str] | None, tmp_path: Path) -> None:
    """PEFT puts them beside the adapter by itself."""
    base = tmp_path / "base"
    llama().save_pretrained(base)

    def resized() -> Any:
        model = type(llama()).from_pretrained(base)
        torch.manual_seed(1)
        model.resize_token_embeddings(model.config.vocab_size + 6)
        return model

    tokens = torch.arange(resized().config.vocab_size - 8, resized().config.vocab_size)[None]
    # Nothing else says which class it is: the name of the class in config.json does.
    model = trained_on(tokens, get_peft_model(resized(), SliceFineConfig(r=2, slide_every=2, modules_to_save=heads)))
    with torch.no_grad():
        wanted = model(input_ids=tokens).logits
    adapter = tmp_path / "adapter"
    model.save_pretrained(str(adapter))
    model.config.save_pretrained(adapter)
    loaded = PeftModel.from_pretrained(resized(), str(adapter)).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens).logits, wanted)
    export(str(adapter), "merged", str(tmp_path / "merged"))
    plain = type(llama()).from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=tokens).logits, wanted)


def test_an_adapter_that_has_trained_nothing_begins_with_the_base_that_a_state_dict_brings() -> None:
    _, model = adapted_mlp(bias="slicefine_only")
    torch.manual_seed(7)
    other = mlp()
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    plain = dict(other.state_dict())
    state = {
        key: plain[key.removeprefix("base_model.model.").replace("base_layer.", "")]
        for key in model.state_dict()
        if "slicefine" not in key
    }
    with model.disable_adapter():
        model.load_state_dict(state, strict=False)
    fit(model, 1, optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0))
    model.eval()
    assert torch.equal(outputs(model), outputs(other))
    merged = model.merge_and_unload()
    assert all(torch.equal(value, plain[name]) for name, value in merged.state_dict().items())


def test_a_trained_adapter_stays_on_its_base() -> None:
    _, model = adapted_mlp()
    fit(model, 3)
    before = copy.deepcopy(model.state_dict())
    with model.disable_adapter():
        own = {key: value.clone() for key, value in model.state_dict().items() if "slicefine" not in key}
        model.load_state_dict(own, strict=False)  # the same base
        other = {key: value + 1 for key, value in own.items()}
        with pytest.raises(
            RuntimeError, match=r"has trained rows or columns of this layer, and the state dict has other values"
        ):
            model.load_state_dict(other, strict=False)
    for key, value in model.state_dict().items():
        if "lin0" in key and "bias" not in key:
            assert torch.equal(value, before[key])


@pytest.mark.parametrize("whole", [False, True])
def test_casting_layer_by_layer_is_casting(whole: bool, tmp_path: Path) -> None:
    _, model = adapted_mlp(axis="row")
    fit(model, 3)
    if whole:
        model.to(torch.bfloat16)
    else:
        for module in list(model.modules()):
            if isinstance(module, nn.Linear):
                module.to(torch.bfloat16)
    fit(model, 3, x=batch(torch.bfloat16))
    model.eval()
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(mlp().to(torch.bfloat16), str(tmp_path)).eval()
    assert torch.equal(outputs(loaded, batch(torch.bfloat16)), outputs(model, batch(torch.bfloat16)))


def test_masters_that_were_cast_are_refused() -> None:
    _, model = adapted_mlp()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    with pytest.raises(SliceFineError, match=r"lin0: `slicefine_weight` .* stays float32.*it is torch.bfloat16 now"):
        model.eval()


def test_ranks_that_drew_weights_of_their_own_are_told_of_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """DistributedDataParallel gives all ranks the weight of rank 0, and one of them had another."""
    _, model = adapted_mlp()
    monkeypatch.setattr(guards, "_distributed", lambda: True)
    layer = next(module for module in model.modules() if isinstance(module, SliceLayer))
    with torch.no_grad():
        layer.place.stored.add_(1)
        layer.slicefine_weight["default"].add_(1)
    with pytest.raises(SliceFineError, match=r"call `set_seed` before the model is loaded, on every rank"):
        model.eval()


def test_a_state_of_another_schedule_is_refused() -> None:
    _, model = adapted_mlp(slide_every=2)
    fit(model, 3)
    _, other = adapted_mlp(slide_every=3)
    with pytest.raises(
        RuntimeError, match=r"was trained with r=\d+ .*slide_every=2 .*, and this one has .*slide_every=3"
    ):
        other.load_state_dict(model.state_dict())


def test_hooks_within_the_tuner_layer_are_warned_of_once() -> None:
    _, model = adapted_mlp()
    layer = next(module for module in model.modules() if isinstance(module, SliceLayer))
    layer.get_base_layer().register_forward_hook(lambda *_: None)
    with pytest.warns(SliceFineWarning, match="Register them on the tuner layer") as said:
        model.train()
    assert len(said) == 1


def test_weights_that_share_their_memory_are_tied() -> None:
    model = mlp()
    model.again = nn.Linear(*reversed(model.lin0.weight.shape), bias=False)
    model.again.weight = nn.Parameter(model.lin0.weight.detach())
    assert model.again.weight is not model.lin0.weight
    with pytest.raises(SliceFineError, match="its weight is tied"):
        get_peft_model(model, SliceFineConfig(r=2, target_modules=["lin0"]))


def test_a_model_over_several_devices_is_told_as_such() -> None:
    model = mlp()
    for module in (model.lin0, model.lin1):
        module._hf_hook = SimpleNamespace(offload=False)
    with pytest.raises(SliceFineError, match="as with a `device_map` over several") as error:
        get_peft_model(model, SliceFineConfig(r=2, target_modules=["lin0", "lin1"]))
    assert "Remove them" not in str(error.value)


def test_an_adapter_that_is_not_in_the_cache_is_not_said_to_lack_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("Cannot find the requested files in the disk cache\\nand more")

    monkeypatch.setattr(artifact, "hf_hub_download", unreachable)
    with pytest.raises(SliceFineError, match=r"is not in the cache, and the hub cannot be reached: Cannot find"):
        artifact.locate("user/adapter", None)


def test_reading_a_state_leaves_the_configuration_alone() -> None:
    _, model = adapted_mlp()
    fit(model, 3)
    config = model.peft_config["default"]
    before = config.to_dict()
    get_peft_model_state_dict(model)
    assert config.to_dict() == before
    assert differences(model, copy.deepcopy(model)) == []
