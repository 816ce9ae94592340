"""Two processes under DistributedDataParallel: equal to each other bit by bit, and to one process up to rounding."""

import contextlib
import os
import runpy
import subprocess
import sys
import time
from multiprocessing import set_forkserver_preload
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from peft import get_peft_model
from tiny import adapted_mlp, batch, llama, tokens, trainable
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from slicefine import SliceFineConfig, SliceFineError, active_slices

STEPS, PROCESSES = 7, 2
SETTINGS = {"axis": "alternate", "slide_every": 2, "bias": "slicefine_only"}


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)


def sharded(**kwargs):
    def make(parameters):
        if not dist.is_initialized():
            return adam(parameters)
        from torch.distributed.optim import ZeroRedundancyOptimizer  # warns when it is imported

        return ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, lr=1e-2, weight_decay=0.0, **kwargs)

    return make


CASES = {
    "row": {"settings": {"axis": "row"}},
    "column": {"settings": {"axis": "column"}},
    "alternate": {},
    "random": {"settings": {"order": "random"}},
    "momentum": {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)},
    "no_sync": {"accumulate": 2},
    "static_graph": {"ddp": {"static_graph": True}},
    "gradient_as_bucket_view": {"ddp": {"gradient_as_bucket_view": True}},
    "broadcast_buffers": {"ddp": {"broadcast_buffers": False}},
    "find_unused_parameters": {"ddp": {"find_unused_parameters": True}},
    "checkpointing": {"llama": True},
    "zero": {"optimizer": sharded()},
    "zero-parameters_as_bucket_view": {"optimizer": sharded(parameters_as_bucket_view=True)},
}


def make_model(case):
    if case.get("llama"):
        model = get_peft_model(llama(), SliceFineConfig(r=2, slide_every=2))
        model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
        return model.train()
    return adapted_mlp(**SETTINGS | case.get("settings", {}))[1]


def loss_of(model, case, seed, part, of):
    if case.get("llama"):
        ids = tokens(size=4, seed=seed).chunk(of)[part]
        return model(input_ids=ids, labels=ids, use_cache=False).loss
    return model(batch(size=8, seed=seed).chunk(of)[part]).square().mean()


def train(model, case, part=0, of=1):
    """`STEPS` optimizer steps, each on an equal share of the batch."""
    net = DistributedDataParallel(model, **case.get("ddp", {})) if of > 1 else model
    optimizer = case.get("optimizer", adam)(trainable(model))
    micro_batches = case.get("accumulate", 1)
    for step in range(STEPS):
        for micro_batch in range(micro_batches):
            last = micro_batch == micro_batches - 1
            with contextlib.nullcontext() if last or of == 1 else net.no_sync():
                (loss_of(net, case, step * micro_batches + micro_batch, part, of) / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()


@contextlib.contextmanager
def group(rank, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    yield
    dist.destroy_process_group()


def start(function, *args):
    """`function(rank, *args)` in two processes, forked from one that has imported the libraries already."""
    set_forkserver_preload(["peft", "slicefine.tuner"])
    return mp.start_processes(function, args, nprocs=PROCESSES, join=False, start_method="forkserver")


def train_all(rank, folder):
    with group(rank, folder):
        for name, case in CASES.items():
            model = make_model(case)
            train(model, case, rank, PROCESSES)
            torch.save((model.state_dict(), active_slices(model)), f"{folder}/{name}-{rank}.pt")


def assert_equal_ranks(first, second, alone):
    assert first.keys() == second.keys() == alone.keys()
    for key, value in alone.items():
        assert torch.equal(first[key], second[key])
        torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    context = start(train_all, str(folder))
    while not context.join():
        pass
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes(trained, name):
    (first, positions), (second, others) = (
        torch.load(trained / f"{name}-{rank}.pt", weights_only=False) for rank in range(PROCESSES)
    )
    alone = make_model(CASES[name])
    train(alone, CASES[name])
    assert positions == others == active_slices(alone)
    assert any(piece.start for piece in positions.values())
    assert_equal_ranks(first, second, alone.state_dict())


# ---------------------------------------------------------------------- ranks that do not agree

PATIENCE = 30
"""Seconds within which ranks that do not agree must have stopped."""
DISAGREE = "all ranks of a distributed run start with the same SliceFineConfig and the same step"


def loaded_from_later(model):
    other = llama_with()
    train(other, {"llama": True})
    model.load_state_dict(other.state_dict())


# `q_proj` and `o_proj` are square and of one size: neither an axis nor a name shows in the shapes of parameters.
COMMON = {"r": 2, "axis": "alternate", "slide_every": 2, "target_modules": ["q_proj"]}
DIFFERENCES = {
    "slide_every": {"slide_every": 3},
    "order": {"order": "random"},
    "seed": {"order": "random", "seed": 1},
    "axis": {"axis": "row"},
    "r": {"r": 4},
    "more targets": {"target_modules": ["q_proj", "k_proj"]},
    "other targets": {"target_modules": ["o_proj"]},
    "other blocks": {"layers_to_transform": [1]},
    "bias": {"bias": "slicefine_only"},
    "trained before": lambda model: train(model, {"llama": True}),
    "loaded from later": loaded_from_later,
}
"""What the second rank has besides `COMMON`, or does before it begins."""
PARAMETERS = {"r", "more targets", "other blocks", "bias"}
"""Differences in which parameters there are: torch compares those itself, before the first step."""


def llama_with(**settings):
    return get_peft_model(llama(attention_bias=True), SliceFineConfig(**COMMON | settings)).train()


def differ(rank, name, folder):
    with group(rank, folder):
        difference = DIFFERENCES[name]
        settings = difference if isinstance(difference, dict) else {}
        both = {"order": "random"} if name == "seed" else {}
        model = llama_with(**both | (settings if rank else {}))
        if rank and callable(difference):
            difference(model)
        try:
            train(model, {"llama": True}, rank, PROCESSES)
        except Exception as error:
            Path(folder, f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
            raise


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """What the ranks said that began with something different; nothing, if they had not ended in time."""
    deadline = time.monotonic() + PATIENCE
    contexts = {}
    for name in DIFFERENCES:
        folder = tmp_path_factory.mktemp("differ")
        contexts[name] = folder, start(differ, name, str(folder))
    said = dict.fromkeys(DIFFERENCES, "")
    for name, (folder, context) in contexts.items():
        with contextlib.suppress(mp.ProcessRaisedException, mp.ProcessExitedException):
            while not context.join(timeout=1) and time.monotonic() < deadline:
                pass
        if not any(process.is_alive() for process in context.processes):
            said[name] = "\n".join(path.read_text() for path in sorted(folder.glob("*.txt")))
        for process in context.processes:
            process.kill()
    return said


@pytest.mark.parametrize("name", DIFFERENCES)
def test_ranks_that_begin_with_something_different_stop(stopped, name):
    if name in PARAMETERS:
        assert "RuntimeError" in stopped[name]
        assert "params" in stopped[name]
    else:
        assert SliceFineError.__name__ in stopped[name]
        # What was trained before shows in the weights, which rank 0 has overwritten.
        assert (DISAGREE if name != "trained before" else "differ") in stopped[name]


# ---------------------------------------------------------------------- accelerate launch

LOOP = """
import sys
import torch
from accelerate import Accelerator
from tiny import adapted_mlp, batch, trainable

folder, common, mine = sys.argv[1], eval(sys.argv[2]), eval(sys.argv[3])
accelerator = Accelerator(cpu=True)
rank, ranks = accelerator.process_index, accelerator.num_processes
model = adapted_mlp(**common | (mine if rank else {}))[1]
net, optimizer = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.0))
for step in range(7):
    accelerator.backward(net(batch(size=8, seed=step).chunk(ranks)[rank]).square().mean())
    optimizer.step()
    optimizer.zero_grad()
torch.save((type(net).__name__, accelerator.unwrap_model(net).state_dict()), f"{folder}/{rank}.pt")
accelerator.end_training()
"""

TRAINER = """
import sys
import torch
from peft import get_peft_model
from slicefine import SliceFineConfig
from tiny import llama, tokens
from transformers import Trainer, TrainingArguments

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, index):
        return {"input_ids": tokens(seed=index)[0], "labels": tokens(seed=index)[0]}

folder, batch_size = sys.argv[1], int(sys.argv[2])
model = get_peft_model(llama(), SliceFineConfig(r=2, slide_every=2))
args = TrainingArguments(
    folder, max_steps=7, per_device_train_batch_size=batch_size, learning_rate=1e-2, save_strategy="no", report_to="none",
    use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
)
trainer = Trainer(model, args, train_dataset=Rows())
trainer.train()
torch.save((type(trainer.model_wrapped).__name__, model.state_dict()), f"{folder}/{args.process_index}.pt")
"""


def launch(folder, script, *args):
    """Run `script` in two processes. `--multi_gpu` is what starts more than one, also without GPUs."""
    file = folder / "script.py"
    file.write_text(script)
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(PROCESSES),
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
    ]  # fmt: skip
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return subprocess.run(
        [*command, str(file), str(folder), *map(str, args)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def run_alone(monkeypatch, folder, script, *args):
    """The same script in this process."""
    file = folder / "alone.py"
    file.write_text(script)
    monkeypatch.setattr(sys, "argv", [str(file), str(folder), *map(str, args)])
    runpy.run_path(str(file))
    (folder / "0.pt").rename(folder / "alone.pt")


@pytest.mark.parametrize(
    ("script", "together", "alone"),
    [(LOOP, [{"axis": "alternate", "slide_every": 2, "bias": "slicefine_only"}, {}], None), (TRAINER, [2], [4])],
    ids=["loop", "trainer"],
)
def test_accelerate_launch(tmp_path, monkeypatch, script, together, alone):
    run_alone(monkeypatch, tmp_path, script, *(alone or together))
    result = launch(tmp_path, script, *together)
    assert not result.returncode, result.stderr
    (kind, alone), (engine, first), (_, second) = (
        torch.load(tmp_path / f"{name}.pt", weights_only=False) for name in ("alone", 0, 1)
    )
    assert (kind, engine) == ("PeftModel", "DistributedDataParallel")
    assert_equal_ranks(first, second, alone)


def test_accelerate_launch_ends_when_ranks_differ(tmp_path):
    settings = {"axis": "alternate", "slide_every": 2}
    result = launch(tmp_path, LOOP, settings, {"slide_every": 3})
    assert result.returncode
    assert DISAGREE in result.stderr
    assert not list(tmp_path.glob("*.pt"))
