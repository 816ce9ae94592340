"""The memory of a step of a deep model, from the steps of models of few layers.

Every further layer of a kind adds the same bytes: what it saves, until the backward pass has been through it, and its gradients from then
on. So what is alive grows evenly with the number of layers within each part of a step; which part is the highest may change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from slicefine.benchmarking.saved_bytes import FORWARD, HEAD, LAYERS, StepMemory

More = Sequence[tuple[int, StepMemory]]
"""For each kind of layers: how many more of them the deep model has, and the step with one more of them."""


def with_more_layers(start: StepMemory, more: More, *, accumulating: bool) -> StepMemory:
    """The step of a model that has the layers of `start`, and those of `more`.

    Args:
        accumulating: Whether gradients of batches before are there from the beginning.
    """

    def all_of(of_step: Callable[[StepMemory], int]) -> int:
        return of_step(start) + sum(times * (of_step(step) - of_step(start)) for times, step in more)

    def highest(part: str) -> dict[str, int]:
        kinds = dict.fromkeys(kind for step in (start, *(step for _, step in more)) for kind in step.highest[part])
        return {kind: all_of(lambda step, kind=kind: step.highest[part].get(kind, 0)) for kind in kinds}

    return StepMemory(
        saved=all_of(lambda step: step.saved),
        saved_logits=all_of(lambda step: step.saved_logits),
        logits=all_of(lambda step: step.logits),
        gradients=all_of(lambda step: step.gradients),
        highest={part: highest(part) for part in (FORWARD, HEAD)} | {LAYERS: _in_layers(start, more, accumulating)},
    )


def _in_layers(start: StepMemory, more: More, accumulating: bool) -> dict[str, int]:
    """The highest moment in the backward pass of the layers, each kind of which may be the one that it is in."""
    counts = [times for times, _ in more]
    found = [_with_others(start, counts, start, more, accumulating)]
    for place, (_, step) in enumerate(more):
        others = [times - (at == place) for at, times in enumerate(counts)]
        found.append(_with_others(step, others, start, more, accumulating))
    return max(found, key=lambda alive: sum(alive.values()))


def _with_others(
    shown: StepMemory, counts: Sequence[int], start: StepMemory, more: More, accumulating: bool
) -> dict[str, int]:
    """That of `shown`, beside `counts` further layers of each kind: all before it, or all after it, whichever is the more."""
    alive = Counter(shown.highest[LAYERS])
    for count, (_, step) in zip(counts, more, strict=True):
        pending, gradients = step.saved - start.saved, step.gradients - start.gradients
        if pending >= gradients or accumulating:
            alive["activations"] += count * pending
        if pending < gradients or accumulating:
            alive["gradients"] += count * gradients
    return dict(alive)
