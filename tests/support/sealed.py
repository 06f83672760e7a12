"""Bundles whose manifest says something else and is right by its own hash, as a stranger would make them."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any


def body_of(bundle: Path) -> dict[str, Any]:
    """The manifest as JSON."""
    return json.loads((bundle / "manifest.json").read_bytes())


def sealed(body: dict[str, Any]) -> bytes:
    """A manifest's file with a right hash of its own, whatever it says."""

    def canonical(value: dict[str, Any]) -> bytes:
        return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()  # writes NaN and Infinity, too

    rest = {name: value for name, value in body.items() if name != "manifest_sha256"}
    return canonical(rest | {"manifest_sha256": hashlib.sha256(canonical(rest)).hexdigest()})


def seal(bundle: Path, body: dict[str, Any]) -> Path:
    """Write `body` as the bundle's manifest, with the hashes that its files have by now."""
    for name in body["files"]:
        data = (bundle / name).read_bytes()
        body["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (bundle / "manifest.json").unlink(missing_ok=True)  # it may be a link to another's
    (bundle / "manifest.json").write_bytes(sealed(body))
    return bundle


def with_openvino(bundle: Path, folder: Path) -> Path:
    """A copy of a bundle of ONNX Runtime's engines that lists the same files for OpenVINO too."""
    shutil.copytree(bundle, folder)
    body = body_of(folder)
    for profile in body["profiles"]:
        for engines in profile["engines"].values():
            engines["openvino"] = engines["onnxruntime"]
    return seal(folder, body)
