"""Tiny models, made on the spot, for all tests."""

import copy

import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from slicefine import SliceFineConfig


class MLP(nn.Module):
    """10 -> 20 -> 14 -> 3; takes a batch as a plain tensor."""

    def __init__(self, bias=True, dtype=torch.float32):
        super().__init__()
        self.lin0 = nn.Linear(10, 20, bias=bias)
        self.lin1 = nn.Linear(20, 14, bias=bias)
        self.head = nn.Linear(14, 3, bias=bias)
        self.to(dtype)

    def forward(self, x):
        return self.head(self.lin1(self.lin0(x).relu()).relu())


def mlp(**kwargs):
    torch.manual_seed(0)
    return MLP(**kwargs)


def conv_mlp():
    """The tiny MLP with Conv1D in place of its first two layers, and the same function."""
    model = mlp()
    for name in ("lin0", "lin1"):
        linear = getattr(model, name)
        conv = Conv1D(linear.out_features, linear.in_features)
        conv.weight = nn.Parameter(linear.weight.detach().t().contiguous())
        conv.bias = linear.bias
        setattr(model, name, conv)
    return model


def bert(num_labels=3, **kwargs):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, num_labels=num_labels, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **kwargs,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def llama(**kwargs):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, max_position_embeddings=32, **kwargs,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def electra(**kwargs):
    torch.manual_seed(0)
    config = ElectraConfig(
        vocab_size=50, embedding_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **kwargs,
    )  # fmt: skip
    return ElectraForSequenceClassification(config)


def gpt2(**kwargs):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0, **kwargs,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def opt(**kwargs):
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24, word_embed_proj_dim=16,
        max_position_embeddings=32, dropout=0.0, **kwargs,
    )  # fmt: skip
    return OPTForCausalLM(config)


def batch(dtype=torch.float32, size=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 10, generator=generator).to(dtype)


def tokens(size=4, length=7, seed=1):
    return torch.randint(0, 50, (size, length), generator=torch.Generator().manual_seed(seed))


def adapted_mlp(dtype=torch.float32, **settings):
    """A base MLP, and a PeftModel around a copy of it that trains `lin0` and `lin1`."""
    base = mlp(dtype=dtype)
    settings = {"target_modules": ["lin0", "lin1"], "slide_every": 3, "r": 4} | settings
    return base, get_peft_model(copy.deepcopy(base), SliceFineConfig(**settings))


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def fit(model, steps, x=None, optimizer=None, seed=2):
    """`steps` plain optimizer steps on random targets; returns the optimizer."""
    optimizer = optimizer or torch.optim.AdamW(trainable(model), lr=3e-2, weight_decay=0.0)
    x = batch(dtype=next(model.parameters()).dtype) if x is None else x
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        y = model(x)
        (y.float() - torch.randn(y.shape, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@torch.no_grad()
def outputs(model, x=None):
    x = batch(dtype=next(model.parameters()).dtype) if x is None else x
    return model(x)


def differences(model, other):
    """Names in the states of two models that only one has, or whose bits differ."""
    state, expected = model.state_dict(), other.state_dict()
    return sorted(state.keys() ^ expected.keys()) + [
        n for n in state.keys() & expected.keys() if not torch.equal(state[n], expected[n])
    ]
