"""Gradients of a scalar output for each example by itself, with respect to some weights of a model.

Two ways to the same numbers:

vmap    `torch.func`: the gradient of a function of weights and one example, mapped over several examples of one shape at once
loop    one backward pass per example; the gradient of a weight is handed on and freed as soon as it is there

vmap needs the gradients of several examples at once, and a model without control flow that depends on its inputs; where it fails, or where
the weights are too large for it, the loop is used. Examples come one by one, not padded to each other: a mask that masks nothing is left out
of the call, which changes no output and spares the models that look into it, which vmap does not allow.

The model is called with its weights passed in from outside, as views of the ones that it has; nothing in it is written to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

Example = dict[str, Tensor]
"""A batch of one example."""
Scalar = Callable[[Any], Tensor]
"""Output of the model -> a scalar."""
Keep = Callable[[str, Sequence[int], Tensor], None]
"""Takes the name of a weight, numbers of m examples, and their gradients, `(m, *shape of the parameter)`."""

VMAP, LOOP = "torch.func.vmap", "single backward passes"
AT_ONCE = 8
"""Examples that vmap is given together, at most."""
BYTES_AT_ONCE = 2**28
"""Of the gradients of examples that vmap is given together, at most."""
INPUTS_AT_ONCE = 2**20
"""Numbers in inputs that vmap is given together, at most: it keeps what they leave in the model until the backward pass."""


class ExampleGradients:
    """Gradients of scalar outputs of `model` for each of `examples`.

    Args:
        model: In eval mode; its parameters want no gradients.
        examples: Batches of one example each.
        vmapped: Whether vmap may be used.
    """

    def __init__(self, model: nn.Module, examples: Sequence[Example], *, vmapped: bool = True) -> None:
        self.model = model
        self.examples = [without_idle_mask(example) for example in examples]
        self.method = VMAP if vmapped else LOOP
        """How the last gradients were computed."""
        self.why_loop = ""
        """Why vmap was not used."""

    def each(self, weights: Mapping[str, Tensor], scalar: Scalar, keep: Keep) -> None:
        """Hand the gradient with respect to every weight, for every example, to `keep`.

        Args:
            weights: Full name of a parameter of the model -> the parameter.
        """
        views = {name: weight.detach() for name, weight in weights.items()}
        size = sum(view.numel() * view.element_size() for view in views.values())
        if self.method == VMAP and size > BYTES_AT_ONCE:
            self._fall_back(f"the gradients for one example take {size / 2**20:.0f} MiB")
        most = min(AT_ONCE, BYTES_AT_ONCE // max(size, 1))
        for numbers in _alike(self.examples, most) if self.method == VMAP else _singly(self.examples):
            if self.method == VMAP:
                try:
                    found = self._mapped(views, scalar, numbers)
                except Exception as error:  # whatever vmap does not know; the loop says what is wrong with the model
                    self._fall_back(str(error).strip().partition("\n")[0][:200])
                else:
                    for name, gradients in found.items():
                        keep(name, numbers, gradients)
                    continue
            for number in numbers:
                self._single(views, scalar, number, keep)

    def _fall_back(self, why: str) -> None:
        self.method, self.why_loop = LOOP, why

    def _mapped(self, views: dict[str, Tensor], scalar: Scalar, numbers: Sequence[int]) -> dict[str, Tensor]:
        def output(weights: dict[str, Tensor], example: Example) -> Tensor:
            return scalar(functional_call(self.model, weights, (), example))

        chosen = [self.examples[number] for number in numbers]
        stack = {key: torch.stack([example[key] for example in chosen]) for key in chosen[0]}
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels are not mapped, but run one by one
            return vmap(grad(output), in_dims=(None, 0))(views, stack)

    def _single(self, views: dict[str, Tensor], scalar: Scalar, number: int, keep: Keep) -> None:
        leaves = {name: view.detach().requires_grad_() for name, view in views.items()}

        def hand_on(name: str) -> Callable[[Tensor], None]:
            def hook(leaf: Tensor) -> None:
                assert leaf.grad is not None
                keep(name, [number], leaf.grad[None])
                leaf.grad = None

            return hook

        for name, leaf in leaves.items():
            leaf.register_post_accumulate_grad_hook(hand_on(name))
        output = scalar(functional_call(self.model, leaves, (), self.examples[number]))
        if output.requires_grad:  # else no weight was used
            torch.autograd.backward(output, inputs=list(leaves.values()))


def without_idle_mask(example: Example) -> Example:
    """`example` without its attention mask, if that masks nothing."""
    mask = example.get("attention_mask")
    if mask is None or not bool(mask.all()):
        return example
    return {key: value for key, value in example.items() if key != "attention_mask"}


def _alike(examples: Sequence[Example], most: int) -> Iterator[list[int]]:
    """Numbers of examples whose tensors have the same shapes, at most `most` together."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for number, example in enumerate(examples):
        groups.setdefault(tuple((key, value.shape) for key, value in example.items()), []).append(number)
    for numbers in groups.values():
        inputs = sum(value.numel() for value in examples[numbers[0]].values())
        count = max(min(most, INPUTS_AT_ONCE // max(inputs, 1)), 1)
        yield from (numbers[at : at + count] for at in range(0, len(numbers), count))


def _singly(examples: Sequence[Example]) -> Iterator[list[int]]:
    return ([number] for number in range(len(examples)))
