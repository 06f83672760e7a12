"""Runs of a tiny model for the training tests: in this process, in one that is killed, in several at once."""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny import TINY

from trip_reference import presets
from trip_reference.training import loop
from trip_reference.training.config import load_config
from trip_reference.training.run import train_run

presets.PRESETS["tiny"] = dataclasses.replace(
    TINY, trip=dataclasses.replace(TINY.trip, width=32, num_frames=3, num_inference_steps=3)
)

# Small enough for a step in a twentieth of a second, with everything that a state has to carry: two stages, parts of
# steps, an average.
SETTINGS = [
    "model.preset=tiny",
    "data.clips=10",
    "data.validation=",
    "vae.steps=0",
    "vae.untrained=true",
    "run.batch=4",
    "run.save_every=3",
    "run.log_every=1",
    "run.tracker=none",
    "run.weights=fp32",
    "stages.0.steps=12",
    "stages.0.warmup=2",
]
STAGE = dict(trains=["fusion.*"], unet_lr=1e-3, tnf_lr=1e-3, warmup=2)
TWO_STAGES = [
    'stages=[{name="tnf", steps=5, trains=["fusion.*"], unet_lr=1e-3, tnf_lr=1e-3, warmup=2},'
    '{name="all", steps=7, trains=["*"], unet_lr=1e-3, tnf_lr=2e-3, warmup=2}]'
]

# Children begin with everything imported, which is most of what a short run costs. Their server finds installed
# packages alone.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["trip_reference.training.run", "trip_export.export", "tensorboard", "pytest"])


def train_tiny(folder: Path, *settings: str) -> dict[str, Any]:
    return train_run(load_config("demo", None, [*SETTINGS, *settings]), folder)


def train_start(folder: Path) -> Path:
    """A checkpoint of the weights that every run begins with."""
    train_tiny(folder, "stages.0.steps=1", "stages.0.unet_lr=1e-12", "stages.0.tnf_lr=1e-12")
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint folder."""
    files = [path for path in sorted(folder.glob("*/*.safetensors")) if path.parent.name not in ("training", "lora")]
    return {f"{path.parent.name}.{name}": tensor for path in files for name, tensor in load_file(path).items()}


def same_bits(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(folder: Path, what: str = "loss") -> list[float]:
    records = [json.loads(line) for line in (folder / "training" / "denoiser.jsonl").read_text().splitlines()]
    return [record[what] for record in records if what in record]


def start(folder: Path, *settings: str, kill_at: int | None = None, environment: dict[str, str] | None = None) -> Any:
    """A process that trains; `kill_at`: it kills itself within that step."""
    process = _processes.Process(target=_child, args=(folder, settings, kill_at, environment or {}))
    process.start()
    return process


def train_together(folder: Path, count: int, *settings: str, sharded: bool = False) -> None:
    """One run in `count` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        world | {"RANK": str(rank), "LOCAL_RANK": str(rank), "SHARDED": str(int(sharded))} for rank in range(count)
    ]
    logs = [folder.with_name(f"{folder.name}-rank-{rank}.log") for rank in range(count)]
    processes = [
        start(folder, *settings, environment=rank | {"LOG": str(log)}) for rank, log in zip(ranks, logs, strict=True)
    ]
    for process in processes:
        process.join(240)
    codes = [process.exitcode for process in processes]
    # What a process says as it dies, by a signal too, is the only trace of a fault in one run of many.
    assert codes == [0] * count, "\n".join([f"exit codes: {codes}", *(log.read_text()[-6000:] for log in logs)])


def _child(folder: Path, settings: tuple[str, ...], kill_at: int | None, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    if "LOG" in environment:
        sys.stderr.flush()
        os.dup2(os.open(environment["LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        faulthandler.enable(2)
    torch.set_num_threads(1)
    if kill_at is not None:
        seed_torch = loop.seed_torch

        def kill(seed: int, step: int, part: int, rank: int) -> None:
            if step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            seed_torch(seed, step, part, rank)

        loop.seed_torch = kill
    if environment.get("SHARDED") == "1":
        _shard()
    train_tiny(folder, *settings)


def _shard() -> None:
    """Have Accelerate shard modules as its FSDP does on GPUs: on CPUs it offers none."""
    from accelerate import Accelerator
    from torch.distributed.fsdp import fully_shard

    def prepare(
        self: Accelerator, module: torch.nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[torch.nn.Module, Any]:
        names = {parameter: name for name, parameter in module.named_parameters()}
        fully_shard(module.residual_unet)
        fully_shard(module)
        sharded = dict(module.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [sharded[names[parameter]] for parameter in group["params"]]
        optimizer.optimizer = optimizer
        return module, optimizer

    Accelerator.prepare = prepare
