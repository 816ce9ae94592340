"""The memory of a step of a deep model, from the steps of models of few layers.

Every further layer of a kind adds the same bytes: what it saves, until the backward pass has been through it, and its gradients from then
on. So what is alive in the forward pass and at the head grows evenly with the number of layers; in the backward pass through the layers it
depends on which of them that is in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from slicefine.benchmarking.saved_bytes import FORWARD, HEAD, LAYERS, StepMemory

Added = Sequence[StepMemory]
"""For each further layer of the deep model, in their order: the step with one more of its kind."""


def with_more_layers(start: StepMemory, added: Added, *, accumulating: bool) -> StepMemory:
    """The step of a model that has the layers of `start`, and those of `added`.

    Args:
        accumulating: Whether gradients of batches before are there from the beginning.
    """

    def all_of(of_step: Callable[[StepMemory], int]) -> int:
        return of_step(start) + sum(of_step(step) - of_step(start) for step in added)

    def highest(part: str) -> dict[str, int]:
        kinds = dict.fromkeys(kind for step in (start, *added) for kind in step.highest[part])
        return {kind: all_of(lambda step, kind=kind: step.highest[part].get(kind, 0)) for kind in kinds}

    return StepMemory(
        saved=all_of(lambda step: step.saved),
        saved_logits=all_of(lambda step: step.saved_logits),
        logits=all_of(lambda step: step.logits),
        gradients=all_of(lambda step: step.gradients),
        reached=all_of(lambda step: step.reached),
        blocks={kind: all_of(lambda step, kind=kind: step.blocks[kind]) for kind in start.blocks},
        highest={part: highest(part) for part in (FORWARD, HEAD)} | {LAYERS: _in_layers(start, added, accumulating)},
    )


def _in_layers(start: StepMemory, added: Added, accumulating: bool) -> dict[str, int]:
    """The highest moment in the backward pass of the layers, each of which may be the one that it is in.

    Layers before that one still have what they save, those after it have their gradients already.
    """
    pending, gradients = (
        [step.blocks[kind] - start.blocks[kind] for step in added] for kind in ("activations", "gradients")
    )
    # That of `start` may be in a layer between any two of those that are added.
    moments = [(start, place, place) for place in range(len(added) + 1)]
    moments += [(step, place, place + 1) for place, step in enumerate(added)]
    found = []
    for step, before, after in moments:
        alive = Counter(step.highest[LAYERS])
        alive["activations"] += sum(pending[:before])
        alive["gradients"] += sum(gradients[after:])
        if accumulating:
            alive["gradients"] += sum(gradients[:before])
        found.append(dict(alive))
    return max(found, key=lambda alive: sum(alive.values()))
