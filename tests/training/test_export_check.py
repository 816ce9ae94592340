"""What has to be alike for two models with the same weights to have the same logits in every bit."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from slicefine.training.export_check import same_kernels


class Narrow(nn.Module):
    """Layers whose kernels depend on where weights lie (one output), and on whether they want gradients (no bias, input in another order)."""

    def __init__(self) -> None:
        super().__init__()
        self.many, self.one = nn.Linear(32, 9, bias=False), nn.Linear(9, 1)

    def forward(self, x_BTI: Tensor) -> Tensor:
        return self.one(self.many(x_BTI.transpose(1, 2)))


def test_equal_weights_have_equal_outputs_wherever_they_lie_and_whatever_wants_gradients() -> None:
    torch.manual_seed(0)
    model, x_BTI = Narrow(), torch.randn(2, 32, 16)
    mapped = copy.deepcopy(model).requires_grad_(False)
    for parameter in mapped.parameters():  # as a file that is mapped: not where torch would have put it
        place = torch.empty(parameter.numel() + 1)[1:].view(parameter.shape)
        parameter.data = place.copy_(parameter)
    before = {name: parameter.clone() for name, parameter in mapped.named_parameters()}
    with torch.no_grad():
        for one in (model, mapped):
            same_kernels(one)
        assert torch.equal(model(x_BTI), mapped(x_BTI))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.data_ptr() % 16 == 0 for parameter in mapped.parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in mapped.named_parameters())
