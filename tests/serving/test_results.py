"""The files of finished clips."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image
from service_parts import FRAMES

from trip_rt.serving import results
from trip_rt.serving.results import Results


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (3, 2, 2), (5, 3, 2), (16, 4, 4)])
def test_a_spritesheet_has_all_frames_row_by_row(count, columns, rows):
    frames = np.stack([np.full((4, 6, 3), 10 * index + 1, np.uint8) for index in range(count)])
    sheet = np.asarray(results.spritesheet(frames))
    assert sheet.shape == (4 * rows, 6 * columns, 3)
    for index in range(rows * columns):
        row, column = divmod(index, columns)
        cell = sheet[4 * row : 4 * row + 4, 6 * column : 6 * column + 6]
        assert (cell == (10 * index + 1 if index < count else 0)).all()


def test_a_large_spritesheet_is_scaled_down():
    assert results.spritesheet(np.zeros((9, 1000, 2000, 3), np.uint8)).size == (4096, 2048)


def test_a_draft_is_kept_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyError), results.draft(tmp_path, "broken", keep=True) as draft:
        (draft / "video.mp4").write_bytes(b"half")
        raise KeyError
    with results.draft(tmp_path, "tried") as draft:
        (draft / "video.mp4").write_bytes(b"whole")
    assert os.listdir(tmp_path / ".drafts") == []
    with results.draft(tmp_path, "made", keep=True) as draft:
        size = results.write(draft, FRAMES, 8)
    kept = Results(tmp_path)
    kept.take("made", size)
    path = kept.path("made", results.VIDEO)
    assert kept.bytes == size == sum(file.stat().st_size for file in path.parent.iterdir())
    assert len(results.read_frames(path)) == 5 and os.listdir(tmp_path / ".drafts") == []
    with Image.open(kept.path("made", results.THUMBNAIL)) as image:
        assert image.size == (48, 32) and image.format == "WEBP"
    with pytest.raises(OSError):
        kept.take("made", size)
    kept.remove("made", size)
    assert kept.bytes == 0 and os.listdir(tmp_path) == [".drafts"]


def test_a_sweep_leaves_what_is_known(tmp_path):
    for name in ("known", "unknown", ".drafts/half"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "video.mp4").write_bytes(b"a video")
    kept = Results(tmp_path)
    kept.sweep({"known": 7})
    assert sorted(os.listdir(tmp_path)) == [".drafts", "known"] and os.listdir(tmp_path / ".drafts") == []
    assert kept.bytes == 7 and (tmp_path / "known" / "video.mp4").read_bytes() == b"a video"
