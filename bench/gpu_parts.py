"""The parts of bench/gpu.py: each a function of the context that gives its figures; "passed" False means that what was run was wrong."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_timing import as_graph, ceilings, interleaved, spread
from torch.utils.flop_counter import FlopCounterMode

from trip_reference.fusion import NoiseFusion
from trip_reference.presets import DEMO, TRIP_256, Preset
from trip_rt.config import TNFConfig, TripConfig
from trip_rt.devices import open_device
from trip_rt.sampler import loop_buffers
from trip_rt.schedule import ddim_steps, step_table

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
BOUNDS = {"fp16": 1e-3, "bf16": 8e-3, "fp32": 1e-5}
ROOT = Path(__file__).parent.parent
# A model of every layer that the real ones have, small enough for an interpreter.
TINY = Preset(
    trip=dataclasses.replace(DEMO.trip, num_frames=5, height=32, width=48, text_width=16, tnf=TNFConfig(16, 4, 2)),
    unet=DEMO.unet | dict(block_out_channels=(8, 16), norm_num_groups=4),
    vae=DEMO.vae | dict(block_out_channels=(8, 8, 8, 8), norm_num_groups=4),
    text_encoder=DEMO.text_encoder | dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, bos_token_id=62, eos_token_id=63),
)


class Skipped(Exception):
    """Why a part does not run here."""


@dataclass
class Context:
    """How to run: for real or dry, with how many rounds, and where files may lie."""

    dry: bool
    quick: bool
    folder: Path

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def rounds(self) -> int:
        return 1 if self.dry else 20 if self.quick else 100

    def full(self) -> Preset:
        return TINY if self.dry else TRIP_256


def best_of_the_gpu(context: Context) -> dict[str, Any]:
    """What the GPU does at best, measured."""
    return ceilings(context.quick)


def parity(context: Context) -> dict[str, Any]:
    """The kernels, compiled here and by `trip_kernels.compile`, against fp64: RMS error over RMS."""
    from trip_kernels.fuse_noise import fuse_noise
    from trip_kernels.fused_step import fused_step, fused_step_ref
    from trip_kernels.tiles import Tile

    shapes = {"tiny": (TINY.trip, 1)} if context.dry else {"demo": (DEMO.trip, 2), "trip-256": (TRIP_256.trip, 1), "odd": (_odd(), 3)}
    errors: dict[str, Any] = {}
    passed = True
    for label, (config, batch) in shapes.items():
        fusion = _fusion(config, context.device)
        for precision, dtype in DTYPES.items():
            tensors = _step_tensors(config, batch, context.device)
            given = tensors["latents"], tensors["first_frame"], tensors["residual_noise"]
            row = tensors["table"][1]
            expected = _double(fusion)(*(tensor.double() for tensor in given), row[1:2].double(), row[2:3].double(), row[:1].long())
            tile = Tile(16, 4, 1) if context.dry else None  # in the interpreter a program costs the same however large it is
            found = {"fuse_noise": _rms(fuse_noise(fusion, *given, row[1:2], row[2:3], row[:1].long(), compute=dtype, tile=tile), expected)}
            double = {name: tensor.double() if tensor.is_floating_point() else tensor.clone() for name, tensor in tensors.items()}
            fused_step_ref(_double(fusion), **double)
            fused_step(fusion, **tensors, compute=dtype, tile=tile)
            found["fused_step"] = _rms(tensors["latents"], double["latents"])
            if not context.dry:
                found["fused_step, from its cubin"] = _rms(_by_cubin(context, fusion, config, batch, precision), double["latents"])
            errors[f"{label}, {precision}"] = found
            passed &= all(error <= BOUNDS[precision] for error in found.values())
    return {"errors": errors, "passed": passed}


def kernel(context: Context) -> dict[str, Any]:
    """The step after the UNet at full size: the fused kernel against eager torch and torch.compile of the reference, and against its floor."""
    from trip_kernels.fused_step import fused_step_kernel, step_arguments
    from trip_kernels.tiles import Tile, tiles

    config = context.full().trip
    limits = ceilings(quick=True)
    figures: dict[str, Any] = {
        "shape": f"2×{config.num_frames} frames of {config.latent_height}×{config.latent_width}, width {config.tnf.hidden_size}"
    }
    figures["ceilings"] = limits
    for precision, dtype in DTYPES.items():
        fusion = _fusion(config, context.device)
        tensors = _step_tensors(config, 1, context.device)
        tensors["table"] = _standing_still(tensors["table"])
        rivals: dict[str, Callable[[], object]] = {}
        half = _fusion(config, context.device).to(dtype)
        eager = partial(_reference_step, half, tensors | {"residual_noise": tensors["residual_noise"].to(dtype)})
        rivals["eager torch"] = eager
        rivals["eager torch, as a graph"] = as_graph(eager)
        if not context.dry:
            compiled = torch.compile(_reference_step)
            call = partial(compiled, half, tensors | {"residual_noise": tensors["residual_noise"].to(dtype)})
            call()
            rivals["torch.compile"] = call
            rivals["torch.compile, as a graph"] = as_graph(call)
        for tile in [Tile(16, 4, 1)] if context.dry else tiles(step_arguments(fusion, tensors, dtype)[2], dtype):
            name = f"fused, {tile.pixels} pixels {tile.warps} warps {tile.stages} stages"
            try:
                launch = _launch(fused_step_kernel, fusion, tensors, dtype, tile)
                launch()
                rivals[name] = as_graph(launch)
            except Exception as error:  # a tile that does not fit this GPU
                figures.setdefault("tiles left out", {})[f"{name}, {precision}"] = f"{type(error).__name__}: {str(error)[:80]}"
        if not context.dry:
            device, step = _kernel_step(context, fusion, config, 1, precision)
            device.write(step.buffers.table, _standing_still(tensors["table"]).cpu().numpy()[: step.buffers.table.shape[0]])
            times = interleaved({"fused, from its cubin": step}, context.rounds, torch.cuda.ExternalStream(device.stream))
            times |= interleaved(rivals, context.rounds)
            device.close()
        else:
            times = interleaved(rivals, context.rounds)
        best = min(value["median"] for name, value in times.items() if name.startswith("fused"))
        flops, needed = _flops(config)
        data = sum(tensor.nbytes for tensor in tensors.values()) + tensors["latents"].nbytes
        floor = max(flops * (3 if precision == "fp32" else 1) / limits["fp16_tflop_s"] / 1e6, data / limits["copy_tb_s"] / 1e6)
        figures[precision] = times | {
            "times faster than eager (10 wanted)": times["eager torch"]["median"] / best,
            "times faster than eager as a graph": times["eager torch, as a graph"]["median"] / best,
            "GFLOP of the kernel": flops / 1e9,
            "GFLOP of the reference": needed / 1e9,
            "MB read and written": data / 1e6,
            "floor, µs": floor,
            "of the floor, %": 100 * floor / best,
        }
        if not context.dry:
            figures[precision]["times faster than torch.compile (2 wanted)"] = times["torch.compile"]["median"] / best
            figures[precision]["times faster than torch.compile as a graph"] = times["torch.compile, as a graph"]["median"] / best
    return figures


def demo_loop(context: Context) -> dict[str, Any]:
    """The runtime's loop on the demo model, its UNet in PyTorch, against the oracle: PSNR of latents in dB."""
    figures: dict[str, Any] = {}
    passed = True
    for precision, floor in {"fp32": 60.0, "fp16": 40.0}.items():
        if context.dry and precision == "fp16":
            continue
        model = _demo_model(context)
        found = _loop_parity(context, model, precision)
        figures[precision] = found
        passed &= all(value >= floor for name, value in found.items() if name.endswith("dB"))
    return figures | {"passed": passed}


def inductor(context: Context) -> dict[str, Any]:
    """The same loop with its UNet compiled by AOTInductor for this device."""
    from trip_export.components import component
    from trip_export.inductor_export import export_inductor
    from trip_rt.backends import EngineOptions
    from trip_rt.backends.inductor import InductorEngine

    if context.dry:
        raise Skipped("compiles for minutes; tests/test_inductor.py does the same on a CPU")

    def compiled(engines: dict[str, Any], model: Any, device: Any) -> dict[str, Any]:
        package = context.folder / "unet.pt2"
        target = export_inductor(component(model.cpu(), "unet", 1, model.config.num_frames), package, "fp32", context.device)
        spec = dataclasses.replace(engines["unet"].spec, files=(package.name,), target=target)
        return engines | {"unet": InductorEngine.open(package, spec, EngineOptions(device="cuda"), device)}

    found = _loop_parity(context, _demo_model(context), "fp32", compiled)
    return {"fp32": found, "passed": all(value >= 60 for name, value in found.items() if name.endswith("dB"))}


def full_loop(context: Context) -> dict[str, Any]:
    """The loop at full size with random weights in fp16: milliseconds a step with and without a CUDA graph, and what of it is not the UNet."""
    from torch_engine import profile_of, torch_engines

    from trip_rt.pipeline import Pipeline

    model = _random_model(context)
    config = model.config
    precision = "fp32" if context.dry else "fp16"
    kernels = {} if context.dry else {precision: _kernel_spec(context, model.fusion, config, precision)}
    figures: dict[str, Any] = {"parameters, millions": sum(p.numel() for p in model.residual_unet.parameters()) / 1e6}
    steps = ddim_steps(config.schedule, 3 if context.dry else 20 if context.quick else 60)
    for label, cuda_graph in (("with a CUDA graph", True), ("without", False)):
        device = open_device(context.device)
        chunk = 1 if not context.dry else config.num_frames
        engines = torch_engines(model, device, 1, chunk, precision)
        pipeline = Pipeline(device, config, profile_of(model, engines, 1, chunk, kernels), engines, context.folder, cuda_graph)
        noise = np.random.default_rng(0).standard_normal((1, config.latent_channels, config.num_frames, config.latent_height, config.latent_width))
        pipeline.encode(*_tokens(config), np.zeros((1, 3, config.height, config.width), np.float32))
        marks = _Marks(device)
        pipeline.denoise(noise.astype(np.float32), steps, 7.5, lambda done, total, marks=marks: marks.mark())
        figures[f"a step, {label}"] = marks.between()
        finite = bool(np.isfinite(pipeline.latents()).all())
        figures[f"a step, {label}"]["latents are finite"] = finite
        if cuda_graph:
            buffers = pipeline.buffers
            unet = engines["unet"]
            alone = unet.bind({tensor.name: getattr(buffers, tensor.name) for tensor in (*unet.spec.inputs, *unet.spec.outputs)})
            device.write(buffers.table, _standing_still(torch.from_numpy(step_table(steps, 7.5))).numpy()[: buffers.table.shape[0]])
            stream = None if context.dry else torch.cuda.ExternalStream(device.stream)
            parts = interleaved({"the UNet": alone, "after the UNet": pipeline.after_unet}, 2 if context.dry else 20, stream)
            figures |= parts
            share = 100 * parts["after the UNet"]["median"] / (parts["the UNet"]["median"] + parts["after the UNet"]["median"])
            figures["outside of the UNet, % of a step (3 wanted)"] = share
            began = _Marks(device)
            began.mark()
            frames = sum(len(chunk) for chunk in pipeline.decode(0))
            began.mark()
            figures["decoding, read back as it goes"] = began.between() | {"frames": frames}
        for engine in engines.values():
            engine.close()
        device.close()
    if not context.dry:
        figures["peak GPU memory, GB"] = torch.cuda.max_memory_allocated() / 1e9
    return figures


PARTS = {
    "ceilings": best_of_the_gpu, "parity": parity, "kernel": kernel, "demo_loop": demo_loop, "inductor": inductor, "full_loop": full_loop,
}  # fmt: skip


class _Marks:
    """Points in the device's work, and the milliseconds between them."""

    def __init__(self, device: Any):
        self._device, self._marks = device, []

    def mark(self) -> None:
        if self._device.kind == "cpu":
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.ExternalStream(self._device.stream))
        self._marks.append(event)

    def between(self) -> dict[str, float]:
        if self._device.kind == "cpu":
            return spread([(b - a) * 1e6 for a, b in zip(self._marks, self._marks[1:], strict=False)])
        torch.cuda.synchronize()
        return spread([a.elapsed_time(b) * 1e3 for a, b in zip(self._marks, self._marks[1:], strict=False)])


def _odd() -> TripConfig:
    return dataclasses.replace(DEMO.trip, num_frames=7, height=40, width=24, tnf=TNFConfig(48, 3, 3), normalize_prior=False)


def _fusion(config: TripConfig, device: str) -> NoiseFusion:
    """A fusion with no dead path."""
    torch.manual_seed(0)
    fusion = NoiseFusion(config)
    with torch.no_grad():
        for parameter in fusion.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return fusion.eval().to(device)


def _double(fusion: NoiseFusion) -> NoiseFusion:
    return copy.deepcopy(fusion).double()


def _step_tensors(config: TripConfig, batch: int, device: str) -> dict[str, torch.Tensor]:
    """The loop's buffers as torch tensors, at the third of four steps, on random values."""
    generator = torch.Generator().manual_seed(1)
    size = config.latent_channels, config.num_frames, config.latent_height, config.latent_width

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    latents, first = random(batch, *size), random(batch, size[0], *size[2:])
    steps = ddim_steps(config.schedule, 4)
    return {
        "latents": torch.cat([latents, latents]),
        "first_frame": torch.cat([first, first]),
        "first_noise": random(batch, size[0], *size[2:]),
        "residual_noise": random(2 * batch, *size),
        "timestep": torch.tensor([steps[0].timestep], device=device),
        "table": torch.from_numpy(step_table(steps, 2.5)).to(device),
        "step": torch.ones(1, dtype=torch.int32, device=device),
    }


def _standing_still(table: torch.Tensor) -> torch.Tensor:
    """The table's first row again and again: a step that computes all and changes nothing, to be timed as often as one likes."""
    return table[:1].repeat(4096, 1)


@torch.no_grad()
def _reference_step(fusion: NoiseFusion, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """`fused_step_ref` without a word to the host: the row is taken on the device."""
    row = tensors["table"].index_select(0, tensors["step"].long())[0]
    first, latents = tensors["first_frame"], tensors["latents"]
    noise = fusion(latents, first, tensors["residual_noise"], row[1:2], row[2:3], row[:1].long())
    unconditional, conditional = noise.chunk(2)
    following = row[3] * latents.chunk(2)[0] + row[4] * (unconditional + row[5] * (conditional - unconditional))
    held = row[7] * first.chunk(2)[0] + row[8] * tensors["first_noise"]
    following = torch.cat([held[:, :, None], following[:, :, 1:]], 2)
    return torch.cat([following, following])


def _launch(kernel: Any, fusion: NoiseFusion, tensors: dict[str, torch.Tensor], dtype: torch.dtype, tile: Any) -> Callable[[], object]:
    """The kernel as compiled here, its weights packed beforehand."""
    from trip_kernels.fused_step import step_arguments

    arguments, constants, _ = step_arguments(fusion, tensors, dtype)
    batch, pixels = arguments[-2:]

    def launch() -> None:
        kernel[(batch * -(-pixels // tile.pixels),)](*arguments, **constants, PIXELS=tile.pixels, num_warps=tile.warps, num_stages=tile.stages)

    return launch


def _kernel_spec(context: Context, fusion: NoiseFusion, config: TripConfig, precision: str) -> Any:
    from trip_export.kernels import build_kernel

    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    return build_kernel(
        copy.deepcopy(fusion).cpu().float(), config, precision, [capability], f"{precision}{config.width:0>14}", context.folder, lambda text: None
    )


def _kernel_step(context: Context, fusion: NoiseFusion, config: TripConfig, batch: int, precision: str) -> tuple[Any, Any]:
    """A device and the cubin's step on it, on buffers filled as `_step_tensors`."""
    from trip_rt.after_unet import KernelStep, fitting

    device = open_device("cuda")
    spec = _kernel_spec(context, _fusion(config, "cpu"), config, precision)
    buffers = loop_buffers(device, config, batch)
    for name, tensor in _step_tensors(config, batch, "cpu").items():
        buffer = getattr(buffers, name)
        device.write(buffer[: len(tensor)] if name == "table" else buffer, tensor.numpy())
    return device, KernelStep(device, buffers, context.folder, spec, fitting(spec.cubins, device.compute_capability) or "")


def _by_cubin(context: Context, fusion: NoiseFusion, config: TripConfig, batch: int, precision: str) -> torch.Tensor:
    device, step = _kernel_step(context, fusion, config, batch, precision)
    step()
    latents = torch.from_numpy(device.read(step.buffers.latents)).cuda()
    device.close()
    return latents


def _rms(found: torch.Tensor, expected: torch.Tensor) -> float:
    if not found.isfinite().all():
        return float("inf")
    return float((found.double() - expected.double()).square().mean().sqrt() / expected.double().square().mean().sqrt())


def _flops(config: TripConfig) -> tuple[int, int]:
    """Floating-point operations of both halves' products: as the kernel does them, and as the reference defines them."""
    tokens = 2 * config.num_frames * config.latent_height * config.latent_width
    width, context, frames, heads = config.tnf.hidden_size, 2 * config.latent_channels, config.num_frames, config.tnf.num_heads
    self_attention = 4 * width * width + 2 * frames * width
    cross_attention = 2 * width * heads * context + 2 * frames * heads * context
    kernel = 2 * tokens * (config.tnf.num_layers * (self_attention + cross_attention) + (context + config.latent_channels) * width)
    fusion, tensors = _fusion(config, "cpu"), _step_tensors(config, 1, "cpu")
    with FlopCounterMode(display=False) as counter:
        _reference_step(fusion, tensors)
    return kernel, counter.get_total_flops()


def _demo_model(context: Context) -> Any:
    if context.dry:
        return _random_model(context)
    from trip_reference import checkpoint

    return checkpoint.from_pretrained(ROOT / "checkpoints" / "demo")


def _random_model(context: Context) -> Any:
    """A model of the full size's layout with random weights, made on the device in half precision."""
    from trip_reference.model import build_model

    torch.manual_seed(0)
    preset = context.full()
    with torch.device(context.device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32 if context.dry else torch.float16)
        try:
            model = build_model(preset)
        finally:
            torch.set_default_dtype(default)
    return model.eval()


def _tokens(config: TripConfig) -> tuple[np.ndarray, np.ndarray]:
    ids = np.ones((1, config.text_length), np.int64)
    return ids, 2 * ids


def _loop_parity(context: Context, model: Any, precision: str, replaced: Any = None) -> dict[str, float]:
    """PSNR of the loop's latents to the oracle's, in dB, with and without a graph."""
    from torch_engine import profile_of, torch_engines

    from trip_reference.sampling import sample
    from trip_rt.pipeline import Pipeline
    from trip_rt.sampler import initial_noise

    config = model.config
    steps = ddim_steps(config.schedule, 3 if context.dry else 25)
    picture = np.random.default_rng(0).uniform(-1, 1, (1, 3, config.height, config.width)).astype(np.float32)
    ids = _tokens(config)
    noise = initial_noise([0], (config.latent_channels, config.num_frames, config.latent_height, config.latent_width))
    with torch.no_grad():
        text = torch.cat([model.encode_text(torch.from_numpy(tokens)) for tokens in ids])
        expected = sample(model, model.encode_image(torch.from_numpy(picture)), torch.from_numpy(noise), text, steps, config.guidance_scale).numpy()
    kernels = {} if context.dry else {precision: _kernel_spec(context, copy.deepcopy(model.fusion), config, precision)}
    found = {}
    for label, cuda_graph in (("graph", True), ("no graph", False)):
        device = open_device(context.device)
        on_device = copy.deepcopy(model).to(context.device, DTYPES[precision])
        engines = torch_engines(on_device, device, 1, config.num_frames, precision)
        if replaced:
            engines = replaced(engines, copy.deepcopy(model), device)
        pipeline = Pipeline(device, config, profile_of(model, engines, 1, config.num_frames, kernels), engines, context.folder, cuda_graph)
        pipeline.encode(*ids, picture)
        pipeline.denoise(noise, steps, config.guidance_scale)
        error = np.mean((pipeline.latents().astype(np.float64) - expected) ** 2)
        found[f"latents, {label}, dB"] = float(10 * np.log10(np.ptp(expected) ** 2 / max(error, 1e-30)))
        found[f"{label}: after the UNet"] = pipeline.after_unet.name
        device.close()
    return found
