"""Clips side by side as one moving picture, each under its sentence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from trip_rt.errors import printable
from trip_rt.images import shortened

LABEL, GAP = 22, 8  # pixels: the height of a sentence, the space between clips


def moving_sheet(
    clips: Sequence[NDArray[np.uint8]], labels: Sequence[str], columns: int = 4, width: int = 192
) -> NDArray[np.uint8]:
    """Clips of one shape uint8 [F, H, W, 3], each enlarged by whole pixels to about `width`, on white: uint8
    [F, sheet's height, sheet's width, 3], of even sides, as video wants them."""
    scale = max(1, round(width / clips[0].shape[2]))
    frames, height, width = clips[0].shape[0], scale * clips[0].shape[1], scale * clips[0].shape[2]
    columns = min(columns, len(clips))
    rows = -(-len(clips) // columns)
    size = rows * (height + LABEL + GAP) + GAP, columns * (width + GAP) + GAP
    blank = Image.new("RGB", (size[1] + size[1] % 2, size[0] + size[0] % 2), (255, 255, 255))
    draw, font = ImageDraw.Draw(blank), ImageFont.load_default(13)
    corners = [
        (GAP + row * (height + LABEL + GAP), GAP + column * (width + GAP))
        for row in range(rows)
        for column in range(columns)
    ]
    for (top, left), label in zip(corners, labels, strict=False):
        words = shortened(printable(label), lambda text: font.getlength(text) <= width)
        draw.text((left, top + LABEL / 2), words, fill=(40, 40, 40), font=font, anchor="lm")
    sheet = np.repeat(np.asarray(blank)[None], frames, axis=0)
    for (top, left), clip in zip(corners, clips, strict=False):
        sheet[:, top + LABEL : top + LABEL + height, left : left + width] = clip.repeat(scale, 1).repeat(scale, 2)
    return sheet
