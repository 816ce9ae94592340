"""One forward and some short backward passes that show which features of a layer's input come from which rows of other layers.

The output of every target is replaced by random numbers that are leaves of the graph: so the input of a target depends on just those
outputs that reach it without passing through another target. The graph says which; gradients of its input tell feature by feature.

Three kinds of writers are told apart:

- direct: a feature comes from one row alone (value, up, gate, fc1; a convolution before a norm per channel). With grouped-query attention
  several features come from one row.
- blocks: the features of a head come from a block of rows, all from all (query and key, which softmax mixes). Paired by order: the same feature of
  the same head, and of the key head that serves it. Where query and key have fewer features than value, no order says which belong together.
- everything from everything (a norm between, a residual stream with several readers): no partner.

Rows of the batch are independent of each other, so each row carries a question of its own: a row asks for all features with a certain digit, or of
one head.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slicefine.errors import SliceFineError, first_line
from slicefine.slicing import COLUMN, ROW, Layout
from slicefine.tuner.base_layers import CONVOLUTIONS
from slicefine.tuner.layer import SliceLayer
from slicefine.tuner.undisturbed import undisturbed

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_NUMBER = re.compile(r"\d+")
OUTPUT = ""
"""Among those who read: the caller of the model."""
Digits = list[int | None]
"""For each row of a writer, the place within a head of the features that come from it; `ALL` if that is every place, None if it is several."""
ALL = -1
Heads = list[tuple[int, ...]]
"""For each row of a writer, the heads whose features come from it."""


@dataclass
class _Reader:
    """A target, and the others whose outputs reach its input."""

    name: str
    x: Tensor
    """Its input: rows of the batch in dimension 0, features in `dim`."""
    dim: int
    weights: Tensor
    """Like `x`: its gradients are asked for in a sum with these, so that a norm of several features does not hide that it is one."""
    writers: list[str]
    shared: set[str]
    """Those of which others read as well. A feature that one of them writes, as those of a residual stream, is not hidden."""

    @property
    def size(self) -> int:
        """Number of features."""
        return self.x.shape[self.dim]


class Probe:
    """Finds the partners among some layers of a model. The model is not changed, and draws no random numbers of anybody else's.

    Args:
        model: With values, on any device.
        layers: Linear layers and convolutions without groups by name; tuner layers around such as well.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self._model, self._layers = model, layers
        self._inputs: dict[str, list[Tensor]] = defaultdict(list)
        self._leaves: dict[str, list[Tensor]] = defaultdict(list)
        self._outputs: list[Tensor] = []
        self._generator = torch.Generator("cpu").manual_seed(0)
        self._head_of: dict[int, int] = {}
        """Features of a reader -> those of a head in the last one of that size: blocks of a stack are alike, and each question costs a backward pass."""

    # ------------------------------------------------------------------ the forward pass

    def run(self, called: nn.Module, batch: Mapping[str, Any]) -> None:
        """Call `called`, the model or a part of it, with `batch`.

        Raises `SliceFineError` if that fails, or the batch has a single row.
        """
        with ExitStack() as stack:
            for name, module in self._layers.items():
                for handle in (
                    module.register_forward_pre_hook(self._before(name), with_kwargs=True),
                    module.register_forward_hook(self._after(name)),
                ):
                    stack.callback(handle.remove)
            for module in self._model.modules():
                if isinstance(module, BATCH_NORMS):
                    stack.callback(module.register_forward_hook(self._lift).remove)
            stack.enter_context(undisturbed(self._model))
            stack.enter_context(torch.enable_grad())
            try:
                output = called(**batch)
            except SliceFineError:
                raise
            except Exception as error:
                raise SliceFineError(
                    f"axis='coupled' finds partners by a forward pass, which failed: {type(error).__name__}: "
                    f"{first_line(error)}. Find them with a batch that {type(self._model).__name__} takes: "
                    "`config.couplings = slicefine.couplings(model, config, batch)`."
                ) from error
        parts = (
            output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else [output]
        )
        self._outputs = [part for part in parts if isinstance(part, Tensor) and part.requires_grad]
        inputs = [x for calls in self._inputs.values() for x in calls]
        if inputs and all(len(x) < 2 for x in inputs):
            raise SliceFineError(
                "axis='coupled' finds partners by a forward pass on a batch of at least two rows, of which each asks for other features; got one row."
            )

    def _before(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # A copy, because a model may go on to write into it.
            self._inputs[name].append([*args, *kwargs.values()][0].clone())

        return hook

    def _after(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
            if not isinstance(output, Tensor):  # a router that gives choices as well: it has no partners
                return None
            leaf = self._positive(output).requires_grad_()
            self._leaves[name].append(leaf)
            return leaf.clone()  # a leaf itself may not be written into

        return hook

    def _lift(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The statistics of a norm are of other values than ours, and a ReLU would hide what they make negative."""
        return output - output.detach() + self._positive(output)

    def _positive(self, like: Tensor) -> Tensor:
        """Numbers that no ReLU hides, another at every place, so that nothing cancels."""
        return (torch.rand(like.shape, generator=self._generator, device="cpu") + 0.1).to(like)

    # ------------------------------------------------------------------ what comes from where

    def layouts(self) -> dict[str, Layout]:
        """The layouts of all that have partners."""
        of_leaf = {id(leaf): name for name, leaves in self._leaves.items() for leaf in leaves}
        reached = {name: _reached(calls, of_leaf) for name, calls in self._inputs.items()}
        read_by: dict[str, set[str]] = defaultdict(set)
        for reader, writers in (reached | {OUTPUT: _reached(self._outputs, of_leaf)}).items():
            for writer in writers:
                read_by[writer].add(reader)
        found: dict[str, Layout] = {}
        fruitless: set[Any] = set()  # to ask again in every block of a stack may take hours (Mamba2)
        for (
            name,
            writers,
        ) in reached.items():  # in the order of the forward pass: in a chain of three, the first two are a pair
            shared = {writer for writer in writers if read_by[writer] != {name}}
            free = not found.keys() & {name, *writers} - shared
            if len(shared) < len(writers) and free and (reader := self._reader(name, writers, shared)):
                kind = self._kind(reader)
                layouts = {} if kind in fruitless else self._couple(reader)
                found |= layouts
                if not layouts:
                    fruitless.add(kind)
            self._inputs[name] = [
                x.detach() for x in self._inputs[name]
            ]  # its part of the graph is not needed any more
        return found

    def _once(self, name: str) -> bool:
        """Whether the layer is called once: rows of one that is called again are of other features each time."""
        return len(self._inputs[name]) == len(self._leaves[name]) == 1

    def _reader(self, name: str, writers: Collection[str], shared: set[str]) -> _Reader | None:
        """The reader with those of its writers that have a row for each of its own in the batch; None if one of `shared` has not."""
        if not self._once(name):
            return None
        (x,) = self._inputs[name]
        dim = self._feature_dim(name, x)
        if dim is None or len(x) < 2:
            return None
        alike = [
            writer
            for writer in writers
            if self._once(writer)
            and len(self._leaves[writer][0]) == len(x)
            and self._feature_dim(writer, self._leaves[writer][0])
        ]
        if not alike or not shared <= {*alike}:
            return None
        return _Reader(name, x, dim, self._positive(x), alike, shared)

    def _kind(self, reader: _Reader) -> Any:
        """Equal for readers of like names and shapes with like writers: the same layer in other blocks of a stack."""
        writers = ((_NUMBER.sub("#", w), w in reader.shared, self._leaves[w][0].shape) for w in reader.writers)
        return _NUMBER.sub("#", reader.name), reader.x.shape, *sorted(writers)

    def _feature_dim(self, name: str, x: Tensor) -> int | None:
        """The dimension of features in the input or output of a layer; None if the batch has no dimension of its own."""
        module = self._layers[name]
        base = module.get_base_layer() if isinstance(module, SliceLayer) else module
        if isinstance(base, CONVOLUTIONS):
            return 1 if x.dim() == base.weight.dim() else None
        return x.dim() - 1 if x.dim() > 1 else None

    def _features(self, name: str) -> int:
        """Of the output of a layer."""
        leaf = self._leaves[name][0]
        return leaf.shape[self._feature_dim(name, leaf) or 0]

    def _ask(self, reader: _Reader, questions: Tensor) -> dict[str, Tensor]:
        """Where the features of the reader come from.

        Args:
            questions: bool, `(questions, features of the reader)`.

        Returns:
            Writer -> bool, `(questions, its features)`: those from which any feature of the question comes.
        """
        leaves = [self._leaves[name][0] for name in reader.writers]
        answers: dict[str, list[Tensor]] = defaultdict(list)
        for asked in questions.split(len(reader.x)):
            shape = [1] * reader.x.dim()
            shape[0], shape[reader.dim] = asked.shape
            weights = torch.zeros_like(reader.x)
            weights[: len(asked)] = asked.view(shape).to(weights.device) * reader.weights[: len(asked)]
            try:
                gradients = torch.autograd.grad(reader.x, leaves, weights, retain_graph=True, allow_unused=True)
            except RuntimeError as error:  # a model that writes into what its backward pass needs
                raise SliceFineError(
                    f"axis='coupled' finds partners by a gradient, and that of {reader.name} failed: {error}. Use another axis, or take `couplings` from "
                    "the configuration of an adapter of the same architecture."
                ) from error
            for name, leaf, gradient in zip(reader.writers, leaves, gradients, strict=True):
                if gradient is not None and not gradient.isfinite().all():
                    raise SliceFineError(
                        f"axis='coupled' finds partners by a gradient, and that of {reader.name} with respect to {name} is NaN or infinite: nothing is told "
                        "by it. Load the model with its values, and give `slicefine.couplings` a batch that it computes well."
                    )
                seen = (torch.zeros_like(leaf) if gradient is None else gradient)[: len(asked)] != 0
                features = seen.movedim(self._feature_dim(name, leaf) or 0, 1)
                answers[name].append((features.flatten(2).any(2) if features.dim() > 2 else features).cpu())
        return {name: torch.cat(parts) for name, parts in answers.items()}

    def _couple(self, reader: _Reader) -> dict[str, Layout]:
        """Layouts of a reader and of those of its writers that can be paired with it feature by feature."""
        best: dict[str, Layout] = {}
        for head in self._head_sizes(reader):
            found = self._attempt(reader, head)
            if len(found) > len(best):
                best = found
            if len(found) > len(reader.writers):
                self._head_of[reader.size] = head
                break
        return best

    def _head_sizes(self, reader: _Reader) -> Iterator[int]:
        """How many features a head may have, the likeliest first.

        From one head to the next, features come from other rows, or from the same ones again.
        """
        known = self._head_of.get(reader.size, reader.size)
        if known < reader.size and self._boundary(reader, known):
            yield known
        direct = all(int(seen.sum()) <= 1 for seen in self._ask(reader, _one_each([0], reader.size)).values())
        if direct:
            yield reader.size
        places = [0, *(place for place in range(1, reader.size) if reader.size % place == 0)]
        alone = self._ask(reader, _one_each(places, reader.size)).values()
        shared = [(seen & seen[0]).sum(1).tolist() for seen in alone]
        yield from (place for at, place in enumerate(places) if at > 1 and any(of[at] != of[at - 1] for of in shared))
        if not direct:
            yield reader.size

    def _boundary(self, reader: _Reader, head: int) -> bool:
        """Whether a head may end after `head` features: the next one comes from other rows than those before."""
        alone = self._ask(reader, _one_each([0, head - 1, head], reader.size)).values()
        _, last, following = zip(*((seen & seen[0]).sum(1).tolist() for seen in alone), strict=True)
        return last != following

    def _attempt(self, reader: _Reader, head: int) -> dict[str, Layout]:
        """As `_couple`, if a head has `head` features."""
        digits, heads = self._digits(reader, head), self._heads(reader, head)
        rows = {
            name: [() if place in (None, ALL) else tuple(h * head + place for h in of) for place, of in pairs]
            for name, pairs in ((name, zip(digits[name], heads[name], strict=True)) for name in reader.writers)
        }
        if any(any(rows[name]) for name in reader.shared):
            return {}
        unit_of = _units((features for name in reader.writers for features in rows[name]), reader.size)
        column = _layout(COLUMN, unit_of)
        if column is None:
            return {}
        found = {}
        for name in _in_order(rows, heads, head):
            seen: dict[tuple[int, ...], int] = defaultdict(int)
            own: list[int | None] = []
            for place, features, of in zip(digits[name], rows[name], heads[name], strict=True):
                if place is None:
                    own.append(None)
                elif features:
                    own.append(unit_of[features[0]])
                else:  # in a block: by its order there
                    own.append(unit_of[of[0] * head + seen[of] % head])
                    seen[of] += 1
            layout = _layout(ROW, own)
            if name not in reader.shared and layout and layout.features == column.features:
                found[name] = layout
        # A query alone does not say what its features are: those of the output are the value's.
        return found | {reader.name: column} if any(any(rows[name]) for name in found) else {}

    def _digits(self, reader: _Reader, head: int) -> dict[str, Digits]:
        base = len(reader.x)
        offsets = torch.arange(reader.size, device="cpu") % head
        scales = [1]
        while scales[-1] * base < head:
            scales.append(scales[-1] * base)
        asked = torch.stack([offsets // scale % base == digit for scale in scales for digit in range(base)])
        there = asked.any(1).view(len(scales), base, 1)
        found: dict[str, Digits] = {}
        for name, seen in self._ask(reader, asked).items():
            of_scale = seen.view(len(scales), base, -1)
            place = (of_scale.int().argmax(1) * torch.tensor(scales, device="cpu")[:, None]).sum(0)
            alone, everywhere = (of_scale.sum(1) == 1).all(0), (of_scale == there).flatten(0, 1).all(0)
            place[everywhere & ~alone] = ALL
            sure = (alone | everywhere).tolist()
            found[name] = [at if known else None for at, known in zip(place.tolist(), sure, strict=True)]
        return found

    def _heads(self, reader: _Reader, head: int) -> dict[str, Heads]:
        of = torch.arange(reader.size, device="cpu") // head
        asked = torch.stack([of == number for number in range(reader.size // head)])
        found: dict[str, Heads] = {}
        for name, seen in self._ask(reader, asked).items():
            heads: list[list[int]] = [[] for _ in range(self._features(name))]
            for row, number in seen.t().nonzero().tolist():
                heads[row].append(number)
            found[name] = [tuple(numbers) for numbers in heads]
        return found


def _in_order(rows: Mapping[str, Sequence[tuple[int, ...]]], heads: Mapping[str, Heads], head: int) -> list[str]:
    """Writers whose rows of a block can be told apart by their order there: as many as a head has features, or that of two kinds, one after the other.

    Of query and key both are in a block. If only half of the rows are there beside the value, both are narrower than it, and look like one.

    Args:
        rows: Writer -> for each of its rows the features that come from it alone.
        heads: Writer -> for each of its rows the heads whose features come from it.
        head: Features of a head.
    """
    blocks = {
        name: Counter(h for features, of in zip(own, heads[name], strict=True) if not features for h in of)
        for name, own in rows.items()
    }
    together = sum(blocks.values(), Counter())
    return [
        name
        for name, counts in blocks.items()
        if all(
            rows_of == 2 * head or (rows_of == head and (not any(rows[name]) or together[h] >= 2 * head))
            for h, rows_of in counts.items()
        )
    ]


def _one_each(places: list[int], size: int) -> Tensor:
    """Questions for one feature each, bool, `(places, size)`."""
    return torch.nn.functional.one_hot(torch.tensor(places, device="cpu"), size).bool()


def _units(rows: Iterable[tuple[int, ...]], size: int) -> list[int | None]:
    """For each of the `size` features of a reader the number of its hidden feature; None if it comes from none of the rows.

    Features that come from one row are the same hidden feature. `rows`: those that each row writes.
    """
    same = [*range(size)]

    def first(feature: int) -> int:
        while same[feature] != feature:
            feature = same[feature]
        return feature

    order: dict[int, None] = {}
    for features in rows:
        for feature in features:
            low, high = sorted((first(features[0]), first(feature)))
            same[high] = low
            order[feature] = None
    numbers: dict[int, int] = {}
    for feature in order:
        numbers.setdefault(first(feature), len(numbers))
    return [numbers[first(feature)] if feature in order else None for feature in range(size)]


def _layout(axis: str, features: list[int | None]) -> Layout | None:
    """None if the features are not all there, each equally often."""
    try:
        return None if None in features else Layout.of(axis, [feature for feature in features if feature is not None])
    except SliceFineError:
        return None


def _reached(tensors: Iterable[Tensor], of_leaf: Mapping[int, str]) -> dict[str, None]:
    """The names of the leaves from which any of the tensors is computed, in some fixed order."""
    names: dict[str, None] = {}
    waiting = [tensor.grad_fn for tensor in tensors]
    seen = set(waiting)
    while waiting:
        node: Any = waiting.pop()
        if node is None:
            continue
        leaf = getattr(node, "variable", None)
        if id(leaf) in of_leaf:
            names[of_leaf[id(leaf)]] = None
        below = [inner for inner, _ in node.next_functions if inner not in seen]
        seen.update(below)
        waiting += below
    return {name: None for name in of_leaf.values() if name in names}
