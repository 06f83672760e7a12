"""Settings that the model, the export and the runtime must agree on: frozen, and stored as JSON in checkpoints and
bundles."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from trip_rt.errors import InputError

Fusion = Literal["tnf", "linear", "none"]
FirstFrame = Literal["start", "end", "channel"]

T = TypeVar("T")


@dataclass(frozen=True)
class ScheduleConfig:
    """Noise schedule: β over `num_train_timesteps` steps, and which of them an inference run visits."""

    beta_schedule: Literal["linear", "scaled_linear"]
    beta_start: float
    beta_end: float
    num_train_timesteps: int
    timestep_spacing: Literal["leading", "trailing"]
    steps_offset: int


@dataclass(frozen=True)
class TNFConfig:
    """Temporal Noise Fusion: width and heads of its transformer over frames."""

    hidden_size: int
    num_heads: int
    num_layers: int


@dataclass(frozen=True)
class TripConfig:
    """A whole TRIP model as seen from outside its networks.

    `height` and `width` are pixels; latents are smaller by `vae_scale_factor` and multiplied by `scaling_factor`
    so that they have about unit variance. `guidance_scale` and `num_inference_steps` are the sampling defaults.
    """

    fusion: Fusion
    first_frame: FirstFrame
    normalize_prior: bool
    num_frames: int
    height: int
    width: int
    fps: int
    latent_channels: int
    vae_scale_factor: int
    scaling_factor: float
    text_length: int
    text_width: int
    guidance_scale: float
    num_inference_steps: int
    tnf: TNFConfig
    schedule: ScheduleConfig

    @property
    def latent_height(self) -> int:
        return self.height // self.vae_scale_factor

    @property
    def latent_width(self) -> int:
        return self.width // self.vae_scale_factor

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """One clip's [C, F, h, w]."""
        return self.latent_channels, self.num_frames, self.latent_height, self.latent_width


def to_json(config: Any) -> dict[str, Any]:
    """A config dataclass as plain JSON values."""
    return dataclasses.asdict(config)


def from_json(cls: type[T], data: Any, where: str) -> T:
    """Build the config dataclass `cls` from JSON values; `where` names the file in error messages.

    Unknown, missing or wrongly typed fields raise InputError: a config from a stranger is never half read.
    """
    if not isinstance(data, dict):
        raise InputError(f"{where}: expected an object for {cls.__name__}, found {type(data).__name__}")
    hints = get_type_hints(cls)
    for found, expected, word in ((hints, data, "lacks"), (data, hints, "has unknown")):
        if extra := [name for name in found if name not in expected]:
            raise InputError(
                f"{where}: {cls.__name__} {word} {', '.join(map(repr, extra))}; was it written by another version?"
            )
    return cls(**{name: _value(hints[name], data[name], f"{where}: {cls.__name__}.{name}") for name in hints})


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_json(hint, value, where)  # type: ignore[arg-type]
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise InputError(f"{where}: found {value!r}, expected one of {', '.join(map(str, get_args(hint)))}")
        return value
    if get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{where}: found {value!r}, expected a list")
        return tuple(_value(get_args(hint)[0], item, f"{where}.{i}") for i, item in enumerate(value))
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise InputError(f"{where}: found {value!r}, expected {hint.__name__}")
    return value
