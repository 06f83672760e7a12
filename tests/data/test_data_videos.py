"""Clips out of videos: which frames, cut how, and what happens to files that are not what they should be."""

from __future__ import annotations

import io
import os
from contextlib import contextmanager
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_videos import grey, numbers, write_video

from trip_reference.data.folder import VideoFolder
from trip_reference.data.sample import BrokenClip, ClipFormat
from trip_reference.data.videos import decode_clip, open_video
from trip_rt.errors import InputError
from trip_rt.images import load_image

FIRST = ClipFormat(4, 16, 16, fps=4, crop="centre", start="first")


def decode(path, clip=FIRST, seed=0):
    return decode_clip(path, path.name, clip, np.random.default_rng(seed))


def like(**changes):
    return ClipFormat(
        **{"num_frames": 4, "height": 16, "width": 16, "fps": 4.0, "crop": "centre", "start": "first"} | changes
    )


@pytest.mark.parametrize(
    "file, codec",
    [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.webm", "libvpx"), ("a.mov", "mpeg4"), ("a.avi", "mpeg4")],
)
@pytest.mark.parametrize(
    "fps, stride, expected",
    [(8, 1, [0, 1, 2, 3]), (4, 1, [0, 2, 4, 6]), (4, 2, [0, 4, 8, 12]), (8 / 3, 1, [0, 3, 6, 9])],
)
def test_frames_are_those_of_the_wanted_rate(tmp_path, file, codec, fps, stride, expected):
    path = write_video(tmp_path / file, range(20), codec=codec)
    assert numbers(decode(path, like(fps=fps, stride=stride))) == expected


@pytest.mark.parametrize("fps", [24, 25, 30, Fraction(30000, 1001), 60])
def test_frames_between_the_grid_are_those_shown_at_the_time(tmp_path, fps):
    path = write_video(tmp_path / "a.mp4", [i / 2 for i in range(70)], fps=fps, gop=12)
    found = [2 * (float(frame.mean()) - 10) / 6 for frame in decode(path)]
    assert np.allclose(found, [int(i * fps / 4 + 0.01) for i in range(4)], atol=0.8)


def test_a_video_slower_than_the_clip_repeats_frames(tmp_path):
    assert numbers(decode(write_video(tmp_path / "a.mp4", range(6), fps=4), like(fps=8))) == [0, 0, 1, 1]


def test_variable_frame_rate_and_a_late_start(tmp_path):
    times = [0, 40, 80, 700, 740, 1000, 1010, 1020, 1600]
    for start in (0, 2500):
        path = write_video(tmp_path / "a.mkv", range(9), times=times, start=start)
        assert numbers(decode(path, like(num_frames=7))) == [0, 2, 2, 4, 5, 7, 7]  # at 0, 0.25 … 1.5 s


@pytest.mark.parametrize("gop, bframes", [(4, 0), (4, 2), (7, 3), (100, 2)])
def test_random_starts_reach_every_frame_that_leaves_a_whole_clip(tmp_path, gop, bframes):
    path = write_video(tmp_path / "a.mp4", range(20), gop=gop, bframes=bframes)
    clip, seen = like(num_frames=3, start="random"), set()
    for seed in range(60):
        found = numbers(decode(path, clip, seed))
        assert found == [found[0], found[0] + 2, found[0] + 4]
        assert numbers(decode(path, clip, seed)) == found
        seen.add(found[0])
    assert seen <= set(range(16)) and {0, 15} <= seen and len(seen) > 12


def test_seeking_reads_only_from_the_keyframe_on(tmp_path, monkeypatch):
    from trip_reference.data import videos

    decoded, decode_packets = [], videos._decode_packets
    monkeypatch.setattr(
        videos, "_decode_packets", lambda *where: (decoded.append(p) or p for p in decode_packets(*where))
    )
    path = write_video(tmp_path / "a.mp4", list(range(40)), gop=5)
    clip = like(num_frames=2, fps=8, start="random")
    for seed in range(8):
        decoded.clear()
        found = numbers(decode(path, clip, seed))
        assert found[1] == found[0] + 1 and len(decoded) <= 7


def test_seeking_too_far_is_made_good(tmp_path, monkeypatch):
    from trip_reference.data import videos

    opened = videos._opened

    class Overshooting:
        def __init__(self, container):
            self.demux, self.duration, self._seek = container.demux, container.duration, container.seek

        def seek(self, tick, stream):
            self._seek(tick + round(2 / stream.time_base), stream=stream)

    @contextmanager
    def overshooting(*given):
        with opened(*given) as (container, stream):
            yield Overshooting(container), stream

    path = write_video(tmp_path / "a.mp4", range(40))
    expected = [numbers(decode(path, like(num_frames=2, start="random"), seed)) for seed in range(6)]
    monkeypatch.setattr(videos, "_opened", overshooting)
    assert [numbers(decode(path, like(num_frames=2, start="random"), seed)) for seed in range(6)] == expected


def test_short_videos_repeat_their_last_frame(tmp_path):
    path = write_video(tmp_path / "a.mp4", range(5))
    for start in ("first", "random"):
        assert numbers(decode(path, like(num_frames=6, start=start))) == [0, 2, 4, 4, 4, 4]
    assert numbers(decode(write_video(tmp_path / "b.mp4", [7]))) == [7, 7, 7, 7]


def disc(height, width, frames=2, stretch=1.0):
    """A white disc in the middle, `stretch` times as wide as high, a third of the height across."""
    y, x = np.mgrid[:height, :width]
    inside = np.hypot((x + 0.5 - width / 2) / stretch, y + 0.5 - height / 2) < height / 6
    return np.repeat((inside * np.uint8(255))[None, :, :, None], frames, 0).repeat(3, -1)


def extent(frame):
    """Height and width of what is white."""
    white = frame[..., 0] > 128
    return white.any(1).sum(), white.any(0).sum()


@pytest.mark.parametrize(
    "source, wanted", [((64, 128), (48, 48)), ((128, 64), (48, 48)), ((96, 96), (32, 64)), ((64, 64), (96, 48))]
)
def test_pictures_are_cut_and_never_squashed(tmp_path, source, wanted):
    path = write_video(tmp_path / "a.mp4", disc(*source))
    frames = decode(path, like(height=wanted[0], width=wanted[1]))
    assert frames.shape == (4, *wanted, 3) and frames.dtype == np.uint8
    height, width = extent(frames[0])
    diameter = source[0] / 3 * max(wanted[0] / source[0], wanted[1] / source[1])
    assert abs(height - width) <= 1 and abs(height - diameter) <= 2


def test_pixels_that_are_not_square_are_shown_square(tmp_path):
    path = write_video(tmp_path / "a.mp4", disc(96, 96, stretch=0.5), pixel_aspect=Fraction(2, 1))
    height, width = extent(decode(path, like(height=48, width=48))[0])
    assert abs(height - width) <= 1 and abs(height - 16) <= 1


def test_the_centre_cut_is_the_runtimes(tmp_path):
    noise = np.random.default_rng(0).integers(60, 200, (12, 20, 3), dtype=np.uint8).repeat(6, 0).repeat(6, 1)
    path = write_video(tmp_path / "a.mp4", [noise])
    with av.open(str(path)) as container:
        source = next(container.decode(video=0)).to_ndarray(format="rgb24")
    cut = decode(path, like(height=40, width=24))[0]
    assert np.abs(cut.astype(int) - load_image(source, 40, 24)).max() <= 1


def test_random_cuts_stay_still_within_a_clip_and_reach_both_ends(tmp_path):
    ramp = np.repeat(np.linspace(0, 250, 192).astype(np.uint8)[None, :, None], 64, 0).repeat(3, -1)
    path = write_video(tmp_path / "a.mp4", [ramp] * 8)
    lefts = []
    for seed in range(40):
        frames = decode(path, like(height=32, width=32, crop="random", fps=8), seed)
        assert np.abs(frames.astype(int) - frames[0]).max() <= 3
        lefts.append(frames[0].mean())
    assert min(lefts) < 60 and max(lefts) > 190


@pytest.mark.parametrize("rotation, corner", [(90, (-1, 0)), (180, (-1, -1)), (-90, (0, -1))])
def test_rotated_videos_come_upright(tmp_path, rotation, corner):
    picture = np.full((64, 64, 3), 20, np.uint8)
    picture[:24, :24] = 235
    frame = decode(write_video(tmp_path / "a.mp4", [picture] * 2, rotation=rotation))[0]
    assert frame[corner].mean() > 200 and frame.mean() < 80


@pytest.mark.parametrize(
    "codec, pixels",
    [("libx264", "yuv444p"), ("libx264", "yuv420p10le"), ("ffv1", "bgra"), ("ffv1", "gray"), ("ffv1", "rgb48le")],
)
def test_odd_pixel_formats(tmp_path, codec, pixels):
    path = write_video(tmp_path / "a.mkv", range(8), codec=codec, pixels=pixels)
    assert numbers(decode(path)) == [0, 2, 4, 6]


def test_a_file_in_memory(tmp_path):
    data = io.BytesIO(write_video(tmp_path / "a.mp4", range(8)).read_bytes())
    assert numbers(decode_clip(data, "a", FIRST, np.random.default_rng(0))) == [0, 2, 4, 6]


def test_what_a_video_says_of_itself(tmp_path):
    with open_video(write_video(tmp_path / "a.mp4", range(9), fps=8), "a", FIRST) as video:
        assert (video.width, video.height, video.seconds, video.fps) == (64, 64, 1.0, 8.0)


@pytest.mark.parametrize("file, codec", [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.webm", "libvpx")])
def test_a_cut_off_file_gives_the_frames_it_has(tmp_path, file, codec):
    noise = np.random.default_rng(0).integers(-15, 16, (30, 64, 64, 3))
    frames = [(noise[i] + grey(i + 1)).astype(np.uint8) for i in range(30)]
    path = write_video(tmp_path / file, frames, codec=codec, faststart=file == "a.mp4")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert numbers(decode(path)) == [1, 3, 5, 7]
    found = {numbers(decode(path, like(num_frames=1, start="random"), seed))[0] for seed in range(80)}
    assert len(found) > 8 and max(found) < 25
    with pytest.raises(BrokenClip, match=r"cut-off file with 1\.\d+ s left, expected a whole one or at least 3\.75 s"):
        decode(path, like(num_frames=16))


def test_a_long_last_frame_is_no_sign_of_damage(tmp_path):
    path = write_video(tmp_path / "a.mkv", range(3), times=[0, 125, 3000])
    assert numbers(decode(path, like(num_frames=16))) == [0] + [1] * 11 + [2] * 4


def broken_file(folder, kind):
    path = folder / "clip.mp4"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "sound alone":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=16000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
            frame.rate = 16000
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
    elif kind in ("empty", "words", "playlist", "concat"):
        contents = {
            "words": "not a video",
            "playlist": "#EXTM3U\n#EXTINF:1,\nother.mp4\n",
            "concat": "ffconcat version 1.0\nfile other.mp4\n",
        }
        path.write_text(contents.get(kind, ""))
        write_video(folder / "other.mp4", range(3))
    elif kind != "missing":
        data = bytearray(write_video(path, range(24)).read_bytes())
        if kind == "cut off before its index":
            path.write_bytes(data[: len(data) // 2])
        elif kind == "garbled":
            start = data.index(b"mdat") + 4
            end = data.index(b"moov") - 4
            data[start:end] = np.random.default_rng(0).bytes(end - start)
            path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "kind, limits, words",
    [
        ("missing", {}, "no such file"),
        ("folder", {}, "not a plain file"),
        ("fifo", {}, "not a plain file"),
        ("empty", {}, "empty file"),
        ("words", {}, "damaged or unsupported"),
        ("playlist", {}, "damaged or unsupported"),
        ("concat", {}, "damaged or unsupported"),
        ("sound alone", {}, "no video stream"),
        ("cut off before its index", {}, "damaged or unsupported"),
        ("garbled", {}, "no picture that can be decoded|damaged"),
        ("whole", {"max_bytes": 1000}, "expected at most 0.0 MiB"),
        ("whole", {"max_pixels": 63 * 64}, "64 x 64 pixels, expected at least 1 and at most 4032"),
        ("whole", {"max_seconds": 2.0}, "2.9 s, expected at most 2 s"),
        ("whole", {"max_seconds": 0.01}, "more than 10 frames"),
    ],
)
def test_broken_files(tmp_path, kind, limits, words):
    path = broken_file(tmp_path, kind)
    with pytest.raises(BrokenClip, match=words) as caught:
        decode(path, like(**limits))
    assert (
        str(caught.value).startswith("clip.mp4: found")
        and "expected" in str(caught.value)
        and str(caught.value).isprintable()
    )


def test_times_out_of_order_are_found(tmp_path):
    with pytest.raises(BrokenClip, match="out of order"):
        decode(write_video(tmp_path / "a.avi", range(20)), like(num_frames=8))


@pytest.fixture(scope="module")
def sound_file(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "a.mp4", range(16)).read_bytes()


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_damage_gives_a_clip_or_a_reason(sound_file, data):
    damaged = bytearray(sound_file)
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    clip = like(start="random", crop="random", max_seconds=100.0)
    try:
        frames = decode_clip(io.BytesIO(damaged), "a", clip, np.random.default_rng(0))
        assert frames.shape == (4, 16, 16, 3)
    except BrokenClip as error:
        cause = error.__cause__
        assert isinstance(cause, (BrokenClip, av.FFmpegError, ValueError, OSError, ArithmeticError)), repr(cause)


def test_folder(tmp_path):
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos/a.mp4", range(8))
    (tmp_path / "annotations.json").write_text(
        '[{"video_path": "videos/a.mp4", "text": " it brightens "}, {"video_path": "videos/b.mp4", "text": "b"}]'
    )
    folder = VideoFolder(tmp_path, FIRST)
    sample = folder.clip(0, np.random.default_rng(0))
    assert (
        len(folder) == 2
        and numbers(sample.frames) == [0, 2, 4, 6]
        and sample.text == "it brightens"
        and "a.mp4" in sample.name
    )
    with pytest.raises(BrokenClip, match=r"b\.mp4: found no such file"):
        folder.clip(1, np.random.default_rng(0))


@pytest.mark.parametrize(
    "changes", [{"num_frames": 0}, {"height": 0}, {"stride": 0}, {"fps": 0.0}, {"fps": float("nan")}]
)
def test_useless_formats(changes):
    with pytest.raises(InputError, match="found"):
        like(**changes)
