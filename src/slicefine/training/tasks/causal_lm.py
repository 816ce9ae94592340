"""Causal language models: instructions, prompts with completions, conversations, or plain text.

What is learned is the completion where there is one: its tokens are the labels, all others are ignored.

| format        | columns                         | learned                                                          |
|---------------|---------------------------------|------------------------------------------------------------------|
| `instruction` | `instruction`, `input`, `output` | the output and the end token, after the prompt of `prompts.py`   |
| `prompt`      | `prompt`, `completion`          | the completion and the end token                                 |
| `chat`        | `messages`                      | the assistant's turns, or its last one: see `chat.py`            |
| `text`        | `data.text`                     | everything, and the end token                                    |
"""

from __future__ import annotations

import random
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from trl import SFTConfig, pack_dataset

from slicefine.errors import SliceFineError, SliceFineWarning, first_line, listed, raise_all
from slicefine.training.data import Table, read_tables, shorten
from slicefine.training.interrupts import not_swallowed
from slicefine.training.preflight import IGNORED
from slicefine.training.prompts import prompt
from slicefine.training.recipe import DataSettings, ModelSettings, Recipe
from slicefine.training.sft import CausalLMTrainer
from slicefine.training.tasks import Prepared
from slicefine.training.tasks.chat import Chat, message_problems
from slicefine.training.tokenizer import load_tokenizer, refuse_unknown

PEFT_TASK_TYPE = "CAUSAL_LM"
TRAINER = CausalLMTrainer
PRETRAINED = AutoModelForCausalLM

# Without the optional ones.
COLUMNS = {"instruction": ("instruction", "output"), "prompt": ("prompt", "completion"), "chat": ("messages",)}
SHOWN_PLACES = 3
TOGETHER = 1000
"""Texts that the tokenizer is given at a time: it works on them in parallel."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Checked examples in one of the four formats."""

    format: str
    train: list[dict[str, Any]]
    """`messages`, or `prompt` and `completion`, or `text`; and `place`, where the example is."""
    validation: list[dict[str, Any]]
    sources: dict[str, dict[str, Any]]

    def summary(self) -> dict[str, Any]:
        """Sources, sizes and format, for the run record."""
        return {**self.sources, "format": self.format}


def arguments(data: DataSettings, settings: dict[str, Any]) -> TrainingArguments:
    """What `TRAINER` takes beside model and examples. Those come tokenized, cut and packed: see `prepare`."""
    return SFTConfig(
        **settings,
        max_length=data.max_length,
        packing=data.packing,
        packing_strategy=data.packing_strategy,
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def read(data: DataSettings) -> Examples:
    """Read and check the examples. A fraction for validation is split off at random, always in the same way.

    Raises `SliceFineError` with every problem.
    """
    tables = read_tables(data, None)
    raise_all(
        [f"the {name} set is empty: {t.source} has no examples." for name, t in tables.items() if not t.rows], "Data"
    )
    formats = {name: _format_of(table, data) for name, table in tables.items()}
    if len(set(formats.values())) > 1:
        raise SliceFineError(
            f"Data: training and validation examples have one format; {tables['train'].source} has {formats['train']}, "
            f"{tables['validation'].source} has {formats['validation']}."
        )
    kind = formats["train"]
    problems: list[str] = []
    sets = {}
    for name, table in tables.items():
        found: list[str] = []
        sets[name] = [
            _example(kind, row, place, data.text, found) for place, row in zip(table.places, table.rows, strict=True)
        ]
        problems += shorten(found)
    raise_all(problems, "Data")
    sources: dict[str, dict[str, Any]] = {
        name: {"source": table.source, "fingerprint": table.fingerprint} for name, table in tables.items()
    }
    if isinstance(data.validation, float):
        rows = sets["train"]
        # The split is part of the data: runs that differ in their seed alone share it.
        off = set(random.Random(0).sample(range(len(rows)), round(data.validation * len(rows))))
        if not 0 < len(off) < len(rows):
            raise SliceFineError(
                f"Data: a fraction of {data.validation} of the {len(rows)} examples of {data.train} leaves {len(off)} for "
                f"validation and {len(rows) - len(off)} for training. Set `data.validation` to another fraction, or to a file."
            )
        sets = {
            "train": [row for number, row in enumerate(rows) if number not in off],
            "validation": [row for number, row in enumerate(rows) if number in off],
        }
        sources["validation"] = {
            "source": f"{data.validation} of train",
            "fingerprint": sources["train"]["fingerprint"],
        }
    for name, rows in sets.items():
        sources[name]["examples"] = len(rows)
    return Examples(format=kind, **sets, sources=sources)


@not_swallowed()
def prepare(recipe: Recipe, examples: Examples) -> Prepared:
    """Load tokenizer and model; tokenize, cut and pack the examples."""
    settings, data = recipe.model, recipe.data
    try:
        tokenizer = load_tokenizer(settings.name)
        config = AutoConfig.from_pretrained(settings.name, trust_remote_code=False)
    except SliceFineError:
        raise
    except (OSError, ValueError) as error:
        raise SliceFineError(_not_loaded(settings, error)) from error
    refuse_unknown(tokenizer, [_text_of(row) for row in examples.train], settings.name)
    text_config = config.get_text_config()
    longest = min(tokenizer.model_max_length, getattr(text_config, "max_position_embeddings", None) or data.max_length)
    if data.max_length > longest:
        raise SliceFineError(
            f"`data.max_length` is at most what {settings.name} can read, {longest} tokens; got {data.max_length}."
        )
    notes = _settle_special_tokens(tokenizer, text_config)
    encode = _Encoder(tokenizer, examples.format, settings.name)
    notes += encode.notes
    sets = {}
    for name, rows in (("train", examples.train), ("validation", examples.validation)):
        sets[name], more = _cut(encode.all(rows), recipe.data, name)
        notes += more
    notes += encode.boundary_notes()

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            settings.name,
            config=config,
            dtype=settings.dtype,
            attn_implementation=settings.attn_implementation,
            output_loading_info=True,
            trust_remote_code=False,
        )
        model, report = loaded
    except ImportError as error:  # of flash attention
        raise SliceFineError(f"`model.attn_implementation`: {first_line(error)}.") from error
    except (OSError, ValueError) as error:
        raise SliceFineError(_not_loaded(settings, error)) from error
    if report["missing_keys"]:
        raise SliceFineError(
            f"A language model is trained from pretrained weights alone; the files of {settings.name} have none for "
            f"{listed(sorted(report['missing_keys']), 5)}. Name a complete causal language model."
        )
    train = sets["train"]
    if data.packing:
        train, note = _pack(train, data)
        notes.append(note)
    return Prepared(
        model=model,
        processor=tokenizer,
        train=train,
        validation=sets["validation"],
        collator=None,
        compute_metrics=None,
        new_modules=[],
        notes=notes,
    )


def _text_of(row: dict[str, Any]) -> str:
    """What is learned of an example, as far as it is text."""
    if "messages" in row:
        return " ".join(message["content"] for message in row["messages"] if isinstance(message.get("content"), str))
    return row["text"] if "text" in row else row["completion"]


def load_base(name: str, folder: Path) -> PreTrainedModel:
    """The base model in the dtype that `config.json` in the adapter's `folder` says."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return AutoModelForCausalLM.from_pretrained(name, config=config, dtype=config.dtype, trust_remote_code=False)


# ---------------------------------------------------------------- reading


def _format_of(table: Table, data: DataSettings) -> str:
    """The one format of all rows, given or by their columns. Raises `SliceFineError` if there is not exactly one."""
    columns = COLUMNS | {"text": (data.text,)}
    known = ", ".join(f"{name} ({', '.join(needed)})" for name, needed in columns.items())
    fits: dict[str, list[str]] = {name: [] for name in columns}
    problems: list[str] = []
    for place, row in zip(table.places, table.rows, strict=True):
        found = [name for name, needed in columns.items() if set(needed) <= row.keys()]
        for name in found:
            fits[name].append(place)
        wanted = data.format
        if wanted == "auto" and not found:
            problems.append(f"{place}: the columns {', '.join(map(repr, row)) or '(none)'} are of no known format.")
        elif wanted != "auto" and wanted not in found:
            missing = [column for column in columns[wanted] if column not in row]
            problems.append(
                f"{place}: no column {', '.join(map(repr, missing))}; there are {', '.join(map(repr, row)) or 'none'}."
            )
    if problems:
        raise SliceFineError("\n".join([*shorten(problems), f"The formats are {known}. Rename the columns."]))
    if data.format != "auto":
        return data.format
    whole = [name for name, places in fits.items() if len(places) == len(table.rows)]
    if len(whole) == 1 and not any(places for name, places in fits.items() if name not in whole):
        return whole[0]
    present = {name: places for name, places in fits.items() if places}
    if whole:  # columns of several formats in every row
        raise SliceFineError(
            f"{table.source} has the columns of {' and of '.join(present)}, and `data.format` is auto. Say which it is: "
            f"--data.format {whole[0]}, say."
        )
    shown = ", ".join(f"{name} ({len(places)} rows, the first {places[0]})" for name, places in present.items())
    raise SliceFineError(f"All rows have one format; {table.source} mixes {shown}. Write one file for each.")


def _example(kind: str, row: dict[str, Any], place: str, text_column: str, problems: list[str]) -> dict[str, Any]:
    """The row as the format's own columns; what is wrong with it goes into `problems`."""
    if kind == "chat":
        problems += [f"{place}: {problem}" for problem in message_problems(row["messages"])]
        return {"messages": row["messages"], "place": place}
    names = [text_column] if kind == "text" else COLUMNS[kind]
    optional = ["input"] if kind == "instruction" and row.get("input") is not None else []
    bad = [
        f"{place}: {name!r} is a text; got {'null' if row[name] is None else repr(row[name])[:40]}."
        for name in [*names, *optional]
        if not isinstance(row[name], str)
    ]
    bad += [
        f"{place}: {name!r} is empty. Fill it in, or remove the row."
        for name in names
        if isinstance(row[name], str) and not row[name].strip()
    ]
    problems += bad
    if bad or kind == "text":
        return {"text": row[text_column], "place": place} if not bad else {}
    if kind == "instruction":
        return {
            "prompt": prompt(row["instruction"], row.get("input") or ""),
            "completion": row["output"],
            "place": place,
        }
    return {"prompt": row["prompt"], "completion": row["completion"], "place": place}


# ---------------------------------------------------------------- tokens


def _settle_special_tokens(tokenizer: PreTrainedTokenizerBase, config: Any) -> list[str]:
    """Give the tokenizer an end token and a pad token if it has none; say so."""
    notes = []
    if tokenizer.eos_token is None:
        known = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
        if known is not None:
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(known)
            notes.append(
                f"The tokenizer has no end token; the one of the model's configuration is used, {tokenizer.eos_token!r}."
            )
        else:
            notes.append(
                "The tokenizer has no end token and neither has the model: completions are learned without one, so the tuned "
                "model will write until it is stopped. Set `eos_token` in the tokenizer's configuration if there is one."
            )
    if tokenizer.pad_token is None:
        # Padding is masked in attention and loss, so any token will do.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
        notes.append(
            f"The tokenizer has no pad token; {tokenizer.pad_token!r} is used, and ignored by attention and loss."
        )
    return notes


@dataclass(frozen=True)
class _Encoded:
    """One example as tokens."""

    place: str
    ids: np.ndarray
    """int32, `(tokens,)`"""
    labels: np.ndarray
    """int32, `(tokens,)`: `ids` where they are learned, `IGNORED` elsewhere."""


class _Encoder:
    """From examples of one format to token ids and labels."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kind: str, model: str) -> None:
        self._tokenizer = tokenizer
        self._chat = Chat(tokenizer, model) if kind == "chat" else None
        self._merged: list[tuple[str, str]] = []
        self.notes = self._chat.notes if self._chat else []

    def all(self, rows: list[dict[str, Any]]) -> list[_Encoded]:
        """Encode every example. Raises `SliceFineError` with every problem."""
        encoded: list[_Encoded] = []
        problems: list[str] = []
        encode = self._conversations if self._chat else self._texts
        for start in range(0, len(rows), TOGETHER):
            encode(rows[start : start + TOGETHER], encoded, problems)
        raise_all(shorten(problems), "Data")
        return encoded

    def boundary_notes(self) -> list[str]:
        """Say where the end of a prompt and the beginning of its completion became one token, and where no end is learned."""
        notes = self._chat.end_notes() if self._chat else []
        if not self._merged:
            return notes
        place, end = self._merged[0]
        return [
            *notes,
            f"In {len(self._merged)} examples ({place} is the first) the last token of the prompt, {end!r}, is another one when the "
            "completion follows: the model will meet a slightly different prompt than it was trained on. Let prompts end "
            "with a line break, or completions begin without white space.",
        ]

    def _texts(self, rows: list[dict[str, Any]], encoded: list[_Encoded], problems: list[str]) -> None:
        end: Any = self._tokenizer.eos_token_id
        empty: Any = self._tokenizer("")["input_ids"]
        # Some tokenizers end every text. One that begins every text with the same token (OPT's) does not.
        ends = end is not None and empty[-1:] == [end] and empty != [self._tokenizer.bos_token_id]
        whole = [row["text"] if "text" in row else row["prompt"] + row["completion"] for row in rows]
        all_ids: Any = self._tokenizer(whole)["input_ids"]
        prompts: Any = [[]] * len(rows)
        if "text" not in rows[0]:
            prompts = self._tokenizer([row["prompt"] for row in rows])["input_ids"]
        for row, ids, prompt_ids in zip(rows, all_ids, prompts, strict=True):
            if ends:
                ids, prompt_ids = ids[:-1], prompt_ids[:-1]
            if end is not None and ids[-1:] != [end]:
                ids = [*ids, end]
            self._add(row["place"], ids, prompt_ids, encoded, problems)

    def _conversations(self, rows: list[dict[str, Any]], encoded: list[_Encoded], problems: list[str]) -> None:
        assert self._chat is not None
        for row in rows:
            try:
                ids, prompt_ids, mask = self._chat.encode(row["messages"])
            except SliceFineError as error:
                problems.append(f"{row['place']}: {error}")
                continue
            if mask is None:
                self._add(row["place"], ids, prompt_ids, encoded, problems)
                continue
            tokens = np.array(ids, dtype=np.int32)
            encoded.append(_Encoded(row["place"], tokens, np.where(np.array(mask) == 1, tokens, np.int32(IGNORED))))

    def _add(
        self, place: str, ids: list[int], prompt_ids: list[int], encoded: list[_Encoded], problems: list[str]
    ) -> None:
        """Let the labels begin where `ids` part from `prompt_ids`, as TRL does."""
        pairs = enumerate(zip(prompt_ids, ids, strict=False))
        same = next((i for i, (one, other) in pairs if one != other), min(len(prompt_ids), len(ids)))
        if same < len(prompt_ids):
            self._merged.append((place, str(self._tokenizer.decode(prompt_ids[same:]))))
        if same == len(ids):
            problems.append(f"{place}: nothing is left of the completion in tokens; the prompt's are all there are.")
            return
        tokens = np.array(ids, dtype=np.int32)
        labels = tokens.copy()
        labels[:same] = IGNORED
        encoded.append(_Encoded(place, tokens, labels))


def _cut(examples: list[_Encoded], data: DataSettings, name: str) -> tuple[Dataset, list[str]]:
    """Cut examples to `data.max_length`, and drop or refuse those of which nothing to learn is left."""
    kept: dict[str, list[np.ndarray]] = {"input_ids": [], "labels": []}
    splits = name == "train" and data.packing and data.packing_strategy != "bfd"
    lost, cut = [], 0
    for example in examples:
        size = len(example.ids) if splits else data.max_length
        if (example.labels[1:size] == IGNORED).all():  # the first token is never predicted
            lost.append(example.place)
            continue
        cut += len(example.ids) > size
        kept["input_ids"].append(example.ids[:size])
        kept["labels"].append(example.labels[:size])
    notes = []
    if lost:
        what = (
            f"{len(lost)} of {len(examples)} {name} examples have nothing to learn within `data.max_length` "
            f"({data.max_length} tokens): {listed(lost, SHOWN_PLACES)}"
        )
        if data.fully_cut == "error" or len(lost) == len(examples):
            raise SliceFineError(f"Data: {what}. Raise `data.max_length`, or shorten these prompts.")
        warnings.warn(f"{what}. They are left out.", SliceFineWarning, stacklevel=3)
        notes.append(f"{what}; left out.")
    if cut:
        notes.append(f"{cut} of {len(examples)} {name} examples are cut to {data.max_length} tokens.")
    return Dataset.from_dict(kept), notes


def _pack(train: Dataset, data: DataSettings) -> tuple[Dataset, str]:
    """Several examples a sequence, but for the sequences that parts of prompts alone have come into; and what was done."""
    packed = pack_dataset(train, data.max_length, data.packing_strategy)
    learning = [number for number, row in enumerate(packed) if _learns(row)]
    if not learning:
        raise SliceFineError(
            f"Data: packed ({data.packing_strategy}) into sequences of `data.max_length` ({data.max_length} tokens), the examples "
            "leave nothing to learn. Raise `data.max_length`."
        )
    note = f"Packing: {len(train):,} training examples in {len(learning):,} sequences of up to {data.max_length} tokens"
    if len(learning) == len(packed):
        return packed, f"{note}."
    return packed.select(learning), f"{note}; {len(packed) - len(learning):,} more, of prompts alone, are left out."


def _learns(row: Any) -> bool:
    """Whether a packed sequence has a label that counts: the first token of an example, or of a part, is never predicted."""
    labels = np.array(row["labels"])
    starts = np.cumsum([0, *row.get("seq_lengths", labels.shape)[:-1]])
    labels[starts] = IGNORED
    return bool((labels != IGNORED).any())


def _not_loaded(settings: ModelSettings, error: Exception) -> str:
    return (
        "`model.name` is a folder with a pretrained causal language model and its tokenizer, or the name of one on the hub; "
        f"{settings.name!r} did not load: {first_line(error)}."
    )
