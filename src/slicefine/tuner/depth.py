"""The stack of blocks that a depth window counts in."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from slicefine.errors import listed
from slicefine.tuner.config import SliceFineConfig, block_of


def find_stack(model: nn.Module, targets: Iterable[str]) -> tuple[str | None, list[str]]:
    """Name of the list of blocks that `targets` are in, and what keeps a depth window from it, one sentence each.

    A list is an `nn.ModuleList` or `nn.Sequential`; of lists within lists the outermost one counts. A target that is used after the
    last block (a pooler, a head) is in none, and always trained.
    """
    lists = {name: m for name, m in model.named_modules() if name and isinstance(m, nn.ModuleList | nn.Sequential)}
    of: dict[str, set[int]] = {}
    outside = []
    for target in targets:
        stack = next((name for name in lists if block_of(target, name) is not None), None)
        if stack is None:
            outside.append(target)
        else:
            index = block_of(target, stack)
            assert index is not None
            of.setdefault(stack, set()).add(index)
    stacks = [name for name, indices in of.items() if len(indices) > 1]
    if not stacks:
        return None, [
            "`depth_window` needs blocks in an order, and no list of modules in this model has targets in more than one of its entries."
        ]
    if len(of) > 1:
        return None, [
            f"`depth_window` counts in one list of blocks; there are targets in {listed(of)}. Name the layers of one of them with `target_modules`."
        ]
    order = [name for name, _ in model.named_modules()]
    below = [name for name in outside if order.index(name) < order.index(stacks[0])]
    if below:
        return None, [
            f"`depth_window` ends backpropagation below a block, and {listed(below)} are below all. Leave them out with `exclude_modules`."
        ]
    return stacks[0], []


def problems(model: nn.Module, config: SliceFineConfig, targets: Iterable[str]) -> list[str]:
    """What is wrong with the depth window of `config` for `targets` of `model`, whose stack has been found."""
    assert config.depth_window is not None
    assert config.depth_stack is not None
    blocks = {block for name in targets if (block := block_of(name, config.depth_stack)) is not None}
    if not blocks:
        return [f"`depth_stack`: no target is in {config.depth_stack!r}. Leave it out, and it is found again."]
    found = []
    if above := sorted({index for index in config.depth_window if index > max(blocks)}):
        found.append(
            f"`depth_window`: the blocks of {config.depth_stack} with targets are {min(blocks)} to {max(blocks)}; got {listed(map(str, above))}."
        )
    if min(config.depth_window) > min(blocks):
        never = listed(str(block) for block in sorted(blocks) if block < min(config.depth_window))
        found.append(
            f"`depth_window`: block {never} of {config.depth_stack} would never be trained. Let one of the indices be at most {min(blocks)}, or leave "
            "these blocks out with `layers_to_transform`."
        )
    return found
