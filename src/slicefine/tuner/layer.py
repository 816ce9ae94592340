"""A layer that trains one slice of its weight, as a PEFT tuner layer.

The base layer's weight always holds the values that the next forward pass is to use. Which values those are is settled in
one place, `_settle`: those of the active adapter, or the original ones while adapters are disabled.
"""

from __future__ import annotations

import functools
from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from slicefine.errors import SliceFineError
from slicefine.kernel import vectors
from slicefine.slicing import SLICE_AXES, Region, Schedule, Shape, Slice
from slicefine.tuner import guards, sliding
from slicefine.tuner.adapter_state import AdapterState, MasterDict
from slicefine.tuner.artifact import Target
from slicefine.tuner.base_layers import WEIGHT, Place, compute, present_values
from slicefine.tuner.originals import Originals, Stored, to_cpu, unnoticed
from slicefine.tuner.reading import read_bias, read_weight

if TYPE_CHECKING:
    from slicefine.tuner.arrival import Arrival


def _settle_after_loading(layer: nn.Module, incompatible_keys: Any) -> None:
    """The state may have been saved with the adapter disabled, or another one active."""
    assert isinstance(layer, SliceLayer)
    for state in layer.slicefine_state.values():
        state.cast(layer.dtype)  # `assign=True` brings the dtype of the state dict
    layer._begin_on_another_base()
    layer._settle()


class SliceLayer(nn.Module, BaseTunerLayer):
    """A base layer (see `base_layers.py`) of which one slice per adapter is trained."""

    adapter_layer_names = ("slicefine_weight", "slicefine_bias")
    cast_input_dtype_enabled = False  # there is no cast; PEFT's `disable_input_dtype_casting` asks
    other_param_names = ("slicefine_index", "slicefine_start", "slicefine_state")

    def __init__(self, base_layer: nn.Module, name: str, parameter: str = WEIGHT) -> None:
        """`name`: that of the base layer, or of the parameter, in the base model, for messages."""
        super().__init__()
        self.name = name
        self.base_layer: Any = base_layer
        self.parameter = parameter
        self.out_features, self.in_features = self.shape[:2]
        self._turned = self.place.turned  # asked for in every forward pass
        self.slicefine_weight = MasterDict()
        self.slicefine_bias = MasterDict()
        self.slicefine_index: Any = BufferDict(persistent=False)  # its values are typed as possibly None
        self.slicefine_start: Any = BufferDict(persistent=False)
        self.slicefine_state: dict[str, AdapterState] = {}
        self.merged_adapters: list[str] = []
        self._active_adapter: list[str] = []
        self._installed: str | None = None
        self._arrival: Arrival | None = None
        self._other_base = False
        """Whether a state dict has just brought values of a base alone."""
        self.followed: int | None = None
        """Version of the installed adapter's parameter that the weight is known to follow; see `guards.py`."""
        self.register_load_state_dict_post_hook(_settle_after_loading)
        sliding.watch(self)

    def __getattr__(self, name: str) -> Any:
        """What the base layer has (`stride`, `embedding_dim`, ...): models ask the layer for it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_modules" not in vars(self) or name == "base_layer" or name.startswith("slicefine_"):
                raise  # those within have their own
            return getattr(self._modules["base_layer"], name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies and unpickled layers are watched as well."""
        super().__setstate__(state)
        sliding.watch(self)

    @property
    def place(self) -> Place:
        """Where the weight is."""
        return Place(self.get_base_layer(), self.parameter)

    @property
    def weight_key(self) -> str:
        """Name of the weight below this layer: several parameters of one module have a layer each, one around the other."""
        return "base_layer." * len(list(layers_around(self))) + self.parameter

    @property
    def matrix(self) -> Tensor:
        """The base weight as `(d_out, d_in, *kernel)`, a view: whatever its values are now."""
        return self.place.matrix

    @property
    def shape(self) -> Shape:
        """`(d_out, d_in, *kernel)` of the weight."""
        return self.place.shape

    @property
    def dtype(self) -> torch.dtype:
        """That of the base weight."""
        return self.place.stored.dtype

    @property
    def is_meta(self) -> bool:
        """Whether the weight has a shape and no values."""
        return self.place.stored.is_meta

    @property
    def weight(self) -> Tensor:
        """The base weight, for code that reads it instead of calling the layer: its slice is trained all the same."""
        self._take_in()
        return read_weight(self) if self.trains_now() else self.place.stored

    @property
    def bias(self) -> Tensor | None:
        """The bias of the base layer; the same holds."""
        self._take_in()
        return read_bias(self) if self.trains_now() else self.place.bias

    @property
    def installed(self) -> str | None:
        """The adapter whose values the weight holds, or None if it holds the original ones."""
        return self._installed

    @property
    def state(self) -> AdapterState:
        """What is known of the installed adapter, of which there must be one."""
        assert self._installed is not None
        return self.slicefine_state[self._installed]

    # ------------------------------------------------------------------ adapters come and go

    def add(self, adapter: str, schedule: Schedule, *, train_bias: bool, perturb: bool) -> None:
        """Give the layer an adapter whose slice is at its first position. The weight does not change.

        `perturb` adds noise to the slice, as if one optimizer step had been made, which leaves a layer alone that rests: PEFT's
        `init_weights=False`, for tests.
        """
        shown = self._installed
        self._show(None)
        weight = self.matrix
        size = schedule.widest(self.shape)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.slicefine_weight.place(adapter, torch.zeros(size, dtype=dtype, device=weight.device))
        active = schedule.slice_at(0, self.shape)
        state = self.slicefine_state[adapter] = AdapterState(schedule, active)
        index = torch.zeros(active.count, dtype=torch.int64, device=weight.device)
        self.slicefine_index[adapter] = index
        if train_bias and self.place.bias is not None:
            self.slicefine_bias.place(adapter, self.place.bias.detach().to(dtype, copy=True))
            state.bias = to_cpu(self.place.bias.detach()).clone()
        self._occupy(adapter, active)
        if perturb:
            if schedule.active(0):
                master = self._in_use(adapter)
                master += torch.randn_like(master) * weight.detach().to(dtype).std()
                self._show(adapter)
                self._write(adapter)
            state.step = 1
            if schedule.slice_at(1, self.shape) != active:
                self.slide(adapter)
        self._declare(adapter)
        self._show(shown)

    def copy(self, source: str, adapter: str) -> None:
        """Make `adapter`, which has the same schedule, what `source` is now."""
        state = self.slicefine_state[source]
        region = self.region(source)
        self.load(
            adapter,
            step=state.step,
            master=self.slicefine_weight[source].detach(),
            values={axis: self.trained_values(source, axis, region.along(axis)) for axis in SLICE_AXES},
            bias=self.slicefine_bias[source].detach() if source in self.slicefine_bias else None,
        )

    def target(self, adapter: str) -> Target:
        """What a file must fit to be loaded."""
        return Target(
            self.shape, adapter in self.slicefine_bias, self.slicefine_state[adapter].schedule, self.base_values
        )

    @property
    def arrival(self) -> Arrival | None:
        """What the layer waits for, see `arrival.py`."""
        return self._arrival

    def await_arrival(self, arrival: Arrival | None) -> None:
        """Wait for `arrival`, or no longer for any."""
        if arrival is not None and self._arrival is not None:
            self._arrival.end()
        self._arrival = arrival

    def _take_in(self) -> None:
        # Asking the others would take each of them as long, and they are asked when they are used themselves.
        if self._arrival is not None and self._arrival.has_come(self):
            self._arrival.complete()

    def check_written(self) -> None:
        """Raise `SliceFineError` if the weight does not follow the parameters of the installed adapter."""
        self._take_in()
        guards.check_written(self)

    def train(self, mode: bool = True) -> Any:
        """As `nn.Module.train`."""
        if mode:
            self._take_in()
            guards.warn_of_hooks(self)
        else:
            self.check_written()
        return super().train(mode)

    def load(self, adapter: str, *, step: int, master: Tensor, values: dict[str, Tensor], bias: Tensor | None) -> None:
        """Make `adapter` what a saved one was: everything it has trained since then is forgotten.

        Args:
            step: optimizer steps made when it was saved.
            master: fp32, the whole parameter; in its corner the slice that is active at `step`. It is taken if a step has trained
                it there; just after a move the weight knows better, in whatever dtype.
            values: `"row"` -> `(rows, d_in)`, `"column"` -> `(columns, d_out)`: final values of what was touched.
            bias: fp32, `(d_out,)`, or None if the adapter trains no bias.
        """
        self._show(None)
        state = self.slicefine_state[adapter]
        state.step, touched = step, state.schedule.touched(step, self.shape)
        region = Region.of(touched)
        kept = {axis: dict.fromkeys(i for p in touched if p.axis == axis for i in p.indices) for axis in SLICE_AXES}
        state.originals = Originals(
            {axis: Stored(torch.tensor([*i]), self._present(axis, tuple(i))) for axis, i in kept.items() if i}
        )
        self._installed = adapter
        with torch.no_grad():
            for axis, trained in values.items():
                index = torch.tensor(region.along(axis), dtype=torch.int64, device=self.matrix.device)
                vectors(self.matrix, axis).index_copy_(0, index, trained.to(self.matrix))
            if bias is not None and self.place.bias is not None:
                state.bias = to_cpu(self.place.bias.detach()).clone()
                self.slicefine_bias[adapter].copy_(bias)
                self.place.bias.copy_(bias)
        self._occupy(adapter, state.schedule.slice_at(step, self.shape))
        if state.schedule.begun(step, self.shape):
            with torch.no_grad():
                self.slicefine_weight[adapter].copy_(master)
            self._write(adapter)
        self._declare(adapter)
        self._settle()

    def delete_adapter(self, adapter_name: str) -> None:
        if self._arrival is not None and self._arrival.adapter == adapter_name:
            self._arrival.end()
        if self._installed == adapter_name:
            self._show(None)
        super().delete_adapter(adapter_name)
        self._settle()

    # ------------------------------------------------------------------ which values the weight holds

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1:
            raise SliceFineError(
                f"One slicefine adapter is active at a time, because each puts its values into the same weights; got {names}. "
                "Activate one, or merge one first and train the next on the merged model."
            )
        self.check_written()
        super().set_adapter(names, inference_mode=inference_mode)
        self._settle()

    def enable_adapters(self, enabled: bool) -> None:
        self.check_written()
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)
        self._settle()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Let the layer work as the plain linear layer it would be after export. The weight holds the values already.

        `safe_merge` changes nothing: values that are not finite are always refused.
        """
        names = check_adapters_to_merge(self, adapter_names)
        if not names:
            return
        if len(names) > 1 or self.merged:
            raise SliceFineError(
                f"One slicefine adapter is merged at a time; got {self.merged_adapters + names}. Unmerge first."
            )
        self.check_written()
        if names[0] not in self.slicefine_weight:
            self._show(None)
            return
        self._show(names[0])
        self.merged_adapters = names

    def unmerge(self) -> None:
        """Back to the adapted, trainable state."""
        self.merged_adapters = []
        self._settle()

    def withdraw(self) -> None:
        """Put the original bytes back into the weight and the bias."""
        self._show(None)

    @contextmanager
    def shown(self, adapter: str | None) -> Iterator[bool]:
        """Within this context the weight holds the values of `adapter`, or the original ones; yields whether it did not before."""
        before = self._installed
        self._show(adapter)
        try:
            yield before != adapter
        finally:
            self._show(before)

    def let_go(self) -> None:
        """Forget the adapter that is installed: the weight keeps its values and is not written to any more."""
        self._installed = None

    def _settle(self) -> None:
        wanted = self.merged_adapters or ([] if self.disable_adapters else self.active_adapters)
        self._show(wanted[0] if wanted and wanted[0] in self.slicefine_weight else None)

    def _show(self, adapter: str | None) -> None:
        """Make the weight and the bias hold the values of `adapter`, or the original ones."""
        self._take_in()
        if adapter == self._installed:
            return
        if self._installed is not None:
            self._exchange(self.slicefine_state[self._installed])
            self._installed = None
        if adapter is not None:
            self._exchange(self.slicefine_state[adapter])
            self._installed = adapter

    def _exchange(self, state: AdapterState) -> None:
        state.cast(self.dtype)  # code that casts base layers one by one passes us by
        state.originals.exchange(self.matrix)
        bias = self.place.bias
        if state.bias is not None and bias is not None:
            present = to_cpu(bias.detach()).clone()
            with torch.no_grad(), unnoticed(bias):
                bias.copy_(state.bias)
            state.bias = present

    # ------------------------------------------------------------------ training

    def trains_now(self) -> bool:
        """Whether a forward pass made now trains the installed adapter.

        Raises `SliceFineError` if the weight does not hold what it must.
        """
        # Parameters come straight out of their dictionaries: going through nn.Module's attributes would take longer than
        # all the rest of a forward pass, in every layer and every step.
        modules: Any = self._modules
        adapter = self._installed
        master = modules["slicefine_weight"]._parameters.get(adapter)
        if master is None:
            if adapter is not None:
                raise SliceFineError(
                    f"{self.name}: this copy of the layer has lost the parameter of adapter {adapter!r}, as replicas of nn.DataParallel do. "
                    "Use DistributedDataParallel, or one device."
                )
            return False
        if not torch.compiler.is_compiling() and not master.is_inference() and master._version != self.followed:
            self.check_written()
        if self.merged_adapters or not torch.is_grad_enabled():
            return False
        bias_master = modules["slicefine_bias"]._parameters.get(adapter)
        if not master.requires_grad and (bias_master is None or not bias_master.requires_grad):
            return False
        state = self.state
        if state.schedule.window is not None:
            guards.refuse_unready_ranks(self)
        return not state.resting

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.begin()
        if not self.trains_now():
            return self.watched(self.base_layer(x, *args, **kwargs))
        modules: Any = self._modules
        adapter: Any = self._installed
        base = modules["base_layer"]
        weight = base._parameters["weight"]
        if weight.requires_grad:
            self.refuse_trained_base()
        if args or kwargs:
            raise SliceFineError(
                f"{self.name}: {type(self).__name__} is called with the input alone while it trains; got {len(args)} more arguments and "
                f"{sorted(kwargs)}. Mixed batches of several adapters are not supported."
            )
        return compute(
            base,
            x,
            weight.t() if self._turned else weight,
            base._parameters.get("bias"),
            modules["slicefine_weight"]._parameters[adapter],
            modules["slicefine_index"]._buffers[adapter],
            self.slicefine_state[adapter].active.axis,
            modules["slicefine_bias"]._parameters.get(adapter),
            None if torch.compiler.is_compiling() else functools.partial(guards.check_shown, self, adapter),
        )

    def begin(self) -> None:
        """Take in what a loader has brought: the weight is about to be used."""
        if self._arrival is not None:
            self._arrival.complete(last=True)

    def watched(self, y: Any) -> Any:
        """The output of a forward pass that trains nothing here; its backward pass must meet the same values."""
        if isinstance(y, tuple | list):
            for part in y:
                self.watched(part)
        elif isinstance(y, Tensor) and y.requires_grad and not torch.compiler.is_compiling():
            y.register_hook(functools.partial(guards.check_shown, self, self._installed))
            guards.warn_of_no_end(self)
        return y

    def refuse_trained_base(self) -> None:
        """Say why `forward` cannot train while the base weight wants a gradient."""
        if type(self.place.stored) is not nn.Parameter:
            raise SliceFineError(
                f"{self.name}: its weight has been made a piece of something larger, as FSDP does, which is not supported yet. Use plain data "
                "parallelism (DDP), or one device."
            )
        raise SliceFineError(
            f"{self.name}: a weight is trained by its slice or as a whole, not both: the base weight of this layer "
            f"({self.out_features} x {self.in_features}) has requires_grad=True. Set it to False, or exclude the layer "
            "with `exclude_modules`."
        )

    def pending_writes(self, adapter: str, stepped: Container[int] | None = None) -> list[tuple[Tensor, Tensor]]:
        """`(destination, source)` pairs that bring what an optimizer did into the weight and the bias.

        `stepped`: identities of the parameters that the optimizer holds; all if None. The adapter must be installed.
        """
        pairs = []
        if stepped is None or id(self.slicefine_weight[adapter]) in stepped:
            pairs += self._copies(adapter)
        bias, held = self.slicefine_bias.get(adapter), self.place.bias
        if bias is not None and held is not None and (stepped is None or id(bias) in stepped):
            pairs.append((held.detach(), bias.detach()))
        return pairs

    def _write(self, adapter: str) -> None:
        """Let the weight and the bias follow the parameters. The adapter must be installed."""
        for destination, source in self.pending_writes(adapter):
            destination.copy_(source)

    def has_followed(self, adapter: str) -> None:
        """Say that what an optimizer did has been written."""
        master = self.slicefine_weight[adapter]
        self.followed = None if master.is_inference() else master._version

    def count_step(self, adapter: str) -> bool:
        """An optimizer step was made; returns whether the slice has to move. One as wide as its weight stays."""
        state = self.slicefine_state[adapter]
        state.step += 1
        state.resting = not state.schedule.active(state.step)
        if state.schedule.moves(state.step) == state.schedule.moves(state.step - 1):
            return False
        return state.schedule.slice_at(state.step, self.shape) != state.active

    def slide(self, adapter: str) -> None:
        """Freeze the active slice with what it has learned and go to where the schedule wants to be."""
        state = self.slicefine_state[adapter]
        self._occupy(adapter, state.schedule.slice_at(state.step, self.shape))

    def _occupy(self, adapter: str, piece: Slice) -> None:
        """Make `piece` the active slice: keep its originals, load the master, point the index at it."""
        self.slicefine_state[adapter].cast(self.dtype)
        self.slicefine_state[adapter].originals.keep(self.matrix, piece)
        self._point_at(adapter, piece)
        with torch.no_grad():
            self.slicefine_weight[adapter].zero_()
            for present, held in self._copies(adapter):
                held.copy_(present)

    def _point_at(self, adapter: str, piece: Slice) -> None:
        self.slicefine_state[adapter].active = piece
        index, buffer = torch.tensor(piece.indices, dtype=torch.int64), self.slicefine_index[adapter]
        if buffer.shape == index.shape:
            buffer.copy_(index)
        else:  # `alternate` on a weight narrower than `r` along one axis
            self.slicefine_index[adapter] = index.to(buffer.device)

    def _declare(self, adapter: str) -> None:
        state = self.slicefine_state[adapter]
        state.resting = not state.schedule.active(state.step)
        start = self.slicefine_state[adapter].start = guards.start_of(self, adapter)
        with torch.inference_mode(False):
            self.slicefine_start[adapter] = torch.tensor([start], device=self.matrix.device)

    def _in_use(self, adapter: str) -> Tensor:
        """The part of the master that holds the active slice, `(width, length)`. A view."""
        active = self.slicefine_state[adapter].active
        return self.slicefine_weight[adapter].detach()[: active.count, : self.shape[1 - active.dim]]

    def _copies(self, adapter: str) -> list[tuple[Tensor, Tensor]]:
        """The active slice in the weight and in the master, in pieces that lie side by side in both. Views."""
        active = self.slicefine_state[adapter].active
        weight, master = vectors(self.matrix.detach(), active.axis), self._in_use(adapter)
        pairs, at = [], 0
        for first, count in active.runs:
            pairs.append((weight[first : first + count], master[at : at + count]))
            at += count
        return pairs

    # ------------------------------------------------------------------ reading

    def region(self, adapter: str) -> Region:
        """The rows and columns that optimizer steps have trained so far."""
        state = self.slicefine_state[adapter]
        return Region.of(state.schedule.touched(state.step, self.shape))

    def trained_values(self, adapter: str, axis: str, indices: tuple[int, ...]) -> Tensor:
        """Current values of touched rows or columns of `adapter`, `(len(indices), length)`, CPU, base dtype."""
        return self._values(adapter, axis, indices, trained=True)

    def original_values(self, adapter: str, axis: str, indices: tuple[int, ...]) -> Tensor:
        """Original values of touched rows or columns of `adapter`, `(len(indices), length)`, CPU, base dtype."""
        return self._values(adapter, axis, indices, trained=False)

    def _values(self, adapter: str, axis: str, indices: tuple[int, ...], *, trained: bool) -> Tensor:
        installed = self._installed == adapter
        if trained != installed and indices:
            self.slicefine_state[adapter].cast(self.dtype)
            return self.slicefine_state[adapter].originals.pick(axis, indices)
        return self._present(axis, indices) if installed else self.base_values(axis, indices)

    def base_values(self, axis: str, indices: tuple[int, ...]) -> Tensor:
        """Rows or columns of the weight as it is without any adapter, `(len(indices), length)`, CPU, base dtype."""
        with self.shown(None):
            return self._present(axis, indices)

    def _present(self, axis: str, indices: tuple[int, ...]) -> Tensor:
        return present_values(self.matrix, axis, indices)

    def _apply(self, fn, recurse=True):
        before = self.dtype
        applied = super()._apply(fn, recurse)
        if self.dtype == before:
            return applied
        for state in self.slicefine_state.values():
            state.cast(self.dtype)
        for adapter in self.slicefine_state:
            with self.shown(adapter):
                self._write(adapter)
        return applied

    # ------------------------------------------------------------------ state_dict() and load_state_dict()

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for adapter in self.slicefine_state:
            if self._arrival is not None and self._arrival.adapter == adapter:
                continue  # what is still to come has no state, and a loader would report it as missing
            destination.update({prefix + key: tensor for key, tensor in self.state_tensors(adapter).items()})

    def state_tensors(self, adapter: str) -> dict[str, Tensor]:
        """What a state dict holds of an adapter beside its parameters: step, originals, and whether it is installed."""
        tensors = {"installed": torch.tensor(adapter == self._installed)} | self.slicefine_state[adapter].tensors()
        return {f"slicefine_index.{adapter}.{name}": tensor for name, tensor in tensors.items()}

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs):
        """Positions and originals first; weight and masters are children and are loaded after this."""
        weight = prefix + self.weight_key
        own = f"{prefix}slicefine_index."  # under a child's name, by which PEFT tells what is not the base model's
        given = {key.removeprefix(own): state_dict.pop(key) for key in list(state_dict) if key.startswith(own)}
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self._other_base = not given and weight in state_dict
        problems = guards.state_problems(self, given, state_dict.get(weight))
        if problems:
            error_msgs += [f"{prefix.removesuffix('.')}: {problem}" for problem in problems]
            state_dict.pop(weight, None)
            return
        unexpected_keys += [own + key for key in given if key.rpartition(".")[0] not in self.slicefine_state]
        for adapter, state in self.slicefine_state.items():
            parts = {k.rpartition(".")[2]: tensor for k, tensor in given.items() if k.rpartition(".")[0] == adapter}
            if "step" not in parts:
                if strict:
                    missing_keys.append(f"{own}{adapter}.step")
                continue
            if bool(parts["installed"]):
                self._installed = adapter
            elif self._installed == adapter:
                self._installed = None
            state.restore(parts, self.dtype)
            self._point_at(adapter, state.schedule.slice_at(state.step, self.shape))
            self._declare(adapter)

    def _begin_on_another_base(self) -> None:
        """Let slices that have trained nothing begin with what a state dict has brought."""
        if not self._other_base:
            return
        self._other_base = False
        for adapter, state in self.slicefine_state.items():
            if state.schedule.own(state.step):
                continue
            state.originals = Originals()
            self._occupy(adapter, state.active)
            bias = self.place.bias
            if state.bias is not None and bias is not None:
                state.bias = to_cpu(bias.detach()).clone()
                self.slicefine_bias[adapter].detach().copy_(bias.detach())

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move, but never cast: masters are fp32 whatever the base is."""
        target = device if device is not None else self.matrix.device
        for parameters in (self.slicefine_weight, self.slicefine_bias):
            if adapter_name in parameters:
                parameters[adapter_name].data = parameters[adapter_name].data.to(target)
        for buffers in (self.slicefine_index, self.slicefine_start):
            if adapter_name in buffers:
                buffers[adapter_name] = buffers[adapter_name].to(target)

    def __repr__(self) -> str:
        return "slicefine." + super().__repr__()


class SliceLinear(SliceLayer):
    """A linear base layer. PEFT's "all-linear" knows tuner layers around linear ones by the name of their class."""


def layers_around(module: nn.Module) -> Iterator[SliceLayer]:
    """`module` and those within, as long as they are tuner layers: several parameters of one module have a layer each."""
    while isinstance(module, SliceLayer):
        yield module
        module = module.base_layer


def slice_layers(model: nn.Module, adapter_name: str | None = None) -> dict[str, SliceLayer]:
    """The tuner layers of `model` by name; those that have `adapter_name`, if it is given."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SliceLayer) and (adapter_name is None or adapter_name in module.slicefine_weight)
    }
