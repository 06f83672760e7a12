"""Feature networks in TorchScript, and the Fréchet distances on their features: FVD of clips, FID of frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import tqdm

from trip_reference.evaluation.frechet import distance_of, extrapolated
from trip_reference.model import to_model_range
from trip_rt.errors import InputError, one_line
from trip_rt.plain_files import check_plain

Clip = NDArray[np.uint8]

BATCH = 8
# Arguments of the widespread i3d_torchscript.pt: return features, and leave the clips as they are.
I3D_WORDS = {"rescale": False, "resize": False, "return_features": True}


class Network:
    """A TorchScript file that gives features [B, D]. It is code that runs with your rights: open files you trust."""

    def __init__(self, path: Path, device: str = "cpu"):
        check_plain(path, "a TorchScript network by torch.jit.save")
        try:
            self.module = torch.jit.load(str(path), map_location=device).eval()
        except Exception as error:
            raise InputError(
                f"{path}: cannot be opened as a TorchScript network ({one_line(error)}); expected a file by"
                " torch.jit.save"
            ) from error
        self.path, self.device = path, device
        arguments = {argument.name for argument in self.module.forward.schema.arguments}
        self.words = {name: value for name, value in I3D_WORDS.items() if name in arguments}

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        """Features fp32 [B, D] on the host; InputError where the network gives something else."""
        try:
            features: Any = self.module(inputs.to(self.device), **self.words)
        except RuntimeError as error:
            line = " ".join(str(error).split())[-200:]
            raise InputError(
                f"{self.path}: does not take a batch of shape {list(inputs.shape)} ({line}); give its picture size"
            ) from error
        if not isinstance(features, Tensor) or features.ndim < 2 or len(features) != len(inputs):
            raise InputError(
                f"{self.path}: found no features [B, D] for a batch of {len(inputs)}, expected a feature network"
            )
        return features.flatten(1).float().cpu()


def fvd(network: Network, made: Sequence[Clip], real: Sequence[Clip], size: int) -> dict[str, Any]:
    """Fréchet video distance (Unterthiner et al. 2018) between clips uint8 [F, H, W, 3], with all that its value
    depends on.

    Clips go in as [B, 3, F, size, size] in [−1, 1].
    """
    features = [_features(lambda batch: network(_clips(batch, size)), clips, "FVD") for clips in (made, real)]
    return _described(features) | {"frames": len(made[0]), "size": size}


def fid(network: Network, made: Sequence[Clip], real: Sequence[Clip], size: int) -> dict[str, Any]:
    """Fréchet distance between all frames, by torchmetrics. Frames go in as uint8 [B, 3, size, size], as Inception's
    do."""
    width = network(_frames(made[0][:1], size)).shape[1]
    metric = FrechetInceptionDistance(feature=_Module(network, width), input_img_size=(3, size, size))
    for clips, is_real in ((made, False), (real, True)):
        for clip in tqdm(clips, desc="FID", unit="clip", disable=None):
            metric.update(_frames(clip, size), real=is_real)
    count = min(sum(map(len, clips)) for clips in (made, real))
    return {
        "value": round(float(metric.compute()), 4),
        "frames": count,
        "feature_width": width,
        "size": size,
        "biased": count <= 10 * width,
    }


class _Module(nn.Module):
    """A Network as torchmetrics takes one."""

    def __init__(self, network: Network, width: int):
        super().__init__()
        self.network, self.num_features = network, width

    def forward(self, frames: Tensor) -> Tensor:
        return self.network(frames)


def _described(features: list[NDArray[np.float32]]) -> dict[str, Any]:
    """The distance, its value extrapolated to endless data, and the counts that its bias depends on."""
    count, width = min(map(len, features)), features[0].shape[1]
    limit = extrapolated(*features)
    return {
        "value": round(distance_of(*features), 4),
        "extrapolated": None if limit is None else round(limit, 4),
        "clips": count,
        "feature_width": width,
        # Up to D samples the covariance is singular, and c/N stays large for some way above.
        "biased": count <= 10 * width,
    }


def _features(of: Callable[[Sequence[Clip]], Tensor], clips: Sequence[Clip], what: str) -> NDArray[np.float32]:
    return torch.cat(
        [of(batch) for batch in tqdm(list(_batches(clips)), desc=what, unit="batch", disable=None)]
    ).numpy()


def _batches(clips: Sequence[Clip]) -> Iterator[Sequence[Clip]]:
    return (clips[start : start + BATCH] for start in range(0, len(clips), BATCH))


def _clips(clips: Sequence[Clip], size: int) -> Tensor:
    return to_model_range(torch.stack([_resized(clip, size).movedim(0, 1) for clip in clips]))


def _frames(clip: Clip, size: int) -> Tensor:
    return _resized(clip, size).round().clamp(0, 255).to(torch.uint8)


def _resized(clip: Clip, size: int) -> Tensor:
    """uint8 [F, H, W, 3] → fp32 [F, 3, size, size], 0 to 255."""
    images = torch.from_numpy(clip).movedim(-1, 1).float()
    if images.shape[2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)
