"""The state of a run in one safetensors file, which depends neither on the number of processes nor on how they shard
the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from trip_reference.training.average import Average
from trip_rt.errors import InputError
from trip_rt.files import whole_file


@dataclass(frozen=True)
class Place:
    """How far a run has come: steps done over all stages, seconds they took, places in streamed data (a list a
    process), scale of fp16 losses."""

    step: int
    seconds: float = 0.0
    data: tuple[list[int], ...] = ()
    loss_scale: dict[str, Any] | None = None


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
            save_file(gathered, part, metadata={"run": run, "place": json.dumps(place.__dict__)})


def read_place(path: Path, run: str) -> Place:
    """The place in the file; InputError where it is another run's."""
    with _opened(path) as file:
        metadata = file.metadata()
    if metadata.get("run") != run:
        raise InputError(
            f"{path}: holds a run with other settings; resume with the settings it began with or choose another folder"
        )
    return Place(**json.loads(metadata["place"]))


def load_state(
    path: Path,
    tensors: Mapping[str, Tensor],
    average: Average,
    optimizer: torch.optim.Optimizer | None,
    names: Mapping[Tensor, str],
) -> None:
    """Put the file's numbers into weights, average and optimiser."""
    with _opened(path) as file, torch.no_grad():
        stored = set(file.keys())

        def put(target: Tensor, name: str) -> None:
            if name not in stored:
                raise InputError(f"{path}: lacks {name!r}; it was written by another version, start in a new folder")
            target.copy_(_like(file.get_tensor(name), target))

        for name, tensor in tensors.items():
            put(tensor, f"weights.{name}")
        for name, tensor in average.tensors.items():
            put(tensor, f"average.{name}")
        if optimizer:
            for parameter, name in names.items():
                prefix = f"optimizer.{name}."
                moments = {key.removeprefix(prefix): file.get_tensor(key) for key in stored if key.startswith(prefix)}
                if moments:  # "step" is a scalar on the host; moments have their parameter's device and layout
                    optimizer.state[parameter] = {
                        key: _like(value, parameter) if value.ndim else value for key, value in moments.items()
                    }


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor on the host, gathered where it is sharded among processes."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def _like(full: Tensor, target: Tensor) -> Tensor:
    if isinstance(target, DTensor):
        return distribute_tensor(full.to(target.device), target.device_mesh, target.placements)
    return full.to(target.device)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except Exception as error:
        raise InputError(
            f"{path}: cannot be read ({' '.join(str(error).split())[:200]}); delete it to begin anew"
        ) from error
