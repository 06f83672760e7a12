"""The fused step's machine code compiled beforehand on another machine, by the Triton that bundles are made with: what
ships is then what is checked and timed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu.cases import DTYPES, ODD
from trip_export.kernels import shape_of, sources_sha256
from trip_kernels.compile import CompiledStep, compile_fused_step
from trip_kernels.packing import TileShape
from trip_kernels.tile_choices import Tile
from trip_reference.presets import DEMO, TRIP_256
from trip_rt.errors import InputError

SHAPES = (DEMO.trip, TRIP_256.trip, ODD)


def write(folder: Path, capabilities: Sequence[str], note: Callable[[str], None]) -> None:
    """Compile all that the parts of a run launch, for those compute capabilities, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for config in SHAPES:
        for name, dtype in DTYPES.items():
            shape = shape_of(config)
            for step in compile_fused_step(shape, dtype, capabilities, partial(_say, note, config, name)):
                about = dataclasses.asdict(step) | {"cubin": ""}
                path = folder / _name(shape, dtype, step.capability)
                path.with_suffix(".cubin").write_bytes(step.cubin)
                path.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")


def read(
    folder: Path,
    shape: TileShape,
    dtype: torch.dtype,
    capabilities: Sequence[str],
    note: Callable[[str], None] = lambda text: None,
) -> list[CompiledStep]:
    """What compile_fused_step gives, out of `folder`; InputError where it is not there or of other sources."""
    return [_read(folder / _name(shape, dtype, capability), capability) for capability in capabilities]


def _read(path: Path, capability: str) -> CompiledStep:
    try:
        about: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
        cubin = path.with_suffix(".cubin").read_bytes()
    except OSError as error:
        raise InputError(
            f"kernels: found none in {path.parent} for compute capability {capability} of these sources and shapes;"
            f" compile them with bench/gpu/run.py --kernels {path.parent} --compile-for {capability}"
        ) from error
    about |= {"cubin": cubin, "tile": Tile(**about["tile"]), "parameters": tuple(about["parameters"])}
    return CompiledStep(**about)


def _name(shape: TileShape, dtype: torch.dtype, capability: str) -> str:
    key = hashlib.sha256(f"{shape} {dtype} {sources_sha256()}".encode()).hexdigest()
    return f"fused_step-{key[:16]}-sm{capability.replace('.', '')}"


def _say(note: Callable[[str], None], config: Any, precision: str, text: str) -> None:
    note(f"{config.num_frames} frames, {config.latent_channels} channels, {precision}: {text}")
