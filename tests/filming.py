"""Clips made on the spot, whose frames can be told apart: frame n is grey of brightness 8 n."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

SIZE = (64, 48)
STEP = 8


def grey(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.full((size[1], size[0], 3), STEP * number, np.uint8)


def number_of(image: Image.Image) -> int:
    """Which frame this is. Encoding shifts the brightness by less than half a step."""
    return round(float(np.asarray(image).mean()) / STEP)


def noise(count: int, size: tuple[int, int] = SIZE) -> list[np.ndarray]:
    """Frames that need many bytes."""
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8) for _ in range(count)]


def film(
    path: Path,
    frames: int | Sequence[np.ndarray],
    *,
    codec: str = "mpeg4",
    rate: int = 10,
    times: Sequence[int] | None = None,
    sound: float = 0.0,
    rotation: int | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Write a clip in the format that the suffix of `path` says.

    `times`: of each frame, in units of 1/`rate` second. `sound`: seconds of silence beside the pictures.
    """
    pictures = [grey(number) for number in range(frames)] if isinstance(frames, int) else frames
    with av.open(str(path), "w", options=options or {}) as container:
        streams = {}
        if len(pictures):
            video = container.add_stream(codec, rate=rate)
            video.height, video.width = pictures[0].shape[:2]
            video.pix_fmt = "yuv420p"
            video.bit_rate = 2_000_000
            video.codec_context.gop_size = 5
            video.codec_context.time_base = Fraction(1, rate)
            if rotation is not None:
                video.set_display_rotation(rotation)
            streams[video] = list(map(av.VideoFrame.from_ndarray, pictures))
            starts = list(times or range(len(pictures)))
            for frame, start, end in zip(streams[video], starts, [*starts[1:], starts[-1] + 1], strict=True):
                frame.pts, frame.duration, frame.time_base = start, end - start, Fraction(1, rate)
        if sound:
            audio = container.add_stream("aac", rate=16000)
            streams[audio] = [
                av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                for _ in range(int(sound * 16000 / 1024))
            ]
            for number, frame in enumerate(streams[audio]):
                frame.sample_rate, frame.pts = 16000, 1024 * number
        for stream, made in streams.items():
            for frame in [*made, None]:
                for packet in stream.encode(frame):
                    container.mux(packet)
    return path


def film_bytes(path: Path, *args, **kwargs) -> bytes:
    return film(path, *args, **kwargs).read_bytes()


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 20)).save(file, "PNG")
    return file.getvalue()
