"""`python -m trip_reference.demo_world.networks`: feature networks of the demo world, in the formats of the real
ones.

CLIP, I3D and Inception know nothing of the demo world, and cannot be had without a download. These small ones are
trained in minutes to tell its colours, shapes, sizes and motions apart. Figures made with them compare our own models
with each other and with nothing else.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from trip_reference.data.new_folder import new_folder
from trip_reference.demo_world import world
from trip_reference.model import to_model_range
from trip_reference.presets import DEMO
from trip_rt.command_line import CommandParser, add_json_flag, main_of, report
from trip_rt.errors import InputError

SIZE = DEMO.trip.height
FRAMES = DEMO.trip.num_frames
LABELS = {"colour": tuple(world.COLOURS), "shape": world.SHAPES, "motion": world.MOTIONS}
WHITE = (0.5, 0.5, 0.5)
BATCH = {"clip-encoder": 64, "frames": 64, "clips": 12}


class FrameFeatures(nn.Module):
    """uint8 [B, 3, 64, 64] → [B, 32], as an Inception of torch-fidelity takes pictures."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.layers = nn.Sequential(
            _conv2d(3, 24), _conv2d(24, 48), _conv2d(48, 64), _conv2d(64, 96), nn.Conv2d(96, width, 1)
        )

    def forward(self, pictures: Tensor) -> Tensor:
        return self.layers(to_model_range(pictures)).mean((2, 3))


class ClipFeatures(nn.Module):
    """fp32 [B, 3, F, 64, 64] in [−1, 1] → [B, 32], as an I3D takes clips."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.layers = nn.Sequential(
            _conv3d(3, 16), _conv3d(16, 32), _conv3d(32, 64), _conv3d(64, 96), nn.Conv3d(96, width, 1)
        )

    def forward(self, clips: Tensor) -> Tensor:
        return self.layers(clips).mean((2, 3, 4))


def train_networks(folder: Path, steps: int, clips: int, seed: int) -> dict[str, Any]:
    """Train all three, write clip-encoder/, clips.pt and frames.pt to `folder`, and return their accuracies on held-out
    clips in percent."""
    torch.manual_seed(seed)
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=SIZE,
            patch_size=8,
            projection_dim=32,
        )
    )
    nets = {"clip-encoder": encoder, "frames": FrameFeatures(), "clips": ClipFeatures()}
    heads = nn.ModuleDict({name: nn.Linear(32, sum(map(len, _labels_of(name).values())) + 4) for name in nets})
    parameters = [p for module in (*nets.values(), heads) for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    train, test = _clips(clips, False), _clips(max(64, clips // 8), True)
    rng = np.random.default_rng(seed)
    for _ in tqdm(range(steps), desc="train", unit="step", disable=None):
        loss = torch.zeros(())
        for name, net in nets.items():
            rows, frames = rng.integers(clips, size=BATCH[name]), rng.integers(FRAMES, size=BATCH[name])
            loss = loss + _loss(heads[name](_features(net, name, train[0][rows], frames)), name, train, rows, frames)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    accuracies = {name: _accuracy(net.eval(), heads[name], name, test) for name, net in nets.items()}
    with new_folder(folder) as draft:
        encoder.save_pretrained(draft / "clip-encoder")
        processor = {"image_mean": WHITE, "image_std": WHITE, "size": {"shortest_edge": SIZE}, "crop_size": SIZE}
        (draft / "clip-encoder" / "preprocessor_config.json").write_text(json.dumps(processor) + "\n", encoding="utf-8")
        for name in ("frames", "clips"):
            torch.jit.save(torch.jit.script(nets[name]), str(draft / f"{name}.pt"))
    return accuracies


def _conv2d(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1), nn.GroupNorm(4, outputs), nn.SiLU())


def _conv3d(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv3d(inputs, outputs, 3, 2, 1), nn.GroupNorm(4, outputs), nn.SiLU())


def _labels_of(name: str) -> dict[str, tuple[str, ...]]:
    return LABELS if name == "clips" else {key: LABELS[key] for key in ("colour", "shape")}


def _clips(count: int, held_out: bool) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """uint8 [N, F, 3, H, W], the labels' numbers [N] each, and where and how large the shape is, [N, F, 4]."""
    frames, labels, places = [], [], []
    for seed in tqdm(range(count), desc="render clips", unit="clip", disable=None):
        scene, motion, _ = world.sample(10_000 + seed, held_out)
        frames.append(world.render(scene, motion, FRAMES, SIZE))
        cover = world.mask(scene, motion, FRAMES, SIZE)
        area, axis = cover.sum((1, 2)), np.linspace(-1, 1, SIZE)
        places.append(
            np.stack(
                [
                    cover.sum(1) @ axis / area,
                    cover.sum(2) @ axis / area,
                    area / SIZE**2 * 4,
                    np.full(FRAMES, np.sin(scene.angle)),
                ],
                1,
            )
        )
        labels.append(
            [
                LABELS[key].index(value)
                for key, value in (("colour", scene.colour), ("shape", scene.shape), ("motion", motion))
            ]
        )
    pixels = torch.from_numpy(np.stack(frames)).movedim(-1, 2)
    numbers = torch.tensor(labels)
    return pixels, {key: numbers[:, i] for i, key in enumerate(LABELS)}, torch.from_numpy(np.stack(places)).float()


def _features(net: nn.Module, name: str, clips: Tensor, frames: np.ndarray) -> Tensor:
    chosen = clips[torch.arange(len(clips)), torch.from_numpy(frames)]
    if name == "clips":
        return net(to_model_range(clips.transpose(1, 2)))
    return net(chosen) if name == "frames" else net(pixel_values=to_model_range(chosen)).image_embeds


def _loss(
    logits: Tensor, name: str, data: tuple[Tensor, dict[str, Tensor], Tensor], rows: np.ndarray, frames: np.ndarray
) -> Tensor:
    _, labels, places = data
    chosen = torch.from_numpy(rows)
    place = places[chosen, -1] - places[chosen, 0] if name == "clips" else places[chosen, torch.from_numpy(frames)]
    loss = F.mse_loss(logits[:, :4], place)
    for key, part in _split(logits, name):
        loss = loss + F.cross_entropy(part, labels[key][chosen])
    return loss


def _split(logits: Tensor, name: str) -> list[tuple[str, Tensor]]:
    names = _labels_of(name)
    return list(zip(names, logits[:, 4:].split([len(values) for values in names.values()], dim=1), strict=True))


@torch.no_grad()
def _accuracy(
    net: nn.Module, head: nn.Module, name: str, data: tuple[Tensor, dict[str, Tensor], Tensor]
) -> dict[str, float]:
    pixels, labels, _ = data
    logits = torch.cat([head(_features(net, name, part, np.zeros(len(part), int))) for part in pixels.split(32)])
    return {
        key: round(100 * float((part.argmax(1) == labels[key]).float().mean()), 1) for key, part in _split(logits, name)
    }


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m trip_reference.demo_world.networks",
        description=(
            "Train feature networks of the demo world for trip-evaluate, as real ones know nothing of it. Their figures"
            " compare our models."
        ),
        epilog="example: python -m trip_reference.demo_world.networks -o out/demo-networks",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder to write, new or empty")
    parser.add_argument("--steps", type=int, default=1500, help="(%(default)s)")
    parser.add_argument("--clips", type=int, default=1500, help="to train on (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    add_json_flag(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    for name in ("steps", "clips"):
        if getattr(args, name) < 1:
            raise InputError(f"{name}: found {getattr(args, name)}, expected at least 1")
    accuracies = train_networks(args.output, args.steps, args.clips, args.seed)
    lines = [
        f"{name}: " + ", ".join(f"{label} {percent} %" for label, percent in by_label.items())
        for name, by_label in accuracies.items()
    ]
    report(args, accuracies, "\n".join([f"{args.output}: on held-out clips", *lines]))
    return 0


main = main_of(build_parser, run)

if __name__ == "__main__":
    raise SystemExit(main())
