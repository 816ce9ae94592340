"""What a step needs is counted without values: the same bytes as of a step that is run."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from benchmarked import tiny
from torch import Tensor

from slicefine.benchmarking import memory
from slicefine.benchmarking.counting import dense_deltas, needed
from slicefine.benchmarking.methods import method
from slicefine.benchmarking.setups import Setup
from slicefine.errors import SliceFineError

TRAINED = (
    "frozen-limit", "full", "SliceFine-2R", "SliceFine-2C", "SliceFine-2RC", "SliceFine-2S", "RoCoFT-2R", "LoRA-r2", "AdaLoRA-r2", "VeRA-r4",
    "HRA-r2", "SHiRA-r2", "random-mask-r2", "split-rows-r2", "split-columns-r2",
)  # fmt: skip


def setup_of(name: str, dtype: torch.dtype = torch.float32, checkpointing: bool = False) -> Setup:
    return Setup(of=tiny(name), device="cpu", dtype=dtype, checkpointing=checkpointing, compile=False, seed=0)


@pytest.mark.parametrize(
    ("setup", "more"),
    [
        (setup_of("llama-3.2-3b-small"), ("prefix-r3",)),
        (setup_of("gemma-3-12b-small", torch.bfloat16), ("prefix-r3",)),
        (setup_of("videomae-base-small"), ("head-only",)),
        (setup_of("roberta-base-small", checkpointing=True), ("head-only",)),
    ],
    ids=lambda given: given.of.name if isinstance(given, Setup) else "",
)
def test_it_is_what_real_steps_need(setup: Setup, more: tuple[str, ...]) -> None:
    """To the byte: sizes, what is saved, and the highest moment."""
    for name in (*TRAINED, *more):
        real, _ = memory._run(setup, method(name))
        assert needed(setup, method(name)) == real, name
        assert real.step.saved > 0


def test_a_model_that_fits_into_no_memory() -> None:
    """No value of a weight is made."""
    large = dataclasses.replace(setup_of("gemma-3-12b-small"), of=tiny("gemma-3-12b-small").resized("width", 2**20))
    rows, lora = (needed(large, method(name)) for name in ("SliceFine-2R", "LoRA-r2"))
    assert rows.weights > 2**40
    assert rows.step.saved < lora.step.saved


def test_what_cannot_be_attached_says_why() -> None:
    with pytest.raises(SliceFineError, match="prefix tuning needs a decoder"):
        needed(setup_of("vit-base-small"), method("prefix-r3"))


def test_a_dense_delta_is_what_the_sparse_one_is() -> None:
    """Value, gradient and bytes saved for backward."""
    indices = torch.tensor([[0, 3, 1], [2, 0, 1]], dtype=torch.int32)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))

    def run() -> tuple[Tensor, Any, int]:
        saved: list[Tensor] = []
        values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            delta = torch.sparse_coo_tensor(indices, values * 1.0, (4, 3))
        kept = [part for t in saved for part in ((t._indices(), t._values()) if t.is_sparse else (t,))]
        weight = torch.ones(4, 3) + delta
        (x @ weight.T).square().sum().backward()
        return weight.detach(), values.grad, sum(t.nbytes for t in kept)

    with torch.sparse.check_sparse_tensor_invariants(enable=False):
        sparse = run()
    with dense_deltas():
        dense = run()
    assert torch.equal(sparse[0], dense[0])
    assert torch.allclose(sparse[1], dense[1])
    assert sparse[2] == dense[2] == 3 * (2 * 8 + 4)
