"""The architectures by name: their sizes, their batches, and what a sweep makes of them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from benchmarked import tiny

from slicefine.benchmarking.models import MODELS, SMALL, architecture, batch_of, build
from slicefine.benchmarking.settings import Settings
from slicefine.errors import SliceFineError


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # As their model cards and the hub count them, of Gemma the language model alone; with heads for 2, 100 and 101 classes.
        ("llama-3.2-3b", 3_212_749_824),
        ("gemma-3-12b", 11_766_034_176),
        ("deepseek-r1-8b", 8_030_261_248),
        ("roberta-base", 124_055_040 + 768 * 768 + 768 + 768 * 2 + 2),
        ("vit-base", 85_798_656 + 768 * 100 + 100),
        ("videomae-base", 86_227_200 + 768 * 101 + 101),
    ],
)
def test_the_large_models_have_the_size_of_the_public_ones(name: str, parameters: int) -> None:
    model = build(MODELS[name], device="meta", dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", [name for name in MODELS if name not in SMALL])
def test_every_model_has_a_small_version_of_the_same_architecture(name: str) -> None:
    large, small = MODELS[name], MODELS[f"{name}-small"]
    assert (large.config, large.task, large.sizes.keys()) == (small.config, small.task, small.sizes.keys())
    parameters = sum(p.numel() for p in build(small, device="meta").parameters())
    assert 15e6 < parameters < 30e6


@pytest.mark.parametrize("name", SMALL)
def test_a_seed_decides_weights_and_batch(name: str) -> None:
    of = tiny(name)
    first, second = (dict(build(of, seed=1).named_parameters()) for _ in range(2))
    other = dict(build(of, seed=2).named_parameters())
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)
    batch, again, third = batch_of(of, seed=1), batch_of(of, seed=1), batch_of(of, seed=2)
    inputs = next(iter(batch))
    assert torch.equal(batch[inputs], again[inputs])
    assert not torch.equal(batch[inputs], third[inputs])
    assert torch.isfinite(build(of)(**batch).loss)
    if of.task == "text-classification":
        assert not (batch["input_ids"] == build(of).config.pad_token_id).any()


SHAPES = {
    "llama-3.2-3b-small": (4, 256),
    "roberta-base-small": (8, 128),
    "vit-base-small": (16, 3, 112, 112),
    "videomae-base-small": (4, 8, 3, 112, 112),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_a_batch(name: str) -> None:
    batch = batch_of(MODELS[name], dtype=torch.bfloat16)
    inputs = batch.get("input_ids", batch.get("pixel_values"))
    assert tuple(inputs.shape) == SHAPES[name]
    assert inputs.dtype == (torch.bfloat16 if "pixel_values" in batch else torch.int64)


@pytest.mark.parametrize("dimension", ["length", "width", "depth", "batch"])
@pytest.mark.parametrize("name", SMALL)
def test_a_sweep_changes_one_dimension(name: str, dimension: str) -> None:
    of = tiny(name)
    value = 2 * of.dimension(dimension)
    other = of.resized(dimension, value)
    assert other.dimension(dimension) == value
    for unchanged in {"batch", "length", "depth", "width"} - {dimension}:
        assert other.dimension(unchanged) == of.dimension(unchanged)
    assert torch.isfinite(build(other)(**batch_of(other)).loss)
    if dimension == "width":
        scaled = [key for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size") if key in of.sizes]
        assert [other.sizes[key] for key in scaled] == [2 * of.sizes[key] for key in scaled]


@pytest.mark.parametrize(
    ("name", "dimension", "value", "says"),
    [
        ("llama-3.2-3b-small", "width", 500, "is a multiple of 256, for whole heads; got 500"),
        ("roberta-base-small", "length", 513, "takes at most 512 tokens; got 513"),
        ("vit-base-small", "length", 100, "image_size of vit-base-small is a multiple of its patch_size, 16; got 100"),
        ("videomae-base-small", "length", 3, "num_frames of videomae-base-small is a multiple of its tubelet_size, 2"),
    ],
)
def test_sizes_that_no_model_has(name: str, dimension: str, value: int, says: str) -> None:
    with pytest.raises(SliceFineError, match=says):
        MODELS[name].resized(dimension, value)


def test_an_unknown_model() -> None:
    with pytest.raises(SliceFineError, match=r"no model 'lama-3.2-3b'; there are .* Did you mean 'llama-3.2-3b'\?"):
        architecture("lama-3.2-3b")


def test_names_are_read_without_torch() -> None:
    code = (
        "import sys, slicefine.benchmarking.models, slicefine.benchmarking.methods\n"
        "sys.exit(bool({'torch', 'peft', 'transformers'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_usual_values_of_all_sweeps_exist() -> None:
    """Also for the models as they ship."""
    for name in ("r", "length", "width", "depth", "batch"):
        for gpu in (False, True):
            given = Settings(sweep=name, models=None)
            assert len(given.architectures(gpu)) == (6 if name == "r" else 18)
    ranks = {one.r for one in Settings(sweep="r", methods=("LoRA",)).compared()}
    assert ranks == {None, 1, 2, 4, 8, 16, 32, 64}
