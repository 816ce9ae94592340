"""Clips: evenly spaced frames of a video file, and what is wrong with a file that has none.

A clip is gone through twice: once without decoding, for the time of each frame, and once decoding up to the last frame
that was chosen. No more than the chosen frames are kept. Where the packets of a file do not tell the times (raw streams,
and AVI files whose timestamps are those of decoding), everything is decoded to count, and then once more.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import av
from PIL import Image

from slicefine.errors import SliceFineError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

Source = Path | bytes

AGAIN = "Copy or download it again, or leave it out"
LEAST_SHARE = 0.9
"""Of the time that a container announces. Encoders round it, and count the sound; a file cut short lacks more."""


def read_frames(source: Source, num_frames: int) -> list[Image.Image]:
    """`num_frames` frames of the file, or of the bytes of one, evenly spaced in time: RGB, upright, all of one size.

    The time from the first frame to the end of the last is cut into `num_frames` equal parts. Of each, the frame is taken
    that shows in its middle: with parts counted by `k` from 0, at `start + (k + 1/2) / num_frames * (end - start)`. With N
    frames at a constant rate it is number `floor((k + 1/2) * N / num_frames)`, counted from 0, and none is taken twice.

    Raises `SliceFineError` for a file that is missing, empty, cut short, not a video, without pictures (sound alone), with
    fewer frames than `num_frames`, or damaged before the last frame taken. The message is the rest of a sentence that begins
    with the place of the clip.
    """
    images = _images(source, _Timeline.of_packets(source), num_frames, certain=False)
    if images is None:
        counted = _Timeline.of_frames(source)
        images = _images(source, counted, num_frames, certain=True)
        if images is None:
            raise SliceFineError(too_few(len(counted.starts), num_frames))
    return images


def count_frames(source: Source) -> int:
    """Decode all of the file, or of the bytes of one, and count its frames. Raises as `read_frames`."""
    _Timeline.of_packets(source)  # raises for a file that is cut short
    return len(_Timeline.of_frames(source).starts)


def too_few(found: int, num_frames: int) -> str:
    """What to say of a clip with `found` frames of which `num_frames` are to be sampled."""
    if not found:
        return f"no frame could be decoded. {AGAIN}."
    return (
        f"{found} frame{'s' * (found != 1)}, fewer than the {num_frames} that are sampled. Leave it out, or set "
        "`data.num_frames` lower where the model allows it."
    )


class _Timeline:
    """When each frame of a clip shows, as whole numbers in units of its own."""

    def __init__(self, times: list[tuple[int, int]]) -> None:
        """`times`: start and duration of each frame, in order; a duration of 0 is unknown."""
        self.starts = [start for start, _ in times]
        last = times[-1][1] if times else 0
        if not last and len(times) > 1:
            last = (self.starts[-1] - self.starts[0]) // (len(times) - 1)
        self.end = self.starts[-1] + max(last, 1) if times else 0

    @classmethod
    def of_packets(cls, source: Source) -> _Timeline:
        """As the packets of the file say, without decoding. Some say nothing, or what is not so: the frames decide."""
        with _opened(source) as (container, stream):
            times: list[tuple[int, int]] = []
            ends = [0.0]
            try:
                for packet in container.demux():  # of all streams: sound that outlasts the pictures is no fault
                    if not packet.size:
                        continue  # the mark of a stream's end
                    if packet.is_corrupt:
                        raise SliceFineError(
                            f"the file is cut short or damaged: its data end within a frame, after {len(times)} frames. {AGAIN}."
                        )
                    if packet.pts is not None and packet.time_base is not None:
                        ends.append(float((packet.pts + (packet.duration or 0)) * packet.time_base))
                    if packet.stream.index == stream.index and not packet.is_discard:
                        times.append((packet.pts or 0, packet.duration or 0))
            except av.FFmpegError as error:
                raise SliceFineError(f"reading fails after {len(times)} frames ({error.strerror}). {AGAIN}.") from error
            # Some containers count from 0, others from their first frame: the later end is never too early.
            announced, end = (container.duration or 0) / av.time_base, max(ends)
            if 0 < end < LEAST_SHARE * announced:
                raise SliceFineError(
                    f"the file is cut short: it announces {announced:.1f} seconds and ends after {end:.1f}. {AGAIN}."
                )
        return cls(sorted(times))

    @classmethod
    def of_frames(cls, source: Source) -> _Timeline:
        """As the decoded frames say; frames of equal length if they do not."""
        times: list[tuple[int, int]] = []
        told = True
        for frame in _decoded(source):
            told = told and frame.pts is not None
            times.append((frame.pts or 0, frame.duration or 0))
        told = told and all(one < other for (one, _), (other, _) in pairwise(times))
        return cls(times if told else [(number, 1) for number in range(len(times))])

    def pick(self, count: int) -> list[int]:
        """Numbers of the frames that show in the middle of `count` equal parts of the time, in order."""
        start, length = self.starts[0], self.end - self.starts[0]
        # Exact in whole numbers: a start counts if it is not after the middle, start + (2 k + 1) / (2 count) * length.
        return [bisect_right(self.starts, start + (2 * k + 1) * length // (2 * count)) - 1 for k in range(count)]


def _images(source: Source, timeline: _Timeline, count: int, *, certain: bool) -> list[Image.Image] | None:
    """The frames picked from the timeline; None if there are too few or, unless `certain`, others than it says."""
    if len(timeline.starts) < count:
        return None
    numbers = timeline.pick(count)
    images: list[Image.Image] = []
    for number, frame in enumerate(_decoded(source)):
        if not certain and (number == len(timeline.starts) or frame.pts != timeline.starts[number]):
            return None
        if number == numbers[len(images)]:
            size = images[0].size if images else None
            images += [_upright(frame, size)] * numbers.count(number)
        if len(images) == count:
            return images
    return None


def _upright(frame: VideoFrame, size: tuple[int, int] | None) -> Image.Image:
    """The frame as a picture, turned as its file says; brought to `size`, should the clip change it on its way."""
    image: Image.Image = frame.to_image(threads=1)  # a thread a core, the default, takes ten times as long
    turns = round(frame.rotation / 90) % 4  # counterclockwise
    if turns:
        kinds = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
        image = image.transpose(kinds[turns - 1])
    return image if size in (None, image.size) else image.resize(size)


def _decoded(source: Source) -> Iterator[VideoFrame]:
    with _opened(source) as (container, stream):
        number = 0
        try:
            for frame in container.decode(stream):
                yield frame
                number += 1
        except av.FFmpegError as error:
            raise SliceFineError(f"decoding fails after {number} frames ({error.strerror}). {AGAIN}.") from error


@contextmanager
def _opened(source: Source) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its pictures; closed in the end. Raises `SliceFineError` without the file's name."""
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")  # noqa: SIM115 -- closed below
    except OSError as error:
        raise SliceFineError(f"the file cannot be opened ({error.strerror}). Mend or remove it.") from error
    with file:
        if not file.seek(0, io.SEEK_END):
            raise SliceFineError(f"the file is empty (0 bytes). {AGAIN}.")
        file.seek(0)
        try:
            # A playlist must not open other files, let alone addresses, from within a data set.
            container = av.open(file, "r", options={"protocol_whitelist": "none"})
        except av.FFmpegError as error:
            raise SliceFineError(
                f"no video that FFmpeg can read, or one that is cut short ({error.strerror}). {AGAIN}."
            ) from error
        with container:
            stream = container.streams.best("video")
            if not isinstance(stream, av.VideoStream):
                kinds = " and ".join(sorted({other.type for other in container.streams}))
                found = (
                    f"no video stream in it; there is {kinds}" if kinds else "nothing in it, neither pictures nor sound"
                )
                raise SliceFineError(f"{found}. Leave it out.")
            if stream.codec_context is None:
                raise SliceFineError(
                    "no decoder for its pictures in this build of PyAV. Encode it anew, as H.264 for instance: ffmpeg -i "
                    "OLD -c:v libx264 NEW.mp4."
                )
            stream.codec_context.thread_count = 1  # loading runs in worker processes, each of which takes a core
            yield container, stream
