"""Settings that the model, the export and the runtime must agree on: frozen, and stored as JSON in checkpoints and
bundles."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import msgspec
from msgspec import Meta

from trip_rt.errors import InputError, printable

Fusion = Literal["tnf", "linear", "none"]
FirstFrame = Literal["start", "end", "channel"]
Gate = Literal["frame", "matched"]
ControlKind = Literal["motion"]
CONTROL_CHANNELS: dict[ControlKind, int] = {"motion": 3}
Count = Annotated[int, Meta(ge=1, le=1 << 20)]
Beta = Annotated[float, Meta(gt=0, lt=1)]
Timesteps = Annotated[int, Meta(ge=1, le=100_000)]
MAX_FRAMES = 4096  # of a clip
Frames = Annotated[int, Meta(ge=1, le=MAX_FRAMES)]
MOST_SIDE = 8192  # pixels
Side = Annotated[int, Meta(ge=1, le=MOST_SIDE)]
Width = Annotated[int, Meta(ge=1, le=1 << 14)]  # of a network
MOST_CLIP = 1 << 30  # bytes of a clip's pixels

T = TypeVar("T")


@dataclass(frozen=True)
class ScheduleConfig:
    """Noise schedule: β over `num_train_timesteps` steps, and which of them an inference run visits."""

    beta_schedule: Literal["linear", "scaled_linear"]
    beta_start: Beta
    beta_end: Beta
    num_train_timesteps: Timesteps
    timestep_spacing: Literal["leading", "trailing"]
    steps_offset: Annotated[int, Meta(ge=0, le=1 << 20)]

    def __post_init__(self) -> None:
        if self.beta_start > self.beta_end:
            raise InputError(f"beta_end: found {self.beta_end:g}, expected at least beta_start, {self.beta_start:g}")
        if self.steps_offset >= self.num_train_timesteps:
            raise InputError(
                f"steps_offset: found {self.steps_offset}, expected less than num_train_timesteps,"
                f" {self.num_train_timesteps}"
            )


@dataclass(frozen=True)
class TNFConfig:
    """Temporal Noise Fusion: width and heads of its transformer over frames."""

    hidden_size: Width
    num_heads: Width
    num_layers: Annotated[int, Meta(ge=1, le=64)]

    def __post_init__(self) -> None:
        if self.hidden_size % 2:  # half sines, half cosines
            raise InputError(f"hidden_size: found {self.hidden_size}, expected an even number")
        if self.hidden_size % self.num_heads:
            raise InputError(
                f"num_heads: found {self.num_heads}, expected a divisor of hidden_size, {self.hidden_size}"
            )


@dataclass(frozen=True)
class ControlConfig:
    """A network that steers a clip by a map [channels, F, h, w] beside picture and sentence.

    `kind` says what the map shows (control.py). The network has `num_layers` layers of `hidden_size` channels.
    """

    kind: ControlKind
    hidden_size: Width
    num_layers: Annotated[int, Meta(ge=1, le=64)]

    @property
    def channels(self) -> int:
        """How many numbers the map has at each place."""
        return CONTROL_CHANNELS[self.kind]


@dataclass(frozen=True)
class TripConfig:
    """A whole TRIP model as seen from outside its networks.

    `height` and `width` are pixels; latents are smaller by `vae_scale_factor` and multiplied by `scaling_factor` so
    that they have about unit variance. `guidance_scale` and `num_inference_steps` are the sampling defaults. `gate`
    says how the fusion weighs the noise prior: by frame, or by frame and timestep.
    """

    fusion: Fusion
    first_frame: FirstFrame
    normalize_prior: bool
    num_frames: Frames
    height: Side
    width: Side
    fps: Annotated[int, Meta(ge=1, le=1000)]
    latent_channels: Annotated[int, Meta(ge=1, le=1024)]
    vae_scale_factor: Annotated[int, Meta(ge=1, le=128)]
    scaling_factor: Annotated[float, Meta(ge=1e-6, le=1e6)]
    text_length: Annotated[int, Meta(ge=1, le=4096)]
    text_width: Width
    guidance_scale: Annotated[float, Meta(ge=0, le=100)]
    num_inference_steps: Timesteps
    tnf: TNFConfig
    schedule: ScheduleConfig
    gate: Gate = "frame"

    def __post_init__(self) -> None:
        if self.gate == "matched" and not self.normalize_prior:
            raise InputError(
                "gate: found matched with normalize_prior off, expected it on: the raw prior has no such gate"
            )
        for name, side in (("height", self.height), ("width", self.width)):
            if side % self.vae_scale_factor:
                raise InputError(
                    f"{name}: found {side}, expected a multiple of vae_scale_factor, {self.vae_scale_factor}"
                )
        if (size := 3 * self.num_frames * self.height * self.width) > MOST_CLIP:
            raise InputError(
                f"size: found {self.num_frames} frames of {self.width}x{self.height}, {size / 2**30:.1f} GiB of pixels,"
                f" expected at most {MOST_CLIP >> 30}; take fewer or smaller ones"
            )
        if self.num_inference_steps > self.schedule.num_train_timesteps:
            raise InputError(
                f"num_inference_steps: found {self.num_inference_steps}, expected at most num_train_timesteps,"
                f" {self.schedule.num_train_timesteps}"
            )

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """The latent of one frame, [C, h, w]."""
        factor = self.vae_scale_factor
        return self.latent_channels, self.height // factor, self.width // factor

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """The latents of one clip, [C, F, h, w]."""
        channels, height, width = self.frame_shape
        return channels, self.num_frames, height, width


def to_json(config: Any) -> dict[str, Any]:
    """A config dataclass as plain JSON values."""
    return dataclasses.asdict(config)


def from_json(cls: type[T], data: Any, where: str, remedy: str = "was it written by another version?") -> T:
    """Build the config dataclass `cls` from JSON values; errors begin with `where`, the file, and end with `remedy`.

    Unknown, missing, wrongly typed or out-of-range fields raise InputError: a stranger's config is never half read.
    """
    try:
        config = msgspec.convert(data, cls)
    except msgspec.ValidationError as error:
        raise InputError(f"{where}: {_in_words(str(error), cls, data)}; {remedy}") from error
    except (UnicodeError, OverflowError, RecursionError) as error:  # half characters, numbers without end, deep nesting
        raise InputError(f"{where}: found values that no file of ours holds ({error}); {remedy}") from error
    if unknown := next(_unknown(data, msgspec.to_builtins(config)), None):
        raise InputError(f"{where}: found the unknown field {printable(unknown)[:100]}; {remedy}")
    return config


def _in_words(message: str, cls: type, data: Any) -> str:
    """msgspec's message as place, what was found there, and what was expected."""
    what, _, place = message.partition(" - at `$")
    name = place.strip("`.")
    hint: Any = cls
    for part in name.split(".") if name else ():
        data = data.get(part) if isinstance(data, dict) else None
        hint = get_type_hints(hint).get(part) if dataclasses.is_dataclass(hint) else None
    if choices := get_args(hint) if "enum value" in what else ():
        what = f"expected one of {', '.join(map(str, choices))}"
    elif what.startswith("Expected") and data is not None:
        what = what[0].lower() + what[1:].partition(", got")[0].replace("`", "")
    else:
        return f"{name}: {what}" if name else what
    return f"{name}: found {data!r:.100}, {what}" if name else what


def _unknown(data: Any, known: Any, path: str = "") -> Iterator[str]:
    """Paths of the fields of `data` that `known` lacks; msgspec passes over them in a dataclass."""
    if isinstance(data, dict):
        for name, value in data.items():
            if name not in known:
                yield f"{path}{name}"
            else:
                yield from _unknown(value, known[name], f"{path}{name}.")
    elif isinstance(data, (list, tuple)):
        for index, (value, other) in enumerate(zip(data, known, strict=True)):
            yield from _unknown(value, other, f"{path}{index}.")
