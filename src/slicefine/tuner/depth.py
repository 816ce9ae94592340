"""The stack of blocks that a depth window counts in."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import nn

from slicefine.errors import by_text, listed
from slicefine.slicing import ROW
from slicefine.tuner.config import SliceFineConfig, block_of


def find_stack(model: nn.Module, targets: Collection[str]) -> tuple[str | None, list[str]]:
    """Name of the list of blocks that `targets` are in, and what keeps a depth window from it, one sentence each.

    A list is an `nn.ModuleList` or `nn.Sequential` with targets in more than one of its entries; of lists within lists the outermost one
    counts. A target that is used after the last block (a pooler, a head) is in none, and always trained. Whether it is used there, and
    whether the blocks are used in their order, shows in a forward pass alone: see `depth_order.py`.
    """
    stacks: list[str] = []
    for name, module in model.named_modules():  # outer ones first
        within = tuple(f"{stack}." for stack in stacks)
        if not name or not isinstance(module, nn.ModuleList | nn.Sequential) or name.startswith(within):
            continue
        if len({block_of(target, name) for target in targets} - {None}) > 1:
            stacks.append(name)
    if not stacks:
        return None, [
            f"`depth_window` needs blocks in an order, and no list of modules within this {type(model).__name__} has targets in more than one of its "
            f"entries; the targets are {listed(targets)}. Add layers of several blocks to `target_modules`, or leave `depth_window` out."
        ]
    if len(stacks) > 1:
        return None, [
            f"`depth_window` counts in one list of blocks; there are targets in {listed(stacks)}. Say which one with `depth_stack`, or name the layers "
            "of one of them with `target_modules`."
        ]
    return stacks[0], []


def problems(model: nn.Module, config: SliceFineConfig, targets: Collection[str]) -> list[str]:
    """What is wrong with the depth window of `config` for `targets` of `model`, whose stack has been found."""
    assert config.depth_window is not None
    assert config.depth_stack is not None
    stack, window = config.depth_stack, config.depth_window
    blocks = {block for name in targets if (block := block_of(name, stack)) is not None}
    if not blocks:
        return [f"`depth_stack`: no target is in {stack!r}. Leave it out, and it is found again."]
    found = []
    if above := sorted({index for index in window if index > max(blocks)}):
        found.append(
            f"`depth_window`: the blocks of {stack} with targets are {min(blocks)} to {max(blocks)}; got {listed(map(str, above))}. Use indices up to {max(blocks)}."
        )
    if min(window) > min(blocks):
        never = listed(str(block) for block in sorted(blocks) if block < min(window))
        found.append(
            f"`depth_window`: {stack} has targets that would never be trained, in block {never}; got {list(window)}. Let one of the indices be at most "
            f"{min(blocks)}, or leave these blocks out with `layers_to_transform`."
        )
    full = [
        name
        for name, _ in model.named_modules()
        if block_of(name, stack) is not None and name.endswith(tuple(config.modules_to_save or ()))
    ]
    if full:
        found.append(
            f"`depth_window` ends backpropagation below a block of {stack}, and `modules_to_save` has {listed(full)} trained in full at every step. "
            "Leave them out, or leave out `depth_window`."
        )
    return found + _parted(config, targets)


def _parted(config: SliceFineConfig, targets: Iterable[str]) -> list[str]:
    """Readers of coupled features whose writers may be in a block that is trained at other steps.

    Couplings do not say who the partners are, but for the number of features that they have in common: a block that has fewer writers of so many
    than readers reads those of another.
    """
    schedules = {name: config.schedule_of(name) for name in targets}
    sides = []
    for name, schedule in schedules.items():
        if schedule.layout is not None:
            turns = schedule.window.turns if schedule.rests and schedule.window else ()
            sides.append((name, schedule.layout, block_of(name, config.depth_stack), turns))
    parted = {}
    for name, layout, block, turns in sides:
        alike = [(other.axis == ROW, b, t) for _, other, b, t in sides if other.features == layout.features]
        own = [writes for writes, b, _ in alike if b == block]
        elsewhere = any(writes and t != turns for writes, _, t in alike)
        if layout.axis != ROW and own.count(True) < own.count(False) and elsewhere:
            parted[name] = (
                "axis='coupled' moves both sides of a feature together, and this layer reads what another block writes, which `depth_window` trains at other steps. "
                "Leave the layer out with `exclude_modules`, or leave out `depth_window`."
            )
    return by_text(parted)
