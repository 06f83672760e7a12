"""The machine code and the weights of the fused step as files of a bundle."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import trip_kernels
import trip_reference.tnf
from trip_kernels.compile import CompiledStep, compile_fused_step
from trip_kernels.packing import TileShape, pack, tile_shape
from trip_reference.fusion import NoiseFusion
from trip_rt.config import TripConfig
from trip_rt.manifest import Cubin, KernelSpec
from trip_rt.sampling.step_table import COLUMNS

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def build_kernel(
    fusion: NoiseFusion,
    config: TripConfig,
    precision: str,
    gpus: Sequence[str],
    key: str,
    folder: Path,
    note: Callable[[str], None],
    compile_step: Callable[..., list[CompiledStep]] = compile_fused_step,
) -> KernelSpec:
    """Compile the fused step of `config`'s fusion for `gpus` (compute capabilities) and write it, with its weights, to
    `folder`.

    RuntimeError where it cannot be compiled without spilling many registers. `compile_step` is compile_fused_step, or
    what gives the same of code compiled before.
    """
    shape = shape_of(config)
    compiled = compile_step(shape, DTYPES[precision], gpus, note)
    cubins = {}
    for step in compiled:
        cubin = f"fused_step-{step.capability}-{key[:16]}.cubin"
        (folder / cubin).write_bytes(step.cubin)
        cubins[step.capability] = Cubin(cubin, step.tile.pixels, step.tile.warps, step.shared_bytes, step.registers)
    file = f"fused_step-{key[:16]}.weights"
    weights = pack(fusion, shape, DTYPES[precision], torch.arange(config.schedule.num_train_timesteps))
    (folder / file).write_bytes(weights.numpy().tobytes())
    return KernelSpec(key, compiled[0].entry, compiled[0].parameters, cubins, file)


def shape_of(config: TripConfig) -> TileShape:
    """The sizes that the kernels are compiled for."""
    layers = config.tnf.num_layers if config.fusion == "tnf" else 0
    return tile_shape(
        config.latent_channels,
        config.num_frames,
        config.normalize_prior,
        config.gate == "matched",
        config.tnf.hidden_size,
        config.tnf.num_heads,
        layers,
    )


def sources_sha256() -> str:
    """The hash of everything of ours that decides how the kernel and its weights come out: its package, the time
    features of TNF, and the columns of the step table."""
    files = sorted(path for folder in trip_kernels.__path__ for path in Path(folder).glob("*.py"))
    files.append(Path(trip_reference.tnf.__file__))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files) + repr(COLUMNS).encode()).hexdigest()
