"""A recipe tried in a minute: everything as it says, but for a tiny model, few rows and four steps.

The model has the architecture of the real one, from its configuration where that can be had, and random weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from slicefine.errors import SliceFineError, did_you_mean, raise_all
from slicefine.training.data import Table, read_tables
from slicefine.training.hub import model_problem
from slicefine.training.recipe import Recipe
from slicefine.training.run import train
from slicefine.training.tasks import get_task

ROWS, STEPS, EVERY = 64, 4, 2
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
VOCABULARY = 2048
BEGIN, END, PAD = "<s>", "</s>", "<pad>"
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def smoke(recipe: Recipe, folder: Path) -> list[str]:
    """Run the smoke test of `recipe` in the empty folder `folder`; returns what was done, line by line.

    Raises `SliceFineError` for whatever is wrong with recipe or data; all examples are checked, `ROWS` are trained on.
    """
    raise_all(recipe.problems(), "Recipe")
    task = get_task(recipe.task)
    examples = task.read(recipe.data).summary()
    tables = read_tables(recipe.data, None)
    for name, table in tables.items():
        _write_rows(table, folder / f"{name}.jsonl")
    tokenizer, config, model_said, tokenizer_said = _pretrained(recipe, tables["train"])
    made = folder / "model"
    torch.manual_seed(recipe.training.seed)
    model = task.PRETRAINED.from_config(_shrink(config, tokenizer))
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    record = train(Recipe.from_flat(recipe.flat() | _overrides(recipe, folder, made)))
    losses = [record.metrics[when]["loss"] for when in ("before", "after")]
    counted = ", ".join(f"{examples[name]['examples']:,} for {name}" for name in ("train", "validation"))
    return [
        f"{'recipe':<10} fits together; what it takes and learns at full size is not known from this",
        f"{'model':<10} a tiny {config.model_type} ({sum(p.numel() for p in model.parameters()):,} random weights), {model_said}",
        f"{'tokenizer':<10} {tokenizer_said}",
        f"{'data':<10} all examples read and checked ({counted}); up to {ROWS} of each used",
        f"{'run':<10} {record.status}: {record.steps} steps, moves: {record.moves}, validation loss {losses[0]:.4g} -> {losses[1]:.4g}",
        f"{'folder':<10} {folder}",
    ]


def _overrides(recipe: Recipe, folder: Path, model: Path) -> dict[str, Any]:
    """The settings that make a run small."""
    training = recipe.training
    return {
        "model.name": str(model),
        "data.train": str(folder / "train.jsonl"),
        "data.validation": str(folder / "validation.jsonl") if isinstance(recipe.data.validation, str) else 0.25,
        "data.subset": None,
        "data.train_split": "train",
        "output": str(folder / "run"),
        "slice.slide_every": None if recipe.slice.slide_every is None else EVERY,
        "slice.layers_to_transform": None,  # of the tiny model's blocks there are two
        "slice.layers_pattern": None,
        "training.max_steps": STEPS,
        "training.per_device_train_batch_size": min(4, training.per_device_train_batch_size),
        "training.per_device_eval_batch_size": min(8, training.per_device_eval_batch_size),
        "training.gradient_accumulation_steps": min(2, training.gradient_accumulation_steps),
        "training.eval_steps": None,
        "training.save_steps": None,
        "training.logging_steps": 1,
        "training.dataloader_num_workers": 0,
        "training.report_to": "none",
    }


def _write_rows(table: Table, path: Path) -> None:
    """Some rows of a table, evenly spaced: the first ones may all be of one class."""
    every = max(1, len(table.rows) // ROWS)
    with path.open("w", encoding="utf-8") as file:
        for row in table.rows[::every][:ROWS]:
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def _pretrained(recipe: Recipe, table: Table) -> tuple[PreTrainedTokenizerBase, Any, str, str]:
    """Tokenizer and configuration, and where each is from: those of the model, or stand-ins."""
    name, architecture = recipe.model.name, recipe.model.architecture
    if model_problem(name) is None:
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
            return (
                AutoTokenizer.from_pretrained(name, trust_remote_code=False),
                config,
                f"as the configuration of {name} says",
                f"that of {name}",
            )
        except (OSError, ValueError):  # not there, not public, or unknown to this version
            pass
    if architecture is None:
        raise SliceFineError(
            f"A smoke test needs the configuration and tokenizer of {name}, which cannot be had here, or the name of its "
            "architecture: set `model.architecture` (llama, say)."
        )
    if architecture not in CONFIG_MAPPING:
        near = did_you_mean(architecture, CONFIG_MAPPING)
        raise SliceFineError(f"`model.architecture` is a model_type of transformers; got {architecture!r}.{near}")
    said = f"the architecture that the recipe names: the configuration of {name} cannot be had here"
    return (
        _tokenizer_of(table),
        AutoConfig.for_model(architecture),
        said,
        "made from these examples, for the same reason",
    )


def _tokenizer_of(table: Table) -> PreTrainedTokenizerBase:
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
    tokens.train_from_iterator((json.dumps(row, ensure_ascii=False, default=str) for row in table.rows[:ROWS]), trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token=BEGIN, eos_token=END, pad_token=PAD)
    made.chat_template = CHAT
    return made


def _shrink(config: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """A configuration of the same kind with few and small layers, and the tokens of `tokenizer`."""
    parts = {
        name: _shrink(part, tokenizer) for name, part in vars(config).items() if name in config.sub_configs and part
    }
    names = {config.attribute_map.get(name, name): value for name, value in SMALL.items()}
    values = config.to_dict()
    small: dict[str, Any] = {name: value for name, value in names.items() if isinstance(values.get(name), int)}
    if values.get("layer_types"):  # one of each kind: some models have another kind every sixth layer
        small["layer_types"] = (list(dict.fromkeys(values["layer_types"])) * 2)[: SMALL["num_hidden_layers"]]
    if "vocab_size" in values:
        small["vocab_size"] = len(tokenizer)
        small |= {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    values.pop("quantization_config", None)
    return type(config).from_dict(values | small | {name: part.to_dict() for name, part in parts.items()})
