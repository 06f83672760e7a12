"""What is refused before a run begins its slow work: what this machine cannot do, what does not fit the data, what
would train nothing of use."""

from __future__ import annotations

import tomllib
from importlib.util import find_spec
from pathlib import Path

import torch

from trip_reference.data.cache import CachedClips
from trip_reference.data.sample import ClipDataset
from trip_reference.data.shards import ShardSource
from trip_reference.demo_world.paths import DemoPathClips
from trip_reference.model import TripModel
from trip_reference.training.config import OWN_TEXT, OptimizerConfig, RunConfig, TrainConfig, lr_factor
from trip_reference.training.start import learns, train_only, trainable
from trip_rt.errors import InputError


def check_optimizer(config: OptimizerConfig, sharded: bool) -> None:
    """Raise InputError for Muon where processes share the weights."""
    if config.name == "muon" and sharded:
        raise InputError(
            "optimizer.name: found muon under FSDP, expected adamw there; Muon needs whole matrices in every process"
        )


def check_device(run: RunConfig) -> None:
    """Raise InputError for what only a GPU can do where there is none."""
    if run.mixed_precision == "fp16" and not torch.accelerator.is_available():
        raise InputError("run.mixed_precision: found fp16 and no GPU, expected bf16 or no there")
    gpu = torch.cuda.is_available()
    if run.fused_kernel and not (gpu and find_spec("triton")):
        found = "no Triton" if gpu else "no NVIDIA GPU"
        raise InputError(f"run.fused_kernel: found true and {found}, expected false there")


def check_source(config: TrainConfig, source: ClipDataset | ShardSource) -> None:
    """Raise InputError for data that the run cannot use as it is told to, and for a VAE that nothing trains."""
    model, steps = config.model, config.vae.steps
    if isinstance(source, CachedClips) and steps:
        raise InputError(
            f"vae.steps: found {steps} on a cache of latents, expected 0: frames are gone from it; set vae.steps=0 and"
            " name the checkpoint that the cache was made with"
        )
    if model.control:
        _check_control(config, source)
    if isinstance(source, ShardSource) and config.data.cache:
        raise InputError("data.cache: found shards, expected a folder or the demo world; set data.cache=false")
    if not (steps or config.vae.untrained or model.checkpoint or model.modelscope or model.vae):
        raise InputError(
            "vae.steps: found 0 and a VAE of random weights, expected a trained one; set vae.steps to train it on the"
            " data, or take one by --checkpoint or model.vae"
        )


def _check_control(config: TrainConfig, source: ClipDataset | ShardSource) -> None:
    """Raise InputError for a run of a control that would train, or lack, something else."""
    steers = isinstance(source, DemoPathClips) or (isinstance(source, CachedClips) and source.index["control"])
    trained = [pattern for stage in config.stages for pattern in stage.trains if not pattern.startswith("control.")]
    for wrong, found, expected in (
        (not config.model.checkpoint, "no checkpoint", "the one whose UNet is to be steered; name it by --checkpoint"),
        (not steers, f"{config.data.source}, whose clips have no control", "demo-paths, or a cache of it, as the data"),
        (trained, f"stages that train {', '.join(trained)[:200]}", "control.* alone, as all else stays as it is"),
        (config.vae.steps, "vae.steps above 0", "0: the VAE stays as it is"),
        (config.lora.rank, "lora.rank above 0", "0: the UNet stays as it is"),
        (config.model.text, "model.text", "none: the text encoder stays as it is"),
    ):
        if wrong:
            raise InputError(f"model.control: found {found}, expected {expected}")


def check_stages(model: TripModel, config: TrainConfig) -> None:
    """Raise InputError for a stage that names no parameter or has no rate for one that it trains, and for a new text
    encoder that none trains. `model` gets what `trainable` adds."""
    denoiser = trainable(model, config)
    patterns = [pattern for stage in config.stages for pattern in stage.trains]
    names = [f"text_encoder.{name}" for name, _ in denoiser.text_encoder.named_parameters()]
    if config.model.text == OWN_TEXT and not all(learns(name, patterns, config.lora.rank > 0) for name in names):
        raise InputError(
            f"stages: found none that trains all of the text encoder, which model.text={OWN_TEXT} makes anew; add"
            " text_encoder.* to a stage's trains"
        )
    for i, stage in enumerate(config.stages):
        train_only(denoiser, stage.trains, config.lora.rank > 0)
        for name, parameter in denoiser.named_parameters():
            if parameter.requires_grad and not getattr(stage, rate := stage.rate_of(name)):
                raise InputError(
                    f"stages.{i}.{rate}: found 0, expected more than 0, as the stage trains {name}; set a rate, or"
                    " leave the parameter out of trains"
                )


def check_steps(config: TrainConfig, done: int, settings: Path) -> str:
    """InputError where the run has done more steps than `config` asks for; else in words what becomes of it where its
    last stage has another length than in the file `settings`, with which it was last started."""
    stage = config.stages[-1]
    total = sum(stage.steps for stage in config.stages)
    at = done - (total - stage.steps)
    if done > total:
        raise InputError(
            f"stages: found {total} steps in all, expected at least the {done} that this run has had; choose another"
            " folder to train less"
        )
    if at < 0 or not settings.is_file():
        return ""
    before = tomllib.loads(settings.read_text(encoding="utf-8"))["stages"][-1]["steps"]
    if before == stage.steps:
        return ""
    was, now = (
        100 * lr_factor(min(at, steps - 1), steps, stage.warmup, config.optimizer.final_lr)
        for steps in (before, stage.steps)
    )
    return (
        f"stage {stage.name}: {before} steps become {stage.steps}; from step {done} on the rates follow the cosine of"
        f" {stage.steps}, and go from {was:.3g} % to {now:.3g} % of their highest"
    )
