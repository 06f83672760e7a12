"""Timing on a GPU, by events on the stream that does the work."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Rivals = dict[str, Callable[[], object]]


def interleaved(rivals: Rivals, rounds: int, stream: Any = None) -> dict[str, dict[str, float]]:
    """Microseconds of each rival, a round of all at a time, so that whatever else the GPU does falls on all alike.

    Before each call 256 MB are written, so that none finds its inputs in the cache. Without a GPU the host's clock stands in.
    """
    for call in rivals.values():
        for _ in range(3 if torch.cuda.is_available() else 0):
            call()
    if not torch.cuda.is_available():
        return {name: spread([_on_the_host(call) for _ in range(rounds)]) for name, call in rivals.items()}
    stream = stream or torch.cuda.current_stream()
    flush = torch.empty(64 << 20, device="cuda")
    found: dict[str, list[tuple[Any, Any]]] = {name: [] for name in rivals}
    with torch.cuda.stream(stream):
        for _ in range(rounds):
            for name, call in rivals.items():
                flush.zero_()
                began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                began.record(stream)
                call()
                ended.record(stream)
                found[name].append((began, ended))
    torch.cuda.synchronize()
    return {name: spread([began.elapsed_time(ended) * 1000 for began, ended in pairs]) for name, pairs in found.items()}


def spread(microseconds: list[float]) -> dict[str, float]:
    """Median and tails."""
    median, p95, p99 = np.percentile(microseconds, [50, 95, 99])
    return {"median": round(float(median), 2), "p95": round(float(p95), 2), "p99": round(float(p99), 2)}


def as_graph(call: Callable[[], object]) -> Callable[[], object]:
    """`call` captured as a CUDA graph, so that launches cost the host nothing."""
    if not torch.cuda.is_available():
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def ceilings(quick: bool) -> dict[str, float]:
    """What this GPU does at best: TB/s of a large copy, read and write counted, and TFLOP/s of a large fp16 product."""
    if not torch.cuda.is_available():
        return {"copy_tb_s": float("nan"), "fp16_tflop_s": float("nan")}
    size = 8192
    source = torch.randn(2 << 28 if not quick else 2 << 26, device="cuda", dtype=torch.float16)
    target = torch.empty_like(source)
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.float16) for _ in range(2))
    times = interleaved({"copy": lambda: target.copy_(source), "product": lambda: left @ right}, 10 if quick else 30)
    moved, computed = 2 * source.numel() * 2, 2 * size**3
    return {"copy_tb_s": moved / times["copy"]["median"] / 1e6, "fp16_tflop_s": computed / times["product"]["median"] / 1e6}


def _on_the_host(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e6
