"""The control: a light network beside the UNet that lets a map, such as a drawn path, steer a clip.

After ControlNeXt (Peng et al. 2024, arXiv 2408.06070): one small convolutional encoder, whose features are added at
one place, the UNet's first convolution. The UNet stays as it is, and the encoder's last layer begins at zero, so that
training starts from the clips without control. Beside the map it is given the clean first frame, as it is and as the
map moves it: from a map alone it learns where things go, and not to keep what they are.

    config.json  diffusion_pytorch_model.safetensors

is its checkpoint. It belongs to one UNet, whose file's SHA-256 the config holds.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from msgspec import Meta
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from trip_reference.parts import REMEDY, load_weights
from trip_reference.temporal_conv import TemporalConv
from trip_rt.bundle import file_sha256
from trip_rt.config import ControlConfig, FirstFrame, from_json, to_json
from trip_rt.control import MOTION_UNIT
from trip_rt.errors import InputError, printable
from trip_rt.files import disk_full
from trip_rt.plain_files import check_plain, read_json

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
UNET_WEIGHTS = Path("unet", WEIGHTS)  # in a checkpoint folder
_KNOWN = 1e-3  # what is known less of a place counts as nothing
_REMEDY = "train one with trip-train --recipe control"


class ControlEncoder(nn.Module):
    """A map [B, K, F, h, w] and the clean first frame [B, C, h, w] to what the UNet's first convolution is given more,
    [B, F', C', h, w], C' of `width`.

    F' counts the clean frame where that is one of the UNet's; nothing steers it.
    """

    def __init__(self, config: ControlConfig, latent_channels: int, width: int, first_frame: FirstFrame):
        super().__init__()
        self.config, self.first_frame = config, first_frame
        hidden = config.hidden_size
        self.conv_in = nn.Conv2d(config.channels + 2 * latent_channels, hidden, 3, padding=1)
        self.layers = nn.ModuleList(_Layer(hidden) for _ in range(config.num_layers))
        self.conv_out = nn.Conv2d(hidden, width, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        assert self.conv_out.bias is not None
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, control: Tensor, first_frame: Tensor) -> Tensor:
        frames = control.shape[2]
        maps = control.transpose(1, 2).flatten(0, 1)  # [B·F, K, h, w]
        still = first_frame.repeat_interleave(frames, 0)  # [B·F, C, h, w]
        x = self.conv_in(torch.cat([maps, still, carried(still, maps)], 1))  # [B·F, hidden, h, w]
        for layer in self.layers:
            x = layer(x, frames)
        features = self.conv_out(F.silu(x)).unflatten(0, (-1, frames))
        match self.first_frame:
            case "start":
                return F.pad(features, (0, 0, 0, 0, 0, 0, 1, 0))
            case "end":
                return F.pad(features, (0, 0, 0, 0, 0, 0, 0, 1))
            case "channel":
                return features


def carried(pictures: Tensor, maps: Tensor) -> Tensor:
    """Pictures [N, C, h, w] as the `motion` maps [N, 3, h, w] move them: each place has what was there before it moved.
    Where little is known of a place, it has moved little."""
    height, width = pictures.shape[-2:]
    moved = maps[:, :2] / maps[:, 2:].clamp(min=_KNOWN) * (2 * MOTION_UNIT)  # the picture is 2 wide, −1 to 1
    across = torch.linspace(-1 + 1 / width, 1 - 1 / width, width, device=maps.device)
    down = torch.linspace(-1 + 1 / height, 1 - 1 / height, height, device=maps.device)
    came_from = torch.stack([across.expand(height, width), down[:, None].expand(height, width)]) - moved
    return F.grid_sample(pictures, came_from.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)


class _Layer(nn.Module):
    """A convolution over places, then one over frames, added to what came in."""

    def __init__(self, hidden: int):
        super().__init__()
        self.space = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.time = TemporalConv(hidden, hidden, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """[B·F, hidden, h, w] → the same."""
        y = F.silu(self.space(F.silu(x)))
        clips = y.unflatten(0, (-1, frames)).transpose(1, 2)  # [B, hidden, F, h, w]
        return x + self.time(clips).transpose(1, 2).flatten(0, 1)


@contextmanager
def added_features(unet: nn.Module, features: Tensor | None) -> Iterator[None]:
    """While the context lasts, the UNet's first convolution, of [B·F', C', h, w], gives `features` [B, F', C', h, w]
    more."""
    if features is None:
        yield
        return
    more = features.flatten(0, 1)
    hook = unet.conv_in.register_forward_hook(lambda module, inputs, output: output + more)
    try:
        yield
    finally:
        hook.remove()


@dataclass(frozen=True)
class _Stored:
    """config.json: the encoder's sizes, and which UNet it was trained beside."""

    control: ControlConfig
    unet_sha256: Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]


def save_control(encoder: ControlEncoder, base: Path, folder: str | os.PathLike[str], dtype: torch.dtype) -> None:
    """Write an encoder trained beside the UNet of the checkpoint `base` to `folder`, weights as `dtype`, whole or not
    at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with disk_full(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        draft = Path(temporary)
        save_file({name: tensor.to(dtype) for name, tensor in encoder.state_dict().items()}, draft / WEIGHTS)
        stored = to_json(_Stored(encoder.config, unet_sha256(base)))
        (draft / CONFIG).write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
        (folder / CONFIG).unlink(missing_ok=True)
        for name in (WEIGHTS, CONFIG):
            os.replace(draft / name, folder / name)


def load_control_config(folder: str | os.PathLike[str], base: Path) -> ControlConfig:
    """The ControlConfig of a control's folder; InputError unless it was trained beside the UNet of the checkpoint
    `base`."""
    path = Path(folder) / CONFIG
    where = printable(str(path))
    stored = from_json(_Stored, read_json(path, f"that of a control; {_REMEDY}"), where, _REMEDY)
    if (found := unet_sha256(base)) != stored.unet_sha256:
        raise InputError(
            f"{where}: found a control for a UNet of SHA-256 {stored.unet_sha256[:16]}…, {base} has {found[:16]}…;"
            f" {_REMEDY} --checkpoint {base}"
        )
    return stored.control


def load_control(
    folder: str | os.PathLike[str], base: Path, latent_channels: int, width: int, first_frame: FirstFrame
) -> ControlEncoder:
    """The encoder of a control's folder, fp32, for latents of so many channels and a UNet whose first convolution gives
    `width`."""
    with torch.device("meta"):
        encoder = ControlEncoder(load_control_config(folder, base), latent_channels, width, first_frame)
    load_weights(encoder, Path(folder) / WEIGHTS)
    return encoder


def unet_sha256(base: Path) -> str:
    """Of the file of a checkpoint's UNet."""
    path = base / UNET_WEIGHTS
    check_plain(path, f"the weights of a checkpoint; {REMEDY}")
    return file_sha256(path)
