from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

FP32 = 4


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_a_chain_of_linear_layers_saves(device):
    from _memory import kept_for_backward

    batch, width, hidden = 3, 5, 7
    model = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 1)).to(device)
    x = torch.ones(batch, width, device=device)
    kept = kept_for_backward(model, lambda: model(x).sum())
    # The first layer saves its input. ReLU saves its result, which is the second layer's input too: counted once.
    # The weights are saved as well, and left out.
    assert kept.saved == (batch * width + batch * hidden) * FP32
    assert kept.stashed == 0


def test_a_saved_view_counts_as_the_storage_it_keeps_alive():
    from _memory import kept_for_backward

    model = nn.Linear(4, 1, bias=False)
    x = torch.ones(10, 4)
    kept = kept_for_backward(model, lambda: model(x[:1]).sum())
    assert kept.saved == 10 * 4 * FP32


class _Hoarder(torch.autograd.Function):
    """Keeps its input on the autograd context, where the hooks of saved tensors do not see it."""

    @staticmethod
    def forward(ctx, x):
        ctx.hidden = x * 2
        return x.sum()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.hidden


class _Module(nn.Module):
    def forward(self, x):
        self.remembered = x * 2
        return x.sum()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("where", ["autograd context", "module", "closure"])
def test_tensors_hidden_from_the_hooks_are_found(where, device):
    from _memory import kept_for_backward

    x = torch.ones(6, 2, device=device, requires_grad=True)
    closure = SimpleNamespace()

    def remember(x):
        closure.remembered = x * 2
        return x.sum()

    model = _Module() if where == "module" else nn.Identity()
    forward = {"autograd context": _Hoarder.apply, "module": model, "closure": remember}[where]
    kept = kept_for_backward(model, lambda: forward(x))
    assert kept.stashed == 6 * 2 * FP32


def test_alive_counts_each_storage_once():
    from _memory import alive, size, without

    before = alive()
    one = torch.ones(100)
    views = [one[:10], one.view(10, 10)]
    assert size(without(alive(), before)) == 100 * FP32
    assert len(views) == 2
