"""The fine-tuning methods by name: ours, the paper's baselines, and controls. Names follow the paper's poster. Read without torch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from slicefine.errors import SliceFineError, did_you_mean
from slicefine.slicing import ALTERNATE, COLUMN, COUPLED, ROW

FROZEN, FULL, HEAD_ONLY = "frozen-limit", "full", "head-only"
SLICEFINE, ROCOFT = "SliceFine", "RoCoFT"
LORA, ADALORA, VERA, PREFIX, HRA, SHIRA = "LoRA", "AdaLoRA", "VeRA", "prefix", "HRA", "SHiRA"
RANDOM_MASK, BLOCK_MASK = MASKS = ("random-mask", "block-mask")
SPLIT_ROWS, SPLIT_COLUMNS = "split-rows", "split-columns"
AXES = {"R": ROW, "C": COLUMN, "RC": ALTERNATE, "S": COUPLED}
"""Letters in a name -> axis. S: the same hidden features on both sides; the others are the paper's."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A way to fine-tune a model, and how it is set where nothing else is asked for."""

    title: str
    r: int | None = None
    """Rank; None = it has none."""
    settings: str
    """The settings other than the rank, in words."""
    source: str
    """Where rank and settings come from."""
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    """The grid that it chooses from where no other is given; of one length for all, around what is usual for it."""
    speed_only: bool = False
    """Whether it is there to be timed, and not to be trained."""


FINER = (5e-4, 1e-3, 2e-3, 4e-3)
"""Learning rates of slices and of LoRA, in steps of two (steps of three decide by luck)."""
HIGHER = (1e-3, 3e-3, 1e-2, 3e-2)
"""Learning rates of methods that train few numbers, or numbers that begin at zero."""
KINDS = {
    FROZEN: Kind(
        title="no trainable weight; gradients flow through all activations",
        settings="the input of the first block wants a gradient; no optimizer",
        source="the lower limit of a step that propagates through all layers",
        speed_only=True,
    ),
    FULL: Kind(
        title="every weight",
        settings="weights and moments in the dtype of the model",
        source="usual",
        learning_rates=(3e-5, 1e-4, 3e-4, 1e-3),
    ),
    HEAD_ONLY: Kind(
        title="the new head alone", settings="in full", source="usual", learning_rates=(1e-2, 3e-2, 1e-1, 3e-1)
    ),
    SLICEFINE: Kind(
        title="a sliding slice of every weight: rows (R), columns (C), in turn (RC), or coupled (S)",
        r=5,
        settings="a move every 500 steps, adjacent positions",
        source="poster: rank 1 or 5, N of about 500 steps",
        learning_rates=FINER,
    ),
    ROCOFT: Kind(
        title="the first rows (R) or columns (C) of every weight, which do not slide",
        r=5,
        settings="rows; a slice of SliceFine without moves",
        source="poster: as many parameters as SliceFine-5R (6.90 M and 6.89 M)",
        learning_rates=FINER,
    ),
    LORA: Kind(
        title="low-rank updates",
        r=8,
        settings="lora_alpha = 2 r, no dropout",
        source="r: PEFT's default; the rest: PEFT's comparison on MetaMathQA, LLM-Adapters (without their dropout of 0.05)",
        learning_rates=FINER,
    ),
    ADALORA: Kind(
        title="low-rank updates with a budget of ranks",
        r=8,
        settings="target_r = r, init_r = 1.5 r, lora_alpha 8, orth_reg_weight 0.5; ranks are cut from 4 % of the steps to the last 10 %",
        source="PEFT's defaults; the steps: PEFT's comparison on MetaMathQA",
        learning_rates=HIGHER,
    ),
    VERA: Kind(
        title="vectors that scale frozen random projections",
        r=256,
        settings="d_initial 0.1, one pair of projections for all layers",
        source="PEFT's defaults",
        learning_rates=(3e-3, 1e-2, 3e-2, 1e-1),
    ),
    PREFIX: Kind(
        title="keys and values before those of the input; r is their number",
        r=30,
        settings="no projection",
        source="LLM-Adapters",
        learning_rates=HIGHER,
    ),
    HRA: Kind(
        title="Householder reflections",
        r=8,
        settings="no orthogonalization; r is even, as its start needs",
        source="PEFT's defaults",
    ),
    SHIRA: Kind(
        title="single weights at random places",
        r=32,
        settings="as many as LoRA of rank r has, mask `random`",
        source="PEFT's defaults",
    ),
    RANDOM_MASK: Kind(
        title="single weights at random places, by masking the gradient of the whole weight",
        r=5,
        settings="as many in every weight as r rows have; gradient and moments of the whole weight, in the dtype of the model",
        source="poster: random masks match in accuracy, and are slow",
        learning_rates=HIGHER,
    ),
    BLOCK_MASK: Kind(
        title="blocks along the diagonal of every weight, by masking the gradient of the whole weight",
        r=4,
        settings="r wide along the shorter side; gradient and moments of the whole weight, in the dtype of the model",
        source="ours: as dense as a slice, and in every row and column as random places are; r = 4 has about as many weights as SliceFine-5R",
        learning_rates=HIGHER,
    ),
    SPLIT_ROWS: Kind(
        title="the weight cut in three by rows, their outputs concatenated",
        r=5,
        settings="the slice in the middle; it does not move",
        source="how public codes of SliceFine do it",
        speed_only=True,
    ),
    SPLIT_COLUMNS: Kind(
        title="the weight cut in three by columns, their outputs summed",
        r=5,
        settings="the slice in the middle; it does not move",
        source="how public codes of SliceFine do it",
        speed_only=True,
    ),
}
"""Name of a kind -> kind, in the order of tables."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A kind of fine-tuning with its rank and axis."""

    kind: str
    r: int | None = None
    axis: str | None = None
    """`row`, `column`, `alternate` or `coupled` where the method has slices."""
    window: int | None = None
    """Turns of a depth window, whose lowest blocks lie evenly over the depth; None = all blocks are trained at every step."""
    named: bool = field(default=False, compare=False)
    """Whether its name gave the rank: `LoRA-r8` and `LoRA` are the same method, but only the rank of the second may be chosen."""

    @property
    def name(self) -> str:
        """As in the paper's tables; `method(name)` gives the method back."""
        if self.kind in (SLICEFINE, ROCOFT):
            letters = next(letters for letters, axis in AXES.items() if axis == self.axis)
            return f"{self.kind}-{self.r}{letters}" + (f"-w{self.window}" if self.window else "")
        if self.r is None or (self.kind != LORA and self.r == KINDS[self.kind].r):
            return self.kind
        return f"{self.kind}-r{self.r}"

    @property
    def turns(self) -> int:
        """Steps after which it does the same work again."""
        return self.window or 1

    @property
    def family(self) -> str:
        """The method without its rank: what a sweep over ranks draws one line for."""
        if self.kind not in (SLICEFINE, ROCOFT):
            return self.kind
        return f"{self.kind}-{self.axis}" + (f"-w{self.window}" if self.window else "")

    @property
    def speed_only(self) -> bool:
        """Whether it is there to be timed, and not to be trained."""
        return KINDS[self.kind].speed_only

    @property
    def has_size(self) -> bool:
        """Whether it trains anything beside a new head."""
        return self.kind not in (FROZEN, HEAD_ONLY)

    @property
    def has_slices(self) -> bool:
        """Whether it is slicefine's own tuner."""
        return self.kind in (SLICEFINE, ROCOFT)

    @property
    def sizable(self) -> bool:
        """Whether its rank may be chosen for a number of parameters; where the rank is in the name of the method, it may not."""
        return self.kind in (LORA, ADALORA, VERA, PREFIX, HRA, SHIRA, *MASKS) and not self.named

    def of_rank(self, r: int) -> Method:
        """The method with rank `r`; itself if it has none. HRA takes even ranks: an odd one is rounded up."""
        if self.r is None:
            return self
        return dataclasses.replace(self, r=r + r % 2 if self.kind == HRA else r)


METHODS = (
    FROZEN, FULL, HEAD_ONLY,
    *(f"{SLICEFINE}-{r}{letters}" for r in (1, 5) for letters in ("R", "C", "RC")),
    f"{ROCOFT}-5R", LORA, ADALORA, VERA, PREFIX, HRA, SHIRA, *MASKS, SPLIT_ROWS, SPLIT_COLUMNS,
)  # fmt: skip
"""Names of the methods that are compared where nothing else is asked for."""
REFERENCE = f"{LORA}-r{KINDS[LORA].r}"
"""What others are compared with."""
PATTERNS = "SliceFine-<r>R, <r>C, <r>RC or <r>S (coupled), with -w<n> a depth window of n turns, RoCoFT-<r>R or <r>C, and any other that has a rank as <name>-r<r>"


def method(name: str) -> Method:
    """The method called `name`, whatever the case of its letters. Raises `SliceFineError` if there is none."""
    kinds = {kind.lower(): kind for kind in KINDS}
    sliced = re.fullmatch(r"(slicefine|rocoft)-([1-9]\d*)(r|c|rc|s)(?:-w([2-9]|[1-9]\d+))?", name.lower())
    if sliced and (sliced[1] == "slicefine" or (sliced[3] in ("r", "c") and not sliced[4])):
        window = int(sliced[4]) if sliced[4] else None
        return Method(kind=kinds[sliced[1]], r=int(sliced[2]), axis=AXES[sliced[3].upper()], window=window)
    if name.lower() == "rocoft":
        return Method(kind=ROCOFT, r=KINDS[ROCOFT].r, axis=ROW)
    found = re.fullmatch(r"(.+?)(?:-r([1-9]\d*))?", name.lower())
    kind = kinds.get(found[1]) if found else None
    if found is None or kind in (None, SLICEFINE, ROCOFT) or (found[2] and KINDS[kind].r is None):
        near = did_you_mean(name, [*METHODS, REFERENCE, *_with_ending_of(name)])
        raise SliceFineError(f"There is no method {name!r}; there are {', '.join(METHODS)}; also {PATTERNS}.{near}")
    if kind == HRA and found[2] and int(found[2]) % 2:
        raise SliceFineError(f"HRA takes even ranks, which its start needs; got {name!r}.")
    return Method(kind=kind, r=int(found[2]) if found[2] else KINDS[kind].r, named=bool(found[2]))


def sizeless(equal_parameters: str | None) -> list[str]:
    """What is wrong with `--equal_parameters`, where it names a method that is known."""
    if equal_parameters is None or method(equal_parameters).has_size:
        return []
    return [
        f"`--equal_parameters` names a method that trains weights beside a new head; {equal_parameters} trains none."
    ]


def too_few(rounds: int, methods: Iterable[Method]) -> list[str]:
    """What is wrong with `--rounds`, of which depth windows need as many as they have turns."""
    return [
        f"`--rounds` is at least {one.turns}, the turns of {one.name}, each of which is other work; got {rounds}."
        for one in methods
        if one.window and rounds < one.turns
    ]


def _with_ending_of(name: str) -> list[str]:
    """Methods whose name has the rank that `name` ends with: `SliceFine-4S` for `SliceFin-4S`."""
    ending = name.partition("-")[2].upper()
    return [f"{SLICEFINE}-{ending}"] if re.fullmatch(r"[1-9]\d*(R|C|RC|S)", ending) else []
