"""`python -m trip_reference.demo_world.networks`: feature networks of the demo world, in the formats of the real
ones.

CLIP, I3D and Inception know nothing of the demo world, and cannot be had without a download. These small ones are
trained to tell its colours, shapes, sizes and motions apart. Figures made with them compare our own models
with each other and with nothing else.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from trip_reference.data.new_folder import new_folder
from trip_reference.demo_world import world
from trip_reference.model import to_model_range
from trip_reference.presets import DEMO
from trip_reference.progress import shown_progress
from trip_reference.training.config import OptimizerConfig, lr_factor
from trip_reference.training.optimizer import build_optimizer
from trip_rt.command_line import CommandParser, add_json_flag, main_of, report
from trip_rt.errors import InputError

SIZE = 64  # what they look at; larger pictures are made this small, as for the real ones
FRAMES = DEMO.trip.num_frames
LABELS = {"colour": tuple(world.COLOURS), "shape": world.SHAPES, "motion": world.MOTIONS}
WHITE = (0.5, 0.5, 0.5)
LABELS_OF_PICTURES = ("colour", "shape")
FIRST_SEED = 10_000
WIDTH = 32  # of the features
PATCH = 8  # pixels, of the encoder
LR = 5e-3
OPTIMIZER = OptimizerConfig("muon", weight_decay=1e-2, betas=(0.9, 0.99), clip=1.0, final_lr=0.02, ema_decay=0.0)


class FrameFeatures(nn.Module):
    """uint8 [B, 3, 64, 64] → [B, 32], as an Inception of torch-fidelity takes pictures."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.layers = nn.Sequential(
            _conv2d(3, 24), _conv2d(24, 48), _conv2d(48, 64), _conv2d(64, 96), nn.Conv2d(96, width, 1)
        )

    def forward(self, pictures: Tensor) -> Tensor:
        return self.layers(to_model_range(pictures)).mean((2, 3))


class ClipFeatures(nn.Module):
    """fp32 [B, 3, F, 64, 64] in [−1, 1] → [B, 32], as an I3D takes clips."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.layers = nn.Sequential(
            _conv3d(3, 16), _conv3d(16, 32), _conv3d(32, 64), _conv3d(64, 96), nn.Conv3d(96, width, 1)
        )

    def forward(self, clips: Tensor) -> Tensor:
        return self.layers(clips).mean((2, 3, 4))


def train_networks(folder: Path, steps: int, clips: int, seed: int) -> dict[str, Any]:
    """Train all three, write clip-encoder/, clips.pt and frames.pt to `folder`, and return in percent of how many
    held-out true clips each tells the labels, and those that look at pictures also of how many single frames."""
    torch.manual_seed(seed)
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=SIZE,
            patch_size=PATCH,
            projection_dim=WIDTH,
        )
    )
    pupils = {
        "frames": Pupil(FrameFeatures(), 32, LABELS_OF_PICTURES),
        "clips": Pupil(ClipFeatures(), 8, tuple(LABELS)),
        "clip-encoder": PatchPupil(encoder, 32, LABELS_OF_PICTURES),
    }
    train, test = _lessons(clips, False), _lessons(max(64, clips // 8), True)
    for name, pupil in pupils.items():
        _teach(name, pupil, train, steps, seed)
    accuracies = {name: pupil.eval().accuracy(test) for name, pupil in pupils.items()}
    with new_folder(folder) as draft:
        encoder.save_pretrained(draft / "clip-encoder")
        processor = {"image_mean": WHITE, "image_std": WHITE, "size": {"shortest_edge": SIZE}, "crop_size": SIZE}
        (draft / "clip-encoder" / "preprocessor_config.json").write_text(json.dumps(processor) + "\n", encoding="utf-8")
        for name in ("frames", "clips"):
            torch.jit.save(torch.jit.script(pupils[name].net), str(draft / f"{name}.pt"))
    return accuracies


@dataclass(frozen=True)
class Lessons:
    """Clips uint8 [N, F, 3, H, W], the numbers of their labels [N] each, where and how large the shape is and how it is
    turned [N, F, 4], and which pixels it covers, bool [N, F, H, W], eight to a byte."""

    pixels: Tensor
    labels: dict[str, Tensor]
    places: Tensor
    covers: NDArray[np.uint8]


class Pupil(nn.Module):
    """A network with a linear head, which learns the labels and the place of the shape. It sees a frame at a time, or
    whole clips where it learns motions; there the place is its change."""

    def __init__(self, net: nn.Module, batch: int, labels: Sequence[str]):
        super().__init__()
        self.net, self.batch, self.labels = net, batch, labels
        self.sizes = [4, *(len(LABELS[name]) for name in labels)]
        self.head = nn.Linear(WIDTH, sum(self.sizes))

    def features(self, pictures: Tensor) -> Tensor:
        features: Tensor = self.net(pictures)
        return features

    def loss(self, lessons: Lessons, rows: NDArray[np.int64], frames: NDArray[np.int64]) -> Tensor:
        return self._loss_of(self.features(self._pictures(lessons, rows, frames)), lessons, rows, frames)

    def _loss_of(
        self, features: Tensor, lessons: Lessons, rows: NDArray[np.int64], frames: NDArray[np.int64]
    ) -> Tensor:
        place, *answers = self._answers(features)
        whole = lessons.places[rows, -1] - lessons.places[rows, 0]
        loss = F.mse_loss(place, whole if "motion" in self.labels else lessons.places[rows, frames])
        for name, logits in zip(self.labels, answers, strict=True):
            loss = loss + F.cross_entropy(logits, lessons.labels[name][rows])
        return loss

    @torch.no_grad()
    def accuracy(self, lessons: Lessons) -> dict[str, float]:
        """In percent. A clip is told by the mean of its frames' log-probabilities."""
        whole, count = "motion" in self.labels, len(lessons.pixels)
        told: list[list[Tensor]] = []  # by frame, by label [N, …]
        for frame in [0] if whole else range(FRAMES):
            parts = [
                self._answers(self.features(self._pictures(lessons, rows, np.full(len(rows), frame))))[1:]
                for rows in np.array_split(np.arange(count), -(-count // 32))
            ]
            told.append([torch.cat(logits).log_softmax(1) for logits in zip(*parts, strict=True)])
        shares: dict[str, float] = {}
        for i, name in enumerate(self.labels):
            by_frame = torch.stack([answers[i] for answers in told])  # [F, N, …]
            truth = lessons.labels[name]
            shares[name] = _percent(by_frame.mean(0).argmax(1) == truth)
            if not whole:
                shares[f"{name} by frame"] = _percent(by_frame.argmax(2) == truth)
        return shares

    def _answers(self, features: Tensor) -> Sequence[Tensor]:
        return self.head(features).split(self.sizes, dim=1)

    def _pictures(self, lessons: Lessons, rows: NDArray[np.int64], frames: NDArray[np.int64]) -> Tensor:
        if "motion" in self.labels:
            return to_model_range(lessons.pixels[rows].transpose(1, 2))
        return lessons.pixels[rows, frames]


class PatchPupil(Pupil):
    """A CLIP image encoder. It learns besides, from every patch, which shape covers each of its pixels: told only the
    shape of the whole picture, one knew 31 % of held-out shapes after 800 steps, and over 60 % with this after 900."""

    def __init__(self, net: nn.Module, batch: int, labels: Sequence[str]):
        super().__init__(net, batch, labels)
        self.patch_head = nn.Linear(net.config.hidden_size, PATCH**2 * (1 + len(world.SHAPES)))

    def features(self, pictures: Tensor) -> Tensor:
        features: Tensor = self.net(pixel_values=to_model_range(pictures)).image_embeds
        return features

    def loss(self, lessons: Lessons, rows: NDArray[np.int64], frames: NDArray[np.int64]) -> Tensor:
        seen = self.net.vision_model(pixel_values=to_model_range(lessons.pixels[rows, frames]))
        logits = self.patch_head(seen.last_hidden_state[:, 1:]).unflatten(2, (PATCH**2, -1))
        grid = SIZE // PATCH
        cover = torch.from_numpy(np.unpackbits(lessons.covers[rows, frames], axis=1)).long()
        cover = cover.view(-1, grid, PATCH, grid, PATCH).transpose(2, 3).reshape(logits.shape[:3])
        shapes = cover * (lessons.labels["shape"][rows] + 1)[:, None, None]
        weights = torch.tensor([0.1] + [1.0] * len(world.SHAPES))  # most pixels are background
        by_patch = F.cross_entropy(logits.flatten(0, 2), shapes.flatten(), weights)
        return by_patch + self._loss_of(self.net.visual_projection(seen.pooler_output), lessons, rows, frames)


def _teach(name: str, pupil: Pupil, lessons: Lessons, steps: int, seed: int) -> None:
    optimizer = build_optimizer(dict(pupil.named_parameters()), lambda parameter: LR, OPTIMIZER)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, steps, 50, 0.02))
    rng = np.random.default_rng(seed)
    for _ in shown_progress(range(steps), steps, f"train {name}", "step"):
        rows = rng.integers(len(lessons.pixels), size=pupil.batch)
        loss = pupil.loss(lessons, rows, rng.integers(FRAMES, size=pupil.batch))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(pupil.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def _percent(right: Tensor) -> float:
    return round(100 * float(right.float().mean()), 1)


def _conv2d(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1), nn.GroupNorm(4, outputs), nn.SiLU())


def _conv3d(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv3d(inputs, outputs, 3, 2, 1), nn.GroupNorm(4, outputs), nn.SiLU())


def _lessons(count: int, held_out: bool) -> Lessons:
    axis = np.linspace(-1, 1, SIZE)
    pixels, labels, places, covers = [], [], [], []
    for seed in shown_progress(range(FIRST_SEED, FIRST_SEED + count), count, "render clips", "clip"):
        scene, motion, _ = world.sample(seed, held_out)
        cover = world.mask(scene, motion, FRAMES, SIZE)
        area = cover.sum((1, 2))
        middle = [cover.sum(1) @ axis / area, cover.sum(2) @ axis / area]
        places.append(np.stack([*middle, area / SIZE**2 * 4, np.full(FRAMES, np.sin(scene.angle))], 1))
        pixels.append(world.render(scene, motion, FRAMES, SIZE))
        covers.append(np.packbits(cover.reshape(FRAMES, -1) > 0.5, axis=1))
        named = {"colour": scene.colour, "shape": scene.shape, "motion": motion}
        labels.append([values.index(named[name]) for name, values in LABELS.items()])
    numbers = torch.tensor(labels)
    return Lessons(
        torch.from_numpy(np.stack(pixels)).movedim(-1, 2),
        {name: numbers[:, i] for i, name in enumerate(LABELS)},
        torch.from_numpy(np.stack(places)).float(),
        np.stack(covers),
    )


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
    parser.add_argument("--steps", type=int, default=4000, help="of each network (%(default)s)")
    parser.add_argument("--clips", type=int, default=4000, help="to train on (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
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
