"""Two processes under DistributedDataParallel: equal to each other bit by bit, and to one process up to rounding."""

import os

import pytest
import torch
import torch.multiprocessing as mp
from tiny import adapted_mlp, batch, trainable
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

STEPS, PROCESSES = 7, 2


def train(model, part, of):
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.0)
    for step in range(STEPS):
        model(batch(size=8, seed=step).chunk(of)[part]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def adapted(axis):
    return adapted_mlp(axis=axis, slide_every=2, bias="slicefine_only")[1]


def process(rank, axis, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    model = adapted(axis)
    train(DistributedDataParallel(model), rank, PROCESSES)
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("axis", ["row", "column", "alternate"])
def test_two_processes(tmp_path, axis):
    mp.spawn(process, (axis, str(tmp_path)), nprocs=PROCESSES)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(PROCESSES))
    alone = adapted(axis)
    train(alone, 0, 1)
    for name, value in alone.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-6)
