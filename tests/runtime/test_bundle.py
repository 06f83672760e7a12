"""A bundle opens as it was written, or is refused with the name of the file that is wrong."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sealed import sealed

from trip_rt import Animator
from trip_rt.bundle import MAX_MANIFEST_BYTES, open_bundle, read_manifest, verify_file
from trip_rt.components import REQUIRED
from trip_rt.errors import InputError
from trip_rt.manifest import FORMAT_VERSION, FileSpec, serialise


def file_of(data: bytes) -> dict:
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


@pytest.fixture
def copied(tiny_bundle, tmp_path):
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


@pytest.fixture
def refused(copied):
    """Writes a manifest (bytes, or an object to seal) into the copy and returns the refusal."""

    def refuse(manifest) -> str:
        path = copied / "manifest.json"
        path.write_bytes(manifest if isinstance(manifest, bytes) else sealed(manifest))
        with pytest.raises(InputError) as caught:
            open_bundle(copied)
        assert str(path) in str(caught.value)
        return str(caught.value)

    return refuse


@pytest.fixture
def body(tiny_bundle):
    return json.loads((tiny_bundle / "manifest.json").read_bytes())


@pytest.fixture
def engines(body):
    return body["profiles"][0]["engines"]


def test_round_trip(tiny_bundle, body):
    opened = open_bundle(tiny_bundle)
    assert serialise(opened.manifest) == (tiny_bundle / "manifest.json").read_bytes() == sealed(body)
    assert opened.tokenizer_json == (tiny_bundle / "tokenizer.json").read_text()
    for component in REQUIRED:
        spec = opened.manifest.profile().engines[component]["onnxruntime"]
        assert opened.engine_path(spec).stat().st_size == opened.manifest.files[spec.file].bytes


def test_every_flipped_byte_is_found(copied):
    """TRIP_CORRUPTIONS sets how many."""
    rng = np.random.default_rng(0)
    files = sorted(copied.iterdir())
    for _ in range(int(os.environ.get("TRIP_CORRUPTIONS", "300"))):
        path = files[rng.integers(len(files))]
        good = path.read_bytes()
        bad = bytearray(good)
        bad[rng.integers(len(bad))] ^= rng.integers(1, 256)
        path.write_bytes(bad)
        with pytest.raises(InputError) as caught:
            open_bundle(copied)
        assert str(path) in str(caught.value)
        path.write_bytes(good)
    open_bundle(copied)


@pytest.mark.parametrize("change", ["missing", "longer", "cut"])
def test_every_file_counts(copied, change):
    for path in sorted(copied.iterdir()):
        good = path.read_bytes()
        if change == "missing":
            path.unlink()
        else:
            path.write_bytes(good + b"\n" if change == "longer" else good[:-1])
        with pytest.raises(InputError, match=path.name):
            open_bundle(copied)
        path.write_bytes(good)


@pytest.mark.parametrize(
    "name", ["../unet.onnx", "/etc/passwd", "a/b.onnx", "..", ".", "", "a\\b", "a\nb", "x" * 201, "C:\\a", "a\0b", 7]
)
def test_files_stay_inside(refused, body, engines, name):
    engines["unet"]["onnxruntime"]["files"][0] = name
    assert "engines[...][...].files[0]" in refused(body)
    if name != 7:
        assert "files" in refused({**body, "files": body["files"] | {name: {"sha256": "0" * 64, "bytes": 1}}})


@pytest.mark.parametrize("component", REQUIRED)
def test_missing_component(refused, body, engines, component):
    without = copy.deepcopy(body)
    del without["profiles"][0]["engines"][component]
    assert f"found no engine of {component} for 48x32-5f-b1" in refused(without)
    engines[component] = {}
    assert "engines[...]: Expected" in refused(body)


def test_files_that_the_table_lacks(refused, body, engines):
    name = engines["tnf"]["onnxruntime"]["files"][0]
    del body["files"][name]
    assert f"speaks of {name}" in refused(body)


def test_tensors_that_are_not_the_models(refused, body, engines):
    changed = copy.deepcopy(body)
    changed["config"]["text_width"] *= 2
    assert "text_encoder for onnxruntime has tensors that are not this model's of 48x32-5f-b1" in refused(changed)
    engines["unet"]["onnxruntime"]["inputs"].pop()
    assert "unet for onnxruntime has tensors" in refused(body)


def test_two_profiles_of_one_name(refused, body):
    body["profiles"] *= 2
    assert "two profiles of one name" in refused(body)


@pytest.mark.parametrize(
    ("version", "says"),
    [
        (FORMAT_VERSION + 1, "upgrade trip-rt"),
        (10**30, "upgrade trip-rt"),
        (1, "export the bundle again"),
        (True, "version True"),
        (2.0, "version 2.0"),
        ("2", "'2'"),
    ],
)
def test_other_versions(refused, body, version, says):
    message = refused(body | {"format_version": version})
    assert says in message and "found format version" in message


def test_a_newer_version_is_recognised_whatever_else_it_holds(refused):
    newer = b'{"format_version": %d, "new": "things"}' % (FORMAT_VERSION + 1)
    assert f"found format version {FORMAT_VERSION + 1}" in refused(newer)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe\x00",
        b"null",
        b"[1]",
        b'"format_version"',
        b"{}",
        b'{"format_version": %d}' % FORMAT_VERSION,
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b'{"format_version": %d, "manifest_sha256": "", "a": ' % FORMAT_VERSION + b"[" * 600 + b"]" * 600 + b"}",
        b'{"format_version": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_no_manifest(refused, data):
    assert "damaged" in refused(data)


def test_manifest_in_another_encoding_or_layout(refused, body):
    assert "damaged" in refused(json.dumps(body).encode())
    assert "damaged" in refused(sealed(body).decode().encode("utf-16"))
    assert "damaged" in refused(sealed(body).replace(b'"profiles"', b'"profiles": [],\n "profiles"', 1))


def test_oversized_manifest(refused):
    assert f"at most {MAX_MANIFEST_BYTES}" in refused(b" " * (MAX_MANIFEST_BYTES + 1))


def test_no_bundle(tmp_path):
    for folder in (tmp_path / "none", tmp_path, tmp_path / ("x" * 300), tmp_path / "a\0b"):
        with pytest.raises(InputError, match=r"no such folder|no manifest\.json|cannot be read"):
            read_manifest(folder)


def test_tokenizers_that_are_none(copied, body):
    for data, says in ((b"\xff", "not UTF-8"), (b"{}", "not a tokenizer")):
        (copied / "tokenizer.json").write_bytes(data)
        (copied / "manifest.json").write_bytes(
            sealed(body | {"files": body["files"] | {"tokenizer.json": file_of(data)}})
        )
        with pytest.raises(InputError, match=says):
            Animator(copied)


def test_engines_that_are_none(copied, body, engines):
    name = engines["tnf"]["onnxruntime"]["files"][0]
    (copied / name).write_bytes(b"\x00 no engine\n")
    body["files"][name] = file_of(b"\x00 no engine\n")
    (copied / "manifest.json").write_bytes(sealed(body))
    with pytest.raises(InputError, match="found no ONNX graph") as caught:
        Animator(copied)
    assert "\n" not in str(caught.value)


def test_verify_file_names_what_it_found(tmp_path):
    path = tmp_path / "engine"
    path.write_bytes(b"abc")
    verify_file(path, FileSpec(hashlib.sha256(b"abc").hexdigest(), 3))
    for sha256, size, says in (
        ("0" * 64, 3, "expected SHA-256|expected 000000000000"),
        ("0" * 64, 4, "found 3 bytes, expected 4"),
    ):
        with pytest.raises(InputError, match=says):
            verify_file(path, FileSpec(sha256, size))
    with pytest.raises(InputError, match="found a folder"):
        verify_file(tmp_path, FileSpec("0" * 64, 0))
    with pytest.raises(InputError, match="no such file"):
        verify_file(tmp_path / "none", FileSpec("0" * 64, 0))
    os.mkfifo(tmp_path / "pipe")  # to open it would wait for somebody to write to it
    with pytest.raises(InputError, match="found a named pipe"):
        verify_file(tmp_path / "pipe", FileSpec("0" * 64, 0))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["profiles", 0, "batch"], 0),
        (["profiles", 0, "batch"], True),
        (["profiles", 0, "decode_frames"], 2.5),
        (["profiles"], []),
        (["config", "height"], -8),
        (["config", "vae_scale_factor"], 0),
        (["config", "num_frames"], 1 << 40),
        (["config", "guidance_scale"], -1.0),
        (["config", "schedule", "beta_end"], 1),
        (["config", "fusion"], "glue"),
        (["files", "tokenizer.json", "sha256"], None),
        (["files", "tokenizer.json", "sha256"], "0" * 64 + "\n"),
        (["files", "tokenizer.json", "bytes"], "1"),
        (["built_with"], []),
        (["profiles", 0, "engines"], []),
        (["profiles", 0, "engines", "unet"], "onnxruntime"),
        (["profiles", 0, "engines", "unet", "onnxruntime", "files"], []),
        (["profiles", 0, "engines", "unet", "onnxruntime", "precision"], "fp4"),
        (["profiles", 0, "engines", "unet", "onnxruntime", "target"], {"torch": 2}),
        (["profiles", 0, "engines", "unet", "onnxruntime", "inputs"], {}),
        (["profiles", 0, "engines", "unet", "onnxruntime", "inputs", 0, "shape"], [2, -1]),
        (["profiles", 0, "engines", "unet", "onnxruntime", "inputs", 0, "shape"], "12"),
        (["profiles", 0, "engines", "unet", "onnxruntime", "inputs", 0, "dtype"], "object"),
        (["profiles", 0, "engines", "unet", "onnxruntime", "inputs", 0, "extra"], 1),
        (["extra"], 1),
    ],
)
def test_wrong_values(refused, body, path, value):
    place = body
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    refused(body)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["fp32", "int64", "../x", 0, -1, 2**63]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_mutated_manifests_open_cleanly_or_are_refused(tmp_path, tiny_bundle, data):
    mutated = json.loads((tiny_bundle / "manifest.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place, depth = mutated, data.draw(st.integers(0, 6))
        while True:
            key = data.draw(
                st.sampled_from(sorted(place)) if isinstance(place, dict) else st.integers(0, len(place) - 1)
            )
            if depth == 0 or not isinstance(place[key], dict | list) or not place[key]:
                break
            place, depth = place[key], depth - 1
        change = data.draw(st.sampled_from(["replace", "delete", "add"]))
        if change == "replace":
            place[key] = data.draw(JSON)
        elif change == "delete" and len(mutated) > 1:
            del place[key]
        elif isinstance(place, dict):
            place[data.draw(st.text(max_size=8))] = data.draw(JSON)
    folder = Path(tmp_path)
    (folder / "manifest.json").write_bytes(sealed(mutated))
    try:
        manifest = read_manifest(folder)
    except InputError:
        return
    written = json.loads(serialise(manifest))
    assert {**written, "manifest_sha256": ""} == {**mutated, "manifest_sha256": ""}
