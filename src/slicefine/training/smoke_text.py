"""What a smoke test of texts is made of: some rows, a tokenizer, and a tiny configuration for its tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from slicefine.training.data import read_tables
from slicefine.training.recipe import DataSettings
from slicefine.training.smoke_config import shrunk
from slicefine.training.smoke_rows import common, evenly, spread
from slicefine.training.tokenizer import load_tokenizer

VOCABULARY = 2048
BEGIN, END, PAD = "<s>", "</s>", "<pad>"
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_some(data: DataSettings, examples: Any, count: int, folder: Path) -> dict[str, Any]:
    """See `StandIns`. Of a few classes, where there are classes."""
    tables = read_tables(data, None)
    labels = {name: [str(row.get(data.label)) for row in table.rows] for name, table in tables.items()}
    classes = common(labels["train"], labels.get("validation", ()))
    for name, table in tables.items():
        numbered = bool(getattr(examples, "classes", None))
        chosen = spread(labels[name], classes, count) if numbered else evenly(range(len(table.rows)), count)
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for row in map(table.rows.__getitem__, chosen):
                if data.label_kind == "number":  # a string in CSV, which says no more than its text
                    row = row | {data.label: float(row[data.label])}
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    validation = str(folder / "validation.jsonl") if isinstance(data.validation, str) else 0.25
    return {"data.train": str(folder / "train.jsonl"), "data.validation": validation}


def load_processor(name: str) -> PreTrainedTokenizerBase:
    """See `StandIns`."""
    return load_tokenizer(name)


def make_processor(config: Any, folder: Path) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of the rows themselves, so that examples are about as long as with a real one."""
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BEGIN, END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokens.train_from_iterator((folder / "train.jsonl").read_text(encoding="utf-8").splitlines(), trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token=BEGIN, eos_token=END, pad_token=PAD)
    made.chat_template = CHAT
    return made


def shrink(config: Any, processor: PreTrainedTokenizerBase) -> Any:
    """See `StandIns`."""

    def tokens_of(values: dict[str, Any]) -> dict[str, Any]:
        if "vocab_size" not in values:
            return {}
        ids = {f"{kind}_token_id": getattr(processor, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
        return {"vocab_size": len(processor)} | ids

    return shrunk(config, tokens_of)
