"""annotations.json: what is read from it, and what is said of a wrong one."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trip_reference.data.annotations import read_annotations
from trip_rt.errors import InputError

GOOD = '{"video_path": "videos/a.mp4", "text": "a dog runs"}'


def write(folder, text):
    (folder / "annotations.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def test_entries(tmp_path):
    text = f'[\n{GOOD},\n\n  {{"text": "  two\\nlines ", "score": [1, null], "video_path": "./b.webm"}}, {GOOD}]\n'
    for encoded in (text.encode(), b"\xef\xbb\xbf" + text.encode()):
        entries = read_annotations(write(tmp_path, encoded))
        assert [(entry.video, entry.text, entry.line) for entry in entries] == [
            (tmp_path / "videos/a.mp4", "a dog runs", 2),
            (tmp_path / "b.webm", "two\nlines", 4),
            (tmp_path / "videos/a.mp4", "a dog runs", 4),
        ]


def test_another_name(tmp_path):
    (tmp_path / "val_annotations.json").write_text(f"[{GOOD}]")
    assert len(read_annotations(tmp_path, "val_annotations.json")) == 1
    with pytest.raises(InputError, match=r"annotations\.json: found no such file"):
        read_annotations(tmp_path)


@pytest.mark.parametrize(
    "text, line, words",
    [
        ("", 1, "the end of the file"),
        ("\n\nhello", 3, "'hello'"),
        ('{"video_path": "a.mp4", "text": "a"}', 1, "expected a JSON list"),
        ("[\n\n]", 1, "an empty list"),
        (f"[\n{GOOD}\n{GOOD}]", 3, "after an entry"),
        (f"[\n{GOOD},\n]", 3, "comma before"),
        (f"[\n{GOOD},", 2, "the end of the file"),
        (f"[\n{GOOD}\n", 3, "the end of the file"),
        (f"[\n{GOOD}\n]\n[", 4, "after the list"),
        ('[\n{"video_path": "a.mp4",\n"text": oops}]', 3, "oops"),
        ('[\n{"video_path": "a.mp4", "text": "a\nb"}]', 2, "invalid control character"),
        (f"[\n{GOOD},\n7]", 3, "found int"),
        (f"[\n{GOOD},\n" + "7" * 9000 + "]", 3, "no entry needs"),
        ("[\n" + "[" * 100_000, 2, "no entry needs"),
        ('[\n{"text": "a"}]', 2, "found no 'video_path'"),
        ('[\n{"video_path": "a.mp4"}]', 2, "found no 'text'"),
        ('[\n{"video_path": null, "text": "a"}]', 2, "video_path: found NoneType"),
        ('[\n{"video_path": "a.mp4", "text": ["a"]}]', 2, "text: found list"),
        ('[\n{"video_path": "a.mp4", "text": " "}]', 2, "text: found an empty string"),
        ('[\n{"video_path": "", "text": "a"}]', 2, "video_path: found an empty string"),
        ('[\n{"video_path": "a.mp4", "text": "\\ud800"}]', 2, "surrogate"),
        ('[\n{"video_path": "/etc/a.mp4", "text": "a"}]', 2, "inside the folder"),
        ('[\n{"video_path": "videos/../../a.mp4", "text": "a"}]', 2, "inside the folder"),
        ('[\n{"video_path": "a\\u0000.mp4", "text": "a"}]', 2, "inside the folder"),
        ('[\n{"video_path": "out/a.mp4", "text": "a"}]', 2, "a link that leaves"),
        ('[\n{"video_path": "out.mp4", "text": "a"}]', 2, "a link that leaves"),
        (b"[\n\n\xff]", 3, "not UTF-8"),
        (b"\xef\xbb\xbf[\n\n\xff]", 3, "not UTF-8"),
    ],
)
def test_errors_name_the_line(tmp_path, text, line, words):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "out").symlink_to(tmp_path)
    (folder / "out.mp4").symlink_to(tmp_path / "a.mp4")
    with pytest.raises(InputError, match=words) as caught:
        read_annotations(write(folder, text))
    assert f"annotations.json: line {line}: found" in str(caught.value).replace(": video_path", "").replace(
        ": text", ""
    )
    assert (
        "expected" in str(caught.value)
        and str(caught.value).isprintable()
        and len(str(caught.value)) < 400 + len(str(folder))
    )


def test_links_that_stay_inside_are_followed(tmp_path):
    folder, alias = tmp_path / "data", tmp_path / "alias"
    (folder / "real").mkdir(parents=True)
    (folder / "videos").symlink_to("real")
    (folder / "real/a.mp4").symlink_to("b.mp4")
    alias.symlink_to(folder)
    assert read_annotations(write(alias, f"[{GOOD}]"))[0].video == folder / "videos/a.mp4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("annotations")


entries = st.lists(
    st.fixed_dictionaries(
        {"video_path": st.from_regex(r"[a-z]{1,8}/[a-z]{1,8}\.mp4", fullmatch=True), "text": st.text(min_size=1)}
    ),
    min_size=1,
    max_size=6,
)


@given(entries=entries, indent=st.sampled_from([None, 0, 2]), ascii_only=st.booleans())
@settings(max_examples=60, deadline=None)
def test_whatever_json_writes_is_read(folder, entries, indent, ascii_only):
    written = [dict(entry, text=f"x{entry['text']}") for entry in entries]
    try:
        text = json.dumps(written, indent=indent, ensure_ascii=ascii_only).encode()
    except UnicodeEncodeError:
        return
    found = read_annotations(write(folder, text))
    assert [(entry.video, entry.text) for entry in found] == [
        (folder / entry["video_path"], entry["text"].strip()) for entry in written
    ]
    assert all(json.dumps(entry["video_path"]).encode() in text for entry in written)


@given(
    bad=st.integers(0, 9),
    gaps=st.lists(st.integers(1, 4), min_size=10, max_size=10),
    kind=st.sampled_from(["7", '{"text": "a"}', "{oops}", '"a', "[,]"]),
)
@settings(max_examples=60, deadline=None)
def test_the_line_is_right_wherever_the_fault_is(folder, bad, gaps, kind):
    text = "["
    for i, gap in enumerate(gaps):
        text += "\n" * gap
        if i == bad:
            expected = text.count("\n") + 1
        text += (kind if i == bad else GOOD) + ("," if i < 9 else "]")
    with pytest.raises(InputError, match=f"line {expected}: "):
        read_annotations(write(folder, text))


@given(noise=st.binary(max_size=80))
@settings(max_examples=100, deadline=None)
def test_noise_is_refused_in_one_line(folder, noise):
    with pytest.raises(InputError) as caught:
        read_annotations(write(folder, b"[" + noise))
    assert "line " in str(caught.value) and str(caught.value).isprintable()


def test_hundreds_of_thousands(folder):
    text = (
        "[\n"
        + ",\n".join(
            json.dumps({"video_path": f"videos/{i % 100:02d}/{i}.mp4", "text": f"a dog runs {i}"})
            for i in range(200_000)
        )
        + "\n]"
    )
    began = time.process_time()
    found = read_annotations(write(folder, text))
    assert (
        len(found) == 200_000 and found[-1].line == 200_001 and found[-1].video == Path(folder, "videos/99/199999.mp4")
    )
    assert time.process_time() - began < 20  # about 2 s; an entry at a time must not cost the whole file
