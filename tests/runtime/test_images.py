"""Pictures of every kind come in upright and undistorted, unusable ones are refused in one line, and pixels survive the
round trip."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import time
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from trip_rt.errors import EngineError, InputError
from trip_rt.images import contact_sheet, load_image, to_frames, to_model

RED, WHITE = (255, 0, 0), (255, 255, 255)


def quadrants(width=32, height=16):
    """Red, green / blue, white: tells all eight orientations apart."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2] = RED
    picture[: height // 2, width // 2 :] = (0, 255, 0)
    picture[height // 2 :, : width // 2] = (0, 0, 255)
    picture[height // 2 :, width // 2 :] = WHITE
    return picture


def corners(picture):
    h, w = picture.shape[:2]
    return picture[[h // 4, h // 4, -h // 4, -h // 4], [w // 4, -w // 4, w // 4, -w // 4]].astype(int)


def png(width, height, bits, colour, data=b""):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_formats(tmp_path, kind):
    path = tmp_path / "picture"
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    path.write_bytes(encoded(Image.fromarray(quadrants()), kind, **options))
    for source in (path, str(path)):
        loaded = load_image(source, 16, 32)
        assert loaded.shape == (16, 32, 3) and loaded.dtype == np.uint8
        assert np.abs(loaded.astype(int) - quadrants()).max() <= (6 if kind == "JPEG" else 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, kind, orientation):
    """The stored picture is the upright one moved by the inverse of what the tag asks for (EXIF 2.3, table 6)."""
    upright = quadrants()
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned"
    path.write_bytes(encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif))
    loaded = load_image(path, 16, 32, "letterbox")
    assert np.abs(corners(loaded) - corners(upright)).max() <= 40


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01", b"Exif\0\0"])
def test_broken_exif_does_no_harm(tmp_path, exif):
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(Image.fromarray(quadrants()), "JPEG", exif=exif))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(path, 16, 32).shape == (16, 32, 3)


def half_transparent(colour):
    """`colour` on the left, transparent black on the right."""
    picture = np.zeros((16, 16, len(colour)), np.uint8)
    picture[:, :8] = colour
    return Image.fromarray(picture)


def palette_with_transparency():
    image = Image.new("P", (16, 16), 1)
    image.putpalette([9, 9, 9, 255, 0, 0])
    image.paste(0, (8, 0, 16, 16))
    return image, {"transparency": 0}


@pytest.mark.parametrize(
    ("image", "options", "left", "right"),
    [
        pytest.param(half_transparent((255, 0, 0, 255)), {}, RED, WHITE, id="RGBA"),
        pytest.param(half_transparent((100, 255)), {}, (100,) * 3, WHITE, id="LA"),
        pytest.param(*palette_with_transparency(), RED, WHITE, id="P-transparent"),
        pytest.param(Image.new("RGB", (16, 16), RED), {"transparency": RED}, WHITE, WHITE, id="RGB-transparent"),
        pytest.param(Image.new("L", (16, 16), 77), {}, (77,) * 3, (77,) * 3, id="L"),
        pytest.param(Image.new("1", (16, 16), 1), {}, WHITE, WHITE, id="1"),
        pytest.param(Image.fromarray(np.full((16, 16), 32896, np.uint16)), {}, (128,) * 3, (128,) * 3, id="I;16"),
        pytest.param(Image.fromarray(np.full((16, 16), 65535, np.int32)), {}, WHITE, WHITE, id="I"),
    ],
)
def test_modes(tmp_path, image, options, left, right):
    path = tmp_path / "picture"
    image.save(path, "TIFF" if image.mode == "I" else "PNG", **options)
    loaded = load_image(path, 16, 16)
    assert (loaded[8, 2] == left).all() and (loaded[8, -3] == right).all()
    if not options:
        assert (load_image(image, 16, 16) == loaded).all()


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(tmp_path, kind):
    path = tmp_path / "print"
    path.write_bytes(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), kind))
    assert np.abs(load_image(path, 16, 16)[8, 8].astype(int) - RED).max() <= 4


def test_big_endian_16_bit_tiff(tmp_path):
    path = tmp_path / "scan.tif"
    Image.frombytes("I;16B", (16, 16), np.full((16, 16), 32896, ">u2").tobytes()).save(path)
    assert (load_image(path, 16, 16) == 128).all()


def test_half_transparent_edges_do_not_darken():
    picture = np.zeros((64, 64, 4), np.uint8)  # transparent black beside opaque white
    picture[:, 32:] = 255
    assert load_image(picture, 16, 16).min() >= 254


def test_arrays():
    assert (load_image(quadrants(), 16, 32) == quadrants()).all()
    assert (load_image(np.full((16, 16), 5, np.uint8), 16, 16) == 5).all()
    assert (load_image(quadrants()[:, ::-1], 16, 32) == quadrants()[:, ::-1]).all()
    assert (load_image(quadrants() / 255, 16, 32) == quadrants()).all()
    assert (load_image((quadrants() / 255).astype(np.float16), 16, 32) == quadrants()).all()


def test_open_files(tmp_path):
    Image.fromarray(quadrants()).save(tmp_path / "a.png")
    assert (load_image(io.BytesIO((tmp_path / "a.png").read_bytes()), 16, 32) == quadrants()).all()
    with (tmp_path / "a.png").open("rb") as file:
        assert (load_image(file, 16, 32) == quadrants()).all()


@pytest.mark.parametrize("fit", ["crop", "letterbox"])
@pytest.mark.parametrize("size", [(400, 240), (240, 400), (300, 300), (1001, 333)])
@pytest.mark.parametrize("target", [(64, 64), (64, 96), (96, 64)])
def test_circle_stays_a_circle(size, target, fit):
    picture = Image.new("RGB", size)
    middle, radius = (size[0] / 2, size[1] / 2), min(size) / 4
    ImageDraw.Draw(picture).ellipse(
        [middle[0] - radius, middle[1] - radius, middle[0] + radius, middle[1] + radius], fill=WHITE
    )
    loaded = load_image(picture, *target, fit).astype(float)[..., 0] / 255
    assert abs(loaded.sum(1).max() - loaded.sum(0).max()) <= 1
    ratio = (
        max(target[1] / size[0], target[0] / size[1])
        if fit == "crop"
        else min(target[1] / size[0], target[0] / size[1])
    )
    assert loaded.sum() == pytest.approx(np.pi * (radius * ratio) ** 2, rel=0.06)
    weights = loaded / loaded.sum()
    centre = (weights.sum(1) @ (np.arange(target[0]) + 0.5), weights.sum(0) @ (np.arange(target[1]) + 0.5))
    assert centre == pytest.approx((target[0] / 2, target[1] / 2), abs=1)


def test_crop_keeps_the_middle_and_letterbox_pads_with_the_border_colour():
    picture = np.full((32, 96, 3), 50, np.uint8)
    picture[:, 32:64] = 200
    assert (load_image(picture, 32, 32)[4:-4, 4:-4] == 200).all()
    boxed = load_image(picture, 96, 96, "letterbox")
    border = np.concatenate([picture[0], picture[-1], picture[1:-1, 0], picture[1:-1, -1]]).mean(0).round()
    assert (boxed[:32] == border).all() and (boxed[64:] == border).all() and (boxed[32:64] == picture).all()


@settings(max_examples=60, deadline=None)
@given(
    *[st.integers(8, 120)] * 2, *[st.integers(1, 70)] * 2, st.sampled_from(["crop", "letterbox"]), st.integers(0, 255)
)
def test_any_size_gives_the_shape_asked_for(height, width, to_height, to_width, fit, level):
    loaded = load_image(np.full((height, width, 3), level, np.uint8), to_height, to_width, fit)
    assert loaded.shape == (to_height, to_width, 3) and loaded.dtype == np.uint8
    assert (loaded == level).all()


WHOLE = {
    kind: encoded(Image.effect_noise((64, 64), 60).convert("RGB"), kind)
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(None, "no such file", id="missing"),
        pytest.param(b"", "empty file", id="empty"),
        pytest.param(b"just some text\n", "another kind of file", id="text"),
        pytest.param(b"8BPS" + bytes(40), "another kind of file", id="unsupported"),
        pytest.param(b"P6 16 16 255 " + bytes(768), "another kind of file", id="format not allowed"),
        pytest.param(b"\x89PNG\r\n\x1a\n" + bytes(40), "damaged", id="header only"),
        *[pytest.param(data[: len(data) // 2], "damaged", id=f"half a {kind}") for kind, data in WHOLE.items()],
        pytest.param(png(16, 16, 8, 2, b"\0" * 10), "damaged", id="too little data"),
        pytest.param(png(1, 1, 8, 2, b"\0" * 4), "1 x 1 pixels, expected at least 8", id="one pixel"),
        pytest.param(png(4000, 3, 1, 0), "4000 x 3 pixels", id="too thin"),
        pytest.param(
            png(20_000, 20_000, 1, 0, bytes(2501 * 20_000)), "megapixels, expected at most 100", id="400 megapixels"
        ),
        pytest.param(png(12_000, 9_000, 1, 0), "12000 x 9000 pixels (108 megapixels)", id="108 megapixels"),
        pytest.param(png(11_000, 9_000, 1, 0), "damaged", id="99 megapixels without data"),
    ],
)
def test_unusable_files(tmp_path, content, words):
    path = tmp_path / "picture.png"
    if content is not None:
        path.write_bytes(content)
    start = time.perf_counter()
    with pytest.raises(InputError) as caught, warnings.catch_warnings():
        warnings.simplefilter("error")
        load_image(path, 16, 16)
    message = str(caught.value)
    assert (
        str(path) in message and words in message and "\n" not in message and "expected" in message and ";" in message
    )
    assert time.perf_counter() - start < 0.5


def test_unusable_paths(tmp_path):
    huge = tmp_path / "huge.png"
    huge.touch()
    os.truncate(huge, 257 * 2**20)
    os.mkfifo(tmp_path / "pipe")
    for path, words in [
        (tmp_path, "a folder"),
        (huge, "257 MB"),
        (tmp_path / "pipe", "found a named pipe"),
        (tmp_path / ("x" * 300), "name too long"),
        (tmp_path / "a\nb.png", "a?b.png"),
        ("nul\0.png", "nul?.png"),
        (huge / "inner.png", "cannot be read"),
    ]:
        with pytest.raises(InputError) as caught:
            load_image(path, 16, 16)
        assert words in str(caught.value).lower() or words in str(caught.value)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (np.zeros((16, 16, 3), np.int64), "int64 [16, 16, 3]"),
        (np.full((16, 16, 3), 255, np.float32), "float32 [16, 16, 3] of values 255 to 255, expected 0 (black) to 1"),
        (np.full((16, 16, 3), -1, np.float64), "values -1 to -1"),
        (np.full((16, 16, 3), np.nan, np.float32), "values nan to nan"),
        (np.zeros((3, 16, 16), np.float32), "float32 [3, 16, 16]"),
        (np.zeros((16, 16, 2), np.uint8), "uint8 [16, 16, 2]"),
        (None, "found None, expected a path"),
        (5, "found 5, expected a path"),
        (b"\x89PNG", "wrap bytes in io.BytesIO"),
        (torch.zeros(3, 16, 16), "found a Tensor, expected a path"),
        ([Image.new("RGB", (16, 16))], "Animator.batch takes several"),
        (io.BytesIO(), "found 0 bytes to read"),
        (io.BytesIO(b"GIF89a"), "damaged"),
        (io.StringIO("text"), "open it in binary mode"),
        (np.zeros((0, 16, 3), np.uint8), "16 x 0 pixels"),
        (Image.new("RGB", (3, 16)), "3 x 16 pixels"),
        (Image.new("F", (16, 16)), "floating-point"),
        (Image.new("I", (16, 16), 70000), "32-bit"),
    ],
)
def test_unusable_images(source, words):
    with pytest.raises(InputError, match=r"^image.*expected") as caught:
        load_image(source, 16, 16)
    assert words in str(caught.value)


def test_unusable_arguments():
    with pytest.raises(InputError, match="fit: found 'stretch'"):
        load_image(quadrants(), 16, 16, "stretch")
    with pytest.raises(InputError, match="height 0"):
        load_image(quadrants(), 0, 16)


def test_pixels_round_trip():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    images[..., 1] = images[..., 1].T.reshape(images[..., 1].shape)
    pixels = to_model(images)
    assert pixels.shape == (1, 3, 16, 16) and pixels.dtype == np.float32 and pixels.flags.c_contiguous
    assert pixels.min() == -1 and pixels.max() == 1
    assert (to_frames(pixels) == images).all()


def test_frames_are_clipped_and_rounded_half_to_even():
    values = np.array([-np.inf, -1.5, np.inf, 2.5 / 127.5 - 1, 3.5 / 127.5 - 1], np.float64).astype(np.float32)
    frames = to_frames(np.broadcast_to(values, (1, 3, 1, 5)))
    assert frames.shape == (1, 1, 5, 3) and frames[0, 0, :3, 0].tolist() == [0, 0, 255]
    assert frames[0, 0, 3:, 0].tolist() == np.rint((values[3:] + 1) * np.float32(127.5)).tolist()


def test_bad_pixels():
    with pytest.raises(EngineError, match="1 NaN of 12"):
        to_frames(np.where(np.arange(12) == 5, np.nan, 0).astype(np.float32).reshape(1, 3, 2, 2))
    with pytest.raises(ValueError, match="expected float32"):
        to_frames(np.zeros((1, 2, 2, 3), np.float32))
    with pytest.raises(ValueError, match="expected uint8"):
        to_model(np.zeros((1, 3, 2, 2), np.uint8))


def test_contact_sheet():
    clip = np.arange(16, dtype=np.uint8).reshape(16, 1, 1, 1).repeat(8, 1).repeat(8, 2).repeat(3, 3) * 10
    sheet = np.asarray(contact_sheet([clip, clip[:1]], columns=4, scale=2))
    assert sheet.shape == (2 * 12 + 2 * 16 + 4, 2 * 12 + 4 * 16 + 3 * 4, 3)
    assert sheet[20, [12, 32, 52, 72], 0].tolist() == [0, 50, 100, 150]
    assert sheet[40, 12, 0] == 0 and sheet[40, 40, 0] == 255
    labelled = contact_sheet([clip, clip], labels=["a red ball rolls to the right\n" * 30, "b"])
    assert (
        labelled.size == (2 * 12 + 8 * 160 + 7 * 4, 2 * 12 + 2 * 184 + 12) and np.asarray(labelled)[12:36].min() < 128
    )
    for bad in ([], [clip[0]], [clip[:0]]):
        with pytest.raises(ValueError, match="expected"):
            contact_sheet(bad)
    with pytest.raises(ValueError, match="1 labels"):
        contact_sheet([clip, clip], labels=["only one"])


def test_importing_stays_light():
    code = "import sys, trip_rt.images, trip_rt.video; print([m for m in ('PIL', 'av') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
