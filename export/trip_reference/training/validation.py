"""Validation during a run: the loss on clips that it does not train on, and a sheet of samples beside those clips."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trip_reference.model import TripModel
from trip_reference.sampling import sample
from trip_reference.training.average import Average
from trip_reference.training.config import LossConfig
from trip_reference.training.denoiser import Denoiser
from trip_reference.training.draws import draw
from trip_reference.training.log import Log
from trip_rt.images import contact_sheet, to_frames
from trip_rt.sampling.loop import initial_noise
from trip_rt.settings import Settings

SHOWN = 4  # clips on the sheet
ROUNDS = 4  # draws of timestep and noise for each clip
SEED = 20240617  # the same draws at every validation and in every run


class Validation:
    """`latents` [N, C, F, h, w] of clips, their token ids [N, L] (the empty sentence's last, [N + 1, L]), captions and,
    where they have some, controls [N, K, F, h, w]."""

    def __init__(
        self,
        model: TripModel,
        latents: Tensor,
        ids: Tensor,
        captions: Sequence[str],
        control: Tensor | None,
        loss: LossConfig,
        sheets: Path,
        log: Log,
    ):
        self.model, self.latents, self.ids, self.captions, self.control = model, latents, ids, captions, control
        self.loss, self.sheets, self.log = loss, sheets, log

    @torch.no_grad()
    def look(self, denoiser: Denoiser, average: Average, step: int, samples: bool) -> None:
        """Log the averaged weights' loss and, with `samples`, write a sheet of clips beside the true ones.

        Every process does the same, as weights may be shared among them; the main one writes.
        """
        denoiser.eval()
        with average.in_place():
            losses, count = [], len(self.latents)
            for round_ in range(ROUNDS):
                draws = draw(
                    SEED,
                    round_,
                    range(count),
                    count,
                    self.model.config.latent_shape,
                    len(denoiser.alpha_bars),
                    self.loss,
                    drop=False,
                )
                for i in range(count):
                    row = slice(i, i + 1)
                    inputs = (
                        tensor[row].to(self.latents.device)
                        for tensor in (self.latents, draws.noise, draws.timestep, self.ids)
                    )
                    control = None if self.control is None else self.control[row].to(self.latents.device)
                    losses.append(float(denoiser(*inputs, control=control)))
            self.log.write({"step": step, "validation_loss": round(float(np.mean(losses)), 6)})
            if samples:
                clips, labels = self._samples()
                self._write(clips, labels, step)
        denoiser.train()

    def _samples(self) -> tuple[list[np.ndarray], list[str]]:
        model, shown = self.model, min(SHOWN, len(self.latents))
        latents = self.latents[:shown]
        text = model.encode_text(torch.cat([self.ids[-1:].expand(shown, -1), self.ids[:shown]]))
        noise = torch.from_numpy(initial_noise(list(range(shown)), model.config.latent_shape)).to(latents.device)
        first_frame, steered = latents[:, :, 0], None
        if model.control:
            steered = model.encode_control(self.control[:shown].to(latents.device), first_frame)
        sampled = sample(
            model,
            first_frame,
            noise,
            text,
            Settings(speed="balanced").steps(model.config),
            control_features=steered,
        )
        pairs = [(self._decoded(clip), self._decoded(true)) for clip, true in zip(sampled, latents, strict=True)]
        labels = [label for caption in self.captions[:shown] for label in (caption, "(the true clip)")]
        return [clip for pair in pairs for clip in pair], labels

    def _decoded(self, clip: Tensor) -> np.ndarray:
        """[C, F, h, w] → uint8 [F, H, W, 3]."""
        return to_frames(self.model.decode(clip.transpose(0, 1)).cpu().numpy())

    def _write(self, clips: list[np.ndarray], labels: list[str], step: int) -> None:
        if not self.log.accelerator.is_main_process:
            return
        self.sheets.mkdir(exist_ok=True)
        sheet = contact_sheet(clips, labels=labels)
        sheet.save(self.sheets / f"step-{step:06d}.png")
        for tracker in self.log.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": np.asarray(sheet)[None]}, step=step, **layout)
