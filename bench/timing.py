"""Timing on the host, side by side: rivals take turns, so that whatever else the machine does falls on all alike."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from trip_rt.backends import openvino as openvino_backend

Call = Callable[[], object]
_LIBRARIES = ("numpy", "onnxruntime", "openvino", "torch")


def interleaved(rivals: Mapping[str, Call], rounds: int, warm_ups: int = 2, label: str = "") -> dict[str, list[float]]:
    """Seconds of every call, a round of all at a time, each round begun by another; the first rounds only warm up."""
    names, seconds = list(rivals), {name: [] for name in rivals}  # type: tuple[list[str], dict[str, list[float]]]
    for index in tqdm(range(-warm_ups, rounds), desc=label or None, unit="round", disable=None, leave=False):
        for name in names:
            began = time.perf_counter()
            rivals[name]()
            if index >= 0:
                seconds[name].append(time.perf_counter() - began)
        names = [*names[1:], names[0]]
    return seconds


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Milliseconds: p50, p95 and p99."""
    return {f"p{q}": round(float(np.percentile(seconds, q)) * 1000, 3) for q in (50, 95, 99)}


def ratio(seconds: list[float], base: list[float]) -> dict[str, float]:
    """How many times as long as `base` of the same rounds: the median, and p5 and p95 over the rounds."""
    ratios = np.array(seconds) / np.array(base)
    return {name: round(float(np.percentile(ratios, q)), 3) for name, q in (("median", 50), ("p5", 5), ("p95", 95))}


def machine() -> dict[str, Any]:
    """The CPU, its threads and what half-precision arithmetic it has, and the versions of Python and of the
    libraries."""
    info = Path("/proc/cpuinfo")
    lines = [line.partition(":") for line in info.read_text().splitlines()] if info.exists() else []
    models = [value.strip() for key, _, value in lines if key.strip() == "model name"] or [platform.processor()]
    flags = next((value.split() for key, _, value in lines if key.strip() == "flags"), [])
    about: dict[str, Any] = {"cpu": models[0], "threads": len(models)}
    about["instructions"] = [
        flag
        for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
        if flag in flags
    ]
    about["python"] = platform.python_version()
    for name in _LIBRARIES:
        try:
            about[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            about[name] = None
    if about["openvino"]:
        with ThreadPoolExecutor(1) as thread:  # not the main one, as in trip_rt/backends/openvino.py
            about["openvino_arithmetic"] = thread.submit(_openvino_arithmetic).result()
    return about


def _openvino_arithmetic() -> list[str]:
    """What OpenVINO says that this CPU computes in natively, BF16 perhaps among it."""
    openvino = openvino_backend.library()

    capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return sorted(name for name in capabilities if name in ("FP32", "BF16", "FP16", "INT8"))
