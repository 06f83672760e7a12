"""The kernels by themselves: are they right, and how fast is the fused step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from own_process import one_line
from torch import Tensor, nn
from triton.runtime.errors import OutOfResources

from gpu.cases import (
    BOUNDS,
    DTYPES,
    ODD,
    TINY,
    Context,
    build_kernels,
    kernel_flops,
    of_row,
    random_fusion,
    reference_flops,
    reference_step,
    rms_ratio,
    steady_table,
    step_tensors,
)
from gpu.clock import as_graph, beats_ceiling, ceilings, interleaved
from trip_kernels.fuse_noise import fuse_noise
from trip_kernels.fused_step import fused_step, fused_step_ref, launch_fused_step, step_arguments
from trip_kernels.tile_choices import Tile, tile_choices
from trip_reference.presets import DEMO, TRIP_256
from trip_rt.config import TripConfig
from trip_rt.devices import open_device
from trip_rt.fused_step import FusedStep
from trip_rt.manifest import KernelSpec
from trip_rt.networks import step_buffers

# In Triton's interpreter a program costs the same however large its tile is.
LARGE = Tile(pixels=32, warps=4, stages=1)


def parity(context: Context) -> dict[str, Any]:
    """The kernels against fp64, as Triton compiles them here and as machine code launched without Triton: RMS error
    over RMS."""
    cases = (
        {"tiny": (TINY.trip, 1)}
        if context.dry
        else {"demo": (DEMO.trip, 2), "trip-256": (TRIP_256.trip, 1), "odd": (ODD, 3)}
    )
    wanted = {
        (label, precision): (random_fusion(config, "cpu"), config, precision)
        for label, (config, _) in cases.items()
        for precision in DTYPES
    }
    if context.dry:
        wanted = {("tiny", "fp16"): wanted["tiny", "fp16"]}
    specs = build_kernels(context, wanted)
    errors: dict[str, Any] = {}
    passed = True
    for label, (config, batch) in cases.items():
        for precision in DTYPES:
            row: dict[str, Any] = {}
            checks = {
                "fuse_noise": partial(fuse_noise_error, config, batch, precision, context.device),
                "fused_step": partial(fused_step_error, config, batch, precision, context.device),
                "fused_step, from its cubin": partial(
                    _cubin_error, context, specs.get((label, precision)), config, batch
                ),
            }
            if precision == "fp32":
                checks["gradient"] = partial(gradient_error, config, batch, context.device)
            for name, check in checks.items():
                bound = 1e-4 if name == "gradient" else BOUNDS[precision]  # a gradient sums over all pixels in fp32
                try:
                    error = check()
                    row[name] = "not run: found no GPU" if error is None else error
                    passed &= error is None or error <= bound
                except Exception as error:
                    row[name] = one_line(error)
                    passed = False
            errors[f"{label}, {precision}"] = row
            context.keep({"errors": errors, "passed": passed})
    return {"errors": errors, "passed": passed}


def fuse_noise_error(config: TripConfig, batch: int, precision: str, device: str) -> float:
    """Of `fuse_noise` in `precision`, its output poisoned beforehand."""
    fusion, given = random_fusion(config, device), _noise_arguments(config, batch, device)
    with mock.patch.object(torch, "empty_like", lambda tensor, **_: torch.full_like(tensor, float("nan"))):
        noise = fuse_noise(fusion, *given, compute=DTYPES[precision], tile=_tile(device))
    return rms_ratio(noise, _double(fusion)(*_in_double(given)))


def gradient_error(config: TripConfig, batch: int, device: str) -> float:
    """The largest of any gradient of `fuse_noise` in fp32, of its input or of a parameter."""
    fusion, (latents, first, residual, *rest) = (
        random_fusion(config, device).requires_grad_(),
        _noise_arguments(config, batch, device),
    )
    double = _double(fusion)
    towards = torch.randn(residual.shape, generator=torch.Generator().manual_seed(2)).to(device)
    gradients = []
    for model, op in (fusion, partial(fuse_noise, fusion, tile=_tile(device))), (double, double):
        kind = next(model.parameters()).dtype
        inputs = [
            tensor.to(kind) if tensor.is_floating_point() else tensor for tensor in (latents, first, residual, *rest)
        ]
        inputs[2].requires_grad_()
        gradients.append(torch.autograd.grad(op(*inputs), [inputs[2], *model.parameters()], towards.to(kind)))
    return max(rms_ratio(gradient, expected) for gradient, expected in zip(*gradients, strict=True))


def fused_step_error(config: TripConfig, batch: int, precision: str, device: str) -> float:
    """The largest of `fused_step`'s latents in `precision` over two steps, each begun on the reference's own
    latents."""
    fusion, tensors = random_fusion(config, device), step_tensors(config, batch, device)
    double = {
        name: tensor.double() if name != "table" and tensor.is_floating_point() else tensor.clone()
        for name, tensor in tensors.items()
    }
    errors = []
    for _ in range(2):
        fused_step(fusion, **tensors, compute=DTYPES[precision], tile=_tile(device))
        fused_step_ref(_double(fusion), **double)
        errors.append(rms_ratio(tensors["latents"], double["latents"]))
        if not (torch.equal(tensors["timestep"], double["timestep"]) and torch.equal(tensors["step"], double["step"])):
            raise RuntimeError(
                f"fused_step: found timestep {tensors['timestep'].item()} and step {tensors['step'].item()}, expected"
                " the reference's"
            )
        for name in ("latents", "history"):
            tensors[name].copy_(double[name])
    return max(errors)


def cubin_error(spec: KernelSpec, folder: Any, config: TripConfig, batch: int) -> float:
    """As `fused_step_error`, of machine code launched by trip_rt's own FusedStep."""
    fusion, tensors = random_fusion(config, "cuda"), step_tensors(config, batch, "cuda")
    device = open_device("cuda")
    try:
        step = kernel_step(device, folder, spec, config, tensors)
        step()
        latents = torch.from_numpy(device.read(step.buffers.latents))
        moved = [int(device.read(buffer)[0]) for buffer in (step.buffers.timestep, step.own.step)]
    finally:
        device.close()
    double = {
        name: tensor.double() if name != "table" and tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    fused_step_ref(_double(fusion), **double)
    if moved != [int(double["timestep"]), int(double["step"])]:
        raise RuntimeError(
            f"found timestep and step {moved}, expected the reference's"
            f" {[int(double['timestep']), int(double['step'])]}"
        )
    return rms_ratio(latents, double["latents"].cpu())


def kernel_step(
    device: Any, folder: Any, spec: KernelSpec, config: TripConfig, tensors: dict[str, Tensor]
) -> FusedStep:
    """The cubin's step on buffers of its own that hold what `tensors` do."""
    (capability,) = spec.cubins
    buffers = step_buffers(device, config, len(tensors["first_noise"]), config.text_width, (1, 1, 1, 1))
    step = FusedStep(device, config, buffers, folder, spec, capability)
    for name, tensor in tensors.items():
        buffer = (vars(buffers) | vars(step.own))[name]
        device.write(buffer[: len(tensor)] if name == "table" else buffer, tensor.cpu().numpy())
    return step


def kernel(context: Context) -> dict[str, Any]:
    """The step after the UNet at full size: the fused kernel against eager torch and torch.compile of the reference,
    and against its floor.

    Every rival is called on as many sets of buffers as the L2 cache does not hold, one after the other, as nothing of a
    step is in the cache after a UNet. What is wrong has no time.
    """
    config = context.full.trip
    limits = ceilings(context.dry)
    shape = (
        f"2×{config.num_frames} frames of {config.frame_shape[1]}×{config.frame_shape[2]}, width"
        f" {config.tnf.hidden_size}"
    )
    figures: dict[str, Any] = {"shape": shape, "ceilings": limits}
    specs = (
        {}
        if context.dry
        else build_kernels(context, {name: (random_fusion(config, "cpu"), config, name) for name in DTYPES})
    )
    for name in (*DTYPES, *(() if context.dry or context.quick else ("fp16, tuned",))):
        precision = name.partition(",")[0]
        figures[name] = _Race(context, config, precision, tuned=name != precision).run(specs.get(precision), limits)
        figures["passed"] = figures.get("passed", True) and not figures[name]["failed"]
        context.keep(figures)
    return figures


class _Race:
    """The rivals of one precision on the same sets of buffers, all work on one stream."""

    def __init__(self, context: Context, config: TripConfig, precision: str, tuned: bool):
        self.context, self.config, self.precision, self.tuned = context, config, precision, tuned
        self.device = open_device(context.device)
        self.stream = None if context.dry else torch.cuda.ExternalStream(self.device.stream)
        self.sets, self.restart = _sets(config, context.device)
        self.start = self.sets[0]["latents"].clone()
        self.fusion = random_fusion(config, context.device)
        self.expected = _expected(self.fusion, self.sets[0])
        self.rivals: dict[str, Callable[[], object]] = {}
        self.about: dict[str, dict[str, Any]] = {}
        self.left_out: dict[str, str] = {}
        self.failed: dict[str, str] = {}

    def run(self, spec: Any, limits: dict[str, float]) -> dict[str, Any]:
        dtype, half = DTYPES[self.precision], random_fusion(self.config, self.context.device).to(DTYPES[self.precision])
        self._enter("eager torch", lambda: [partial(reference_step, half, **tensors) for tensors in self.sets], 10)
        compiled, mode = self._compiled(half)
        self._enter(f"torch.compile{mode}", lambda: compiled, 10)
        arguments = [step_arguments(self.fusion, tensors, dtype) for tensors in self.sets]
        shape = arguments[0]["SHAPE"]
        choices = [LARGE] if self.context.dry else tile_choices(shape, dtype)[: 1 if self.tuned else None]
        for tile in choices:
            name = f"fused, {tile.pixels} pixels {tile.warps} warps {tile.stages} stages"
            self.about[name] = {}
            self._enter(name, partial(_launches, arguments, tile, self.about[name]))
        if spec is not None:
            self._enter("fused, from its cubin", partial(self._cubins, spec))
        try:
            times = interleaved(self.rivals, self.context.rounds, len(self.sets), self.stream, self.restart)
        finally:
            self.device.close()
        tile = Tile(spec.cubins[next(iter(spec.cubins))].pixels, 0, 0) if isinstance(spec, KernelSpec) else choices[0]
        flops = kernel_flops(shape, tile, 1, math.prod(self.config.frame_shape[1:]), self.precision)
        data = sum(tensor.nbytes for name, tensor in self.sets[0].items() if name != "table") + self.start.nbytes
        floor = max(flops / limits["fp16_tflop_s"], data / limits["copy_tb_s"]) / 1e6
        share = 100 * floor / _fused(times) if _fused(times) else 0.0
        if not share:
            self.failed["fused"] = "found no tile that runs, expected one"
        elif beats_ceiling(share, limits) and not self.context.dry:
            self.failed["fused"] = f"found {share:.0f} % of the floor, expected at most 100 %: the ceilings are too low"
        return {
            "sets of buffers": len(self.sets),
            **times,
            **_ratios(times),
            "GFLOP of the kernel": flops / 1e9,
            "GFLOP of the reference": reference_flops(self.config, 1) / 1e9,
            "MB read and written": data / 1e6,
            "floor, µs": floor,
            **({"of the floor, %": share} if share else {}),
            "about": self.about,
            "left out": self.left_out,
            "failed": self.failed,
        }

    def _enter(self, name: str, prepare: Callable[[], list[Any]], leeway: int = 1) -> None:
        """Have a rival race, plain and as a graph, if it is right: the kernel to the bounds of parity, the reference in
        half precision to ten times those. `prepare` gives its call on each set."""
        try:
            self.sets[0]["latents"].copy_(self.start)
            self.restart()
            calls = prepare()
            if self.stream:
                torch.cuda.synchronize()  # all of this was done on another stream
            with torch.cuda.stream(self.stream):
                calls[0]()
            if self.stream:
                torch.cuda.synchronize()
            buffers = getattr(calls[0], "buffers", None)  # a FusedStep has its own
            latents = torch.from_numpy(self.device.read(buffers.latents)) if buffers else self.sets[0]["latents"]
            error, bound = rms_ratio(latents, self.expected.to(latents.device)), leeway * BOUNDS[self.precision]
            self.about[name] = {**self.about.get(name, {}), "rms error": error}
            if error > bound:
                self.failed[name] = f"rms error {error:.2g}, at most {bound:.0e} wanted"
                return

            def all_sets() -> None:
                for call in calls:
                    call()

            graph = as_graph(all_sets, self.stream)
            self.rivals |= {name: all_sets, f"{name}, as a graph": graph}
        except OutOfResources as error:  # a tile that does not fit this GPU
            self.left_out[name] = one_line(error)
        except Exception as error:  # the other rivals are worth having all the same
            self.failed[name] = one_line(error)

    def _compiled(self, half: nn.Module) -> tuple[list[Callable[[], object]], str]:
        if self.context.dry:
            step, mode = torch.compile(reference_step, backend="eager"), ""
        elif self.tuned:
            step, mode = torch.compile(reference_step, mode="max-autotune-no-cudagraphs"), ", max-autotune"
        else:
            step, mode = torch.compile(reference_step), ""
        return [partial(step, half, **tensors) for tensors in self.sets], mode

    def _cubins(self, spec: KernelSpec | Exception) -> list[FusedStep]:
        if isinstance(spec, Exception):
            raise spec
        return [kernel_step(self.device, self.context.folder, spec, self.config, tensors) for tensors in self.sets]


def _ratios(times: dict[str, dict[str, float]]) -> dict[str, float]:
    """How many times faster than each rival the kernel is as the runtime runs it, in a graph."""
    wanted = {"eager torch": " (10 wanted)", "torch.compile": " (2 wanted)"}
    fused = _fused(times)
    rivals = [name for name in times if not name.startswith("fused") and fused]
    return {f"times faster than {name}{wanted.get(name, '')}": times[name]["median"] / fused for name in rivals}


def _fused(times: dict[str, dict[str, float]]) -> float:
    """Median microseconds of the kernel as bundles hold it, or of the best that was compiled here; 0 where there is
    none."""
    graphs = {
        name: spread["median"] for name, spread in times.items() if name.startswith("fused") and name.endswith("graph")
    }
    return graphs.get("fused, from its cubin, as a graph") or min(graphs.values(), default=0.0)


def _sets(config: TripConfig, device: str) -> tuple[list[dict[str, Tensor]], Callable[[], object]]:
    """Sets of buffers that together are larger than the L2 cache, on the steady table, and what puts all their counters
    back."""
    tensors = step_tensors(config, 1, device)
    size = sum(tensor.nbytes for name, tensor in tensors.items() if name != "table")
    count = 2 if device == "cpu" else min(64, 1 + torch.cuda.get_device_properties(0).L2_cache_size * 5 // 4 // size)
    table, steps = steady_table(config, device), torch.zeros(count, 16, dtype=torch.int32, device=device)
    sets = [step_tensors(config, 1, device, seed) | {"table": table, "step": steps[seed, :1]} for seed in range(count)]
    return sets, steps.zero_


def _expected(fusion: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
    double = {
        name: tensor.double() if name != "table" and tensor.is_floating_point() else tensor.clone()
        for name, tensor in tensors.items()
    }
    fused_step_ref(_double(fusion), **double)
    return double["latents"]


def _launches(arguments: list[dict[str, Any]], tile: Tile, about: dict[str, Any]) -> list[Callable[[], object]]:
    return [partial(_launch, each, tile, about) for each in arguments]


def _launch(arguments: dict[str, Any], tile: Tile, about: dict[str, Any]) -> None:
    compiled = launch_fused_step(arguments, tile)
    if compiled is not None and not about:
        about.update(registers=compiled.n_regs, spilled=compiled.n_spills, shared_kib=compiled.metadata.shared / 1024)


def _tile(device: str) -> Tile | None:
    return LARGE if device == "cpu" else None


def _noise_arguments(config: TripConfig, batch: int, device: str) -> tuple[Tensor, ...]:
    tensors = step_tensors(config, batch, device)
    row = tensors["table"][1]
    signal, sigma = of_row(row, "sqrt_alpha_bar"), of_row(row, "sqrt_one_minus_alpha_bar")
    timestep = of_row(row, "timestep").long()
    return tensors["latents"], tensors["first_frame"], tensors["residual_noise"], signal, sigma, timestep


def _in_double(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors]


def _double(fusion: nn.Module) -> nn.Module:
    return copy.deepcopy(fusion).double()


def _cubin_error(context: Context, spec: Any, config: TripConfig, batch: int) -> float | None:
    if isinstance(spec, Exception):
        raise spec
    return None if context.dry else cubin_error(spec, context.folder, config, batch)
