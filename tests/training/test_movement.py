from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from slicefine import SliceFineConfig, SliceFineError
from slicefine.training.movement import movement


class Blocks(nn.Module):
    """Two blocks of one linear layer, 6 to 6."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def trained(steps: int, **settings: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model after some steps, and the original weights."""
    torch.manual_seed(0)
    base = Blocks()
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    targets = ["blocks.0", "blocks.1", "last"]
    model: Any = get_peft_model(base, SliceFineConfig(target_modules=targets, **settings))  # pyright: ignore
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0)
    for _ in range(steps):
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, before


@pytest.mark.parametrize("axis", ["row", "column", "alternate"])
def test_updates_are_those_of_the_whole_weight(axis: str) -> None:
    """Nothing outside of the touched entries has moved, so the norm of the difference is that of the whole weights."""
    model, before = trained(5, r=2, axis=axis, slide_every=2)
    found = movement(model)
    assert found["step"] == 5
    for weight in found["weights"]:
        layer = model.get_submodule(f"base_model.model.{weight['name']}")
        now, original = layer.get_base_layer().weight.detach(), before[f"{weight['name']}.weight"]
        touched = torch.zeros_like(original, dtype=torch.bool)
        for first, count in weight["touched"]["row"]:
            touched[first : first + count] = True
        for first, count in weight["touched"]["column"]:
            touched[:, first : first + count] = True
        assert weight["share"] == pytest.approx(float(touched.float().mean()))
        assert torch.equal(now[~touched], original[~touched])
        assert weight["update"] == pytest.approx(float((now - original).norm() / original[touched].norm()), rel=1e-5)


def test_places_and_blocks() -> None:
    model, _ = trained(5, r=2, axis="row", slide_every=2)
    first, second, last = movement(model)["weights"]
    assert [first["block"], second["block"], last["block"]] == [0, 1, None]
    assert first["touched"] == {"row": [[0, 6]], "column": []}  # 0-1, 2-3, 4-5: neighbours are one run
    assert first["active"] == [[4, 2]]
    assert first["shape"] == [6, 6]
    assert last["touched"]["row"] == [[0, 3]]


def test_nothing_touched() -> None:
    model, _ = trained(0, r=2, axis="column")
    for weight in movement(model)["weights"]:
        assert weight["update"] is None
        assert weight["share"] == 0


def test_a_model_without_slices() -> None:
    with pytest.raises(SliceFineError, match="no slicefine layer"):
        movement(Blocks())
