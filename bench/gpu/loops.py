"""The denoising loop as trip_rt runs it on the GPU: on the demo model against the oracle, and at full size against the
clock."""

from __future__ import annotations

import copy
import time
from functools import partial
from typing import Any

import numpy as np
import torch
from own_process import Skipped, missing, one_line, require
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gpu.cases import (
    DTYPES,
    FLOORS,
    ROOT,
    TINY,
    Context,
    build_kernels,
    random_fusion,
    reference_step,
    steady_table,
    step_tensors,
)
from gpu.clock import Marks, beats_ceiling, ceilings, interleaved
from gpu.torch_engines import StandIn, opener, profile_of, torch_engines
from trip_reference.presets import DEMO
from trip_rt.accuracy import psnr
from trip_rt.config import TripConfig
from trip_rt.devices import open_device
from trip_rt.errors import InputError
from trip_rt.pipeline import Pipeline
from trip_rt.sampling.loop import initial_noise
from trip_rt.settings import Settings

_OF_THE_MODEL = ("diffusers", "transformers")  # what trip_reference.model imports


def demo_loop(context: Context) -> dict[str, Any]:
    """The runtime's loop, its engines the PyTorch model's own modules, against the oracle: PSNR of latents in dB."""
    model, name = _demo_model(context)
    figures: dict[str, Any] = {"model": name, "passed": True}
    for precision in FLOORS:
        parity = _loop_parity(context, model, precision)
        figures[precision] = parity
        figures["passed"] &= all(value >= FLOORS[precision] for label, value in parity.items() if label.endswith("dB"))
        context.keep(figures)
    return figures


def inductor(context: Context) -> dict[str, Any]:
    """The same loop with its UNet compiled by AOTInductor for this device."""
    if context.dry:
        raise Skipped("compiles for minutes; tests/export/test_inductor.py does the same on a CPU")
    from trip_export.components import component, signatures
    from trip_export.inductor_export import export_inductor
    from trip_reference import checkpoint
    from trip_rt.backends import EngineOptions
    from trip_rt.backends.inductor import InductorEngine
    from trip_rt.manifest import EngineSpec

    model = checkpoint.from_pretrained(ROOT / "checkpoints" / "demo")
    specs = {}
    for name in ("text_projection", "unet"):
        package = context.folder / f"{name}.pt2"
        target = export_inductor(
            component(copy.deepcopy(model), name, 1, model.config.num_frames), package, "fp32", context.device
        )
        specs[name] = EngineSpec(
            (package.name,), "", "fp32", {}, 0.0, target, *signatures(model, 1, model.config.num_frames)[name]
        )

    def compiled(engines: dict[str, Any], device: Any) -> dict[str, Any]:
        options = EngineOptions(device="cuda")
        return engines | {
            name: InductorEngine.open(context.folder / spec.file, spec, options, device) for name, spec in specs.items()
        }

    parity = _loop_parity(context, model, "fp32", compiled)
    return {
        "fp32": parity,
        "passed": all(value >= FLOORS["fp32"] for label, value in parity.items() if label.endswith("dB")),
    }


def libraries(context: Context) -> dict[str, Any]:
    """The demo model as bundles made here for the engine libraries that run on this GPU: their parity as trip-export
    measures it."""
    if context.dry:
        raise Skipped("builds engines for a GPU")
    probes = {
        "tensorrt-rtx": _tensorrt_rtx,
        "tensorrt": partial(require, "tensorrt"),
        "onnxruntime": _onnxruntime_cuda,
    }
    figures: dict[str, Any] = {"left out": {}, "failed": {}, "passed": True}
    for backend, probe in probes.items():
        try:
            probe()
            from trip_engines.tensorrt_build import BuildOptions
            from trip_export.export import export_bundle
            from trip_export.plan import ExportOptions

            gpus = ("{}.{}".format(*torch.cuda.get_device_capability()),)
            for precision in ("fp32", "fp16"):
                options = ExportOptions(
                    backends=(backend,),
                    precision=precision,
                    gpus=gpus,
                    parity_steps=25,
                    tensorrt=BuildOptions(capabilities=gpus),
                )
                result = export_bundle(
                    ROOT / "checkpoints" / "demo", context.folder / f"{backend}-{precision}", options
                )
                parity = result.parity[backend]
                figures[f"{backend}, {precision}"] = {"latents, dB": parity.latents_psnr, "on": parity.measured_on}
                figures["passed"] &= parity.passed
        except Skipped as error:
            figures["left out"][backend] = str(error)
        except Exception as error:  # the other library is worth having all the same
            figures["failed"][backend], figures["passed"] = one_line(error), False
        context.keep(figures)
    if len(figures["left out"]) == len(probes):
        raise Skipped("; ".join(figures["left out"].values()))
    return figures


def full_loop(context: Context) -> dict[str, Any]:
    """The loop at full size with random weights in fp16: microseconds a step with and without a CUDA graph, and what of
    it is not the UNet.

    Its latents are held to those of eager torch's loop in fp16. What is wrong has no time.
    """
    model, precision = _full_model(context), "fp32" if context.dry else "fp16"
    config, parameters = model.config, sum(p.numel() for p in model.residual_unet.parameters())
    kernels = (
        {}
        if context.dry
        else build_kernels(context, {precision: (copy.deepcopy(model.fusion).cpu().float(), config, precision)})
    )
    if isinstance(kernels.get(precision), Exception):
        raise kernels[precision]
    steps = Settings(num_inference_steps=3 if context.dry else 50, guidance_scale=2.5).steps(config)
    noise = initial_noise([0], config.latent_shape)
    figures: dict[str, Any] = {"parameters, millions": parameters / 1e6, "steps": len(steps)}
    expected, figures["a step of eager torch's loop"] = _eager_loop(context, model, noise, steps)
    for label, cuda_graph in (("as a graph", True), ("without a graph", False)):
        device = open_device(context.device)
        stream = None if context.dry else torch.cuda.ExternalStream(device.stream)
        engines = torch_engines(model, device, 1, precision)
        if not context.dry:
            torch.cuda.reset_peak_memory_stats()
        pipeline = Pipeline(
            device, config, profile_of(config, engines, 1, kernels), opener(engines), context.folder, cuda_graph
        )
        for _ in range(2):  # the first warms up
            marks = Marks(stream)
            pipeline.denoise(noise, steps, lambda done, total, marks=marks: marks.mark())
        error = psnr(pipeline.latents(), expected, np.ptp(expected))
        figures[f"latents against eager torch's, {label}, dB"] = error
        if np.isfinite(expected).all() and not error >= FLOORS["fp16"]:
            return figures | {"passed": False}
        figures[f"a step of the loop, {label}"] = marks.between()
        if cuda_graph:
            if not context.dry:
                figures["peak GPU memory of torch, GB"] = torch.cuda.max_memory_allocated() / 1e9
            figures |= _decoding(pipeline, device)
            context.keep(figures)
            figures |= _shares(context, config, pipeline, engines["unet"], device, stream)
        device.close()
        context.keep(figures)
    return {"passed": True} | figures


def _shares(
    context: Context, config: TripConfig, pipeline: Pipeline, engine: Any, device: Any, stream: Any
) -> dict[str, Any]:
    """A step's parts by themselves and together, as graphs, over and over at one timestep. On a host, where no fused
    kernel runs, eager torch stands in for it."""
    buffers, after = pipeline.buffers, pipeline.fused_step
    device.write(buffers.timestep, np.array([500], np.int64))
    if after:
        device.write(after.own.table, steady_table(config).numpy())
        device.write(after.own.step, np.zeros(1, np.int32))
    elif context.dry:
        tensors = step_tensors(config, 1, "cpu") | {"table": steady_table(config)}
        after = partial(reference_step, random_fusion(config, "cpu"), **tensors)
    else:
        raise RuntimeError(f"found {pipeline.after_unet} after the UNet, expected the fused kernel")
    unet = engine.bind(
        {tensor.name: getattr(buffers, tensor.name) for tensor in (*engine.spec.inputs, *engine.spec.outputs)}
    )

    def step() -> None:
        unet()
        after()

    graphs = {"the step": step, "the UNet": unet, "after the UNet": after}
    times = interleaved(
        {name: engine.capture(work) if stream else work for name, work in graphs.items()}, context.rounds, 1, stream
    )
    whole, alone, rest = (times[name]["median"] for name in graphs)
    limits = ceilings(context.dry)
    with FlopCounterMode(display=False) as counter:
        unet()
    floor = counter.get_total_flops() / limits["fp16_tflop_s"] / 1e6
    impossible = beats_ceiling(100 * floor / alone, limits) and not context.dry
    return {
        **{f"{name}, as a graph": spread for name, spread in times.items()},
        "outside of the UNet, % of a step (3 wanted)": 100 * rest / whole,
        "the same as step less UNet, %": 100 * (whole - alone) / whole,
        "TFLOP of the UNet": counter.get_total_flops() / 1e12,
        "floor of the UNet, µs": floor,
        "of the UNet's floor, %": 100 * floor / alone,
        **({"passed": False, "ceilings, which are too low": limits} if impossible else {}),
    }


def _decoding(pipeline: Pipeline, device: Any) -> dict[str, Any]:
    milliseconds, latents = [], pipeline.latents()[0]
    for _ in range(3):
        device.read(pipeline.buffers.timestep)  # waits
        began = time.perf_counter()
        frames = sum(len(chunk) for chunk in pipeline.decode(latents))
        milliseconds.append((time.perf_counter() - began) * 1000)
    return {"decoding a clip, read back as it goes, ms": min(milliseconds), "frames": frames}


def _eager_loop(
    context: Context, model: Any, noise: np.ndarray, steps: list[Any]
) -> tuple[np.ndarray, dict[str, float]]:
    """The oracle as it is, on the GPU and in the model's own dtype, from buffers of zeros as the runtime's are: its
    latents, and its steps' times."""
    from trip_reference.sampling import sample

    config, dtype = model.config, next(model.residual_unet.parameters()).dtype
    with torch.device(context.device), torch.no_grad():  # where the oracle makes its own tensors
        first = torch.zeros(1, *config.frame_shape, dtype=dtype)
        text = torch.zeros(2, config.text_length, config.text_width, dtype=dtype)
        start = torch.from_numpy(noise).to(context.device, dtype)
        for _ in range(2):
            marks = Marks(None if context.dry else torch.cuda.current_stream())
            latents = sample(model, first, start, text, steps, lambda *_, marks=marks: marks.mark())
        return latents.float().cpu().numpy(), marks.between()


def _loop_parity(context: Context, model: Any, precision: str, replaced: Any = None) -> dict[str, Any]:
    """PSNR of the loop's latents to the fp32 oracle's, in dB (peak: their range), with and without a graph."""
    config = model.config
    steps = Settings(num_inference_steps=3 if context.dry else 25).steps(config)
    picture = np.random.default_rng(0).uniform(-1, 1, (1, 3, config.height, config.width)).astype(np.float32)
    noise = initial_noise([0], config.latent_shape)
    expected, found = _oracle(model, picture, noise, steps)
    kernels = (
        {} if context.dry else build_kernels(context, {precision: (copy.deepcopy(model.fusion), config, precision)})
    )
    if isinstance(kernels.get(precision), Exception):
        raise kernels[precision]
    for label, cuda_graph in (("graph", True), ("no graph", False)):
        device = open_device(context.device)
        engines = torch_engines(
            copy.deepcopy(model).to(context.device, DTYPES[precision]), device, config.num_frames, precision
        )
        if replaced:
            engines = replaced(engines, device)
        pipeline = Pipeline(
            device,
            config,
            profile_of(config, engines, config.num_frames, kernels),
            opener(engines),
            context.folder,
            cuda_graph,
        )
        pipeline.encode(*_tokens(config), picture)
        pipeline.denoise(noise, steps)
        found[f"latents, {label}, dB"] = psnr(pipeline.latents(), expected, np.ptp(expected))
        found[f"{label}: after the UNet"] = pipeline.after_unet
        found[f"{label}: recorded"] = str(pipeline.graph)
        device.close()
    return found


def _oracle(model: Any, picture: np.ndarray, noise: np.ndarray, steps: list[Any]) -> tuple[np.ndarray, dict[str, Any]]:
    """fp32 latents, and what made them: the PyTorch oracle or, where that cannot be imported, the loop on the host,
    which tests hold to it."""
    config, ids = model.config, _tokens(model.config)
    if lacking := missing(*_OF_THE_MODEL):
        device = open_device("cpu")
        engines = torch_engines(model, device, config.num_frames, "fp32")
        pipeline = Pipeline(
            device, config, profile_of(config, engines, config.num_frames, {}), opener(engines), ROOT, cuda_graph=False
        )
        pipeline.encode(*ids, picture)
        pipeline.denoise(noise, steps)
        return pipeline.latents(), {"held to": f"the loop on the host, as {lacking[0]} is not installed"}
    from trip_reference.sampling import sample

    with torch.no_grad():
        text = torch.cat([model.encode_text(torch.from_numpy(tokens)) for tokens in ids])
        first = model.encode_image(torch.from_numpy(picture))
        return sample(model, first, torch.from_numpy(noise), text, steps).numpy(), {
            "held to": "trip_reference.sampling"
        }


def _demo_model(context: Context) -> tuple[nn.Module, str]:
    """The demo model on the CPU in fp32, or a stand-in with its fusion where diffusers is not installed."""
    config = TINY.trip if context.dry else DEMO.trip
    if lacking := missing(*_OF_THE_MODEL):
        torch.manual_seed(0)
        model = StandIn(config).eval().requires_grad_(False)
        model.fusion = random_fusion(config, "cpu")
        if not context.dry:
            from safetensors.torch import load_file

            model.fusion.load_state_dict(
                load_file(ROOT / "checkpoints" / "demo" / "fusion" / "diffusion_pytorch_model.safetensors")
            )
        return model, f"a stand-in for the UNet and VAE, as {lacking[0]} is not installed; the fusion is the demo's own"
    if context.dry:
        return _random_model(context), "random weights"
    from trip_reference import checkpoint

    return checkpoint.from_pretrained(ROOT / "checkpoints" / "demo"), "checkpoints/demo"


def _full_model(context: Context) -> nn.Module:
    """UNet, VAE and fusion of the full size with random weights, made on the device in half precision; the text
    encoder, which a step does not run, is a stand-in."""
    from trip_reference.model import build_unet, build_vae
    from trip_reference.unet import ResidualUNet

    preset, dtype = context.full, torch.float32 if context.dry else torch.float16
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(context.device):
            model = StandIn(preset.trip)
            model.residual_unet = ResidualUNet(build_unet(preset.trip, preset.unet), preset.trip.first_frame)
            vae = build_vae(preset.trip, preset.vae)
    finally:
        torch.set_default_dtype(default)
    model.fusion = random_fusion(preset.trip, context.device).to(dtype)
    model.decode = _Decoder(vae)
    return model.eval().requires_grad_(False)


class _Decoder(nn.Module):
    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(latents).sample


def _random_model(context: Context) -> nn.Module:
    from trip_reference.model import build_model

    torch.manual_seed(0)
    return build_model(context.full).eval().requires_grad_(False)


def _tokens(config: Any) -> tuple[np.ndarray, np.ndarray]:
    ids = np.ones((1, config.text_length), np.int64)
    return ids, 2 * ids


def _tensorrt_rtx() -> None:
    """Skipped where TensorRT for RTX is not installed or builds nothing for this GPU."""
    require("tensorrt_rtx")
    from trip_engines.tensorrt_build import BuildOptions, target

    try:
        target(
            "tensorrt-rtx", "fp32", BuildOptions(capabilities=("{}.{}".format(*torch.cuda.get_device_capability()),))
        )
    except InputError as error:
        raise Skipped(str(error)) from error


def _onnxruntime_cuda() -> None:
    require("onnxruntime")
    import onnxruntime

    if "CUDAExecutionProvider" not in (providers := onnxruntime.get_available_providers()):
        raise Skipped(
            f"onnxruntime: found the providers {', '.join(providers)}, expected CUDAExecutionProvider; install"
            " onnxruntime-gpu"
        )
