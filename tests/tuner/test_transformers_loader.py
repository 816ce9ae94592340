"""transformers' own adapter loader, which knows nothing of tuners: it assigns the tensors of a file by their names."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import differences, llama, outputs, tokens, trainable
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

from slicefine import SliceFineConfig, SliceFineError, active_slices, touched_slices
from slicefine.tuner.layer import SliceLayer

IDS = tokens()
WEIGHTS = "adapter_model.safetensors"


def fit(model, steps, optimizer=None):
    optimizer = optimizer or torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def saved(request, tmp_path):
    """Folders of a base model and of an adapter for it, and the trained model."""
    llama().to(request.param).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(model, SliceFineConfig(r=3, slide_every=2, task_type="CAUSAL_LM"))
    fit(model, 5)
    model.save_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "good")
    return tmp_path / "base", tmp_path / "adapter", model


def loaded(how, base, adapter, **options):
    if how == "from_pretrained":
        return AutoModelForCausalLM.from_pretrained(adapter, **options)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_adapter(str(adapter), **options)
    return model


@pytest.mark.parametrize("how", ["from_pretrained", "load_adapter"])
def test_the_trained_outputs_bit_by_bit(saved, how):
    base, adapter, trained = saved
    model = loaded(how, base, adapter)
    assert torch.equal(outputs(model, IDS).logits, outputs(trained, IDS).logits)
    assert active_slices(model) == active_slices(trained)
    assert touched_slices(model) == touched_slices(trained)
    plain = outputs(AutoModelForCausalLM.from_pretrained(base), IDS).logits
    model.disable_adapters()
    assert torch.equal(outputs(model, IDS).logits, plain)
    model.enable_adapters()
    assert torch.equal(outputs(model, IDS).logits, outputs(trained, IDS).logits)
    model.delete_adapter("default")
    assert torch.equal(outputs(model, IDS).logits, plain)


def test_nothing_is_reported_as_missing(saved):
    base, adapter, _ = saved
    info = AutoModelForCausalLM.from_pretrained(base).load_adapter(str(adapter))
    assert not info.missing_keys
    assert not info.unexpected_keys
    assert not info.mismatched_keys


def test_a_pipeline_of_the_adapter(saved):
    base, adapter, trained = saved
    vocabulary = {f"w{number}": number for number in range(50)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", unk_token="w0")
    tokenizer.save_pretrained(base)  # where transformers looks for it
    generate = pipeline("text-generation", model=str(adapter), device="cpu")
    (answer,) = generate("w1 w2 w3", max_new_tokens=5, do_sample=False, return_full_text=False)
    expected = trained.eval().generate(input_ids=torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False)
    assert answer["generated_text"].split() == [f"w{number}" for number in expected[0, 3:].tolist()]


def test_training_goes_on(saved):
    base, adapter, _ = saved
    ours = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, is_trainable=True)
    model = loaded("load_adapter", base, adapter, is_trainable=True)
    fit(model, 4)
    fit(ours, 4)
    assert not differences(ours.base_model.model, model)
    assert active_slices(model) == active_slices(ours)


def test_saved_again_by_transformers(saved, tmp_path):
    base, adapter, trained = saved
    loaded("from_pretrained", base, adapter).save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "again")
    assert torch.equal(outputs(again, IDS).logits, outputs(trained, IDS).logits)


def test_a_wrong_base_is_refused_and_left_alone(saved):
    base, adapter, _ = saved
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    before = outputs(model, IDS).logits
    with pytest.raises(SliceFineError, match=r"layers.0.mlp.up_proj.*other values"):
        model.load_adapter(str(adapter))
    assert torch.equal(outputs(model, IDS).logits, before)
    assert not any(isinstance(module, SliceLayer) for module in model.modules())
    assert not hasattr(model, "peft_config")


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # PEFT says so of any second adapter
@pytest.mark.parametrize("how", ["is_trainable", "for inference", "beside another"])
def test_a_bad_file_is_refused_and_the_model_left_alone(saved, how):
    """Nothing checks the file before transformers has assigned it, so it is refused when it is first used."""
    base, adapter, _ = saved
    tensors = load_file(adapter / WEIGHTS)
    key = next(key for key in tensors if key.endswith("layers.1.self_attn.q_proj.slicefine_row"))
    tensors[key].view(-1)[3] += 1
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(base)
    if how == "beside another":
        model.add_adapter(SliceFineConfig(r=1), "first")
    before, flags = outputs(model, IDS).logits, [parameter.requires_grad for parameter in model.parameters()]

    def load_and_use():
        model.load_adapter(str(adapter), "bad", is_trainable=how == "is_trainable")
        model.eval()

    with pytest.raises(SliceFineError, match=r"nothing was loaded: model.layers.1.self_attn.q_proj: what the file"):
        load_and_use()
    assert torch.equal(outputs(model, IDS).logits, before)
    if how == "beside another":
        assert list(model.peft_config) == ["first"]
        assert model.active_adapters() == ["first"]
    else:
        assert not any(isinstance(module, SliceLayer) for module in model.modules())
        assert not hasattr(model, "peft_config")
        assert [parameter.requires_grad for parameter in model.parameters()] == flags
    model.load_adapter(str(adapter.with_name("good")), "good")


def test_an_edited_configuration_is_named_as_such(saved):
    base, adapter, _ = saved
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 2}))
    model = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(SliceFineError, match=r"and 11 more: it was trained with r=3 .* to be loaded with r=2 "):
        model.load_adapter(str(adapter))
    assert not hasattr(model, "peft_config")


def test_a_new_adapter_on_a_plain_transformers_model(saved):
    base, _, trained = saved
    model = AutoModelForCausalLM.from_pretrained(base)
    model.add_adapter(SliceFineConfig(r=3, slide_every=2))
    fit(model, 5)
    assert torch.equal(outputs(model, IDS).logits, outputs(trained, IDS).logits)
