"""transformers' Conv1D, whose weight is stored as (d_in, d_out): the same slices as a Linear of the same weight."""

import copy

import torch
from peft import PeftModel, get_peft_model
from tiny import MLP, batch, differences, fit, mlp, outputs, tokens, trainable
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from slicefine import SliceFineConfig, active_slices, parameter_counts, touched_slices

SETTINGS = {"r": 4, "slide_every": 3, "bias": "slicefine_only", "target_modules": ["lin0", "lin1"]}


def conv_mlp():
    """The tiny MLP with Conv1D in place of its first two layers, and the same function."""
    model = copy.deepcopy(mlp())
    for name in ("lin0", "lin1"):
        linear = getattr(model, name)
        conv = Conv1D(linear.out_features, linear.in_features)
        conv.weight = torch.nn.Parameter(linear.weight.detach().t().contiguous())
        conv.bias = linear.bias
        setattr(model, name, conv)
    return model


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2)).eval()


def test_trains_as_the_linear_layer_does(tmp_path):
    base = conv_mlp()
    conv, linear = (get_peft_model(model, SliceFineConfig(**SETTINGS)) for model in (copy.deepcopy(base), mlp()))
    fit(conv, 11)
    fit(linear, 11)
    assert active_slices(conv) == active_slices(linear)
    assert touched_slices(conv) == touched_slices(linear)
    assert parameter_counts(conv, 20) == parameter_counts(linear, 20)
    conv.save_pretrained(tmp_path)
    trained = outputs(conv)
    assert torch.equal(outputs(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)), trained)
    with conv.disable_adapter():
        assert torch.equal(outputs(conv), outputs(base))
    merged, expected = copy.deepcopy(conv).merge_and_unload(), linear.merge_and_unload()
    assert torch.equal(outputs(merged), trained)
    for name in ("lin0", "lin1"):
        torch.testing.assert_close(
            getattr(merged, name).weight.t(), getattr(expected, name).weight, rtol=1e-3, atol=1e-5
        )
    assert not differences(conv.unload(), base)
    assert isinstance(expected, MLP)


def test_a_disabled_forward_between_forward_and_backward():
    model = get_peft_model(conv_mlp(), SliceFineConfig(**SETTINGS))
    twin = copy.deepcopy(model)
    loss = model(batch()).square().mean()
    with torch.no_grad(), model.disable_adapter():
        model(batch())
    loss.backward()
    twin(batch()).square().mean().backward()
    for parameter, other in zip(trainable(model), trainable(twin), strict=True):
        assert torch.equal(parameter.grad, other.grad)


def test_gpt2_with_all_linear():
    base = gpt2()
    model = get_peft_model(copy.deepcopy(base), SliceFineConfig(r=3, slide_every=2, task_type="CAUSAL_LM"))
    assert sorted({name.split(".")[-1] for name in active_slices(model)}) == ["c_attn", "c_fc", "c_proj"]
    ids = tokens()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.0)
    for _ in range(5):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = outputs(model, ids).logits
    assert not torch.equal(trained, outputs(base, ids).logits)
    assert torch.equal(outputs(copy.deepcopy(model).merge_and_unload(), ids).logits, trained)
    assert torch.equal(outputs(model.unload(), ids).logits, outputs(base, ids).logits)
