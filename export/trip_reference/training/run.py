"""A whole run: the VAE where a recipe trains one, the cache of latents, the denoiser's stages, the checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import tomli_w
import torch
from accelerate import Accelerator
from torch import Tensor

from trip_reference import checkpoint
from trip_reference.data.cache import CachedClips, digest, write_cache
from trip_reference.data.sample import ClipDataset
from trip_reference.data.shards import ShardSource
from trip_reference.data.sources import DEMO, clip_format, open_source
from trip_reference.demo_world.clips import render_clips
from trip_reference.model import TripModel
from trip_reference.training.config import TrainConfig
from trip_reference.training.lora import merged, save_adapters
from trip_reference.training.stage import StageRun
from trip_reference.training.start import start_model, trainable
from trip_reference.training.state import read_place
from trip_reference.training.vae import latent_scale, reconstruction_psnr, train_vae
from trip_rt.command_line import note
from trip_rt.config import to_json
from trip_rt.errors import InputError

SCALE_CLIPS = 64  # clips on which the latents' scale is measured

# Settings that may differ when a run is resumed: no weight depends on them.
_FREE = {
    "run": (
        "save_every",
        "log_every",
        "validate_every",
        "validation_clips",
        "checkpoint_every",
        "max_bad_steps",
        "tracker",
    ),
    "data": ("validation", "workers"),
}


def train_run(config: TrainConfig, folder: Path, allow_remote: bool = False) -> dict[str, Any]:
    """Train as `config` says, leave a checkpoint in `folder` and return what a report should say.

    `folder/training` has the run's settings, state, log and sheets; a run that is found there is taken up where it
    stopped. `allow_remote`: shards may be addresses, or commands that give them; a recipe alone never says so.
    """
    return _Run(config, folder, allow_remote).train()


class _Run:
    def __init__(self, config: TrainConfig, folder: Path, allow_remote: bool):
        self.config, self.folder, self.work = config, folder, folder / "training"
        self.allow_remote = allow_remote
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # without it, several processes on CPUs do not form a group
            mixed_precision=config.run.mixed_precision,
            log_with=None if config.run.tracker == "none" else config.run.tracker,
            project_dir=self.work,
        )
        model, self.tokenizer_json = start_model(config.model, config.run.seed)
        self.vae, self.trip = model.vae, model.config  # what all stages share
        self.run_id = _run_id(config, model)
        for state in (self._state, self._vae_state):
            if state.exists():
                read_place(state, self.run_id)  # raises before any work where the state is another run's

    @property
    def _state(self) -> Path:
        return self.work / "state.safetensors"

    @property
    def _vae_state(self) -> Path:
        return self.work / "vae.safetensors"

    def train(self) -> dict[str, Any]:
        began, config, accelerator = time.monotonic(), self.config, self.accelerator
        if accelerator.is_main_process:
            self.work.mkdir(parents=True, exist_ok=True)
            (self.work / "config.toml").write_text(tomli_w.dumps(to_json(config)), encoding="utf-8")
        accelerator.wait_for_everyone()
        if accelerator.log_with:
            accelerator.init_trackers("tracker")
        psnr = self._train_vae() if config.vae.steps else None
        source = self._source()
        first = 0
        for stage in config.stages:
            files = (self.tokenizer_json, source, accelerator, self._state, self.run_id, self._write_checkpoint)
            average = StageRun(config, stage, first, self._start(), *files).train()
            first += stage.steps
        self._write_checkpoint(self.folder, average)
        accelerator.end_training()
        return {
            "checkpoint": str(self.folder),
            "steps": first,
            "fusion": self.trip.fusion,
            "first_frame": self.trip.first_frame,
            "vae_psnr_db": psnr,
            "scaling_factor": self.trip.scaling_factor,
            "seed": config.run.seed,
            "seconds": round(time.monotonic() - began),
            "process": accelerator.process_index,
            "processes": accelerator.num_processes,
            "torch": torch.__version__,
        }

    def _start(self) -> TripModel:
        """The model at the run's beginning, with the VAE that the run has by now."""
        model, _ = start_model(self.config.model, self.config.run.seed)
        model.vae, model.config = self.vae, self.trip
        return model

    def _train_vae(self) -> float:
        """Train the demo's VAE and set the scale of its latents; returns its PSNR on held-out frames in dB."""
        config = self.config
        if config.data.source != DEMO:
            raise InputError(
                f"vae.steps: found {config.vae.steps} on {config.data.source}, expected 0: only the demo world trains"
                " a VAE"
            )
        clips, held_out = render_clips(self.trip, config.data.clips), render_clips(self.trip, 32, held_out=True)
        train_vae(self.vae, clips, config, self.accelerator, self._vae_state, self.run_id)
        self.vae.to(memory_format=torch.contiguous_format)
        if config.run.weights == "fp16":
            self.vae.half().float()  # the checkpoint's precision: the denoiser learns the latents that it will meet
        self.vae.eval().requires_grad_(False)
        frames = clips.frames[:SCALE_CLIPS].reshape(-1, *clips.frames.shape[2:])
        self.trip = dataclasses.replace(self.trip, scaling_factor=latent_scale(self.vae, frames))
        psnr = reconstruction_psnr(self.vae, held_out.frames[:, ::5].reshape(-1, *held_out.frames.shape[2:]))
        if self.accelerator.is_main_process:
            note(f"VAE gives held-out frames back at {psnr:.2f} dB")
        return round(psnr, 2)

    def _source(self) -> ClipDataset | ShardSource:
        """The run's clips: as the recipe names them, or encoded once into the run's own folder."""
        data = self.config.data
        clip = clip_format(data, self.trip)
        source = open_source(data.source, self.trip, clip, data.clips, data.shuffle, remote=self.allow_remote)
        if data.cache and not isinstance(source, CachedClips):
            if isinstance(source, ShardSource):
                raise InputError("data.cache: found shards, expected a folder or the demo world; set data.cache=false")
            folder = self.work / "latents"
            if self.accelerator.is_main_process and not folder.exists():
                self.vae.to(self.accelerator.device)
                write_cache(source, self._start(), self.tokenizer_json, folder, self.config.run.seed)
            self.accelerator.wait_for_everyone()
            source = CachedClips(folder)
        return source

    def _write_checkpoint(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write a checkpoint with the averaged `weights`, adapters merged in and, if there are any, beside it by
        themselves."""
        if self.accelerator.is_main_process:
            model = self._start()
            parameters = dict(trainable(model, self.config).named_parameters())
            with torch.no_grad():
                for name, tensor in weights.items():
                    parameters[name].copy_(tensor)
            if self.config.lora.rank:
                save_adapters(model.residual_unet.unet, self.config.lora, folder / "lora")
                model.residual_unet.unet = merged(model.residual_unet.unet)
            checkpoint.save_pretrained(
                model,
                self.tokenizer_json,
                folder,
                torch.float16 if self.config.run.weights == "fp16" else torch.float32,
            )
        self.accelerator.wait_for_everyone()


def _run_id(config: TrainConfig, model: TripModel) -> str:
    """A hash of all that the weights of a run depend on."""
    settings = to_json(config)
    for section, names in _FREE.items():
        for name in names:
            del settings[section][name]
    return hashlib.sha256((json.dumps(settings, sort_keys=True) + digest(model)).encode()).hexdigest()
