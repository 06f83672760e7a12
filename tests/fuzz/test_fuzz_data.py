"""Videos and shards: what is accepted gives a whole clip, every frame of it written, and a sentence."""

import io
import tarfile

import numpy as np
import pytest
from fuzzing import damaged, fuzz_area, mutated_json
from hypothesis import strategies as st
from small_videos import write_video

from trip_reference.data.sample import BrokenClip, ClipFormat
from trip_reference.data.shard_files import decode_sample, read_shard
from trip_reference.data.shards import list_shards
from trip_reference.data.videos import decode_clip
from trip_rt import InputError

CLIP = ClipFormat(3, 16, 16, fps=8, max_bytes=2**20, max_pixels=128 * 128, max_seconds=60)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """The bytes of an mp4, a webm and an avi of eight frames."""
    folder = tmp_path_factory.mktemp("videos")
    kinds = {"mp4": {}, "webm": {"codec": "libvpx"}, "avi": {"codec": "mpeg4"}}
    files = [write_video(folder / f"a.{kind}", range(8), **options) for kind, options in kinds.items()]
    return [path.read_bytes() for path in files]


def check_clip(frames):
    assert frames.shape == (3, 16, 16, 3) and frames.dtype == np.uint8


@fuzz_area("videos", quick=60, full=1500)
def test_videos(fuzz, videos, tmp_path):
    path = tmp_path / "a.mp4"

    def decode(data):
        path.write_bytes(data)
        check_clip(decode_clip(path, str(path), CLIP, np.random.default_rng(0)))

    fuzz(damaged(videos), decode, BrokenClip, folder=tmp_path)


def tar_of(members, format=tarfile.GNU_FORMAT):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


@fuzz_area("shards", quick=60, full=1500)
def test_shards(fuzz, videos, tmp_path):
    path = tmp_path / "a.tar"
    long = "x" * 150
    members = [("a.mp4", videos[0]), ("a.txt", b"a ball"), ("b.json", b'{"text": "a star"}'), ("b.webm", videos[1])]
    named = [*members, (f"{long}.mp4", videos[0]), (f"{long}.txt", b"a heart")]
    valid = [tar_of(members), tar_of(named), tar_of(named, tarfile.PAX_FORMAT)]
    texts = mutated_json([{"text": "a star"}]).map(lambda text: tar_of([*members[:2], ("b.json", text), members[3]]))

    def read(data):
        path.write_bytes(data)
        accepted = 0
        for raw in read_shard(str(path), CLIP):
            if isinstance(raw, BrokenClip):
                assert str(raw).isprintable()
                continue
            try:
                sample = decode_sample(raw, CLIP, np.random.default_rng(0))
            except BrokenClip as error:
                assert str(error).isprintable()
                continue
            check_clip(sample.frames)
            assert sample.text.strip() and sample.text.encode()
            accepted += 1
        if not accepted:
            raise BrokenClip("no clip of the shard")

    fuzz(damaged(valid) | texts, read, BrokenClip, folder=tmp_path)


PATTERNS = ["{0..9}", "{000..099}", "{0..999999999}", "{a,b}", "{a..z}", "{", "}", "*", "?", "[a-z]", "..", "/", ","]
PIECES = [
    *PATTERNS,
    "shard-",
    ".tar",
    "\0",
    "\\",
    "pipe:",
    "http://x/",
    "{0..5..0}",
    "{5..1..-2}",
    "\ud800",
    "{{a,b},c}",
]


@fuzz_area("shard patterns", quick=60, full=1500)
def test_patterns(fuzz, tmp_path):
    """What is listed is there and plain."""
    for number in range(10):
        (tmp_path / f"shard-{number}.tar").touch()
    (tmp_path / "pipe.tar").mkdir()

    def expand(pieces):
        for shard in list_shards(f"{tmp_path}/{''.join(pieces)}"):
            assert (tmp_path / shard).is_file()

    ordinary = st.sampled_from([["shard-", end, ".tar"] for end in ("{0..9}", "{3,5}", "?", "*", "[0-4]", "{0..9..3}")])
    pieces = st.lists(st.sampled_from(PIECES), min_size=1, max_size=12)
    fuzz(pieces | pieces | ordinary, expand, InputError, folder=tmp_path)
