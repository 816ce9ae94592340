"""Frames of clips made on the spot: which ones are taken, and what is said of files that have none."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import av
import numpy as np
import pytest
from filming import film, film_bytes, grey, noise, number_of, png
from torch.utils.data import DataLoader, Dataset

from slicefine import SliceFineError
from slicefine.training import clips
from slicefine.training.clips import Source, count_frames, read_frames, too_few

KINDS = [
    ("mp4", "mpeg4"),
    ("mp4", "libx264"),  # frames are stored in another order than shown
    ("mov", "libx264"),
    ("avi", "mpeg4"),  # UCF101
    ("avi", "libx264"),  # timestamps are those of decoding
    ("webm", "libvpx"),  # no count of frames
    ("mkv", "libx264"),
    ("ts", "libx264"),  # does not begin at 0
    ("h264", "libx264"),  # no timestamps at all
]
LYING = [("avi", "libx264"), ("h264", "libx264")]


def numbers(source: Source, count: int) -> list[int]:
    return [number_of(image) for image in read_frames(source, count)]


def refusal(source: Source, count: int = 4) -> str:
    with pytest.raises(SliceFineError) as error:
        read_frames(source, count)
    return str(error.value)


@pytest.mark.parametrize(("suffix", "codec"), KINDS)
def test_frames_are_evenly_spaced_in_every_container(suffix: str, codec: str, tmp_path: Path) -> None:
    clip = film(tmp_path / f"clip.{suffix}", 30, codec=codec)
    for count in (1, 8, 30):
        assert numbers(clip, count) == [(2 * k + 1) * 30 // (2 * count) for k in range(count)]
    assert numbers(clip.read_bytes(), 8) == numbers(clip, 8)
    assert count_frames(clip) == 30
    assert "30 frames, fewer than the 31 that are sampled." in refusal(clip, 31)


def test_frames_are_pictures(tmp_path: Path) -> None:
    (image,) = read_frames(film(tmp_path / "clip.mp4", [grey(3)]), 1)
    assert (image.mode, image.size) == ("RGB", (64, 48))
    assert abs(np.asarray(image).astype(int) - grey(3)).max() <= 2


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_it_is_time_that_is_evenly_spaced(suffix: str, tmp_path: Path) -> None:
    """Five frames in half a second, one every two seconds, and two together at the end."""
    clip = film(tmp_path / f"clip.{suffix}", 10, times=[0, 1, 2, 3, 4, 20, 40, 60, 80, 81])
    # The middles of fifths of 82 units: 8.2, 24.6, 41, 57.4 and 73.8. A frame that shows for long is taken twice.
    assert numbers(clip, 5) == [4, 5, 6, 6, 7]


def test_the_middle_is_exact() -> None:
    """Where a frame begins in the very middle of a part, it is taken: no rounding decides."""
    timeline = clips._Timeline([(3 * n, 3) for n in range(10**6)])
    assert timeline.pick(3) == [166_666, 500_000, 833_333]
    large = clips._Timeline([(2**53 + n, 1) for n in range(6)])  # no float could tell these apart
    assert large.pick(3) == [1, 3, 5]


def test_packets_that_lie_are_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With other times than those of the frames, the frames are counted."""
    clip = film(tmp_path / "clip.mp4", 12)
    assert numbers(clip, 3) == [2, 6, 10]
    for wrong in ([], [(n * n, 1) for n in range(12)], [(1024 * n, 1024) for n in range(30)]):
        monkeypatch.setattr(clips._Timeline, "of_packets", lambda _, wrong=wrong: clips._Timeline(wrong))
        assert numbers(clip, 3) == [2, 6, 10]


@pytest.mark.parametrize(("suffix", "codec"), [kind for kind in KINDS if kind not in LYING])
def test_most_clips_are_decoded_once(suffix: str, codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = film(tmp_path / f"clip.{suffix}", 12, codec=codec)
    monkeypatch.setattr(clips._Timeline, "of_frames", None)
    assert numbers(clip, 3) == [2, 6, 10]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_a_clip_that_does_not_begin_at_0(suffix: str, tmp_path: Path) -> None:
    """Some containers count the time before it as theirs: such a file is not cut short."""
    clip = film(tmp_path / f"clip.{suffix}", 12, codec="libx264", times=range(100, 112))
    assert numbers(clip, 3) == [2, 6, 10]


def test_a_clip_cut_without_encoding_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It begins with frames that are there to decode others, and not to be shown."""
    clip = film(tmp_path / "clip.mp4", 15, codec="libx264", times=range(-3, 12))
    assert count_frames(clip) == 12
    monkeypatch.setattr(clips._Timeline, "of_frames", None)
    assert numbers(clip, 3) == [3 + 2, 3 + 6, 3 + 10]


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_clips_of_a_turned_phone_are_upright(degrees: int, tmp_path: Path) -> None:
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24, :32] = 255  # the upper left corner
    clip = film(tmp_path / "clip.mp4", [picture], codec="libx264", rotation=degrees)
    (image,) = read_frames(clip, 1)
    expected = np.rot90(picture, degrees // 90)  # counterclockwise, as the metadata mean it
    assert np.asarray(image).shape == expected.shape
    assert abs(np.asarray(image).astype(int) - expected).mean() < 10


def test_a_clip_that_changes_its_size(tmp_path: Path) -> None:
    """Two streams of H.264, one after the other: as from a camera that was turned."""
    (tmp_path / "clip.h264").write_bytes(
        film_bytes(tmp_path / "a.h264", 4, codec="libx264")
        + film_bytes(tmp_path / "b.h264", [grey(n, (32, 64)) for n in range(4, 8)], codec="libx264")
    )
    images = read_frames(tmp_path / "clip.h264", 8)
    assert {image.size for image in images} == {(64, 48)}
    assert [number_of(image) for image in images] == list(range(8))


def test_sound_beside_the_pictures(tmp_path: Path) -> None:
    """Also where it lasts much longer."""
    clip = film(tmp_path / "clip.mp4", 10, sound=4.0)
    assert numbers(clip, 5) == [1, 3, 5, 7, 9]


def test_few_frames_are_kept_in_memory(tmp_path: Path) -> None:
    clip = film(tmp_path / "clip.mp4", noise(60, (320, 240)))
    read_frames(clip, 2)
    tracemalloc.start()
    try:
        read_frames(clip, 2)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 6 * 320 * 240 * 3  # of 60 frames


# ---------------------------------------------------------------- what cannot be used


@pytest.mark.parametrize(
    ("suffix", "codec", "options", "says"),
    [
        ("mp4", "mpeg4", {}, "no video that FFmpeg can read, or one that is cut short"),  # the index comes last
        ("mp4", "libx264", {"movflags": "faststart"}, "its data end within a frame, after 1"),
        ("mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}, "its data end within a frame, after 1"),
        ("avi", "mpeg4", {}, "its data end within a frame, after 1"),
        ("webm", "libvpx", {}, "it announces 3.0 seconds and ends after 1."),
        ("mkv", "libx264", {}, "it announces 3.0 seconds and ends after 1."),
    ],
)
def test_half_a_file(suffix: str, codec: str, options: dict[str, str], says: str, tmp_path: Path) -> None:
    whole = film_bytes(tmp_path / f"clip.{suffix}", noise(30), codec=codec, options=options)
    assert len(read_frames(whole, 4)) == 4
    half = whole[: len(whole) // 2]
    assert says in refusal(half)
    assert refusal(half).endswith("Copy or download it again, or leave it out.")
    with pytest.raises(SliceFineError, match="cut short"):
        count_frames(half)


def damaged(folder: Path, *, at: float = 0.5) -> bytes:
    data = bytearray(film_bytes(folder / "clip.mp4", noise(30), codec="libx264"))
    begin = int(at * len(data))
    data[begin : begin + len(data) // 8] = bytes(len(data) // 8)
    return bytes(data)


def test_a_clip_of_which_nothing_can_be_decoded_is_not_called_short() -> None:
    assert too_few(0, 4) == "no frame could be decoded. Copy or download it again, or leave it out."


def of_an_unknown_codec(folder: Path) -> bytes:
    return film_bytes(folder / "clip.mp4", 8, codec="libx264").replace(b"avc1", b"xxxx")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda _: b"", "the file is empty (0 bytes). Copy or download it again, or leave it out."),
        (lambda _: b"no video at all\n" * 50, "no video that FFmpeg can read"),
        (lambda _: bytes(5000), "no video that FFmpeg can read"),
        (lambda _: png(), "1 frame, fewer than the 4 that are sampled. Leave it out, or set `data.num_frames` lower"),
        (lambda folder: film_bytes(folder / "clip.mp4", 3), "3 frames, fewer than the 4 that are sampled."),
        (lambda folder: film_bytes(folder / "clip.mp4", [], sound=1.0), "no video stream in it; there is audio. Leave"),
        (of_an_unknown_codec, "no decoder for its pictures in this build of PyAV. Encode it anew"),
        (damaged, "decoding fails after 1"),
    ],
)
def test_what_is_said_of_bad_files(make, says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = make(tmp_path)
    path = tmp_path / "bad"
    path.write_bytes(data)
    assert says in refusal(path)
    assert refusal(data) == refusal(path)
    assert capfd.readouterr() == ("", "")  # FFmpeg says nothing beside


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:3.0,\n{clip}\n#EXT-X-ENDLIST\n"),
        ("list.ffconcat", "ffconcat version 1.0\nfile {clip.name}\n"),
    ],
)
def test_playlists_open_nothing(name: str, content: str, tmp_path: Path) -> None:
    """They would play other files, or what is at an address."""
    clip = film(tmp_path / "clip.ts", 8, codec="libx264")
    (tmp_path / name).write_text(content.format(clip=clip))
    av.open(str(tmp_path / name)).close()
    assert "no video that FFmpeg can read" in refusal(tmp_path / name)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    assert "the file cannot be opened (No such file or directory)." in refusal(tmp_path / "absent.mp4")
    assert "the file cannot be opened (Is a directory)." in refusal(tmp_path)


def test_counting_finds_what_is_damaged_behind_the_last_frame_taken(tmp_path: Path) -> None:
    data = damaged(tmp_path, at=0.8)
    assert len(read_frames(data, 1)) == 1
    with pytest.raises(SliceFineError, match="decoding fails after 2"):
        count_frames(data)


# ---------------------------------------------------------------- processes


class Numbers(Dataset):
    def __init__(self, clip: Path) -> None:
        self.clip = clip

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> list[int]:
        return [index, *numbers(self.clip, 4)]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_worker_processes(start: str, tmp_path: Path) -> None:
    """Also where the parent has decoded before it forks."""
    clip = film(tmp_path / "clip.mp4", 16, codec="libx264")
    assert numbers(clip, 4) == [2, 6, 10, 14]
    loader = DataLoader(
        Numbers(clip), batch_size=None, num_workers=2, multiprocessing_context=start, timeout=60, collate_fn=list
    )
    assert list(loader) == [[index, 2, 6, 10, 14] for index in range(8)]
