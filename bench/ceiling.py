"""What this CPU does at most in fp32: the fastest of the libraries that are here, on the fastest of several shapes.

No library is the fastest everywhere: on an AMD machine engines of OpenVINO, whose products are MLAS's and whose
convolutions oneDNN's, ran at up to 1.74 times the rate of torch's product, which is MKL's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from own_process import missing

from trip_rt.accuracy import relative_errors
from trip_rt.backends import openvino as openvino_backend
from trip_rt.errors import EngineError

PRODUCTS = ((1024, 1024, 1024), (2048, 2048, 2048), (3072, 3072, 3072), (4096, 256, 1024))  # rows, inner, columns
CONVOLUTION = (8, 256, 32)  # pictures, channels in and out, side; the kernel is 3x3
MAX_ERROR = 1e-5  # RMS error over RMS of fp32, whose sums differ by 1e-6; bf16's and tf32's by 1e-3
# A component is timed by its median and the ceiling by its best round. On a quiet machine a component's rounds spread
# by 1 to 3 % from median to p95 (text_encoder, tnf, unet, vae_decoder in results/latency_bench.json).
SPREAD_PERCENT = 3.0

Rates = dict[tuple[str, str], float]  # GFLOP/s by library and shape


@dataclass(frozen=True)
class Case:
    """One library at work on one shape."""

    library: str
    shape: str
    gflop: float
    call: Callable[[], object]


class Ceiling:
    """Timed in passes, before and after what is held against it: how far they differ is how far the machine changed."""

    def __init__(self, threads: int | None):
        self._cases = cases(threads)
        self._passes: list[Rates] = []

    def measure(self, seconds: float) -> None:
        """One pass: rounds of all cases in turn for so long, two at least."""
        best: Rates = {}
        ends, rounds = time.perf_counter() + seconds, 0
        while rounds < 2 or time.perf_counter() < ends:
            for case in self._cases:
                began = time.perf_counter()
                case.call()
                rate = case.gflop / (time.perf_counter() - began)
                best[case.library, case.shape] = max(rate, best.get((case.library, case.shape), 0.0))
            rounds += 1
        self._passes.append(best)

    def peak(self) -> dict[str, Any]:
        return peak_of(self._passes)


def peak_of(passes: Sequence[Rates]) -> dict[str, Any]:
    """The best rate of all passes with its library and shape; how many percent a share of it may be above 100, the
    passes' difference in that case or SPREAD_PERCENT; and the best of every library and shape."""
    best = {key: max(rates[key] for rates in passes) for key in passes[0]}
    library, shape = winner = max(best, key=lambda key: best[key])
    drift = 100 * (best[winner] / min(rates[winner] for rates in passes) - 1)
    rest: dict[str, dict[str, float]] = {}
    for (name, size), rate in best.items():
        rest.setdefault(name, {})[size] = round(rate, 1)
    return {
        "gflops": round(best[winner], 1),
        "library": library,
        "shape": shape,
        "noise_percent": round(max(drift, SPREAD_PERCENT), 1),
        "libraries": rest,
    }


def beyond(rates: Mapping[str, float], peak: Mapping[str, Any]) -> str:
    """In one line, which GFLOP/s are above the peak by more than its noise, or "" where none are."""
    shares = {name: 100 * rate / peak["gflops"] for name, rate in rates.items()}
    above = [f"{name} at {share:.0f} %" for name, share in shares.items() if share > 100 + peak["noise_percent"]]
    if not above:
        return ""
    return (
        f"found {', '.join(above)} of the machine's ceiling ({peak['gflops']} GFLOP/s, {peak['library']},"
        f" {peak['shape']}), expected at most {100 + peak['noise_percent']:g} %: either the ceiling is too low or the"
        " operations are counted wrong"
    )


def cases(threads: int | None) -> list[Case]:
    """Every library on every shape, each held to fp64 once: what computes in less than fp32 is no ceiling of fp32."""
    rng = np.random.default_rng(0)
    makers = {"torch": _torch, "openvino": _openvino}
    libraries = {name: make(threads) for name, make in makers.items() if not missing(name)}
    every: list[Case] = []
    for rows, inner, columns in PRODUCTS:
        left, right = rng.standard_normal((rows, inner), np.float32), rng.standard_normal((inner, columns), np.float32)
        expected = left[:16].astype(np.float64) @ right
        for name, (product, _) in libraries.items():
            call = product(left, right)
            check(f"{name}'s product", call()[:16], expected)
            every.append(Case(name, f"{rows}x{inner}x{columns} product", 2e-9 * rows * inner * columns, call))
    pictures, channels, side = CONVOLUTION
    images = rng.standard_normal((pictures, channels, side, side), np.float32)
    weights = rng.standard_normal((channels, channels, 3, 3), np.float32)
    expected = np.tensordot(weights.astype(np.float64), images[0, :, :3, :3], 3)  # of the pixel at 1, 1
    shape = f"3x3 convolution of {pictures}x{channels}x{side}x{side}"
    for name, (_, convolution) in libraries.items():
        call = convolution(images, weights)
        check(f"{name}'s convolution", call()[0, :, 1, 1], expected)
        every.append(Case(name, shape, 2e-9 * 9 * channels * images.size, call))
    return every


def check(name: str, result: np.ndarray, expected: np.ndarray) -> None:
    """EngineError where the result is not fp32's."""
    _, error = relative_errors(result, expected)
    if not error <= MAX_ERROR:
        raise EngineError(f"{name}: found an RMS error of {error:.1e}, expected fp32's, at most {MAX_ERROR:.0e}")


Maker = Callable[[np.ndarray, np.ndarray], Callable[[], np.ndarray]]


def _torch(threads: int | None) -> tuple[Maker, Maker]:
    import torch

    torch.set_num_threads(threads or torch.get_num_threads())

    def product(left: np.ndarray, right: np.ndarray) -> Callable[[], np.ndarray]:
        first, second = torch.from_numpy(left), torch.from_numpy(right)
        result = torch.empty(len(left), right.shape[1])
        return lambda: torch.mm(first, second, out=result).numpy()

    def convolution(images: np.ndarray, weights: np.ndarray) -> Callable[[], np.ndarray]:
        first, second = (torch.from_numpy(array).to(memory_format=torch.channels_last) for array in (images, weights))
        return lambda: torch.nn.functional.conv2d(first, second, padding=1).numpy()

    return product, convolution


def _openvino(threads: int | None) -> tuple[Maker, Maker]:
    """With the right side or the weights as constants, which it puts in the order it likes best, as a model's are."""
    openvino = openvino_backend.library()
    from openvino import opset13 as ops

    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads

    def compiled(array: np.ndarray, node: Callable[[Any], Any]) -> Callable[[], np.ndarray]:
        parameter = ops.parameter(array.shape, np.float32)
        model = openvino.Model([node(parameter)], [parameter], "ceiling")
        with ThreadPoolExecutor(1) as thread:  # not the main one, as in trip_rt/backends/openvino.py
            request = thread.submit(
                lambda: openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
            ).result()
        request.set_input_tensor(openvino.Tensor(array, shared_memory=True))

        def call() -> np.ndarray:
            request.infer()
            return np.asarray(request.get_output_tensor().data)

        return call

    def product(left: np.ndarray, right: np.ndarray) -> Callable[[], np.ndarray]:
        return compiled(left, lambda parameter: ops.matmul(parameter, ops.constant(right), False, False))

    def convolution(images: np.ndarray, weights: np.ndarray) -> Callable[[], np.ndarray]:
        places = [[1, 1]] * 4  # strides, padding at both ends, dilations
        return compiled(images, lambda parameter: ops.convolution(parameter, ops.constant(weights), *places))

    return product, convolution
