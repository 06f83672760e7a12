"""What a careful user would run in trip-rt's place, on the same weights: diffusers' network in PyTorch, and its plain
export on engine libraries."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from diffusers import UNet3DConditionModel
from torch import Tensor, nn

from trip_export.components import Component
from trip_reference.model import TripModel
from trip_reference.unet import with_first_frame, without_first_frame
from trip_rt.accuracy import relative_errors
from trip_rt.backends import openvino as openvino_backend
from trip_rt.config import FirstFrame
from trip_rt.errors import InputError
from trip_rt.launch import note
from trip_rt.sampling.step import History, Step, advance, guide

Network = Callable[[Sequence[Tensor]], Tensor]
MAX_ERROR = {"fp32": 1e-3, "bf16": 0.05, "int8": 0.2}  # of a peer's latents: what is wrong is no rival


@dataclass(frozen=True)
class Inputs:
    """A guided step of the loop: latents and clean first frames of both halves, the timestep [1], text [2B, L, D], and
    the step's coefficients."""

    latents: Tensor
    first_frame: Tensor
    timestep: Tensor
    text: Tensor
    step: Step

    @property
    def of_unet(self) -> tuple[Tensor, ...]:
        return self.latents, self.first_frame, self.timestep, self.text


@dataclass(frozen=True)
class Peer:
    """`unet` and `step` do what the runtime does in a call of the network and in a whole guided step; `about`
    says how, `arithmetic` in what."""

    unet: Callable[[], Tensor]
    step: Callable[[], Tensor]
    about: str
    arithmetic: str


class _Plain(nn.Module):
    """diffusers' network as published, with the clean frame put before the others or beside them."""

    def __init__(self, unet: UNet3DConditionModel, first_frame: FirstFrame):
        super().__init__()
        self.unet, self.first_frame = unet, first_frame

    def forward(self, latents: Tensor, first_frame: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        sample = with_first_frame(latents, first_frame, self.first_frame)
        return without_first_frame(self.unet(sample, timestep, encoder_hidden_states=text).sample, self.first_frame)


@contextlib.contextmanager
def peers(model: TripModel, inputs: Inputs, names: Sequence[str], threads: int | None) -> Iterator[dict[str, Peer]]:
    """The peers by name; one whose library is not here is left out with a note."""
    torch.set_num_threads(threads or torch.get_num_threads())
    unet = UNet3DConditionModel.from_config(model.residual_unet.unet.config)
    unet.load_state_dict(model.residual_unet.unet.state_dict())
    plain, fusion = (
        _Plain(unet, model.config.first_frame).eval().requires_grad_(False),
        model.fusion.eval().requires_grad_(False),
    )
    sigmas = torch.tensor([inputs.step.sqrt_alpha_bar]), torch.tensor([inputs.step.sqrt_one_minus_alpha_bar])
    of_fusion = (inputs.latents, inputs.first_frame, inputs.latents, *sigmas, inputs.timestep)
    with tempfile.TemporaryDirectory(prefix="trip-bench-") as folder:
        ready = {}
        for name in names:
            try:
                note(f"{name}: preparing")
                networks, about = _MAKERS[name]([(plain, inputs.of_unet), (fusion, of_fusion)], Path(folder), threads)
            except (ImportError, InputError) as error:
                note(f"{name}: left out: {error}")
                continue
            ready[name] = _peer(*networks, inputs, sigmas, about, arithmetic_of(name))
        yield ready


def arithmetic_of(name: str) -> str:
    """What a peer computes in."""
    return name.partition("-")[2] or "fp32"


def wrong(found: np.ndarray, expected: np.ndarray, arithmetic: str) -> str:
    """Why a rival's latents cannot stand beside the runtime's, or "" where they can."""
    error = relative_errors(found, expected)[1]
    return (
        ""
        if error <= (most := MAX_ERROR[arithmetic])
        else f"found an error of {error:.1e} to trip-rt's latents, expected at most {most}"
    )


def _peer(
    unet: Network, fusion: Network, inputs: Inputs, sigmas: tuple[Tensor, Tensor], about: str, arithmetic: str
) -> Peer:
    step, half = inputs.step, len(inputs.latents) // 2

    @torch.inference_mode()
    def whole_step() -> Tensor:
        residual = unet(inputs.of_unet)
        noise = fusion((inputs.latents, inputs.first_frame, residual, *sigmas, inputs.timestep))
        latents, _ = advance(step, inputs.latents[:half], guide(step, noise, half), History())
        return latents

    @torch.inference_mode()
    def network() -> Tensor:
        return unet(inputs.of_unet)

    return Peer(network, whole_step, about, arithmetic)


Parts = list[tuple[nn.Module, tuple[Tensor, ...]]]


def _eager(parts: Parts, folder: Path, threads: int | None) -> tuple[list[Network], str]:
    """2-D convolutions' weights in the memory format that is faster in a short trial."""
    (plain, inputs), (fusion, _) = parts
    turned = copy.deepcopy(plain)
    for module in turned.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    best = {}
    with torch.inference_mode():
        for name, module in (("contiguous", plain), ("channels-last", turned)) * 2:
            began = time.perf_counter()
            module(*inputs)
            best[name] = time.perf_counter() - began, module
    chosen = min(best, key=lambda name: best[name][0])
    return [_called(best[chosen][1]), _called(fusion)], f"PyTorch eager, {chosen} convolutions"


def _compile(parts: Parts, folder: Path, threads: int | None) -> tuple[list[Network], str]:
    """With freezing: weights are constants, which the compiler reorders for the CPU once."""
    from torch._inductor import config

    compiled = [torch.compile(copy.deepcopy(module)) for module, _ in parts]
    with torch.inference_mode(), config.patch(freezing=True):  # the first call compiles
        for module, (_, inputs) in zip(compiled, parts, strict=True):
            module(*inputs)
    return [_called(module) for module in compiled], "torch.compile, frozen"


def _called(module: Any) -> Network:
    return lambda tensors: module(*tensors)


def _onnxruntime(parts: Parts, folder: Path, threads: int | None) -> tuple[list[Network], str]:
    from trip_rt.backends.onnxruntime import library

    onnxruntime = library()
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads or 0
    settings.add_session_config_entry("session.force_spinning_stop", "1")  # two sessions take turns

    def network(graph: Path) -> Network:
        session = onnxruntime.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        return lambda tensors: torch.from_numpy(
            session.run(None, {name: x.numpy() for name, x in zip(names, tensors, strict=True)})[0]
        )

    return [network(_exported(*part, folder)) for part in parts], "the plain ONNX export on ONNX Runtime"


def _openvino(parts: Parts, folder: Path, threads: int | None, arithmetic: str = "f32") -> tuple[list[Network], str]:
    return _on_openvino([_exported(*part, folder) for part in parts], threads, arithmetic)


def _on_openvino(graphs: Sequence[Path], threads: int | None, arithmetic: str) -> tuple[list[Network], str]:
    openvino = openvino_backend.library()

    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": arithmetic}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads

    def network(graph: Path) -> Network:
        request = openvino.Core().compile_model(graph, "CPU", settings).create_infer_request()
        return lambda tensors: torch.from_numpy(
            np.array(next(iter(request.infer([x.numpy() for x in tensors], share_inputs=True).values())))
        )

    return [network(graph) for graph in graphs], f"the plain ONNX export on OpenVINO, in {arithmetic}"


def _openvino_bf16(parts: Parts, folder: Path, threads: int | None) -> tuple[list[Network], str]:
    if not openvino_backend.OpenVINOEngine.lowers():
        raise InputError("found a CPU without bf16, expected one with it")
    return _openvino(parts, folder, threads, "bf16")


def _openvino_int8(parts: Parts, folder: Path, threads: int | None) -> tuple[list[Network], str]:
    """ONNX Runtime's quantiser as it comes, but for scales by output channel, calibrated on the call that is timed; the
    fusion stays as it is."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    (plain, inputs), fusion = parts
    graph = _exported(plain, inputs, folder)

    class Calls(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            names = [value.name for value in onnx.load(graph, load_external_data=False).graph.input]
            self._left = iter([{name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}])

        def get_next(self) -> dict[str, Any] | None:
            return next(self._left, None)

    logging.disable(logging.WARNING)
    try:
        quantised = folder / "int8.onnx"
        quantize_static(graph, quantised, Calls(), per_channel=True, use_external_data_format=True)
    finally:
        logging.disable(logging.NOTSET)
    network, about = _on_openvino([quantised, _exported(*fusion, folder)], threads, "f32")
    return network, f"{about}, quantised by ONNX Runtime"


def _inductor(parts: Parts, folder: Path, threads: int | None) -> tuple[list[Network], str]:
    from torch._inductor import aoti_load_package

    from trip_export.inductor_export import export_inductor

    def network(module: nn.Module, inputs: tuple[Tensor, ...]) -> Network:
        package = folder / f"{type(module).__name__}.pt2"
        export_inductor(
            Component("", module, {str(i): tensor for i, tensor in enumerate(inputs)}, ()), package, "fp32", "cpu"
        )
        loaded = aoti_load_package(str(package))
        # It takes for granted that inputs lie as the examples did, and the UNet's output without its first frame is a
        # view.
        return lambda tensors: loaded(*(tensor.contiguous() for tensor in tensors))

    return [
        network(module, tuple(tensor.clone() for tensor in inputs)) for module, inputs in parts
    ], "the plain network by AOTInductor, frozen"


def _exported(module: nn.Module, inputs: tuple[Tensor, ...], folder: Path) -> Path:
    path = folder / f"{type(module).__name__}.onnx"
    if not path.exists():
        with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)
            torch.onnx.export(
                module, tuple(tensor.clone() for tensor in inputs), path, dynamo=True, opset_version=18, verbose=False
            )
    return path


_MAKERS = {
    "eager": _eager,
    "compile": _compile,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "openvino-bf16": _openvino_bf16,
    "openvino-int8": _openvino_int8,
    "inductor": _inductor,
}
