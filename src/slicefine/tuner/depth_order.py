"""Whether the blocks that a depth window counts in are used in their order, which the first forward pass shows."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slicefine.errors import SliceFineError, listed
from slicefine.tuner import sliding
from slicefine.tuner.config import SliceFineConfig, block_of
from slicefine.tuner.layer import SliceLayer, slice_layers


@dataclass
class _Call:
    """What a block was called with, and what it returned."""

    block: int
    inputs: list[Tensor]
    outputs: list[Tensor]

    @property
    def is_traced(self) -> bool:
        """Whether the graph tells who reads the outputs. It does not of a block that rests."""
        return any(y.grad_fn is not None for y in self.outputs)

    def is_repeated_with(self, inputs: list[Tensor]) -> bool:
        """Whether `inputs` are nothing new, and nothing that this call has made: one that works in place returns what it got."""
        known, made = {id(x) for x in self.inputs}, {id(y) for y in self.outputs}
        given = {id(x) for x in inputs}
        return bool(given) and bool(made) and given <= known and not given & made


class FirstPass:
    """The first forward pass that trains an adapter with a depth window: how the blocks of its stack are used.

    Modules are registered in any order, and a list of them may hold anything: branches side by side, heads. So hooks on the blocks follow the
    graph from what a block is given down to the blocks that wrote it, and to the slices outside of the stack. They end with the call of the last
    block. A compiled pass is not looked at, nor one in which reentrant checkpointing makes no graph.

    Args:
        model: With the adapter attached.
        config: Its configuration, with a depth window whose stack has been found.
        adapter: Its name.

    The hooks raise `SliceFineError` if a block reads what a later one writes, or does not read what the one called before it writes, or if
    a block that rests in some turn reads what a target outside of the stack writes.
    """

    def __init__(self, model: nn.Module, config: SliceFineConfig, adapter: str) -> None:
        assert config.depth_window is not None
        assert config.depth_stack is not None
        self._stack, self._adapter = config.depth_stack, adapter
        names = [layer.name for layer in slice_layers(model, adapter).values()]
        blocks = sorted({block for name in names if (block := block_of(name, self._stack)) is not None})
        self._last, self._rest_below = blocks[-1], max(config.depth_window)
        self._handles: list[Any] = []
        for block in blocks:
            before, after = functools.partial(self._before, block), functools.partial(self._after, block)
            for module in _called(model.get_submodule(f"{self._stack}.{block}")):
                self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                self._handles.append(module.register_forward_hook(after, with_kwargs=True))
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles of a model: graphs can be neither copied nor saved."""
        return self.__dict__ | {"_call": None, "_written": {}}

    def end(self) -> None:
        """Look at no more passes."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._forget()

    def _forget(self) -> None:
        self._call: _Call | None = None
        self._written: dict[Any, int] = {}
        """Functions of the graph that blocks have returned the results of."""

    def _before(self, block: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._trains(module):
            return
        inputs, call = [*_tensors((args, kwargs))], self._call
        writers, variables = self._origins(inputs)
        if call is not None and call.block != block:
            if (above := max(writers, default=block)) > block:
                self._refuse(block, f"reads what block {above} writes")
            is_fed = block < call.block or call.block in writers or not call.is_traced
            if not is_fed or call.is_repeated_with(inputs):
                self._refuse(block, f"does not read what block {call.block}, called before it, writes")
        if block < self._rest_below and (outside := self._outside(variables)):
            self._forget()
            raise SliceFineError(
                f"{self._stack}.{block}: `depth_window` ends backpropagation below a block, and this one reads what {listed(outside)} outside of {self._stack} "
                "writes, which is trained at every step. Leave such layers out with `exclude_modules`, or leave out `depth_window`."
            )
        # Where the last block is dropped (LayerDrop), the pass has ended when another one begins.
        if call is not None and (block == self._last or block < call.block):
            self.end()

    def _after(self, block: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._trains(module) and self._handles:  # in this order: torch.compile cannot trace handles
            self._call = _Call(block, [*_tensors((args, kwargs))], [*_tensors(output)])
            self._written |= {y.grad_fn: block for y in self._call.outputs if y.grad_fn is not None}

    def _trains(self, module: nn.Module) -> bool:
        """Whether this call is in a forward pass that trains the adapter, which checkpointing repeats within the backward pass."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or torch._C._current_graph_task_id() >= 0:
            return False
        layers = [layer for layer in module.modules() if isinstance(layer, SliceLayer)]
        mine = [layer for layer in layers if layer.installed == self._adapter and not layer.merged_adapters]
        return any(layer.slicefine_weight[self._adapter].requires_grad for layer in mine)

    def _origins(self, inputs: list[Tensor]) -> tuple[set[int], set[int]]:
        """The blocks that wrote `inputs`, and identities of what else is trained and has a part in them."""
        writers, variables, seen = set(), set(), set()
        waiting: list[Any] = [x.grad_fn for x in inputs]
        while waiting:
            function = waiting.pop()
            if function is None or function in seen:
                continue
            seen.add(function)
            if function in self._written:
                writers.add(self._written[function])
            else:
                variables.add(id(getattr(function, "variable", None)))
                waiting += [inner for inner, _ in function.next_functions]
        return writers, variables

    def _outside(self, variables: set[int]) -> list[str]:
        layers = sliding.layers_of(variables)
        return sorted({layer.name for layer in layers if block_of(layer.name, self._stack) is None})

    def _refuse(self, block: int, reason: str) -> None:
        self._forget()  # whoever goes on is told again
        raise SliceFineError(
            f"{self._stack}.{block}: `depth_window` needs blocks in an order, each of which reads what the one before it writes; this one {reason}. Name another "
            "list with `depth_stack`, or leave out `depth_window`."
        )


def _called(block: nn.Module) -> Iterator[nn.Module]:
    """What is called of a block: a list of modules (those of a stage, PVT) is not called itself."""
    if isinstance(block, nn.ModuleList):
        for module in block:
            yield from _called(module)
    else:
        yield block


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those in nested containers. What else there is (a cache) is no chain from block to block."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)
