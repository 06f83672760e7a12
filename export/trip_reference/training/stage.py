"""One stage of a run: a number of steps that train some parameters, on a model built for this stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from trip_reference.data.cache import CachedClips
from trip_reference.data.collate import Collate
from trip_reference.data.loader import BatchPlan, Loader
from trip_reference.data.sample import ClipDataset
from trip_reference.data.shards import ShardSource
from trip_reference.data.sources import read_some
from trip_reference.data.tokens import tokenizer_of
from trip_reference.model import TripModel
from trip_reference.training.average import Average
from trip_reference.training.config import Stage, TrainConfig
from trip_reference.training.denoiser import Denoiser
from trip_reference.training.draws import draw
from trip_reference.training.log import Log
from trip_reference.training.loop import Hook, Stretch, train
from trip_reference.training.start import learns, train_only, trainable
from trip_reference.training.state import Place, whole
from trip_reference.training.validation import Validation
from trip_rt.errors import InputError

WriteCheckpoint = Callable[[Path, dict[str, Tensor]], None]


class StageRun:
    """Trains `stage`, whose first step is the run's step `first`, on `source`, and validates on `held_out`; `state` is
    the run's file, which knows the run by `run_id`."""

    def __init__(
        self,
        config: TrainConfig,
        stage: Stage,
        first: int,
        model: TripModel,
        tokenizer_json: str,
        source: ClipDataset | ShardSource,
        held_out: ClipDataset | ShardSource | None,
        accelerator: Accelerator,
        state: Path,
        run_id: str,
        write_checkpoint: WriteCheckpoint,
    ):
        self.config, self.stage, self.model, self.source = config, stage, model, source
        self.held_out = held_out
        self.tokenizer_json, self.accelerator, self.state, self.run_id = tokenizer_json, accelerator, state, run_id
        self.write_checkpoint = write_checkpoint
        self.stretch = Stretch(stage.name, first, first + stage.steps, stage.warmup)
        self.plan = BatchPlan(
            config.run.batch, config.run.accumulation, accelerator.process_index, accelerator.num_processes
        )
        self.log = Log(accelerator, state.with_name("denoiser.jsonl"), config.run.batch, config.run.log_every)
        self.loader: Loader | None = None

    def train(self) -> dict[str, Tensor]:
        """The average of all weights that any stage trains, by their names in the Denoiser."""
        config, model, device = self.config, self.model, self.accelerator.device
        if isinstance(self.source, CachedClips):
            self.source.check(model)
        denoiser = trainable(model, config)
        train_only(denoiser, self.stage.trains, adapters=config.lora.rank > 0)
        cached_text = isinstance(self.source, CachedClips) and self.source.index["text_encoder"] is not None
        if cached_text and any(p.requires_grad for p in denoiser.text_encoder.parameters()):
            raise InputError(
                "stages: found a text encoder that is trained, on a cache of its embeddings; make the cache without"
                " --text"
            )
        model.vae.to(device).eval().requires_grad_(False)
        denoiser.to(device)
        patterns_of_all = [pattern for stage in config.stages for pattern in stage.trains]
        return train(
            self.accelerator,
            denoiser,
            lambda name: getattr(self.stage, self.stage.rate_of(name)),
            self.stretch,
            self._parts_from,
            self._inputs_of(cached_text),
            self.state,
            self.run_id,
            config.run,
            config.optimizer,
            self.log,
            keeps=lambda name: learns(name, patterns_of_all, config.lora.rank > 0),
            hooks=self._hooks,
            data_state=lambda: self.loader.state() if self.loader else [],
        )

    def _parts_from(self, place: Place) -> Iterator[dict[str, Any]]:
        streamed = isinstance(self.source, ShardSource)
        if streamed and place.data and len(place.data) != self.plan.world:
            raise InputError(
                f"found {self.plan.world} processes, expected {len(place.data)} as when this run began: each has its"
                " own shards"
            )
        self.loader = Loader(
            self.source,
            self.plan,
            self.config.run.seed,
            Collate(self.tokenizer_json),
            place.step * self.config.run.accumulation,
            self.stretch.last * self.config.run.accumulation,
            self.config.data.workers,
            place.data[self.plan.rank] if streamed and place.data else None,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        return iter(self.loader)

    def _inputs_of(self, cached_text: bool) -> Callable[[int, int, dict[str, Any]], dict[str, Tensor]]:
        """A function from a batch to the Denoiser's inputs: latents, noise, timesteps, and the sentences, some of which
        are dropped."""
        run, device, shape = self.config.run, self.accelerator.device, self.model.config.latent_shape
        num_train_timesteps = self.model.config.schedule.num_train_timesteps
        kind = "text" if cached_text else "ids"
        empty = self.source.empty_text() if cached_text else tokenizer_of(self.tokenizer_json)([""])[0]
        empty = empty.to(device)

        def inputs_of(step: int, part: int, batch: dict[str, Any]) -> dict[str, Tensor]:
            draws = draw(
                run.seed, step, self.plan.positions(part), run.batch, shape, num_train_timesteps, self.config.loss
            )
            dropped = draws.drop_text.to(device).reshape(-1, *[1] * empty.ndim)
            control = {"control": batch["control"].to(device)} if self.model.control else {}
            return control | {
                "latents": self._latents(batch),
                "noise": draws.noise.to(device),
                "timestep": draws.timestep.to(device),
                kind: torch.where(dropped, empty, batch[kind].to(device)),
            }

        return inputs_of

    @torch.no_grad()
    def _latents(self, batch: dict[str, Any]) -> Tensor:
        """[B, C, F, h, w], as cached or of frames uint8 [B, F, H, W, 3], encoded a clip at a time."""
        device = self.accelerator.device
        if "latents" in batch:
            return batch["latents"].to(device, non_blocking=True)
        frames = batch["frames"].to(device, non_blocking=True)
        return torch.stack([self.model.encode_clip(clip) for clip in frames])

    def _hooks(self, denoiser: Denoiser, average: Average) -> Sequence[Hook]:
        run, hooks = self.config.run, []
        if run.checkpoint_every:
            checkpoints = self.state.parent.parent / "checkpoints"

            def write(step: int) -> None:
                self.write_checkpoint(
                    checkpoints / f"step-{step:06d}", {name: whole(tensor) for name, tensor in average.tensors.items()}
                )

            hooks.append(Hook(run.checkpoint_every, write))
        if run.validate_every and run.validation_clips and self.held_out is not None:
            validation = self._validation(self.held_out)
            # Under FSDP only a call of the whole denoiser gathers the shards, and sampling calls its parts.
            samples = self.accelerator.distributed_type != DistributedType.FSDP
            hooks.append(Hook(run.validate_every, lambda step: validation.look(denoiser, average, step, samples)))
        return hooks

    def _validation(self, held_out: ClipDataset | ShardSource) -> Validation:
        if isinstance(held_out, CachedClips):
            held_out.check(self.model)
        samples = read_some(held_out, self.config.run.validation_clips)
        captions = [sample.text for sample in samples]
        ids = tokenizer_of(self.tokenizer_json)([*captions, ""]).to(self.accelerator.device)
        batch = Collate(self.tokenizer_json)(samples)
        return Validation(
            self.model,
            self._latents(batch),
            ids,
            captions,
            batch.get("control") if self.model.control else None,
            self.config.loss,
            self.state.with_name("samples"),
            self.log,
        )
