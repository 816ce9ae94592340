"""What images and clips a model takes, as its configuration says."""

from __future__ import annotations

from typing import Any


def pixel_shape(config: Any, side: int = 224) -> tuple[int, ...]:
    """`(channels, height, width)` of an image for the model of `config`, `(frames, channels, height, width)` of a clip.

    Args:
        side: Height and width where the configuration names no size: a convolutional network takes any.
    """
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or side
    height, width = (size, size) if isinstance(size, int) else size[-2:]
    frames = getattr(config, "num_frames", None)
    return (*((frames,) if frames else ()), getattr(vision, "num_channels", 3), height, width)
