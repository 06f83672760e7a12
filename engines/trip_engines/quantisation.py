"""int8 and fp8 of a network as a graph's own QuantizeLinear and DequantizeLinear, which every engine library reads.

Products with weights are quantised: convolutions and linear layers, weights per output channel, activations per tensor,
all symmetric, ranges from the recorded PyTorch run (Jacob et al. 2018). What stays as it is: the first and the last
convolution, the shortcuts, the embedding of the timestep, the products of two activations within attention, and all
other arithmetic.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnxscript.version_converter import convert_version

from trip_engines.emulation import Emulation
from trip_engines.float8 import to_fp8
from trip_engines.onnx_engine import EXTERNAL_FROM
from trip_engines.parity import MAX_COMPONENT_RMS
from trip_engines.precision import HALF
from trip_engines.recording import Sample
from trip_rt.accuracy import relative_errors
from trip_rt.backends.onnxruntime import library
from trip_rt.components import Quantised
from trip_rt.errors import EngineError

_PRODUCTS = ("Conv", "MatMul", "Gemm")
# Shortcuts read a skip connection beside what it joins. OpenVINO gives both one range then: 40 % error of the tiny
# network's output, where ONNX Runtime has 3 %. They are few and small.
_KEPT = re.compile(r"\b(conv_in|conv_out|conv_shortcut|time_embedding|time_emb_proj|time_proj)\b")
_OPSET = 19  # the first with fp8, and with scales in half precision
_CLOSE = 0.8  # of the parity bound, since figures of a few samples must hold for others too


def quantise(
    graph: Path,
    destination: Path,
    quantised: Quantised,
    samples: Sequence[Sample],
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Write the UNet `graph` (ONNX in fp32 or fp16) quantised to `destination`, its weights beside that, calibrated on
    `samples`.

    Returns what the manifest keeps of it: the layers that were kept, the RMS error by timestep, and `from_timestep`,
    above and at which the error is well within the bound: earlier steps are this network's, later ones the whole one's,
    as errors are largest where little noise is left. EngineError where no step is close enough.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    products = [
        node.name for node in onnx.load(graph, load_external_data=False).graph.node if node.op_type in _PRODUCTS
    ]
    kept = [name for name in products if _KEPT.search(name)]
    raw = destination.with_name(f"raw-{destination.name}")
    try:
        with _quietly():
            quantize_static(
                graph,
                raw,
                _Calibration(samples),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(_PRODUCTS),
                nodes_to_exclude=kept,
                per_channel=True,
                use_external_data_format=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                extra_options={
                    "ActivationSymmetric": True,
                    "WeightSymmetric": True,
                    "MatMulConstBOnly": True,
                    "QuantizeBias": False,  # TensorRT takes none of int32
                },
            )
        model = ir.load(raw)
        whole = ir.load(graph)
        emulated = quantised == "fp8" or any(
            value.dtype in HALF.values() for value in whole.graph.initializers.values()
        )
        if emulated:
            convert_version(model, _OPSET)
        if quantised == "fp8":
            to_fp8(model, whole)
        ir.save(
            model,
            destination,
            external_data=destination.with_suffix(".weights").name,
            size_threshold_bytes=EXTERNAL_FROM,
        )
    finally:
        for path in raw.parent.glob(f"{raw.name}*"):  # with its weights
            path.unlink()
    errors = _errors(destination, samples, emulated)
    note(f"error in {quantised} by timestep: " + ", ".join(f"{timestep} {error:.1e}" for timestep, error in errors))
    bound = _CLOSE * MAX_COMPONENT_RMS[quantised]
    close = _from_timestep(errors, bound)
    if close is None:
        raise EngineError(
            f"{graph.name}: found an error of {errors[-1][1]:.1e} in {quantised} where it is least, expected at most"
            f" {bound:.1e}; export without --{quantised}"
        )
    rms = {str(timestep): float(f"{error:.3g}") for timestep, error in errors}
    return {"not_quantised": kept, "rms_error_by_timestep": rms, "from_timestep": close}


def _from_timestep(errors: Sequence[tuple[int, float]], bound: float) -> int | None:
    """The least timestep from which on all errors, given by rising timestep, are within the bound; 0 where all are."""
    close: int | None = None
    for timestep, error in reversed(errors):
        if error > bound:
            return close
        close = timestep
    return 0


def _errors(graph: Path, samples: Sequence[Sample], emulated: bool) -> list[tuple[int, float]]:
    """Timestep and RMS error of the graph on each sample, by rising timestep."""
    if emulated:
        run = Emulation(graph).run
    else:
        onnxruntime = library()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        run = partial(session.run, None)
    errors = []
    for sample in samples:
        output, *_ = run(dict(sample.inputs))
        errors.append((int(sample.inputs["timestep"][0]), relative_errors(output, sample.output)[1]))
    return sorted(errors)


def conditional(samples: Sequence[Sample], rows: dict[str, int]) -> list[Sample]:
    """What a network without guidance gets of the samples of one with it: of each tensor as many of the last `rows` as
    it takes."""

    def last(name: str, array: NDArray[Any]) -> NDArray[Any]:
        return array[-rows[name] :]

    return [
        Sample(
            {name: last(name, array) for name, array in sample.inputs.items()}, last("residual_noise", sample.output)
        )
        for sample in samples
    ]


class _Calibration:
    """onnxruntime.quantization.CalibrationDataReader over samples."""

    def __init__(self, samples: Sequence[Sample]):
        self._left: Iterator[Sample] = iter(samples)

    def get_next(self) -> dict[str, NDArray[np.generic]] | None:
        sample = next(self._left, None)
        return None if sample is None else dict(sample.inputs)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the library's advice to the root logger, which is about graphs that nothing optimised before."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
