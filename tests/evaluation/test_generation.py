from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from parrot import TEXTS, TRUE, config_of, make_tokenizer, parrot, random_llama
from tokenizers import processors
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from slicefine import SliceFineError, SliceFineWarning
from slicefine.evaluation.generation import Generator, batches, encode

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16,
    "initializer_range": 0.3, "tie_word_embeddings": False,
}  # fmt: skip


def prompts(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    texts = [text[:cut] for text in TEXTS for cut in (40, 90, 150, len(text))]
    return encode(tokenizer, texts)


def llama(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return random_llama(tokenizer)


def qwen2(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, **tokens_of(tokenizer)))


def gemma3(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Its first layer sees 8 tokens back."""
    torch.manual_seed(0)
    layers = ["sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, **tokens_of(tokenizer), head_dim=16, sliding_window=8, layer_types=layers)
    )


def tokens_of(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }  # fmt: skip


@pytest.mark.parametrize(("make", "num_beams"), [(llama, 1), (llama, 3), (qwen2, 1), (gemma3, 1)])
def test_batched_answers_are_those_of_one_by_one(
    tokenizer: PreTrainedTokenizerFast, make: Callable[..., PreTrainedModel], num_beams: int
) -> None:
    generate = Generator(make(tokenizer).eval(), tokenizer, max_new_tokens=12, num_beams=num_beams)
    ids = prompts(tokenizer)
    alone = [generate([one])[0] for one in ids]
    assert len({generated.text for generated in alone}) > 5
    for size in (3, len(ids)):
        together = {
            i: generated
            for batch in batches([*map(len, ids)], size)
            for i, generated in zip(batch, generate([ids[i] for i in batch]), strict=True)
        }
        assert [together[i] for i in range(len(ids))] == alone


def test_it_is_what_greedy_decoding_gives(tokenizer: PreTrainedTokenizerFast) -> None:
    """Token by token, from the logits of the whole text."""
    model = random_llama(tokenizer).eval()
    generate = Generator(model, tokenizer, max_new_tokens=6)
    for ids in prompts(tokenizer)[:4]:
        text = list(ids)
        for _ in range(6):
            with torch.no_grad():
                text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
            if text[-1] == tokenizer.eos_token_id:
                break
        (generated,) = generate([ids])
        assert generated.tokens == len(text) - len(ids)
        assert generated.text == tokenizer.decode(text[len(ids) :], skip_special_tokens=True)


def test_beams_find_more_likely_answers(tokenizer: PreTrainedTokenizerFast) -> None:
    model = random_llama(tokenizer).eval()

    def likelihood(prompt: list[int], text: str) -> float:
        answer = tokenizer(text)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        return sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))

    gains = []
    for ids in prompts(tokenizer):
        greedy, searched = (
            Generator(model, tokenizer, max_new_tokens=5, num_beams=beams)([ids])[0] for beams in (1, 4)
        )
        if not greedy.ended and not searched.ended:
            gains.append(likelihood(ids, searched.text) - likelihood(ids, greedy.text))
    assert len(gains) > 3
    assert max(gains) > 0.01


def test_the_models_own_settings_do_not_sample(tokenizer: PreTrainedTokenizerFast) -> None:
    model = random_llama(tokenizer)
    ids = prompts(tokenizer)[:3]
    greedy = Generator(model, tokenizer, max_new_tokens=8)(ids)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=9.0, max_length=3, eos_token_id=tokenizer.eos_token_id
    )
    assert Generator(model, tokenizer, max_new_tokens=8)(ids) == greedy


def test_every_token_that_ends_a_text_ends_an_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    model = parrot(tokenizer, ["a", "b", "7", "8", "</s>"])
    generate = Generator(model, tokenizer, max_new_tokens=9)
    ids = encode(tokenizer, ["Response:\n"])
    assert (generate(ids)[0].text, generate(ids)[0].tokens, generate(ids)[0].ended) == ("a b 7 8", 5, True)
    model.generation_config = GenerationConfig(eos_token_id=[tokenizer.convert_tokens_to_ids("7")])
    assert Generator(model, tokenizer, max_new_tokens=9)(ids)[0].text == "a b"
    model.generation_config = GenerationConfig()
    cut = Generator(model, tokenizer, max_new_tokens=2)(ids)[0]
    assert (cut.text, cut.tokens, cut.ended) == ("a b", 2, False)


def test_an_answer_of_no_token(tokenizer: PreTrainedTokenizerFast) -> None:
    (generated,) = Generator(parrot(tokenizer, ["</s>"]), tokenizer, max_new_tokens=9)(encode(tokenizer, ["\n"]))
    assert (generated.text, generated.tokens, generated.ended) == ("", 1, True)


def test_a_tokenizer_without_a_pad_token_changes_no_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = prompts(tokenizer)
    model = random_llama(tokenizer)
    expected = Generator(model, tokenizer, max_new_tokens=8)(ids)
    bare = make_tokenizer(TEXTS, pad_token=None)
    with pytest.warns(SliceFineWarning, match="no token to pad with; .* filled up with '</s>'") as caught:
        generate = Generator(model, bare, max_new_tokens=8)
    assert generate(ids) == expected
    assert len(caught) == 1


def test_without_a_token_that_ends_a_text(tokenizer: PreTrainedTokenizerFast) -> None:
    bare = make_tokenizer(TEXTS, pad_token=None, eos_token=None)
    model = parrot(tokenizer, TRUE)
    model.generation_config = GenerationConfig()
    with pytest.warns(SliceFineWarning) as caught:
        generate = Generator(model, bare, max_new_tokens=9)
    said = [str(warning.message) for warning in caught]
    assert "Neither the tokenizer nor the model names a token that ends a text" in said[1]
    assert len(said) == 2
    (generated,) = generate(encode(bare, ["\n"]))
    assert (generated.tokens, generated.ended) == (9, False)


def test_the_longest_prompts_come_first() -> None:
    lengths = [3, 9, 1, 7, 7, 2, 8]
    made = list(batches(lengths, 3))
    assert sorted(index for batch in made for index in batch) == list(range(7))
    assert [len(batch) for batch in made] == [3, 3, 1]
    order = [lengths[index] for batch in made for index in batch]
    assert all(one >= other for one, other in pairwise(order))
    assert list(batches([], 3)) == []


def test_special_tokens_before_a_prompt_are_kept_and_those_behind_dropped(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = encode(tokenizer, ["Response:\n"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    )
    assert encode(tokenizer, ["Response:\n"]) == [[tokenizer.bos_token_id, *plain[0]]]


def test_no_memory_names_the_flag(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_llama(tokenizer)

    def fail(**kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    generate = Generator(model, tokenizer, max_new_tokens=8)
    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(SliceFineError, match=r"A batch of 2 prompts of up to 5 tokens does not fit .*--batch_size"):
        generate([[5] * 5, [5]])


def test_it_says_nothing_when_all_is_there(tokenizer: PreTrainedTokenizerFast) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Generator(random_llama(tokenizer), tokenizer, max_new_tokens=2)([[5, 6], [7]])
    assert config_of(tokenizer).eos_token_id == tokenizer.eos_token_id
