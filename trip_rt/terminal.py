"""Pictures in a terminal of 24-bit colours: two pixels a character."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CLEAR = "\x1b[2J\x1b[H"
_SAVE, _HOME, _RESTORE, _PLAIN = "\x1b7", "\x1b[H", "\x1b8", "\x1b[0m"


def below(rows: int) -> str:
    """Goes to where to write under a picture of so many rows, and clears that."""
    return f"\x1b[{rows + 2};1H\x1b[J"


def rows_of(height: int, width: int, columns: int, lines: int) -> int:
    """How many rows of characters a picture of height × width takes in a terminal of that size, with two lines left
    under it."""
    return max(1, min(lines - 3, columns * height // (2 * width)))


def drawn(frame: NDArray[np.uint8], rows: int) -> str:
    """What draws uint8 [H, W, 3] at the top left, `rows` rows high, and leaves the cursor where it was."""
    height, width = frame.shape[:2]
    columns = max(1, round(2 * rows * width / height))
    pixels = np.asarray(Image.fromarray(frame).resize((columns, 2 * rows), Image.Resampling.BOX))
    lines = []
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        cells = (
            f"\x1b[38;2;{a};{b};{c}m\x1b[48;2;{d};{e};{f}m▀" for (a, b, c), (d, e, f) in zip(upper, lower, strict=True)
        )
        lines.append("".join(cells) + _PLAIN)
    return _SAVE + _HOME + "\r\n".join(lines) + _RESTORE
