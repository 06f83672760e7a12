"""Damaged pictures: one that is accepted gives the shape asked for."""

import io

import numpy as np
import pytest
from fuzzing import damaged, fuzz_area
from PIL import Image

from trip_rt.images import ACCEPTED_FORMATS, load_image


def pictures(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
    smooth = np.linspace(0, 255, 24 * 40 * 3).reshape(24, 40, 3).astype(np.uint8)
    modes = ("RGB", "P") if kind == "GIF" else ("RGB", "L") if kind in ("JPEG", "WEBP", "BMP") else ("RGB", "RGBA", "L")
    for mode in modes:
        for array in (pixels, smooth):
            buffer = io.BytesIO()
            Image.fromarray(array).convert(mode).save(buffer, kind)
            yield buffer.getvalue()


@pytest.mark.parametrize("kind", ACCEPTED_FORMATS)
@fuzz_area("pictures", quick=25, full=500)
def test_pictures(fuzz, tmp_path, kind):
    def load(data):
        (tmp_path / "picture").write_bytes(data)
        for source in (tmp_path / "picture", io.BytesIO(data)):
            loaded = load_image(source, 16, 32)
            assert loaded.shape == (16, 32, 3) and loaded.dtype == np.uint8

    fuzz(damaged(list(pictures(kind))), load, folder=tmp_path)
