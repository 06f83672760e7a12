"""A whole run: the VAE where a recipe trains one, the cache of latents, the denoiser's stages, the checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from trip_reference import checkpoint
from trip_reference.control import save_control
from trip_reference.data.cache import CachedClips, digest, write_cache
from trip_reference.data.sources import DEMO, DEMO_PATHS, clip_format, open_held_out, open_source, read_some
from trip_reference.data.words import sentences_of, words_of
from trip_reference.demo_world.clips import render_clips
from trip_reference.model import TripModel
from trip_reference.training.checks import check_device, check_optimizer, check_source, check_stages, check_steps
from trip_reference.training.config import OWN_TEXT, TrainConfig
from trip_reference.training.lora import merged, save_adapters
from trip_reference.training.stage import StageRun
from trip_reference.training.start import start_config, start_model, trainable
from trip_reference.training.state import read_place
from trip_reference.training.vae import Clips, latent_scale, most_clips, reconstruction_psnr, train_vae
from trip_rt.config import to_json
from trip_rt.launch import note

SCALE_CLIPS = 64  # clips on which the latents' scale is measured

# Settings that may differ when a run is resumed: nothing that its state holds depends on them.
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
    "data": ("validation", "workers", "unknown_words"),
    "vae": ("untrained",),
}
LOOKED_AT = 8  # clips on which a VAE that is not trained is measured
GOOD_VAE = 20  # dB: below it, little more than colours comes through
LOST = 0.1  # of what a run has changed, to fp16's rounding: from here on it is said


def train_run(config: TrainConfig, folder: Path, allow_remote: bool = False) -> dict[str, Any]:
    """Train as `config` says, leave a checkpoint, or a control alone, in `folder` and return what a report should say.

    `folder/training` has the run's settings, state, log and sheets; a run that is found there is taken up where it
    stopped. `allow_remote`: shards may be addresses, or commands that give them; a recipe alone never says so.
    """
    return _Run(config, folder, allow_remote).train()


class _Run:
    def __init__(self, config: TrainConfig, folder: Path, allow_remote: bool):
        self.config, self.folder, self.work = config, folder, folder / "training"
        check_device(config.run)
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # without it, several processes on CPUs do not form a group
            mixed_precision=config.run.mixed_precision,
            log_with=None if config.run.tracker == "none" else config.run.tracker,
            project_dir=self.work,
        )
        check_optimizer(config.optimizer, self.accelerator.distributed_type == DistributedType.FSDP)
        trip = start_config(config.model)
        data, clip = config.data, clip_format(config.data, trip)
        self.source = open_source(data.source, trip, clip, data.clips, data.shuffle, remote=allow_remote)
        self.held_out, held_out = open_held_out(data, trip, max(config.run.validation_clips, 1))
        check_source(config, self.source)
        self.sentences = sentences_of(self.source)
        model, self.tokenizer_json = start_model(config.model, config.run.seed, self.sentences)
        self.vae, self.trip = model.vae, model.config  # what all stages share
        if data.source not in (DEMO, DEMO_PATHS) and not isinstance(self.source, CachedClips):
            # Clips play as fast as they were filmed.
            self.trip = dataclasses.replace(self.trip, fps=max(1, round(data.fps / data.stride)))
        self.run_id = _run_id(config, model, self.tokenizer_json)
        check_stages(model, config)
        words = words_of(self.tokenizer_json, self.sentences)
        remedy = f"--set model.text={OWN_TEXT} makes an encoder that knows them, --set data.unknown_words=1 allows it"
        words.check(data.unknown_words, remedy)
        changed = ""  # all that follows is read before any work
        if self._state.exists():
            changed = check_steps(config, read_place(self._state, self.run_id).step, self.work / "config.toml")
        if self._vae_state.exists():
            read_place(self._vae_state, self.run_id)
        for text in filter(None, (f"words: {words}", f"validation: {held_out}", changed)):
            self._note(text)

    def _note(self, text: str) -> None:
        if self.accelerator.is_main_process:
            note(text)

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
        psnr = self._train_vae() if config.vae.steps else self._look_at_vae()
        source = self._cached() if config.data.cache else self.source
        first = 0
        for stage in config.stages:
            average = StageRun(
                config,
                stage,
                first,
                self._start(),
                self.tokenizer_json,
                source,
                self.held_out,
                accelerator,
                self._state,
                self.run_id,
                self._write_checkpoint,
            ).train()
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
        model, _ = start_model(self.config.model, self.config.run.seed, self.sentences)
        model.vae, model.config = self.vae, self.trip
        return model

    def _train_vae(self) -> float:
        """Train the VAE and set the scale of its latents; returns its PSNR in dB, on held-out frames where there are
        some."""
        config = self.config
        if config.data.source == DEMO:
            count = min(config.data.clips, most_clips(self.trip))
            rendered, unseen = render_clips(self.trip, count), render_clips(self.trip, 32, held_out=True)
            clips, held_out = Clips(rendered.frames, rendered.centres), Clips(unseen.frames)
        else:
            clips = Clips.of(read_some(self.source, most_clips(self.trip)))
            held_out = clips
            if self.held_out is not None and not isinstance(self.held_out, CachedClips):
                held_out = Clips.of(read_some(self.held_out, SCALE_CLIPS))
        train_vae(self.vae, clips, config, self.accelerator, self._vae_state, self.run_id)
        self.vae.to(memory_format=torch.contiguous_format)
        if config.run.weights == "fp16":
            self.vae.half().float()  # the checkpoint's precision: the denoiser learns the latents that it will meet
        self.vae.eval().requires_grad_(False)
        scale = latent_scale(self.vae, Clips(clips.frames[:SCALE_CLIPS]).each)
        self.trip = dataclasses.replace(self.trip, scaling_factor=scale)
        psnr = reconstruction_psnr(self.vae, Clips(held_out.frames[:SCALE_CLIPS, ::5]).each)
        self._note(f"VAE gives {'its own' if held_out is clips else 'held-out'} frames back at {psnr:.2f} dB")
        return round(psnr, 2)

    def _look_at_vae(self) -> float | None:
        """The PSNR in dB of a VAE that comes from elsewhere, on some frames of the data: no clip can look better. None
        on a cache, which has no frames, and in other processes than the main one."""
        if isinstance(self.source, CachedClips) or not self.accelerator.is_main_process:
            return None
        frames = np.stack([sample.frames[0] for sample in read_some(self.source, LOOKED_AT)])
        psnr = reconstruction_psnr(self.vae, frames)
        remedy = f", expected {GOOD_VAE} dB or more; set vae.steps to train it on the data" if psnr < GOOD_VAE else ""
        self._note(f"VAE gives frames of the data back at {psnr:.2f} dB{remedy}")
        return round(psnr, 2)

    def _cached(self) -> CachedClips:
        """The run's clips, encoded once into the run's own folder."""
        if isinstance(self.source, CachedClips):
            return self.source
        folder = self.work / "latents"
        if self.accelerator.is_main_process and not folder.exists():
            self.vae.to(self.accelerator.device)
            write_cache(self.source, self._start(), self.tokenizer_json, folder, self.config.run.seed)
        self.accelerator.wait_for_everyone()
        return CachedClips(folder)

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
            if self.config.run.weights == "fp16" and folder == self.folder:
                self._say_what_is_lost(model)
            dtype = torch.float16 if self.config.run.weights == "fp16" else torch.float32
            if model.control:
                save_control(model.control, Path(self.config.model.checkpoint), folder, dtype)
            else:
                checkpoint.save_pretrained(model, self.tokenizer_json, folder, dtype)
        self.accelerator.wait_for_everyone()

    def _say_what_is_lost(self, model: TripModel) -> None:
        """Warn where fp16 rounds away much of what the run has changed in `model`. The state keeps it."""
        if (lost := lost_to_fp16(self._start(), model)) > LOST:
            again = "" if self.config.vae.steps else ", and the same command with it trains nothing again"
            note(
                f"warning: weights in fp16 lose {lost:.0%} of what this run has changed; --set run.weights=fp32 keeps"
                f" it{again}"
            )


def lost_to_fp16(before: nn.Module, after: nn.Module) -> float:
    """How much of what changed from `before` to `after` is gone when the weights are stored as fp16: the norm of the
    rounding errors over the norm of the changes."""
    changes = errors = 0.0
    old = before.state_dict()
    for name, tensor in after.state_dict().items():
        if not torch.equal(tensor, old[name]):
            changes += float((tensor - old[name]).square().sum())
            errors += float((tensor.half().float() - tensor).square().sum())
    return math.sqrt(errors / changes) if changes else 0.0


def _run_id(config: TrainConfig, model: TripModel, tokenizer_json: str) -> str:
    """A hash of all that the weights of a run depend on. How long the last stage is, is left open: a run may be made
    longer."""
    settings = to_json(config)
    for section, names in _FREE.items():
        for name in names:
            del settings[section][name]
    del settings["stages"][-1]["steps"]
    if not config.model.control:
        for name in ("control", "control_size", "control_layers"):
            del settings["model"][name]
    if not config.vae.steps:  # the precision of the VAE is that of its checkpoint
        del settings["run"]["weights"]
    words = (json.dumps(settings, sort_keys=True), digest(model), tokenizer_json)
    return hashlib.sha256("".join(words).encode()).hexdigest()
