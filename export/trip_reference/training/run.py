"""A whole run: the VAE where a recipe trains one, the cache of latents, the denoiser's stages, the checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from trip_reference import checkpoint
from trip_reference.data.cache import CachedClips, digest, latent_shape, write_cache
from trip_reference.data.collate import Collate
from trip_reference.data.loader import BatchPlan, Loader
from trip_reference.data.sample import ClipDataset, ClipFormat
from trip_reference.data.shards import ShardSource
from trip_reference.data.sources import DEMO, open_source
from trip_reference.data.tokens import tokenizer_of
from trip_reference.demo_data import render_clips
from trip_reference.gradient_checkpointing import checkpoint_gradients
from trip_reference.model import TripModel
from trip_reference.training.average import Average
from trip_reference.training.config import Stage, TrainConfig
from trip_reference.training.denoiser import Denoiser
from trip_reference.training.draws import draw
from trip_reference.training.log import Log
from trip_reference.training.loop import Hook, Stretch, train
from trip_reference.training.lora import add_adapters, merged, save_adapters
from trip_reference.training.start import start_model, train_only, without_dropout
from trip_reference.training.state import Place, read_place, whole
from trip_reference.training.vae import latent_scale, reconstruction_psnr, train_vae
from trip_reference.training.validation import Validation
from trip_rt.command import note
from trip_rt.config import to_json
from trip_rt.errors import InputError

_STATE, _VAE_STATE = "state.safetensors", "vae.safetensors"
SCALE_CLIPS = 64  # that the latents' scale is measured on


def train_run(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """Train as `config` says, leave a checkpoint in `folder` and return what a report should say.

    `folder/training` has the run's settings, state, log and sheets; a run that is found there is taken up where it stopped.
    """
    began = time.monotonic()
    work = folder / "training"
    tracker = None if config.run.tracker == "none" else config.run.tracker
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # or several processes on CPUs would not find each other
        mixed_precision=config.run.mixed_precision,
        log_with=tracker,
        project_dir=work,
    )
    model, tokenizer_json = start_model(config.model, config.run.seed)
    run_id = _run_id(config, model)
    for state in (work / _VAE_STATE, work / _STATE):
        if state.exists():
            read_place(state, run_id)  # or raise, before any work
    if accelerator.is_main_process:
        work.mkdir(parents=True, exist_ok=True)
        (work / "config.toml").write_text(tomli_w.dumps(to_json(config)), encoding="utf-8")
    accelerator.wait_for_everyone()
    if tracker:
        accelerator.init_trackers("tracker")
    result: dict[str, Any] = {"checkpoint": str(folder), "seed": config.run.seed}
    if config.vae.steps:
        result["vae_psnr_db"] = _train_vae(model, config, accelerator, work, run_id)
    vae, trip = model.vae, model.config
    source = _source(config, model, tokenizer_json, accelerator, work)
    first = 0
    for stage in config.stages:
        model, _ = start_model(config.model, config.run.seed)
        model.vae, model.config = vae, trip
        average = _Stage(config, stage, first, model, tokenizer_json, source, accelerator, work, run_id).train()
        first += stage.steps
    _write_checkpoint(config, model, tokenizer_json, average, folder, accelerator)
    accelerator.end_training()
    result |= {"fusion": trip.fusion, "first_frame": trip.first_frame, "steps": first, "scaling_factor": trip.scaling_factor}
    return result | {
        "seconds": round(time.monotonic() - began),
        "processes": accelerator.num_processes,
        "process": accelerator.process_index,
        "torch": torch.__version__,
    }


class _Stage:
    """One stage: a stretch of steps over the parameters that it trains, on a model built for it."""

    def __init__(
        self,
        config: TrainConfig,
        stage: Stage,
        first: int,
        model: TripModel,
        tokenizer_json: str,
        source: ClipDataset | ShardSource,
        accelerator: Accelerator,
        work: Path,
        run_id: str,
    ):
        self.config, self.stage, self.model, self.source = config, stage, model, source
        self.accelerator, self.work, self.run_id = accelerator, work, run_id
        self.tokenizer_json = tokenizer_json
        self.stretch = Stretch(stage.name, first, first + stage.steps, stage.warmup)
        self.plan = BatchPlan(config.run.batch, config.run.accumulation, accelerator.process_index, accelerator.num_processes)
        self.log = Log(accelerator, work / "denoiser.jsonl", config.run.batch, config.run.log_every)
        self.loader: Loader | None = None

    def train(self) -> dict[str, Tensor]:
        config, model, device = self.config, self.model, self.accelerator.device
        denoiser = trainable(model, config)
        train_only(denoiser, self.stage.trains)
        cached_text = isinstance(self.source, CachedClips) and self.source.index["text_encoder"] is not None
        if cached_text and any(p.requires_grad for p in denoiser.text_encoder.parameters()):
            raise InputError("stages: found a text encoder that is trained, on a cache of its embeddings; make the cache without --text")
        model.vae.to(device).eval().requires_grad_(False)
        denoiser.to(device)
        tokenize = tokenizer_of(self.tokenizer_json)
        empty_ids = tokenize([""])[0].to(device)
        empty_text = self.source.empty_text().to(device) if cached_text else None
        num_train_timesteps = model.config.schedule.num_train_timesteps

        def inputs_of(step: int, part: int, batch: dict[str, Any]) -> dict[str, Tensor]:
            draws = draw(config.run.seed, step, self.plan.positions(part), config.run.batch, latent_shape(model), num_train_timesteps, config.loss)
            inputs = {"latents": self._latents(batch), "noise": draws.noise.to(device), "timestep": draws.timestep.to(device)}
            dropped = draws.drop_text.to(device)
            if empty_text is not None:
                return inputs | {"text": torch.where(dropped[:, None, None], empty_text, batch["text"].to(device))}
            return inputs | {"ids": torch.where(dropped[:, None], empty_ids, batch["ids"].to(device))}

        everything = tuple(pattern for stage in config.stages for pattern in stage.trains)
        return train(
            self.accelerator,
            denoiser,
            lambda name: self.stage.tnf_lr if name.startswith("fusion.") else self.stage.unet_lr,
            self.stretch,
            self._parts_from,
            inputs_of,
            self.work / _STATE,
            self.run_id,
            config.run,
            config.optimizer,
            self.log,
            keeps=lambda name: any(fnmatchcase(name, pattern) for pattern in everything),
            hooks=self._hooks,
            data_state=lambda: self.loader.state() if self.loader else [],
        )

    def _latents(self, batch: dict[str, Any]) -> Tensor:
        if "latents" in batch:
            return batch["latents"].to(self.accelerator.device, non_blocking=True)
        with torch.no_grad():
            return encode_frames(self.model, batch["frames"].to(self.accelerator.device, non_blocking=True))

    def _parts_from(self, place: Place) -> Iterator[dict[str, Any]]:
        states = place.data
        if isinstance(self.source, ShardSource) and states and len(states) != self.plan.world:
            raise InputError(f"found {self.plan.world} processes, expected {len(states)} as when this run began; its place in the shards is theirs")
        parts = self.config.run.accumulation
        self.loader = Loader(
            self.source,
            self.plan,
            self.config.run.seed,
            Collate(self.tokenizer_json),
            place.step * parts,
            self.stretch.last * parts,
            self.config.data.workers,
            states[self.plan.rank] if states and isinstance(self.source, ShardSource) else None,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        return iter(self.loader)

    def _hooks(self, denoiser: Denoiser, average: Average) -> Sequence[Hook]:
        run = self.config.run
        hooks = []
        if run.checkpoint_every:
            hooks.append(Hook(run.checkpoint_every, lambda step: self._checkpoint(average, step)))
        if run.validate_every and run.validation_clips and self.config.data.validation:
            validation = self._validation()
            samples = self.accelerator.distributed_type != DistributedType.FSDP  # whose shards only the whole denoiser gathers
            hooks.append(Hook(run.validate_every, lambda step: validation.look(denoiser, average, step, samples)))
        return hooks

    def _validation(self) -> Validation:
        config, model = self.config, self.model
        count = config.run.validation_clips
        source = open_source(config.data.validation, model.config, clip_format(config, model, steady=True), count, 1, validation=True)
        if isinstance(source, ShardSource):
            raise InputError("data.validation: found shards, expected demo, a cache or a folder with annotations")
        batch = Collate(self.tokenizer_json)([source.clip(i, np.random.default_rng(i)) for i in range(min(count, len(source)))])
        captions = [source.text(i, np.random.default_rng(i)) for i in range(min(count, len(source)))]
        tokenize = tokenizer_of(self.tokenizer_json)
        ids = tokenize([*captions, ""]).to(self.accelerator.device)
        return Validation(self.model, self._latents(batch), ids, captions, config.loss, self.work / "samples", self.log)

    def _checkpoint(self, average: Average, step: int) -> None:
        tensors = {name: whole(tensor) for name, tensor in average.tensors.items()}
        folder = self.work.parent / "checkpoints" / f"step-{step:06d}"
        _write_checkpoint(self.config, self.model, self.tokenizer_json, tensors, folder, self.accelerator)


def trainable(model: TripModel, config: TrainConfig) -> Denoiser:
    """The denoiser of `model` as a recipe trains it: with adapters, without dropout, with checkpointed gradients."""
    if config.lora.rank:
        add_adapters(model.residual_unet.unet, config.lora)
    if not config.run.dropout:
        without_dropout(model)
    if config.run.gradient_checkpointing:
        checkpoint_gradients(model.residual_unet.unet)
    return Denoiser(model, config.loss, config.run.fused_kernel)


@torch.no_grad()
def encode_frames(model: TripModel, frames: Tensor) -> Tensor:
    """uint8 [B, F, H, W, 3] on the VAE's device → latents [B, C, F, h, w], a clip at a time."""
    return torch.stack([model.encode_image(clip.movedim(-1, -3).float() / 127.5 - 1).transpose(0, 1) for clip in frames])


def clip_format(config: TrainConfig, model: TripModel, steady: bool = False) -> ClipFormat:
    """How clips are cut out of videos for this model; `steady`: always the same cut."""
    trip, data = model.config, config.data
    return ClipFormat(
        num_frames=trip.num_frames,
        height=trip.height,
        width=trip.width,
        fps=data.fps,
        stride=data.stride,
        crop="centre" if steady else data.crop,
        start="first" if steady else data.start,
    )


def _run_id(config: TrainConfig, model: TripModel) -> str:
    """All that the weights of a run depend on. What may change between its sittings is left out."""
    settings = to_json(config)
    for name in ("save_every", "log_every", "validate_every", "validation_clips", "checkpoint_every", "max_bad_steps", "tracker"):
        del settings["run"][name]
    for name in ("validation", "workers"):
        del settings["data"][name]
    return hashlib.sha256((json.dumps(settings, sort_keys=True) + digest(model)).encode()).hexdigest()


def _train_vae(model: TripModel, config: TrainConfig, accelerator: Accelerator, work: Path, run_id: str) -> float:
    """Train the demo's VAE and set the scale of its latents; returns its PSNR on held-out frames in dB."""
    if config.data.source != DEMO:
        raise InputError(f"vae.steps: found {config.vae.steps} on {config.data.source}, expected 0: only the demo world trains a VAE")
    clips = render_clips(model.config, config.data.clips)
    train_vae(model.vae, clips, config, accelerator, work / _VAE_STATE, run_id)
    model.vae.to(memory_format=torch.contiguous_format)
    if config.run.weights == "fp16":
        model.vae.half().float()  # the checkpoint's precision: the denoiser learns the latents that it will meet
    model.vae.eval().requires_grad_(False)
    frames = clips.frames[:SCALE_CLIPS].reshape(-1, *clips.frames.shape[2:])
    model.config = dataclasses.replace(model.config, scaling_factor=latent_scale(model.vae, frames))
    held_out = render_clips(model.config, 32, held_out=True)
    psnr = reconstruction_psnr(model.vae, held_out.frames[:, ::5].reshape(-1, *held_out.frames.shape[2:]))
    if accelerator.is_main_process:
        note(f"VAE gives held-out frames back at {psnr:.2f} dB")
    return round(psnr, 2)


def _source(config: TrainConfig, model: TripModel, tokenizer_json: str, accelerator: Accelerator, work: Path) -> ClipDataset | ShardSource:
    """The run's clips: as the recipe names them, or encoded once into the run's own folder."""
    data = config.data
    source = open_source(data.source, model.config, clip_format(config, model), data.clips, data.shuffle)
    if data.cache and not isinstance(source, CachedClips):
        if isinstance(source, ShardSource):
            raise InputError("data.cache: found shards, expected a folder or the demo world; set data.cache=false")
        folder = work / "latents"
        if accelerator.is_main_process and not folder.exists():
            write_cache(source, model, tokenizer_json, folder, config.run.seed)
        accelerator.wait_for_everyone()
        source = CachedClips(folder)
    if isinstance(source, CachedClips):
        source.check(model)
    return source


def _write_checkpoint(
    config: TrainConfig, model: TripModel, tokenizer_json: str, weights: dict[str, Tensor], folder: Path, accelerator: Accelerator
) -> None:
    """Write the checkpoint with the averaged `weights`, adapters merged in and, if there are any, beside it by themselves."""
    if accelerator.is_main_process:
        fresh, _ = start_model(config.model, config.run.seed)
        fresh.vae, fresh.config = model.vae, model.config
        denoiser = trainable(fresh, config)
        own = dict(denoiser.named_parameters())
        with torch.no_grad():
            for name, tensor in weights.items():
                own[name].copy_(tensor)
        if config.lora.rank:
            save_adapters(fresh.residual_unet.unet, config.lora, folder / "lora")
            fresh.residual_unet.unet = merged(fresh.residual_unet.unet)
        checkpoint.save_pretrained(fresh, tokenizer_json, folder, torch.float16 if config.run.weights == "fp16" else torch.float32)
    accelerator.wait_for_everyone()
