"""Pictures in and out: strangers' files to uint8 arrays, uint8 arrays to model pixels and back, and contact sheets of
clips."""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from trip_rt.checks import one_of, shown
from trip_rt.errors import EngineError, InputError, printable
from trip_rt.files import whole_file
from trip_rt.plain_files import check_plain

if TYPE_CHECKING:
    from PIL import Image

ACCEPTED_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_MEGAPIXELS = 100
MAX_FILE_MEGABYTES = 256
MIN_SIDE = 8

Fit = Literal["crop", "letterbox"]
Picture: TypeAlias = "str | os.PathLike[str] | IO[bytes] | Image.Image | NDArray[np.uint8] | NDArray[np.floating[Any]]"
_FILTERS = threading.Lock()  # the process has one set of warnings' filters, which threads must not put back crosswise
_KIND = f"a picture file ({', '.join(ACCEPTED_FORMATS)})"
_EXPECTED = f"expected {_KIND}"


def load_image(
    source: Picture, height: int, width: int, fit: Fit = "crop", max_megapixels: float = MAX_MEGAPIXELS
) -> NDArray[np.uint8]:
    """A picture as uint8 [height, width, 3], upright and never distorted.

    `source` is a path, a file opened for reading bytes (such as BytesIO), a PIL image, or an array [h, w], [h, w, 3] or
    [h, w, 4]: uint8, or floating-point from 0 (black) to 1. EXIF rotation is applied, transparency is laid on white,
    16-bit greyscale is scaled to 8 bits; of an animation the first frame counts. `fit="crop"` keeps the largest centred
    part of the target's aspect; `fit="letterbox"` keeps all of it, padded with the mean colour of its outermost pixels.

    Raises InputError for what cannot be used, before decoding it where it is larger than `max_megapixels` or
    MAX_FILE_MEGABYTES.
    """
    from PIL import Image

    one_of("fit", fit, get_args(Fit))
    if height < 1 or width < 1:
        raise InputError(f"size: found height {height} and width {width}, expected both to be at least 1")
    if hasattr(source, "read") and not isinstance(source, Image.Image):
        source = _in_memory(source)  # before the lock: it may be slow
    with _FILTERS, warnings.catch_warnings():
        # Pillow warns of large pictures and broken metadata; here they are refused or do no harm.
        warnings.simplefilter("ignore")
        if isinstance(source, np.ndarray):
            return _fitted(_from_array(source, max_megapixels), "image array", height, width, fit, max_megapixels)
        if isinstance(source, Image.Image):
            return _fitted(source, "image", height, width, fit, max_megapixels)
        if isinstance(source, (str, os.PathLike)):
            name = printable(os.fsdecode(source))
            _check_file(source, name)
            with open(source, "rb") as file, _open(file, name) as image:
                return _fitted(image, name, height, width, fit, max_megapixels)
        if isinstance(source, io.BytesIO):
            with _open(source, "image file") as image:
                return _fitted(image, "image file", height, width, fit, max_megapixels)
    if isinstance(source, (list, tuple)):
        raise InputError(f"image: found a {type(source).__name__}, expected one picture; Animator.batch takes several")
    raise InputError(
        f"image: found {shown(source)}, expected a path, an open file, a PIL image or an array [h, w, 3]; wrap bytes in"
        " io.BytesIO, turn a tensor into an array"
    )


def at_size(pictures: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Pictures uint8 [n, H, W, 3] as load_image fits them to another size; themselves where it is their own."""
    if pictures.shape[1:3] == (height, width):
        return pictures
    return np.stack([load_image(picture, height, width) for picture in pictures])


def to_model(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] in [-1, 1]."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"images: found {images.dtype} {list(images.shape)}, expected uint8 [B, H, W, 3]")
    pixels = images.transpose(0, 3, 1, 2).astype(np.float32)  # [B, 3, H, W]
    return np.ascontiguousarray(pixels / np.float32(127.5) - np.float32(1))


def to_frames(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """Model pixels [F, 3, H, W] in [-1, 1] to uint8 [F, H, W, 3]: clipped, rounded half to even. EngineError where any
    is NaN."""
    if not np.issubdtype(pixels.dtype, np.floating) or pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels: found {pixels.dtype} {list(pixels.shape)}, expected float32 [F, 3, H, W]")
    if bad := int(np.isnan(pixels).sum()):
        raise EngineError(f"pixels: found {bad} NaN of {pixels.size} values, expected none")
    levels = np.rint((np.clip(pixels.astype(np.float32), -1, 1) + np.float32(1)) * np.float32(127.5))
    return np.ascontiguousarray(levels.astype(np.uint8).transpose(0, 2, 3, 1))  # [F, H, W, 3]


def contact_sheet(
    clips: Sequence[NDArray[np.uint8]], columns: int = 8, labels: Sequence[str] | None = None, scale: int | None = None
) -> Image.Image:
    """An RGB picture with a row per clip (uint8 [F, H, W, 3]): up to `columns` evenly spaced frames, first and last
    among them.

    `labels` are written above the rows. `scale` enlarges frames by whole pixels; by default so that the largest is
    about 160 wide.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not clips or columns < 1 or (labels is not None and len(labels) != len(clips)):
        found = f"{len(clips)} clips, {columns} columns, {'no' if labels is None else len(labels)} labels"
        raise ValueError(
            f"contact sheet: found {found}, expected a clip and a column at least, and a label for each clip or none"
        )
    for clip in clips:
        if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[3] != 3 or 0 in clip.shape:
            raise ValueError(f"clip: found {clip.dtype} {list(clip.shape)}, expected uint8 [F, H, W, 3]")
    scale = scale or max(1, round(160 / max(clip.shape[2] for clip in clips)))
    cell_width = scale * max(clip.shape[2] for clip in clips)
    cells = max(min(columns, len(clip)) for clip in clips)
    gap, margin, label_height = 4, 12, 24 if labels is not None else 0
    heights = [label_height + scale * clip.shape[1] for clip in clips]
    row_gap = margin if labels is not None else gap
    size = (2 * margin + cells * cell_width + (cells - 1) * gap, 2 * margin + sum(heights) + row_gap * (len(clips) - 1))
    sheet = Image.new("RGB", size, (255, 255, 255))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    top = margin
    for row, clip in enumerate(clips):
        if labels is not None:
            label = shortened(printable(labels[row]), lambda text: font.getlength(text) <= size[0] - 2 * margin)
            draw.text((margin, top + label_height / 2), label, fill=(40, 40, 40), font=font, anchor="lm")
        for column, frame in enumerate(np.rint(np.linspace(0, len(clip) - 1, min(columns, len(clip)))).astype(int)):
            picture = Image.fromarray(np.ascontiguousarray(clip[frame].repeat(scale, 0).repeat(scale, 1)))
            sheet.paste(picture, (margin + column * (cell_width + gap), top + label_height))
        top += heights[row] + row_gap
    return sheet


def check_png(path: Path, what: str) -> None:
    """InputError for a place that `save_png` could not write `what` to."""
    if path.suffix.lower() != ".png" or os.path.isdir(path) or not os.access(path.parent, os.W_OK | os.X_OK):
        raise InputError(
            f"{printable(str(path))}: expected a file name ending in .png, in a folder to write in, for {what}"
        )


def save_png(image: Image.Image, path: Path) -> None:
    """Write a picture, whole or not at all; InputError where the disk refuses."""
    try:
        with whole_file(path) as part:
            image.save(part, "PNG")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"cannot write {printable(str(path))}: {reason}; choose another place") from error


def shortened(text: str, fits: Callable[[str], bool]) -> str:
    """The text, or as much of its beginning as `fits`, with dots."""
    if fits(text):
        return text
    while text and not fits(text + "..."):
        text = text[:-1]
    return text + "..."


def _from_array(array: NDArray[Any], max_megapixels: float) -> Image.Image:
    from PIL import Image

    found = f"{array.dtype} {list(array.shape)}"
    floating = np.issubdtype(array.dtype, np.floating)
    if not (array.dtype == np.uint8 or floating) or not (
        array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    ):
        expected = "uint8, or floating-point from 0 to 1, [h, w], [h, w, 3] or [h, w, 4]"
        raise InputError(f"image array: found {found}, expected {expected}; convert it first")
    _check_size("image array", array.shape[1], array.shape[0], max_megapixels)
    if floating:
        if not (array.min() >= 0 and array.max() <= 1):  # False of NaN
            raise InputError(
                f"image array: found {found} of values {array.min():g} to {array.max():g}, expected 0 (black) to 1;"
                " scale it, or convert it to uint8"
            )
        array = np.rint(array.astype(np.float32) * 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(array))


def _in_memory(file: Any) -> io.BytesIO:
    """The rest of an open file."""
    data = file.read((MAX_FILE_MEGABYTES << 20) + 1)
    if not isinstance(data, bytes):
        raise InputError(f"image file: found one of {shown(data)}, expected bytes; open it in binary mode ('rb')")
    if not 0 < len(data) <= MAX_FILE_MEGABYTES << 20:
        raise InputError(
            f"image file: found {len(data)} bytes to read, expected 1 to {MAX_FILE_MEGABYTES} MB; rewind it first, or"
            " save the picture smaller"
        )
    return io.BytesIO(data)


def _check_file(path: str | os.PathLike[str], name: str) -> None:
    size = check_plain(path, f"{_KIND}; check the path")
    if size == 0:
        raise InputError(f"{name}: found an empty file (0 bytes), {_EXPECTED}; copy or download it again")
    if size > MAX_FILE_MEGABYTES * 2**20:
        raise InputError(
            f"{name}: found a file of {size / 2**20:.0f} MB, expected at most {MAX_FILE_MEGABYTES} MB; save it smaller,"
            " as PNG or JPEG"
        )
    if not os.access(path, os.R_OK):
        raise InputError(
            f"{name}: found a file without read permission, {_EXPECTED}; change its permissions or copy it"
        )


def _check_size(name: str, width: int, height: int, max_megapixels: float) -> None:
    if min(width, height) < MIN_SIDE:
        raise InputError(
            f"{name}: found {width} x {height} pixels, expected at least {MIN_SIDE} on each side; use a larger picture"
        )
    if width * height > max_megapixels * 1_000_000:
        found = f"{width} x {height} pixels ({width * height / 1e6:.0f} megapixels)"
        raise InputError(f"{name}: found {found}, expected at most {max_megapixels:g} megapixels; scale it down first")


def _open(file: IO[bytes], name: str) -> Image.Image:
    """Reads the header only."""
    from PIL import Image

    try:
        return Image.open(file, formats=ACCEPTED_FORMATS)
    except Image.DecompressionBombError as error:
        found = f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} megapixels"
        raise InputError(f"{name}: found {found}, expected at most {MAX_MEGAPIXELS}; scale it down first") from error
    except Exception as error:  # a hostile file can raise nearly anything from inside a decoder
        file.seek(0)
        head = file.read(8)
        if head.startswith((b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"BM", b"GIF8", b"II*\0", b"MM\0*")):
            raise _damaged(name, error) from error
        raise InputError(
            f"{name}: found another kind of file (it starts {head!r}), {_EXPECTED}; convert it to PNG or JPEG"
        ) from error


def _damaged(name: str, error: Exception) -> InputError:
    reason = printable(str(error) or type(error).__name__)[:120]
    return InputError(
        f"{name}: found a damaged, cut-off or unsupported picture ({reason}), {_EXPECTED}; save or download it again"
    )


def _fitted(
    image: Image.Image, name: str, height: int, width: int, fit: Fit, max_megapixels: float
) -> NDArray[np.uint8]:
    from PIL import Image, ImageOps

    _check_size(name, *image.size, max_megapixels)
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # as in _open
        raise _damaged(name, error) from error
    image = _eight_bit(image, name)
    if fit == "crop":
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    else:
        ratio = min(width / image.width, height / image.height)
        size = max(1, round(image.width * ratio)), max(1, round(image.height * ratio))
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    pixels = np.array(image.convert("RGB"))  # [h, w, 3]
    if fit == "crop":
        return pixels
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    canvas = np.empty((height, width, 3), np.uint8)
    canvas[:] = np.rint(border.mean(0))
    top, left = (height - image.height) // 2, (width - image.width) // 2
    canvas[top : top + image.height, left : left + image.width] = pixels
    return canvas


def _eight_bit(image: Image.Image, name: str) -> Image.Image:
    """The decoded picture as RGB or RGBA; Pillow's own conversion would clip 16-bit samples to white."""
    from PIL import Image

    if image.mode.startswith("I"):
        samples = np.asarray(image)
        if samples.min() < 0 or samples.max() > 65535:
            raise InputError(
                f"{name}: found 32-bit samples, expected 8 or 16 bits per channel; convert it to an 8-bit PNG"
            )
        return Image.fromarray(np.rint(samples / np.float32(257)).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise InputError(
            f"{name}: found floating-point samples, expected 8 or 16 bits per channel; convert it to an 8-bit PNG"
        )
    return image.convert("RGBA" if image.has_transparency_data else "RGB")
