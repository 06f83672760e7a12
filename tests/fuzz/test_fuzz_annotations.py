"""annotations.json: every entry that is accepted has a sentence and a path inside the folder."""

import os

from fuzzing import fuzz_area, mutated_json

from trip_reference.data.annotations import ANNOTATIONS, read_annotations

VALID = [
    [{"video_path": "videos/a.mp4", "text": "a dog runs"}, {"video_path": "b.webm", "text": "two cats sleep"}],
    [{"video_path": "videos/ä b.mp4", "text": "ein Hund läuft", "extra": {"deep": [1, 2]}}],
]


@fuzz_area("annotations", quick=60, full=1500)
def test_annotations(fuzz, tmp_path):
    (tmp_path / "videos").mkdir()

    def read(data):
        (tmp_path / ANNOTATIONS).write_bytes(data)
        entries = read_annotations(tmp_path)
        assert entries
        for entry in entries:
            assert entry.text.strip() and entry.text.encode()
            assert os.path.realpath(entry.video).startswith(f"{os.path.realpath(tmp_path)}/")

    fuzz(mutated_json(VALID), read, folder=tmp_path)
