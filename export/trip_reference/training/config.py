"""The settings of a training run: a recipe of this package, changed by a TOML file, then by single settings."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from trip_reference.presets import PRESETS
from trip_rt.config import FirstFrame, Fusion, from_json
from trip_rt.errors import InputError, printable
from trip_rt.plain_files import read_text

OWN_TEXT = "own"  # model.text: a text encoder and a tokenizer made for the data set

RECIPES = Path(__file__).with_name("recipes")


@dataclass(frozen=True)
class ModelConfig:
    """Where the weights start. recipes/demo.toml explains every field."""

    preset: str
    checkpoint: str
    modelscope: str
    stable_diffusion: str
    vae: str
    text: str
    text_length: int
    fusion: Fusion
    first_frame: FirstFrame
    num_frames: int
    height: int
    width: int
    control: Literal["", "motion"]
    control_size: int
    control_layers: int


@dataclass(frozen=True)
class DataConfig:
    source: str
    validation: str
    unknown_words: float
    cache: bool
    clips: int
    fps: float
    stride: int
    crop: Literal["centre", "random"]
    start: Literal["first", "random"]
    workers: int
    shuffle: int


@dataclass(frozen=True)
class VaeConfig:
    """The first stage; 0 steps leave the VAE as it is."""

    steps: int
    untrained: bool
    batch: int
    lr: float
    ema_decay: float
    kl_weight: float


@dataclass(frozen=True)
class LossConfig:
    weighting: Literal["none", "min-snr", "clean"]
    min_snr_gamma: float
    max_weight: float
    change: float
    timesteps: Literal["uniform", "high"]
    text_dropout: float


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the UNet; rank 0 is none."""

    rank: int
    alpha: float
    targets: tuple[str, ...]


@dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["adamw", "muon"]
    weight_decay: float
    betas: tuple[float, ...]
    clip: float
    final_lr: float
    ema_decay: float


@dataclass(frozen=True)
class Stage:
    """`trains` are patterns of parameter names; rates are at their highest, after `warmup` steps. The rate of a part
    that the stage does not train may be left out."""

    name: str
    steps: int
    trains: tuple[str, ...]
    warmup: int
    unet_lr: float = 0.0
    tnf_lr: float = 0.0

    def rate_of(self, parameter: str) -> str:
        """The name of the setting that holds a parameter's rate."""
        return "tnf_lr" if parameter.startswith("fusion.") else "unet_lr"


@dataclass(frozen=True)
class RunConfig:
    seed: int
    batch: int
    accumulation: int
    mixed_precision: Literal["no", "fp16", "bf16"]
    gradient_checkpointing: bool
    dropout: bool
    fused_kernel: bool
    weights: Literal["fp16", "fp32"]
    save_every: int
    log_every: int
    validate_every: int
    validation_clips: int
    checkpoint_every: int
    max_bad_steps: int
    tracker: Literal["tensorboard", "wandb", "none"]


@dataclass(frozen=True)
class TrainConfig:
    model: ModelConfig
    data: DataConfig
    vae: VaeConfig
    loss: LossConfig
    lora: LoraConfig
    optimizer: OptimizerConfig
    stages: tuple[Stage, ...]
    run: RunConfig


def lr_factor(step: int, steps: int, warmup: int, final: float) -> float:
    """Linear warm-up times a cosine from 1 to `final`, for step 0 … steps − 1."""
    cosine = final + (1 - final) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / max(warmup, 1)) * cosine


def load_config(recipe: str, file: Path | None = None, settings: Sequence[str] = ()) -> TrainConfig:
    """The settings of a recipe, changed by a TOML file's and then by `section.name=value` words.

    Raises InputError for unknown names and values of the wrong kind or out of range, naming the file or word.
    """
    data = _read(RECIPES / f"{recipe}.toml")
    if file is not None:
        given = _read(file)
        if unknown := given.keys() - data.keys():
            raise InputError(f"{file}: found section {', '.join(sorted(unknown))}, expected {', '.join(data)}")
        for section, values in given.items():
            data[section] = (
                data[section] | values if isinstance(values, dict) and isinstance(data[section], dict) else values
            )
    for word in settings:
        _set(data, word)
    config = from_json(TrainConfig, data, str(file or f"recipe {recipe}"))
    _check(config)
    return config


def _read(path: Path) -> dict[str, Any]:
    text = read_text(path, "a recipe in TOML", 1 << 20)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        reason = printable(str(error)) if isinstance(error, ValueError) else "lists in lists without end"
        raise InputError(f"{path}: cannot be read as TOML: {reason[:200]}") from error


_MOST = 1 << 40
_RATES = ("unet_lr", "tnf_lr")  # which a stage may leave out


def _set(data: dict[str, Any], word: str) -> None:
    """Put `section.name=value` (stages by their number from 0, or -1 for the last: stages.0.steps=100) into `data`."""
    where, equals, text = word.partition("=")
    *path, name = where.split(".")
    target: Any = data
    for part in path:
        numbered = (
            isinstance(target, list) and part.removeprefix("-").isdecimal() and -len(target) <= int(part) < len(target)
        )
        target = target[int(part)] if numbered else target.get(part) if isinstance(target, dict) else None
    named = isinstance(target, dict) and (name in target or (path[:-1] == ["stages"] and name in _RATES))
    if not equals or not named:
        raise InputError(
            f"{word!r}: found no such setting, expected section.name=value with a name that the recipe has, as"
            " run.batch=16"
        )
    try:
        target[name] = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        target[name] = text  # a bare word


def _check(config: TrainConfig) -> None:
    run, optimizer = config.run, config.optimizer
    # Least and most: beyond the latter no machine has the memory, or no run the time.
    bounds = {
        "run.seed": (run.seed, 0, _MOST),
        "run.batch": (run.batch, 1, 1 << 16),
        "run.accumulation": (run.accumulation, 1, 1 << 16),
        "run.save_every": (run.save_every, 1, _MOST),
        "run.log_every": (run.log_every, 1, _MOST),
        "run.max_bad_steps": (run.max_bad_steps, 1, _MOST),
        "run.validate_every": (run.validate_every, 0, _MOST),
        "run.validation_clips": (run.validation_clips, 0, 1 << 10),
        "run.checkpoint_every": (run.checkpoint_every, 0, _MOST),
        "model.num_frames": (config.model.num_frames, 0, 1 << 12),
        "model.height": (config.model.height, 0, 1 << 13),
        "model.width": (config.model.width, 0, 1 << 13),
        "model.control_size": (config.model.control_size, 1, 1 << 12),
        "model.control_layers": (config.model.control_layers, 1, 64),
        "model.text_length": (config.model.text_length, 0, 1 << 12),
        "data.clips": (config.data.clips, 1, _MOST),
        "data.workers": (config.data.workers, 0, 256),
        "data.stride": (config.data.stride, 1, 1 << 20),
        "data.shuffle": (config.data.shuffle, 1, 1 << 20),
        "lora.rank": (config.lora.rank, 0, 1 << 12),
        "vae.steps": (config.vae.steps, 0, _MOST),
        "vae.batch": (config.vae.batch, 1, 1 << 16),
        "stages": (len(config.stages), 1, 100),
    }
    for i, stage in enumerate(config.stages):
        bounds |= {
            f"stages.{i}.steps": (stage.steps, 1, _MOST),
            f"stages.{i}.warmup": (stage.warmup, 0, _MOST),
            f"stages.{i}.trains": (len(stage.trains), 1, 1000),
        }
        for name in _RATES:
            if not 0 <= getattr(stage, name) < 1:
                raise InputError(f"stages.{i}.{name}: found {getattr(stage, name):g}, expected 0 to less than 1")
    for name, (found, least, most) in bounds.items():
        if found < least:
            raise InputError(f"{name}: found {found}, expected at least {least}")
        if found > most:
            raise InputError(f"{name}: found {found}, expected at most {most}")
    for name, share in (
        ("data.unknown_words", config.data.unknown_words),
        ("loss.text_dropout", config.loss.text_dropout),
        ("optimizer.ema_decay", optimizer.ema_decay),
        ("optimizer.final_lr", optimizer.final_lr),
    ):
        if not 0 <= share <= 1:
            raise InputError(f"{name}: found {share:g}, expected 0 to 1")
    if len(optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in optimizer.betas):
        raise InputError(f"optimizer.betas: found {list(optimizer.betas)}, expected two numbers from 0 to less than 1")
    for name, value in (
        ("optimizer.clip", optimizer.clip),
        ("data.fps", config.data.fps),
        ("loss.max_weight", config.loss.max_weight),
        ("loss.min_snr_gamma", config.loss.min_snr_gamma),
        ("lora.alpha", config.lora.alpha),
        ("vae.lr", config.vae.lr),
    ):
        if not 0 < value < math.inf:  # nor NaN
            raise InputError(f"{name}: found {value:g}, expected more than 0")
    for name, value in (
        ("optimizer.weight_decay", optimizer.weight_decay),
        ("vae.ema_decay", config.vae.ema_decay),
        ("vae.kl_weight", config.vae.kl_weight),
        ("loss.change", config.loss.change),
    ):
        if not 0 <= value < math.inf:
            raise InputError(f"{name}: found {value:g}, expected 0 or more")
    if run.tracker == "wandb" and find_spec("wandb") is None:
        raise InputError(
            "run.tracker: found wandb, which is not installed; `pip install wandb`, or set tensorboard or none"
        )
    names = [stage.name for stage in config.stages]
    if len(set(names)) != len(names):
        raise InputError(f"stages: found the names {', '.join(names)}, expected each once")
    if config.model.preset not in PRESETS:
        raise InputError(f"model.preset: found {config.model.preset!r}, expected one of {', '.join(PRESETS)}")
    if bool(config.model.modelscope) != bool(config.model.stable_diffusion):
        raise InputError("model.modelscope and model.stable_diffusion: found one of them, expected both or neither")
    if config.model.text_length and config.model.text != OWN_TEXT:
        raise InputError(
            f"model.text_length: found {config.model.text_length}, expected 0: a text encoder that is there has its"
            f" length; it can be chosen with model.text={OWN_TEXT} alone"
        )
    if config.run.batch % config.run.accumulation:
        raise InputError(
            f"run.batch: found {run.batch}, expected a multiple of run.accumulation, which is {run.accumulation}"
        )
