"""Examples in small batches of about the same length: less padding, and with it less time; nothing else about them changes.

A batch of the task's own collator is sorted by length and cut, and the positions at which none of a piece has a token are left out. Where
there is no attention mask (images, clips) the pieces are cut as the examples come.
"""

from __future__ import annotations

import random
import statistics

import torch
from torch import Tensor

from slicefine.analysis.subject import Batch, Split, Subject

MASK, LABELS = "attention_mask", "labels"
TOKENS, LEAST = 256, 8
"""In a batch, about: tokens decide what it costs. Few labels are noise, so there are examples of `LEAST` all the same."""
SAMPLE = 16
"""Examples whose length is looked at."""
AT_ONCE = 2**26
"""Numbers that are collated together, about, at most."""


def draw(subject: Subject, split: Split, *, size: int, count: int, seed: int) -> list[Batch]:
    """`count` batches of `size` examples each, or smaller or fewer ones where there are not enough: none is drawn twice.

    The batches come in random order, and each has examples of about the same length.
    """
    number = max(min(size * count, subject.count(split)), 1)
    (one,) = subject.batches(split, size=1, count=1, seed=seed)
    calls = min(-(-number * numbers_in(one) // AT_ONCE), -(-number // size))
    wholes = subject.batches(split, size=number // calls, count=calls, seed=seed)
    if rows(wholes[0]) < number // calls:  # packed into one row: what is to be apart has to be drawn apart
        return subject.batches(split, size=min(size, number), count=max(number // size, 1), seed=seed)
    pieces = list[Batch]()
    while wholes:  # each is let go as soon as it is cut
        pieces += cut(wholes.pop(), size)
    random.Random(seed).shuffle(pieces)
    return pieces


def size_for(subject: Subject, most: int) -> int:
    """How many examples a batch has: `most`, or as many as have `TOKENS` tokens together, but at least `LEAST` that have one label each."""
    ones = subject.examples("train", count=SAMPLE, seed=0)
    lengths = [one[MASK].numel() for one in ones if MASK in one]
    if not lengths:
        return most
    single = all(one[LABELS].numel() == 1 for one in ones if LABELS in one)
    return max(min(most, TOKENS // round(statistics.median(lengths))), min(most, LEAST) if single else 1)


def numbers_in(batch: Batch) -> int:
    """Numbers in the tensors of a batch."""
    return sum(value.numel() for value in batch.values())


def cut(batch: Batch, size: int) -> list[Batch]:
    """The examples of `batch` in batches of `size`, by rising length; the last may be smaller."""
    mask = batch.get(MASK)
    count = rows(batch)
    order = torch.arange(count) if mask is None else mask.sum(1).argsort(stable=True).cpu()
    return [_trimmed(batch, order[at : at + size]) for at in range(0, count, size)]


def _trimmed(batch: Batch, numbers: Tensor) -> Batch:
    mask = batch.get(MASK)
    piece = {key: value[numbers.to(value.device)] for key, value in batch.items()}
    if mask is None:
        return piece
    used = piece[MASK].any(0)
    return {key: value[:, used] if value.shape[:2] == piece[MASK].shape else value for key, value in piece.items()}


def rows(batch: Batch) -> int:
    """How many examples there are in a batch."""
    return len(next(iter(batch.values())))
