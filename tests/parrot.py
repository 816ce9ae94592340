"""Language models whose answers are known, made on the spot: each word is followed by the one that was put behind it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from slicefine.training.prompts import prompt

TRUE = ["the", "correct", "answer", "is", "true", "</s>"]
BOOLQ = [("is the sky blue", "true"), ("is a very big house small", "false"), ("is fire hot", "true")]
PIQA = [("open a can", "solution1"), ("boil an egg", "solution2")]
Row = dict[str, Any]


def boolq_rows(rows: Sequence[tuple[str, str]] = BOOLQ) -> list[Row]:
    text = "Please answer the following question with true or false, question: {}?\n\nAnswer format: true/false"
    return [
        {"instruction": text.format(question), "input": "", "output": f"the correct answer is {gold}", "answer": gold}
        for question, gold in rows
    ]


def piqa_rows() -> list[Row]:
    return [{"instruction": f"Please choose: {goal}", "input": "", "output": "", "answer": gold} for goal, gold in PIQA]


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_tokenizer(texts: Sequence[str], **special: Any) -> PreTrainedTokenizerFast:
    """A token a word, and one for each line break."""
    words = sorted(
        {word for text in texts for word in re.findall(r"\n|\S+", text)}
        | {*TRUE, "false", "solution2", "a", "b", "7", "8"}
    )
    vocabulary = ["<pad>", "<unk>", "<s>", "</s>", *(word for word in words if word != "</s>")]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\S+"), "removed", invert=True)
    settings = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"} | special
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", **{name: word for name, word in settings.items() if word}
    )


def config_of(tokenizer: PreTrainedTokenizerFast, **settings: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer), num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, intermediate_size=16,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        **{"hidden_size": 16, "max_position_embeddings": 512} | settings,
    )  # fmt: skip


def parrot(tokenizer: PreTrainedTokenizerFast, chain: Sequence[str], **settings: Any) -> LlamaForCausalLM:
    """A Llama that answers every prompt with `chain`: attention and MLP add nothing, the head maps each word to the next."""
    width = -(-len(tokenizer) // 4) * 4
    torch.manual_seed(0)
    model = LlamaForCausalLM(config_of(tokenizer, hidden_size=width, **settings))
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(width)[: len(tokenizer)])
        layer = model.model.layers[0]
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight, model.lm_head.weight):
            weight.zero_()
        for word, after in zip(["\n", *chain], chain, strict=False):
            ids = tokenizer.convert_tokens_to_ids([after, word])
            model.lm_head.weight[ids[0], ids[1]] = 1.0
    return model


def random_llama(tokenizer: PreTrainedTokenizerFast, **settings: Any) -> LlamaForCausalLM:
    """A Llama whose answers depend on all of the prompt."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config_of(tokenizer, hidden_size=32, initializer_range=0.3, **settings))
    with torch.no_grad():
        model.lm_head.weight[:3] = 0.0  # padding and such, which a tokenizer may or may not show
    return model


def save(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


TEXTS = [prompt(row["instruction"], "some input") for row in [*boolq_rows(), *piqa_rows()]]
