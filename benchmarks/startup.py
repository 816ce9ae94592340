"""Start-up: wall time of `slicefine --help`, and of importing slicefine after torch and peft.

Run `python benchmarks/startup.py`; takes about a minute. Every sample is a fresh process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from _common import Figure, Table, cores, cpu_model, parser, positive, provenance, spread, write

INTRO = """\
Every sample is a fresh process; untimed ones come first, so files are compiled and in the system's cache. `import \
slicefine` loads its public names on first use: the second figure of an import is what a user's script pays, and counts \
from the same start."""

HELP = "`slicefine --help`, wall time"
IMPORT = "`import slicefine`, after torch and peft"
FIRST_USE = "`import slicefine; slicefine.SliceFineConfig`, after torch and peft"
LIMITS = {HELP: 0.5, IMPORT: 0.1, FIRST_USE: None}

TIMED_IMPORT = """
import json, time
import torch, peft
start = time.perf_counter()
import slicefine
imported = time.perf_counter()
slicefine.SliceFineConfig
print(json.dumps([imported - start, time.perf_counter() - start]))
"""


def help_seconds() -> float:
    """Wall time of `slicefine --help`, from start to exit."""
    command = Path(sys.executable).with_name("slicefine")
    start = time.perf_counter()
    subprocess.run([command, "--help"], check=True, capture_output=True)
    return time.perf_counter() - start


def import_seconds() -> tuple[float, float]:
    """Seconds of `import slicefine`, and of it with the first use of a public name, torch and peft being there."""
    done = subprocess.run([sys.executable, "-c", TIMED_IMPORT], check=True, capture_output=True, text=True)
    imported, used = json.loads(done.stdout)
    return imported, used


def measure(repeats: int) -> dict[str, list[float]]:
    """Seconds of every sample, by figure."""
    help_seconds()
    import_seconds()
    imports = [import_seconds() for _ in range(repeats)]
    return {
        HELP: [help_seconds() for _ in range(repeats)],
        IMPORT: [imported for imported, _ in imports],
        FIRST_USE: [used for _, used in imports],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--repeats", type=positive, default=7, help="processes a figure; the median counts")
    options = made.parse_args(arguments)
    made_by = provenance(
        ["benchmarks/startup.py", *(sys.argv[1:] if arguments is None else arguments)],
        threads=cores(),
        seed=options.seed,
    )
    seconds = measure(options.repeats)
    figures = []
    for name, samples in seconds.items():
        median, low, high = spread(samples)
        figures.append(Figure(name=name, value=median, low=low, high=high, unit="s", at_most=LIMITS[name]))
    rows = [
        {"figure": name, **{f"sample {number}": 1e3 * value for number, value in enumerate(samples, 1)}}
        for name, samples in seconds.items()
    ]
    write(
        options.output,
        theme="startup",
        hardware=cpu_model(),
        intro=INTRO,
        figures=figures,
        tables=[Table(title="Every sample, ms", rows=rows)],
        made_by=made_by,
    )


if __name__ == "__main__":
    main()
