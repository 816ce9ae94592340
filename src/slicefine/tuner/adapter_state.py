"""What a layer holds of one adapter: its parameters, and what it knows beside them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slicefine.slicing import SLICE_AXES, Schedule, Slice
from slicefine.tuner.originals import Originals, Stored, to_cpu


@dataclass
class AdapterState:
    """What a layer knows of one adapter beside its parameters."""

    schedule: Schedule
    active: Slice
    """The slice that the next optimizer step trains."""
    step: int = 0
    """Optimizer steps of the adapter; the schedule says which of them have trained this layer."""
    resting: bool = False
    """Whether the next optimizer step leaves this layer alone."""
    originals: Originals = field(default_factory=Originals)
    """The other version of the covered rows and columns."""
    start: int = 0
    """What all ranks of a distributed run must start with alike, in one number; see `guards.py`."""
    bias: Tensor | None = None
    """The other version of the bias, `(d_out,)`, CPU, base dtype; None if it is not trained."""

    def cast(self, dtype: torch.dtype) -> None:
        """Follow the weight to another dtype."""
        if self.originals.dtype in (None, dtype):
            return
        self.originals.cast(dtype)
        self.bias = None if self.bias is None else self.bias.to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        """What a state dict holds of this, by name; `restore` takes it back."""
        schedule = torch.tensor([*str(self.schedule).encode()], dtype=torch.uint8)
        tensors = {"step": torch.tensor(self.step), "schedule": schedule}
        for axis, (index, values) in self.originals.stored().items():
            tensors |= {f"{axis}_index": index, axis: values}
        return tensors if self.bias is None else tensors | {"bias": self.bias}

    def restore(self, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Become what `tensors` say; the active slice is left to the caller."""
        self.step = int(tensors["step"])
        self.originals = Originals(
            {
                axis: Stored(to_cpu(tensors[f"{axis}_index"]).clone(), to_cpu(tensors[axis]).to(dtype, copy=True))
                for axis in SLICE_AXES
                if axis in tensors
            }
        )
        if self.bias is not None and "bias" in tensors:
            self.bias = to_cpu(tensors["bias"]).to(dtype, copy=True)


class MasterDict(nn.ParameterDict):
    """Parameters that stay at least fp32 when the model is cast: the optimizer's updates would drown in bf16."""

    # nn.ParameterDict's own go through nn.Module's attributes; the optimizer hook asks for every layer at every step.
    def __getitem__(self, name: str) -> nn.Parameter:
        return self._parameters[name]  # pyright: ignore[reportReturnType] -- none of them is None

    def __contains__(self, name: object) -> bool:
        return name in self._parameters

    def get(self, name: str, default: Any = None) -> Any:
        return self._parameters.get(name, default)

    def items(self) -> Any:
        return self._parameters.items()

    def place(self, name: str, values: Tensor) -> None:
        """Add a parameter, on the device of `values` also where new parameters are being diverted to the meta device.

        PEFT does that for `low_cpu_mem_usage`; it would gain nothing here, and lose the values.
        """
        parameter = nn.Parameter(values)
        self[name] = parameter
        self._parameters[name] = parameter

    def _apply(self, fn, recurse=True):
        def keep_wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrowed = tensor.is_floating_point() and moved.dtype.itemsize < min(4, tensor.dtype.itemsize)
            return tensor.to(moved.device) if narrowed else moved

        return super()._apply(keep_wide, recurse)
