"""`torch.compile`: no graph break, no recompile at a move; `alternate` has one graph per axis."""

import copy

import pytest
import torch
from tiny import adapted_mlp, batch, differences, trainable
from torch._dynamo.testing import CompileCounter


# dynamo makes an instance of every autograd function that it traces, and torch warns of that
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    ("axis", "graphs"),
    [("row", [1] * 12), ("column", [1] * 12), ("alternate", [1, 1] + [2] * 10)],
    ids=["row", "column", "alternate"],
)
def test_graphs_over_six_positions(axis, graphs):
    torch._dynamo.reset()
    _, model = adapted_mlp(axis=axis, slide_every=2, bias="slicefine_only")
    plain = copy.deepcopy(model)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.0)
    other = torch.optim.AdamW(trainable(plain), lr=1e-2, weight_decay=0.0)
    counted = []
    for step in range(12):
        for net, steps in ((compiled, optimizer), (plain, other)):
            net(batch(seed=step)).square().mean().backward()
            steps.step()
            steps.zero_grad()
        counted.append(counter.frame_count)
    assert counted == graphs
    assert not differences(model, plain)
