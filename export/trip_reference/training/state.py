"""The state of a run in one safetensors file, which depends neither on the number of processes nor on how they shard
the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from msgspec import Meta
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from trip_reference.training.average import Average
from trip_reference.training.optimizer import moments_of
from trip_rt.config import from_json, to_json
from trip_rt.errors import InputError, one_line, printable
from trip_rt.files import whole_file
from trip_rt.plain_files import check_plain

Steps = Annotated[int, Meta(ge=0, le=1 << 40)]
Number = Annotated[int, Meta(ge=0, le=1 << 40)] | Annotated[float, Meta(ge=0, le=1e300)]

_REMEDY = "delete it to begin anew"
_LOSS_SCALE = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}  # torch's GradScaler's


@dataclass(frozen=True)
class Place:
    """How far a run has come: steps done over all stages, seconds they took, places in streamed data (a list a
    process), scale of fp16 losses."""

    step: Steps
    seconds: Annotated[float, Meta(ge=0, le=1e12)] = 0.0
    data: tuple[list[Steps], ...] = ()
    loss_scale: dict[str, Number] | None = None

    def __post_init__(self) -> None:
        if self.loss_scale and self.loss_scale.keys() != _LOSS_SCALE:
            raise InputError(f"loss_scale: found {sorted(self.loss_scale)}, expected {sorted(_LOSS_SCALE)}")


def save_state(
    path: Path,
    run: str,
    place: Place,
    tensors: Mapping[str, Tensor],
    average: Average,
    optimizer: torch.optim.Optimizer,
    names: Mapping[Tensor, str],
    writes: bool,
) -> None:
    """Write weights (`tensors`), their average and the optimiser's moments to `path`, whole or not at all.

    `run` is the hash of all that the run depends on. Every process calls this, only the one with `writes` writes.
    """
    entries = {f"weights.{name}": tensor for name, tensor in tensors.items()}
    entries |= {f"average.{name}": tensor for name, tensor in average.tensors.items()}
    for parameter, moments in optimizer.state.items():
        entries |= {f"optimizer.{names[parameter]}.{name}": value for name, value in moments.items()}
    # safetensors stores neither shared nor channels-last tensors, so each is copied to plain layout.
    gathered = {name: whole(tensor).contiguous().clone() for name, tensor in entries.items()}
    if writes:
        with whole_file(path) as part:
            save_file(gathered, part, metadata={"run": run, "place": json.dumps(to_json(place))})


def read_place(path: Path, run: str) -> Place:
    """The place in the file; InputError where it is another run's."""
    with _opened(path) as file:
        metadata = file.metadata() or {}
    if metadata.get("run") != run:
        raise InputError(
            f"{path}: holds a run with other settings; resume with the settings it began with or choose another folder"
        )
    try:
        place = json.loads(metadata.get("place", ""))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: found no JSON that says how far the run has come; {_REMEDY}") from error
    return from_json(Place, place, f"{path}: place", _REMEDY)


def load_state(
    path: Path,
    tensors: Mapping[str, Tensor],
    average: Average,
    optimizer: torch.optim.Optimizer | None,
    names: Mapping[Tensor, str],
) -> None:
    """Put the file's numbers into weights, average and optimiser.

    InputError unless the file has all of them, in their shapes, and nothing else of theirs.
    """
    with _opened(path) as file, torch.no_grad():
        stored = set(file.keys())
        wanted = {f"weights.{name}": tensor for name, tensor in tensors.items()}
        wanted |= {f"average.{name}": tensor for name, tensor in average.tensors.items()}
        found = {key for key in stored if key.startswith(("weights.", "average."))}
        if strange := min(found ^ wanted.keys(), default=None):
            what = "lacks" if strange in wanted else "has the unknown"
            raise InputError(
                f"{path}: {what} {printable(strange)[:100]!r}; it was written by another version, start in a new folder"
            )
        moments: dict[Tensor, dict[str, Tensor]] = {}
        if optimizer:
            expected = moments_of(optimizer)
            for parameter, name in names.items():
                prefix = f"optimizer.{name}."
                keys = {key.removeprefix(prefix) for key in stored if key.startswith(prefix)}
                if keys and keys != expected[parameter]:
                    wanted_keys = sorted(expected[parameter])
                    raise InputError(f"{path}: {prefix}*: found {sorted(keys)}, expected {wanted_keys}; {_REMEDY}")
                # "step" is a scalar on the host; moments have their parameter's device and layout
                read = {key: _read(path, file, prefix + key, () if key == "step" else parameter.shape) for key in keys}
                counts = read.keys() & {"step", "exp_avg_sq"}
                if negative := next((key for key in sorted(counts) if (read[key] < 0).any()), None):
                    raise InputError(f"{path}: {prefix}{negative}: found a negative number; {_REMEDY}")
                if read:
                    moments[parameter] = {
                        key: value if key == "step" else _like(value, parameter) for key, value in read.items()
                    }
        for name, target in wanted.items():
            target.copy_(_like(_read(path, file, name, target.shape), target))
        if optimizer:
            optimizer.state.update(moments)


def _read(path: Path, file: Any, name: str, shape: Sequence[int]) -> Tensor:
    entry = file.get_slice(name)
    if (found := entry.get_shape()) != list(shape) or entry.get_dtype() != "F32":
        raise InputError(
            f"{path}: {name}: found {entry.get_dtype()} {found}, expected F32 {list(shape)}; it was written by another"
            " version, start in a new folder"
        )
    tensor: Tensor = file.get_tensor(name)
    if not tensor.isfinite().all():
        raise InputError(f"{path}: {name}: found a number that is not finite; {_REMEDY}")
    return tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor on the host, gathered where it is sharded among processes."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def _like(full: Tensor, target: Tensor) -> Tensor:
    if isinstance(target, DTensor):
        return distribute_tensor(full.to(target.device), target.device_mesh, target.placements)
    return full.to(target.device)


def _opened(path: Path) -> Any:
    check_plain(path, f"the state of a run; {_REMEDY}")
    try:
        return safe_open(path, "pt")
    except Exception as error:  # safetensors' own errors are of several kinds
        raise InputError(f"{path}: cannot be read ({one_line(error)}); {_REMEDY}") from error
