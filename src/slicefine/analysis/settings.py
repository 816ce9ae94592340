"""What `slicefine analyze` is told. Read and checked without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slicefine.errors import did_you_mean, raise_all

BALANCE, ENERGY, WINNERS, GLOBAL, ADVICE = "balance", "energy", "winners", "global", "advice"
STAGES = (BALANCE, ENERGY, WINNERS, GLOBAL, ADVICE)
"""In the order in which they run; each but the first needs examples."""


@dataclass(frozen=True, kw_only=True)
class AnalysisSettings:
    """How a model is analysed. Raises `SliceFineError` that lists all problems at once."""

    output: str = "runs/analysis"
    """Folder for analysis.json and the report."""
    stages: tuple[str, ...] = STAGES
    """Those to run, whatever order they are given in."""
    quick: bool = False
    """Fewer examples, slices and steps in every stage: a first look."""
    untrained: bool = False
    """Analyse a twin of the model with random weights, for which the hypothesis should fail."""
    groups: int = 8
    """Groups of rows, and of columns, that a weight is cut into for its spectral balance."""
    draws: int = 3
    """Random draws of each null of the spectral balance."""
    ranks: tuple[int, ...] = (1, 5, 16)
    """Ranks of the slices that are tried."""
    seed: int = 0
    """Seed of examples, slices, null draws, new heads and the twin."""

    def __post_init__(self) -> None:
        found = [
            f"`--stages` are of {', '.join(STAGES)}; got {name!r}.{did_you_mean(name, STAGES)}"
            for name in self.stages
            if name not in STAGES
        ]
        if not self.stages:
            found.append(f"`--stages` names at least one of {', '.join(STAGES)}.")
        for name, least in (("groups", 2), ("draws", 1), ("seed", 0)):
            value = getattr(self, name)
            if value < least:
                found.append(f"`--{name}` is at least {least}; got {value}.")
        if self.seed >= 2**32:
            found.append(f"`--seed` is below 2**32; got {self.seed}.")
        found += [f"`--ranks` are at least 1; got {rank}." for rank in self.ranks if rank < 1]
        if len(set(self.ranks)) < len(self.ranks) or not self.ranks:
            found.append(f"`--ranks` names at least one rank, and each once; got {list(self.ranks)}.")
        if Path(self.output).is_file():
            found.append(f"`--output` is a folder; {self.output} is a file.")
        raise_all(found, "slicefine analyze")
        object.__setattr__(self, "stages", tuple(stage for stage in STAGES if stage in self.stages))
