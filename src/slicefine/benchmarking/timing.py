"""Seconds of several things, measured so that the ratios between them can be trusted.

Together: all are built before the clock starts and stay alive; a round runs each of them once on the same batch, in an order that is
shuffled anew for every round. A machine that grows warm, or a neighbour that takes its time, slows all alike, and none always
follows the same one. Freed memory stays with the process, so none pays for what another left behind.

In turns, where they do not fit into memory together: each in turn is alone in memory, built, warmed up and run for half of the rounds;
then for the other half in the reverse order. Whatever changes steadily over the run slows all alike.

Either way everything happens in one process, and Python's garbage collector runs between measurements only.
"""

from __future__ import annotations

import ctypes
import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import psutil
import torch
from peft.tuners import shira
from tqdm import tqdm

from slicefine.errors import SliceFineError

Run = Callable[[int], float]
"""Runs once, on the batch of a round; returns its seconds."""
Build = Callable[[], Run]

TOGETHER, IN_TURNS = "together", "in turns"
OUT_OF_MEMORY = "out of memory"
GIB = 2**30


@dataclass(kw_only=True)
class Measured:
    """Seconds of every timed run by name, and why there are none."""

    arrangement: str
    """`together` or `in turns`."""
    rounds: int
    """Timed rounds that were asked for."""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Entry number i is from round i."""
    failed: dict[str, str] = field(default_factory=dict)
    """Name -> reason."""
    interrupted: bool = False

    def cycles(self, name: str, turns: int) -> list[float]:
        """Seconds of `name`; of what does different work in each of `turns` rounds, the means over whole cycles of them.

        The median of single rounds would be that of one turn, and so would the mean of a cycle that was not finished.
        """
        rounds = self.seconds.get(name, [])
        # In turns everything is built twice, and begins anew.
        parts = [rounds[part.start : part.stop] for part in _parts(self.rounds, self.arrangement)]
        return [
            statistics.fmean(part[start : start + turns])
            for part in parts
            for start in range(0, len(part) - turns + 1, turns)
        ]

    def ratios(self, name: str, of: str, turns: int) -> list[float]:
        """Seconds of `name` over those of `of` on the same batches: round by round, or cycle by cycle."""
        return [a / b for a, b in zip(self.cycles(name, turns), self.cycles(of, turns), strict=False)]

    def reason(self, name: str) -> str:
        """Why there are no seconds of whole cycles."""
        return self.failed.get(name, "interrupted")


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Ratio of two medians, with the least and greatest ratio within one round."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, above: Sequence[float], below: Sequence[float]) -> Ratio:
        """`above / below`, entry by entry from the same rounds."""
        within = [a / b for a, b in zip(above, below, strict=False)]
        return cls(value=statistics.median(above) / statistics.median(below), low=min(within), high=max(within))


def seconds_of(run: Callable[[], object], device: str) -> float:
    """Seconds of `run()`, the work that it leaves to a GPU included."""
    wait = torch.cuda.synchronize if device == "cuda" else _nothing
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def measure(
    builds: Mapping[str, Build],
    *,
    rounds: int,
    warmup: int,
    seed: int,
    together: bool,
    title: str,
    turns: Mapping[str, int] | None = None,
) -> Measured:
    """Build and run everything; what fails is left out with its reason, and does not keep the others from being measured.

    Ctrl-C ends it, and what was measured is kept: of the runs together, whole rounds.

    Args:
        title: What the progress bar says.
        turns: Of those that do different work in each of so many rounds, which all have to fit in what is built once.
    """
    measured = Measured(arrangement=TOGETHER if together else IN_TURNS, rounds=rounds)
    parts = _parts(rounds, measured.arrangement)
    for name, cycle in (turns or {}).items():
        if cycle > len(parts[0]):
            least = cycle if together else 2 * cycle - 1
            measured.failed[name] = f"{cycle} turns, measured {measured.arrangement}, take `--rounds {least}` or more"
    steps = sum((len(part) + warmup) * len(builds) for part in parts)
    collecting = gc.isenabled()
    gc.disable()
    gc.freeze()  # what is there stays: looking through all of it would take longer than a step
    with tqdm(total=steps, desc=title, unit="step", leave=False) as bar:
        try:
            for place, part in enumerate(parts):
                names = list(builds)[:: -1 if place else 1]
                for at_once in [names] if together else [[name] for name in names]:
                    _run(measured, builds, at_once, rounds=part, warmup=warmup, seed=seed, bar=bar)
        except KeyboardInterrupt:
            measured.interrupted = True
        finally:
            gc.unfreeze()
            if collecting:
                gc.enable()
    if together and measured.interrupted:
        whole = min(map(len, measured.seconds.values()), default=0)
        measured.seconds = {name: seconds[:whole] for name, seconds in measured.seconds.items() if whole}
    return measured


def _parts(rounds: int, arrangement: str) -> list[range]:
    """The rounds that what is built once runs through."""
    half = rounds if arrangement == TOGETHER else rounds - rounds // 2
    return [part for part in (range(half), range(half, rounds)) if part]


def _run(
    measured: Measured,
    builds: Mapping[str, Build],
    names: Sequence[str],
    *,
    rounds: range,
    warmup: int,
    seed: int,
    bar: tqdm,
) -> None:
    shuffler = random.Random(seed)
    runs: dict[str, Run] = {}

    def attempt(name: str, made: Callable[[], float | None]) -> float | None:
        try:
            return made()
        except Exception as error:  # a method that fails in any way is a row with the reason
            measured.failed[name] = reason(error)
        runs.pop(name, None)
        measured.seconds.pop(name, None)
        return None

    for name in names:
        if name not in measured.failed:
            gc.collect()  # what failed before
            attempt(name, lambda name=name: runs.update({name: builds[name]()}))
    if len(names) > 1:
        gc.freeze()
    for number in [*range(-warmup, 0), *rounds]:
        for name in shuffler.sample(sorted(runs), len(runs)):
            gc.collect()
            seconds = attempt(name, partial(runs[name], number + warmup))
            if seconds is None:
                gc.unfreeze()
                gc.collect()
                gc.freeze()
            elif number >= 0:
                measured.seconds.setdefault(name, []).append(seconds)
            bar.update()
    runs.clear()
    if len(names) > 1:
        gc.unfreeze()
    release()


def reason(error: Exception) -> str:
    """Why something could not be measured, in a line."""
    if out_of_memory(error):
        return OUT_OF_MEMORY
    text = str(error).strip().splitlines()
    first = text[0] if text else ""
    return first if isinstance(error, SliceFineError) else f"{type(error).__name__}: {first}"


def out_of_memory(error: Exception) -> bool:
    """Whether memory, of a GPU or of the host, was too small."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def release() -> None:
    """Give back what is not in use any more."""
    # PEFT's SHiRA remembers every layer that it ever called, and so its weight (peft 0.21.2).
    remembered: Any = getattr(shira.layer, "_warn_once_about_module_hooks", None)
    if hasattr(remembered, "cache_clear"):
        remembered.cache_clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_bytes(device: str) -> int:
    """Memory that nothing uses. On a CPU with what this process has: freed memory stays with it."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available + psutil.Process().memory_info().rss


def refuse_too_large(need: int, device: str) -> None:
    """Raise `SliceFineError` if there are not `need` bytes of free memory.

    For a CPU, where the system ends a process that takes too much, and with it what was measured before; a GPU says so itself.
    """
    free = free_bytes(device)
    if need > free:
        raise SliceFineError(
            f"out of memory: it takes {need / GIB:.1f} GiB at least, and {free / GIB:.1f} GiB are free"
        )


def keep_freed_memory() -> bool:
    """Let the C library keep memory that is freed, instead of returning it to the system; False if it is not glibc.

    glibc returns large blocks depending on what else is on its heap, and getting them back costs a page fault for every
    4 KiB: with several models in one process, one of them pays for what its neighbour left behind. So does a heap that grows, as it
    does for long where blocks have many sizes: it grows beforehand.
    """
    trim_threshold, mmap_max = -1, -4  # names of the options, from malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    kept = mallopt is not None and bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))
    if kept:
        torch.zeros(min(GIB, free_bytes("cpu") // 4), dtype=torch.uint8)  # freed at once, and kept
    return kept


def _nothing() -> None:
    pass
