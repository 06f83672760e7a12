"""Timing on a GPU, by events on the stream that does the work; without one, the host's clock stands in."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Call = Callable[[], object]


def interleaved(
    rivals: dict[str, Call], rounds: int, calls: int, stream: Any = None, before: Call = lambda: None
) -> dict[str, dict[str, float]]:
    """Microseconds of each rival, a round of all at a time and each round in another order, so that whatever else the
    GPU does falls on all alike.

    A sample is the mean of the `calls` that a rival makes when it is called. It begins on an idle GPU, so it holds what
    the host takes to launch the work as far as the GPU has to wait for it. `before` runs ahead of each, untimed.
    """
    names = list(rivals)
    samples: dict[str, list[float]] = {name: [] for name in names}
    with torch.cuda.stream(stream):  # does nothing where there is none
        for index in range(-2 if stream else 0, rounds):  # the first two warm up
            for name in names:
                before()
                sample = _sample(rivals[name], stream)
                if index >= 0:
                    samples[name].append(sample / calls)
            names = [*names[1:], names[0]]
    return {name: spread(samples[name]) for name in rivals}


def spread(microseconds: list[float]) -> dict[str, float]:
    """Median and tails."""
    median, p95, p99 = np.percentile(microseconds, [50, 95, 99])
    return {"median": round(float(median), 2), "p95": round(float(p95), 2), "p99": round(float(p99), 2)}


def as_graph(call: Call, stream: Any) -> Call:
    """`call` as a CUDA graph of `stream`, so that its launches cost the host nothing."""
    if stream is None:
        return call
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph.replay


def ceilings(dry: bool, rounds: int = 20) -> dict[str, float]:
    """What this GPU does at best: TB/s of a large copy, read and write counted, and TFLOP/s of a large fp16 matrix
    product; and how many percent the rounds of either spread, from their median to their p95."""
    device, elements, size = ("cpu", 1 << 16, 64) if dry else ("cuda", 1 << 29, 8192)
    stream = None if dry else torch.cuda.Stream()
    source = torch.zeros(elements, device=device, dtype=torch.float16)
    target = torch.empty_like(source)
    left, right = (torch.randn(size, size, device=device).half() for _ in range(2))
    product = torch.empty_like(left)
    if stream:
        torch.cuda.synchronize()

    def products() -> None:
        for _ in range(4):
            torch.mm(left, right, out=product)

    copied = interleaved({"copy": lambda: target.copy_(source)}, rounds, 1, stream)["copy"]
    multiplied = interleaved({"product": products}, rounds, 4, stream)["product"]
    return {
        "copy_tb_s": 4 * elements / copied["median"] / 1e6,
        "fp16_tflop_s": 2 * size**3 / multiplied["median"] / 1e6,
        "spread, %": max(100 * (times["p95"] / times["median"] - 1) for times in (copied, multiplied)),
    }


def beats_ceiling(percent: float, limits: dict[str, float]) -> bool:
    """Whether a share of `ceilings` is above 100 % by more than they vary themselves: then one is no ceiling."""
    return percent > 100 + limits["spread, %"]


def _sample(call: Call, stream: Any) -> float:
    if stream is None:
        began = time.perf_counter()
        call()
        return (time.perf_counter() - began) * 1e6
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began.record(stream)
    call()
    ended.record(stream)
    ended.synchronize()
    return float(began.elapsed_time(ended)) * 1000


class Marks:
    """Points in a device's work, and the microseconds between them."""

    def __init__(self, stream: Any):
        self._stream = stream
        self._marks: list[Any] = []

    def mark(self) -> None:
        if self._stream is None:
            self._marks.append(time.perf_counter() * 1e6)
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        self._marks.append(event)

    def between(self) -> dict[str, float]:
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if self._stream is None:
            return spread([after - before for before, after in pairs])
        torch.cuda.synchronize()
        return spread([before.elapsed_time(after) * 1000 for before, after in pairs])
