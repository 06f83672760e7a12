"""What a state file holds of a run: weights, their average, an optimiser; of a module of two small layers."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from trip_reference.training.average import Average
from trip_reference.training.state import Place, load_state, save_state

SCALE = {"scale": 2.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 3}


def saved_state(folder: Path) -> Path:
    """The state of a run after a step."""
    run = SmallRun()
    run.step()
    run.save(folder / "state.safetensors")
    return folder / "state.safetensors"


class SmallRun:
    """A run of two small layers."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
        self.tensors = dict(self.module.named_parameters())
        self.names = {tensor: name for name, tensor in self.tensors.items()}
        self.average = Average(self.tensors, 0.9)
        self.optimizer = torch.optim.AdamW(self.module.parameters())

    def step(self) -> None:
        self.module(torch.ones(2, 3)).sum().backward()
        self.optimizer.step()
        self.average.update(0)

    def save(self, path: Path) -> None:
        place = Place(5, 1.5, ([3, 4],), SCALE)
        save_state(path, "run", place, self.tensors, self.average, self.optimizer, self.names, True)

    def load(self, path: Path) -> None:
        load_state(path, self.tensors, self.average, self.optimizer, self.names)
