"""What `slicefine bench speed` and `slicefine bench memory` are told. Read and checked without torch."""

from __future__ import annotations

from dataclasses import dataclass

from slicefine.benchmarking.methods import FROZEN, METHODS, REFERENCE, Method, method, sizeless
from slicefine.benchmarking.models import MODELS, SMALL, Architecture, architecture
from slicefine.errors import SliceFineError, did_you_mean, raise_all

REFERENCES = (FROZEN, REFERENCE)
"""Methods that all others are compared with: measured whether they are asked for or not."""
DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("cpu", "cuda")
RANK = "r"
SWEEPS = (RANK, "length", "width", "depth", "batch")
RANKS = (1, 2, 4, 8, 16, 32, 64)
FACTORS = (0.5, 1, 2)
"""Sizes that a sweep visits where none are given, as shares of the model's own."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Raises `SliceFineError` that lists all problems at once. None: what fits the device is chosen when it is known."""

    models: tuple[str, ...] | None = None
    """Names of architectures; None = the small versions on a CPU, the full ones on a GPU."""
    methods: tuple[str, ...] = METHODS
    rounds: int = 9
    """Timed rounds; a round is one step of every method."""
    warmup: int = 2
    """Untimed rounds before."""
    threads: int | None = None
    """CPU threads; None = as torch has it."""
    device: str | None = None
    """cpu or cuda; None = a GPU if there is one."""
    dtype: str | None = None
    """None = float32 on a CPU, bfloat16 on a GPU."""
    checkpointing: bool = False
    """Keep the activations of block ends alone, and compute the others again in the backward pass."""
    compile: bool = False
    """Run models through torch.compile."""
    sweep: str | None = None
    """One of `SWEEPS`: measure at several values of it."""
    values: tuple[int, ...] | None = None
    """Values of the sweep; None = 1 to 64 for r, half to twice the model's own for all else."""
    equal_parameters: str | None = None
    """A method: the ranks of those that may have any are chosen so that they train nearest to as many parameters."""
    generate: int = 32
    """Tokens that language models generate when inference is timed; 0 = none."""
    seed: int = 0
    """Seed of weights, data and order."""
    output: str = "runs/bench"
    """Folder for the results."""

    def __post_init__(self) -> None:
        problems = []
        for name, least in (("rounds", 1), ("warmup", 1), ("generate", 0), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                problems.append(f"`--{name}` is at least {least}; got {value}.")
        known = {"device": DEVICES, "dtype": DTYPES, "sweep": SWEEPS}
        for name, choices in known.items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                problems.append(
                    f"`--{name}` is one of {', '.join(choices)}; got {value!r}.{did_you_mean(value, choices)}"
                )
        problems += (unknown := self._unknown())
        if not unknown:
            problems += sizeless(self.equal_parameters)
        if self.values is not None and self.sweep is None:
            problems.append("`--values` are those of a sweep; name it with `--sweep`.")
        if self.sweep == RANK and self.equal_parameters is not None:
            problems.append("`--equal_parameters` chooses ranks, and so does `--sweep r`. Give one of them.")
        problems += [f"`--values` are at least 1; got {value}." for value in self.values or () if value < 1]
        raise_all(problems, "slicefine bench")

    def _unknown(self) -> list[str]:
        problems = []
        for read, names in (
            (architecture, self.models if self.models is not None else SMALL),
            (method, (*self.methods, *([self.equal_parameters] if self.equal_parameters else []))),
        ):
            if not names:
                problems.append("`--models` and `--methods` name at least one.")
            for name in names:
                try:
                    read(name)
                except SliceFineError as error:
                    problems.append(str(error))
        return problems

    def compared(self) -> list[Method]:
        """The methods, and those that the others are compared with; with every rank of a sweep over ranks."""
        asked = [method(name) for name in self.methods]
        if self.sweep == RANK:
            asked = [one.of_rank(r) for one in asked for r in self.values or RANKS]
        return [*(one for one in map(method, REFERENCES) if one not in asked), *asked]

    def architectures(self, gpu: bool) -> list[Architecture]:
        """The architectures, with every size of a sweep over sizes. Raises `SliceFineError` where one has no such size."""
        default = tuple(name for name in MODELS if name not in SMALL) if gpu else SMALL
        named = [architecture(name) for name in dict.fromkeys(self.models or default)]
        if self.sweep in (None, RANK):
            return named
        found, problems = [], []
        for one in named:
            own, unit = one.dimension(self.sweep), one.unit(self.sweep)
            for value in self.values or [max(unit, int(own * factor) // unit * unit) for factor in FACTORS]:
                try:
                    found.append(one.resized(self.sweep, value))
                except SliceFineError as error:
                    problems.append(str(error))
        raise_all(problems, f"`--sweep {self.sweep}`")
        return found
