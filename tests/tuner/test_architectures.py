"""What works on common architectures, and what does not: tiny random models, bit by bit.

`docs/architectures.md` is what was found here. Where that has changed on purpose:

    WRITE_DOCS=1 python -m pytest tests/tuner/test_architectures.py
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from architectures import ARCHITECTURES
from examination import ALL_LINEAR, COLUMNS, SLIDE_EVERY, STEPS, Case, Cell, Found, examine

DOCS = Path(__file__).parents[2] / "docs" / "architectures.md"


def modules(*names: str, **settings: Any) -> dict[str, Any]:
    return {"target_modules": list(names)} | settings


def parameters(*names: str, **settings: Any) -> dict[str, Any]:
    return {"target_modules": None, "target_parameters": list(names)} | settings


HEAD = {"export lora": "different"}
NO_LORA = {"export lora": "refused"}
TASKLESS = {"export merged": "refused", "export lora": "refused"}
REFUSED = dict.fromkeys(COLUMNS, "") | {"attach": "refused"}
EXPERTS = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
CASES = [
    Case("Llama"),
    Case("Mistral"),
    Case("Qwen3"),
    Case("Qwen3-MoE", otherwise={"attach": "warned"}),
    Case("Gemma 3"),
    Case("Phi"),
    Case("GPT-2"),
    Case("Mamba", otherwise=NO_LORA),
    Case("T5"),
    Case("BERT", otherwise=HEAD),
    Case("RoBERTa", otherwise=HEAD),
    Case("DeBERTa-v2", otherwise=HEAD),
    Case("ALBERT", otherwise=HEAD),
    Case("ViT", otherwise=HEAD),
    Case("Swin", otherwise=HEAD),
    Case("ConvNeXt", otherwise=HEAD),
    Case("DINOv2", otherwise=HEAD),
    Case("CLIP", otherwise=TASKLESS),
    Case("VideoMAE", otherwise=HEAD),
    Case("Whisper", otherwise=TASKLESS),
    Case("Qwen3-MoE", parameters(*EXPERTS), otherwise=NO_LORA),
    Case("Qwen3-MoE", ALL_LINEAR | {"target_parameters": [*EXPERTS, "mlp.gate.weight"]}, otherwise=NO_LORA),
    Case("GPT-2", modules("wpe"), otherwise=NO_LORA),
    Case("GPT-2", modules("wte"), otherwise=REFUSED),
    Case("BERT", modules("word_embeddings"), otherwise=NO_LORA),
    Case("DeBERTa-v2", modules("rel_embeddings", axis="column"), otherwise=NO_LORA),
    Case("T5", modules("relative_attention_bias"), otherwise=NO_LORA),
    Case("Mamba", modules("conv1d", axis="row"), otherwise=NO_LORA),
    Case("Mamba", parameters("A_log"), otherwise=NO_LORA),
    Case("ViT", modules("projection"), otherwise=NO_LORA),
    Case("Swin", modules("projection"), otherwise=NO_LORA),
    Case("Swin", parameters("relative_position_bias_table"), otherwise=NO_LORA),
    Case("ConvNeXt", modules("dwconv", axis="row"), otherwise=NO_LORA),
    Case("ConvNeXt", modules("patch_embeddings", "downsampling_layer.1"), otherwise=NO_LORA),
    Case("DINOv2", modules("projection"), otherwise=NO_LORA),
    Case("CLIP", modules("patch_embedding", "token_embedding", "position_embedding"), otherwise=TASKLESS),
    Case("VideoMAE", modules("projection"), otherwise=NO_LORA),
    Case("Whisper", modules("conv1", "conv2"), otherwise=TASKLESS),
    Case("Whisper", parameters("decoder.embed_positions.weight"), otherwise=REFUSED),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """`found(case)`: what was found for it, once."""
    rows: dict[str, Found] = {}

    def of(case: Case) -> Found:
        if str(case) not in rows:
            rows[str(case)] = examine(case, tmp_path_factory.mktemp("case"))
        return rows[str(case)]

    return of


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_works(case, found):
    cells = found(case).cells
    differing = {column: cell for column, cell in cells.items() if cell.word != case.otherwise.get(column, "yes")}
    assert not differing


def test_the_documentation_says_so(found):
    page = written([(case, found(case)) for case in CASES])
    if os.environ.get("WRITE_DOCS"):
        DOCS.write_text(page, encoding="utf-8")
    assert DOCS.read_text(encoding="utf-8") == page, __doc__


def written(rows: list[tuple[Case, Found]]) -> str:
    """The page of documentation."""
    notes: dict[str, int] = {}

    def words(cell: Cell) -> str:
        return f"{cell.word} [{notes.setdefault(cell.reason, len(notes) + 1)}]" if cell.reason else cell.word

    def table(heads: list[str], lines: list[list[str]]) -> str:
        return "\n".join(
            f"| {' | '.join(line)} |" for line in ([*heads, *COLUMNS], ["---"] * len([*heads, *COLUMNS]), *lines)
        )

    everything, by_name = [], []
    for case, found in rows:
        cells = [words(cell) for cell in found.cells.values()]
        if case.settings == ALL_LINEAR:
            kind = f"`{ARCHITECTURES[case.architecture].kind}`"
            everything.append([case.architecture, kind, found.layers, found.left_out, *cells])
        else:
            by_name.append([case.architecture, "<br>".join(case.settings_in_words), found.layers, *cells])
    return PAGE.format(
        steps=STEPS,
        moves=(STEPS - 1) // SLIDE_EVERY,
        all_linear=table(["architecture", "class", "weights trained", "weights left out"], everything),
        by_name=table(["architecture", "settings", "weights trained"], by_name),
        notes="\n".join(f"{number}. {reason}" for reason, number in notes.items()),
    )


PAGE = """\
# Architectures

What works on common architectures, and what does not. `tests/tuner/test_architectures.py` writes this page from what it finds on tiny models with random
weights (2 layers, 16 wide, fp32, CPU), and fails if the page says something else. Nothing in slicefine knows these architectures by name.

- **attach**: attaching changes no output, and there is nothing to warn of.
- **{steps} steps**: in {steps} optimizer steps with {moves} moves every slice gets the gradient of full training at every
  position, every targeted weight changes, and nothing but the touched rows and columns does (and heads that are trained in full).
- **disable**: within `disable_adapter()` the outputs are those of the base; afterwards they are the trained ones again.
- **save, load**: the adapter, loaded into the base from its folder, gives the trained outputs.
- **merge**: `merge_and_unload` gives the trained outputs under the base's own names of parameters; `unload` gives the base back.
- **export merged**: plain transformers loads the exported folder and gives the trained outputs.
- **export lora**: PEFT's LoRA gives the trained outputs up to rounding (1e-4).

All are equal to the bit but for LoRA.

## `target_modules="all-linear"`

{all_linear}

## Weights by name

Convolutions, embeddings, and parameters that are no layer's weight are trained if they are named. Rows of an embedding that no
input asks for (tokens that do not occur) get no gradient: with a large vocabulary take `axis="column"`.

{by_name}

## Notes

{notes}
"""
