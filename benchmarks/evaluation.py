"""Generating answers in batches of near lengths: tokens per second over one prompt at a time, and whether the answers agree.

Run `python benchmarks/evaluation.py` on a quiet machine; takes about two minutes.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Callable, Sequence

import torch
from _common import Figure, Table, cores, cpu_model, parser, positive, provenance, say, spread, write
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from slicefine.evaluation.generation import Generated, Generator, Ids, batches

INTRO = """\
Llama with random weights: hidden {hidden}, intermediate {intermediate}, {layers} layers, vocabulary {vocab}, fp32, CPU, \
{threads} threads. {prompts} prompts of random tokens, their lengths log-normal around {median} (sigma {sigma}), as those of the test \
sets are (medians of 96 to 177 with a BPE of 2,000 tokens, few above 400); answers of {new_tokens} tokens, greedy. {rounds} rounds, the three ways in turn; \
ratios within a round.

The model is small on purpose: what a step costs whatever the batch (here the calls, on a GPU the reading of the weights) is what batches \
share. Arithmetic is not shared, and bounds wide models on a CPU: see the table of widths.

"Batched and sorted" is what `slicefine evaluate` does: batches of {batch} prompts of near lengths, the longest first, padded on \
the left. "Batched" takes the prompts as they come. An answer differs if one of its tokens does."""

WAYS = ("one by one", "batched", "batched and sorted")


def generator(options: argparse.Namespace) -> Generator:
    """A random Llama that never ends an answer, so that all ways generate the same number of tokens."""
    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads,
        initializer_range=0.1,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight[0] = 0.0
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(options.vocab)}, unk_token="w1"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w0")
    return Generator(model, tokenizer, max_new_tokens=options.new_tokens)


def make_prompts(options: argparse.Namespace) -> list[Ids]:
    """Random tokens, of log-normal lengths."""
    draw = random.Random(options.seed)
    lengths = [round(draw.lognormvariate(math.log(options.median), options.sigma)) for _ in range(options.prompts)]
    return [[draw.randrange(2, options.vocab) for _ in range(max(length, 1))] for length in lengths]


def orders(prompts: Sequence[Ids], size: int) -> dict[str, list[list[int]]]:
    """For each of `WAYS`, the batches: indices of prompts."""
    indices = list(range(len(prompts)))
    return {
        "one by one": [[index] for index in indices],
        "batched": [indices[start : start + size] for start in range(0, len(indices), size)],
        "batched and sorted": list(batches([len(ids) for ids in prompts], size)),
    }


def answer(
    generate: Callable[[Sequence[Ids]], list[Generated]], prompts: Sequence[Ids], order: Sequence[Sequence[int]]
) -> tuple[dict[int, Generated], float]:
    """The answers by prompt, and tokens per second."""
    answers: dict[int, Generated] = {}
    start = time.perf_counter()
    for batch in order:
        answers |= dict(zip(batch, generate([prompts[index] for index in batch]), strict=True))
    seconds = time.perf_counter() - start
    return answers, sum(generated.tokens for generated in answers.values()) / seconds


def measure(options: argparse.Namespace, speeds: dict[str, list[float]]) -> dict[str, dict[int, Generated]]:
    """The answers of each way, one after the other; adds their tokens per second to `speeds`."""
    generate, prompts = generator(options), make_prompts(options)
    generate(prompts[:2])  # warm-up
    found = {}
    for way, order in orders(prompts, options.batch).items():
        found[way], speed = answer(generate, prompts, order)
        speeds[way].append(speed)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--threads", type=positive, default=cores(), help="CPU threads")
    made.add_argument("--rounds", type=positive, default=5, help="timed rounds")
    made.add_argument("--prompts", type=positive, default=128, help="prompts")
    made.add_argument("--batch", type=positive, default=32, help="prompts a batch")
    made.add_argument("--median", type=positive, default=140, help="tokens of a prompt, median")
    made.add_argument("--sigma", type=float, default=0.3, help="spread of the logarithm of their lengths")
    made.add_argument("--new-tokens", type=positive, default=32, help="tokens of an answer")
    made.add_argument("--layers", type=positive, default=4, help="decoder layers")
    made.add_argument("--hidden", type=positive, default=128, help="width of the model")
    made.add_argument("--intermediate", type=positive, default=352, help="width of the MLP")
    made.add_argument("--widths", type=positive, nargs="*", default=[64, 256], help="other widths, measured once each")
    made.add_argument("--heads", type=positive, default=4, help="attention heads")
    made.add_argument("--vocab", type=positive, default=4096, help="tokens in the vocabulary")
    options = made.parse_args(arguments)
    torch.set_num_threads(options.threads)
    made_by = provenance(
        ["benchmarks/evaluation.py", *(sys.argv[1:] if arguments is None else arguments)],
        threads=options.threads,
        seed=options.seed,
    )
    speeds: dict[str, list[float]] = {way: [] for way in WAYS}
    differing = 0
    for number in range(options.rounds):
        say(f"round {number + 1} of {options.rounds}")
        found = measure(options, speeds)
        alone = found["one by one"]
        different = [sum(alone[i] != found[way][i] for i in range(options.prompts)) for way in WAYS[1:]]
        differing = max(differing, *different)
    other_widths = []
    for hidden in options.widths:
        say(f"width {hidden}")
        once: dict[str, list[float]] = {way: [] for way in WAYS}
        measure(argparse.Namespace(**vars(options) | {"hidden": hidden, "intermediate": hidden * 11 // 4}), once)
        row = {way: once[way][0] for way in WAYS}
        other_widths.append({"hidden": hidden, **row, "ratio": row[WAYS[2]] / row[WAYS[0]]})
    ratios = [fast / slow for fast, slow in zip(speeds[WAYS[2]], speeds[WAYS[0]], strict=True)]
    unsorted = [fast / slow for fast, slow in zip(speeds[WAYS[2]], speeds[WAYS[1]], strict=True)]
    median, low, high = spread(ratios)
    gained, least, most = spread(unsorted)
    write(
        options.output,
        theme="evaluation",
        hardware=f"{cpu_model()} {options.threads} threads",
        intro=INTRO.format(**vars(options)),
        figures=[
            Figure(
                name="batched and sorted / one by one, tokens per second", value=median, low=low, high=high, at_least=3
            ),
            Figure(name="batched and sorted / batched, tokens per second", value=gained, low=least, high=most),
            Figure(name=f"answers of {options.prompts} that differ from one by one", value=differing, at_most=0),
        ],
        tables=[
            Table(
                title="Every round, tokens per second",
                rows=[
                    {"round": number, **{way: speeds[way][number - 1] for way in WAYS}}
                    for number in range(1, options.rounds + 1)
                ],
            ),
            *([Table(title="Other widths, tokens per second", rows=other_widths)] if other_widths else []),
        ],
        made_by=made_by,
    )


if __name__ == "__main__":
    main()
