"""A bundle opens as it was written, or is refused with the name of the file that is wrong."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trip_rt import Animator, bundle
from trip_rt.bundle import MAX_MANIFEST_BYTES, open_bundle, read_manifest, serialise, verify_file
from trip_rt.errors import InputError


def sealed(body: dict) -> bytes:
    """A manifest's file with a right hash of its own, whatever it says."""
    rest = {name: value for name, value in body.items() if name != "manifest_sha256"}
    return bundle._canonical(rest | {"manifest_sha256": hashlib.sha256(bundle._canonical(rest)).hexdigest()})


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


def test_round_trip(tiny_bundle, body):
    opened = open_bundle(tiny_bundle)
    assert serialise(opened.manifest) == (tiny_bundle / "manifest.json").read_bytes() == sealed(body)
    assert opened.tokenizer_json == (tiny_bundle / "tokenizer.json").read_text()
    for component in bundle.COMPONENTS:
        spec = opened.manifest.engines[component]["onnxruntime"]
        assert opened.engine_path(spec).stat().st_size == spec.bytes


def test_every_flipped_byte_is_found(copied):
    rng = np.random.default_rng(0)
    files = sorted(copied.iterdir())
    for _ in range(300):
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


@pytest.mark.parametrize("name", ["../unet.onnx", "/etc/passwd", "a/b.onnx", "..", ".", "", "a\\b", "a\nb", "x" * 201, "C:\\a", "a\0b", 7])
def test_engine_files_stay_inside(refused, body, name):
    body["engines"]["unet"]["onnxruntime"]["file"] = name
    assert "a string" in refused(body) if name == 7 else "plain file name" in refused(body)


@pytest.mark.parametrize("component", bundle.COMPONENTS)
def test_missing_component(refused, body, component):
    without = copy.deepcopy(body)
    del without["engines"][component]
    assert f"lacks an engine for {component}" in refused(without)
    body["engines"][component] = {}
    assert f"lacks an engine for {component}" in refused(body)


@pytest.mark.parametrize(
    ("version", "says"),
    [(2, "upgrade trip-rt"), (10**30, "upgrade trip-rt"), (0, "export the bundle again"), (True, "version True"), (1.0, "version 1.0"), ("1", "'1'")],
)
def test_other_versions(refused, body, version, says):
    message = refused(body | {"format_version": version})
    assert says in message and "found format version" in message


def test_a_newer_version_is_recognised_whatever_else_it_holds(refused):
    assert "found format version 3" in refused(b'{"format_version": 3, "new": "things"}')


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe\x00",
        b"null",
        b"[1]",
        b'"format_version"',
        b"{}",
        b'{"format_version": 1}',
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b'{"format_version": 1, "manifest_sha256": "", "a": ' + b"[" * 600 + b"]" * 600 + b"}",
        b'{"format_version": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_no_manifest(refused, data):
    assert "damaged" in refused(data)


def test_manifest_in_another_encoding_or_layout(refused, body):
    assert "damaged" in refused(json.dumps(body).encode())
    assert "damaged" in refused(sealed(body).decode().encode("utf-16"))
    assert "damaged" in refused(sealed(body).replace(b'"batch"', b'"batch": 1,\n "batch"', 1))


def test_oversized_manifest(refused):
    assert f"at most {MAX_MANIFEST_BYTES}" in refused(b" " * (MAX_MANIFEST_BYTES + 1))


def test_no_bundle(tmp_path):
    for folder in (tmp_path / "none", tmp_path, tmp_path / ("x" * 300), tmp_path / "a\0b"):
        with pytest.raises(InputError, match=r"no such folder|no manifest\.json|cannot be read"):
            read_manifest(folder)


def test_tokenizers_that_are_none(copied, body):
    for data, says in ((b"\xff", "not UTF-8"), (b"{}", "not a tokenizer")):
        (copied / "tokenizer.json").write_bytes(data)
        (copied / "manifest.json").write_bytes(sealed(body | {"tokenizer_sha256": hashlib.sha256(data).hexdigest()}))
        with pytest.raises(InputError, match=says):
            Animator(copied)


def test_engines_that_are_none(copied, body):
    spec = body["engines"]["tnf"]["onnxruntime"]
    (copied / spec["file"]).write_bytes(b"\x00 no engine\n")
    spec |= {"bytes": 12, "sha256": hashlib.sha256(b"\x00 no engine\n").hexdigest()}
    (copied / "manifest.json").write_bytes(sealed(body))
    with pytest.raises(InputError, match="cannot open it") as caught:
        Animator(copied)
    assert "\n" not in str(caught.value)


def test_verify_file_names_what_it_found(tmp_path):
    path = tmp_path / "engine"
    path.write_bytes(b"abc")
    verify_file(path, hashlib.sha256(b"abc").hexdigest(), 3, "unet")
    for sha256, size, says in (("0" * 64, 3, "expected SHA-256|expected 000000000000"), ("0" * 64, 4, "found 3 bytes, expected 4")):
        with pytest.raises(InputError, match=says):
            verify_file(path, sha256, size, "unet")
    with pytest.raises(InputError, match="no such file"):
        verify_file(tmp_path, "0" * 64, None, "unet")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["batch"], 0),
        (["batch"], True),
        (["decode_frames"], 2.0),
        (["config", "height"], -8),
        (["config", "vae_scale_factor"], 0),
        (["config", "num_frames"], 1 << 40),
        (["config", "guidance_scale"], float("nan")),
        (["config", "schedule", "beta_end"], float("inf")),
        (["config", "fusion"], "glue"),
        (["tokenizer_sha256"], None),
        (["built_with"], []),
        (["engines"], []),
        (["engines", "unet"], "onnxruntime"),
        (["engines", "unet", "onnxruntime", "bytes"], "1"),
        (["engines", "unet", "onnxruntime", "inputs"], {}),
        (["engines", "unet", "onnxruntime", "inputs", 0, "shape"], [2, -1]),
        (["engines", "unet", "onnxruntime", "inputs", 0, "shape"], "12"),
        (["engines", "unet", "onnxruntime", "inputs", 0, "dtype"], "object"),
        (["engines", "unet", "onnxruntime", "inputs", 0, "extra"], 1),
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
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["fp32", "int64", "../x", 0, -1, 2**63]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_manifests_open_cleanly_or_are_refused(tmp_path, tiny_bundle, data):
    mutated = json.loads((tiny_bundle / "manifest.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place, depth = mutated, data.draw(st.integers(0, 6))
        while True:
            key = data.draw(st.sampled_from(sorted(place)) if isinstance(place, dict) else st.integers(0, len(place) - 1))
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
