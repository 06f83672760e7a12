"""A control of random weights for the tiny model."""

from __future__ import annotations

from pathlib import Path

import torch

from trip_reference import checkpoint
from trip_reference.control import save_control
from trip_rt.config import ControlConfig

CONTROL = ControlConfig("motion", hidden_size=8, num_layers=2)


def save_tiny_control(base: Path, folder: Path) -> Path:
    """A control of the checkpoint `base` whose last layer is random too, so that it changes clips."""
    model = checkpoint.from_pretrained(base)
    torch.manual_seed(5)
    model.add_control(CONTROL)
    assert model.control
    with torch.no_grad():
        model.control.conv_out.weight.normal_(std=0.3)
        model.control.conv_out.bias.normal_(std=0.1)
    save_control(model.control, base, folder, torch.float32)
    return folder
