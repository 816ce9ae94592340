from __future__ import annotations

import json

import pytest
import torch

TINY = "--threads 1 --rounds 2 --warmup 1 --batch 2 --pixels 64 --width 8 --blocks 1"


@pytest.mark.usefixtures("imported")
def test_it_runs_and_writes_every_figure(tmp_path, capsys):
    import conv_step_time

    conv_step_time.main([*TINY.split(), "--output", str(tmp_path)])
    (path,) = tmp_path.glob("conv-step-time-*.json")
    figures, steps, raw = json.loads(path.read_text())["tables"]
    variants = ["frozen limit", *(f"SliceFine {axis} r{r}" for axis in ("row", "column") for r in (1, 5)), "full"]
    assert [(row["network"], row["variant"]) for row in steps["rows"]] == [
        (network, variant) for network in ("ResNet", "ConvNeXt") for variant in variants
    ]
    assert [row["variant"] for row in raw["rows"]] == 2 * variants
    assert all(row["median ms"] > 0 for row in steps["rows"])
    assert len(figures["rows"]) == 2 * 5
    assert [row["target"] for row in figures["rows"]] == 2 * [*4 * ["at most 1.05"], ""]
    assert "ResNet: warm-up round" in capsys.readouterr().err


def test_the_frozen_limit_reaches_the_stem_and_no_weight():
    import conv_step_time

    torch.manual_seed(0)
    options = conv_step_time.argparse.Namespace(seed=0, width=8, blocks=1)
    for build, stem in conv_step_time.NETWORKS.values():
        model = conv_step_time.frozen(build(options), stem)
        reached = {}
        model.get_submodule(stem).register_forward_hook(lambda module, _, y, reached=reached: reached.update(y=y))
        pixels = torch.randn(2, 3, 64, 64)
        conv_step_time.ImageVariant("", model).step(pixels)
        assert reached["y"].grad is not None
        assert all(parameter.grad is None for parameter in model.parameters())


def test_slices_are_in_all_layers_that_have_enough_rows_or_columns():
    import conv_step_time

    options = conv_step_time.argparse.Namespace(seed=0, width=8, blocks=1)
    model = conv_step_time.with_slices(conv_step_time.convnext(options), "column", 5)
    without = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)}
    without = {name.removeprefix("base_model.model.") for name in without if "base_layer" not in name}
    depthwise = {f"convnext.encoder.stages.{i}.layers.0.dwconv" for i in range(4)}
    assert without == {*depthwise, "convnext.embeddings.patch_embeddings", "classifier"}
