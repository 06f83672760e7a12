"""What a client asks for: the fields of a request for a clip, checked, and the job that they make."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import io
import json
import secrets
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from trip_rt import video
from trip_rt.checks import excerpt, shown
from trip_rt.config import MAX_FRAMES
from trip_rt.control import check_points
from trip_rt.errors import one_line
from trip_rt.images import load_image
from trip_rt.optical_flow import opencv
from trip_rt.sampling.windows import window_starts
from trip_rt.serving.api_errors import ApiError, of_inputs
from trip_rt.serving.jobs import NewJob
from trip_rt.serving.models import Model, playing_time
from trip_rt.settings import Settings, check_prompt, check_seed

_MOST_HELD = 256 << 20  # bytes of a running clip's frames, which the server holds for those who watch
_RANDOM_SEEDS = 2**31  # of which JavaScript, too, keeps every digit
# The words that the runtime's errors begin with, and the request's field that they are about.
PARAMS = {
    "prompt": "prompt",
    "negative prompt": "negative_prompt",
    "seed": "seed",
    "speed": "speed",
    "solver": "solver",
    "steps": "num_inference_steps",
    "num_inference_steps": "num_inference_steps",
    "guidance scale": "guidance_scale",
    "guidance interval": "guidance_interval",
    "feature reuse": "feature_reuse",
    "fit": "fit",
    "size": "size",
    "path": "path",
    "control scale": "control_scale",
    "control guidance start": "control_guidance_start",
    "control guidance end": "control_guidance_end",
    "fps": "fps",
    "num_frames": "num_frames",
    "image": "input_reference",
    "image file": "input_reference",
}


Fields = TypeVar("Fields", bound="HowFields")


@dataclass(frozen=True)
class Limits:
    """What a request may ask for at most."""

    upload_bytes: int = 16 << 20
    megapixels: float = 25
    prompt_characters: int = 2000
    steps: int = 200
    frames: int = 256

    @property
    def body_bytes(self) -> int:
        """Of a request: a picture takes a third more as a data URL, and some words come with it."""
        return self.upload_bytes * 4 // 3 + (1 << 20)


def _numbers(value: Any) -> Any:
    """A form has no lists: two numbers with a comma between them."""
    return value.split(",") if isinstance(value, str) else value


def _points(value: Any) -> Any:
    """A form has no lists: points with a space between them."""
    return [point.split(",") for point in value.split()] if isinstance(value, str) else value


class HowFields(BaseModel):
    """How a clip is made, whatever it begins with. Only the prompt is needed."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(description="The sentence that says what happens.", examples=["a red ball rolls to the right"])
    model: str | None = Field(None, description="One of /v1/models; the first by default.")
    seconds: str | None = Field(
        None,
        description="How long the clip plays, num_frames / fps: the model's own, or longer by windows.",
    )
    size: str | None = Field(
        None, description="WIDTHxHEIGHT: the model's own, or larger and of its shape, by the picture's own detail."
    )
    seed: int | None = Field(None, description="0 to 2^64 − 1; a random one by default, which the answer names.")
    speed: str = Field("exact", description="exact, balanced or fast.")
    num_inference_steps: int | None = Field(None, description="Denoising steps; the speed's by default.")
    solver: str | None = Field(None, description="ddim, dpm++ or unipc; the speed's by default.")
    guidance_scale: float | None = Field(None, description="0 to 100; the model's own by default.")
    guidance_interval: Annotated[tuple[float, float] | None, BeforeValidator(_numbers)] = Field(
        None, description="Guide only within these shares of the schedule, 0 to 1."
    )
    feature_reuse: int | None = Field(None, description="Run the whole UNet every so many steps only.")
    negative_prompt: str = Field("", description="What should not be seen.")
    fps: float | None = Field(None, description="Frames a second that the clip is written with; the model's own.")
    num_frames: int | None = Field(None, description="The model's own, or more by overlapping windows.")


class ClipFields(HowFields):
    """What a clip is made of. Only the prompt and the picture are needed."""

    fit: str = Field("crop", description="How a picture of another shape is fitted: crop or letterbox.")
    path: Annotated[tuple[tuple[float, float], ...] | None, BeforeValidator(_points)] = Field(
        None,
        description="Points (x, y) in shares of the picture's sides, y down, that what lies at the first goes along;"
        " for models that are steered.",
    )
    control_scale: float = Field(1.0, description="How strongly the path counts, 0 to 10.")
    control_guidance_start: float = Field(0.0, description="Share of the steps from which it counts.")
    control_guidance_end: float = Field(1.0, description="Share of the steps up to which it counts.")


class PictureURL(BaseModel):
    """A picture in a JSON request."""

    model_config = ConfigDict(extra="forbid")
    image_url: str = Field(description="data:image/png;base64,… ; no other address is fetched.")


class ClipForm(ClipFields):
    """The same as a form, with the picture as a file."""

    input_reference: bytes = Field(description="The picture: PNG, JPEG, WebP, BMP, GIF or TIFF.")


class ClipJSON(ClipFields):
    """The same as JSON."""

    input_reference: PictureURL


def parsed(fields: dict[str, Any], kind: type[Fields]) -> Fields:
    """The fields of a request of that kind; ApiError 400 names the first that is wrong."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        param = ".".join(map(str, first["loc"][:1])) or None
        if first["type"] == "missing":
            message = f"{param}: found none, expected one"
        elif first["type"] == "extra_forbidden":
            message = f"{excerpt(str(param))}: found this unknown field, expected {', '.join(kind.model_fields)}"
            param = excerpt(str(param))
        else:
            said = one_line(first["msg"], 100)
            message = f"{param}: found {shown(first['input'])}, expected another value ({said[:1].lower()}{said[1:]})"
        raise ApiError(400, message, param) from error


def from_data_url(url: Any) -> bytes:
    """The bytes that a data URL holds; ApiError 400 for any other address, as none is fetched."""
    head, comma, body = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not comma or not head.lower().startswith("data:") or not head.lower().endswith(";base64"):
        found = excerpt(url) if isinstance(url, str) else shown(url)
        raise ApiError(
            400,
            f"input_reference: found {found}, expected a picture as data:image/png;base64,…; no address is fetched,"
            " send the picture itself",
            "input_reference",
        )
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(
            400, "input_reference: found no base64 in the data URL, expected it", "input_reference"
        ) from error


@of_inputs(PARAMS)
def new_job(
    fields: ClipFields, picture: bytes, model: Model, limits: Limits, owner: str, idempotency_key: str | None
) -> NewJob:
    """The job that a request makes, its picture fitted to the model; ApiError for what the model cannot do. It takes a
    while: it decodes the picture."""
    check_words(fields, limits)
    fps = float(model.config.fps if fields.fps is None else fields.fps)
    video.check_fps(fps)
    own = model.config.num_frames
    frames = frames_of(fields, own, own, most_frames(model, limits), fps)
    size = None if fields.size == model.size else fields.size
    asked, settings = settings_of(fields, limits, size, frames if frames > own else None)
    steps = len(settings.steps(model.config))
    height, width = settings.picture_size(model.config)
    if (held := frames * height * width * 3) > _MOST_HELD:
        found = f"{frames} frames of {width}x{height}, {held >> 20} MB, expected at most {_MOST_HELD >> 20}"
        raise ApiError(400, f"size: found {found}; take a smaller one, or fewer frames", "size")
    if settings.size is not None:
        opencv()  # before any slow work
    if fields.path is not None:
        check_points(fields.path)
        if not model.steered or frames > model.config.num_frames:
            found = "one for a longer clip than the engines make at once" if model.steered else "one"
            raise ApiError(400, f"path: found {found}, expected none: nothing of this model would follow it", "path")
    if len(picture) > limits.upload_bytes:
        found = f"{len(picture)} bytes, expected at most {limits.upload_bytes}"
        raise ApiError(413, f"input_reference: found {found}; scale it down", "input_reference", "too_large")
    if not picture:
        raise ApiError(400, "input_reference: found no picture, expected one", "input_reference")
    fitted = io.BytesIO()
    pixels = load_image(io.BytesIO(picture), height, width, settings.fit, limits.megapixels)
    Image.fromarray(pixels).save(fitted, "PNG", compress_level=1)
    request = request_of(fields, model, steps, frames, fps, asked) | {"size": f"{width}x{height}", "path": fields.path}
    sent = fields.model_dump() | {"model": model.name, "input_reference": hashlib.sha256(picture).hexdigest()}
    return NewJob(
        owner=owner,
        model=model.name,
        request=request,
        picture=fitted.getvalue(),
        steps=steps * len(window_starts(frames, model.config.num_frames)),
        batch_key=hash_of([model.name, asked]),
        fingerprint=hash_of(sent),
        idempotency_key=idempotency_key,
    )


def check_words(fields: HowFields, limits: Limits) -> None:
    """ApiError or InputError for sentences that are none, or too long."""
    check_prompt(fields.prompt)
    for name, words in (("prompt", fields.prompt), ("negative_prompt", fields.negative_prompt)):
        if len(words) > limits.prompt_characters:
            found = f"{len(words)} characters, expected at most {limits.prompt_characters}"
            raise ApiError(400, f"{name}: found {found}; say it shorter", name)


def settings_of(
    fields: HowFields, limits: Limits, size: str | None, num_frames: int | None
) -> tuple[dict[str, Any], Settings]:
    """What a request asks for besides Settings' defaults, and the whole of it; ApiError or InputError where that is
    none, or more steps than this server does."""
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    asked = {name: getattr(fields, name) for name in defaults if name in type(fields).model_fields}
    asked |= {"size": size, "num_frames": num_frames}
    asked = {name: value for name, value in asked.items() if value is not None and value != defaults[name]}
    settings = Settings(**asked)
    count = settings.resolved_speed.num_inference_steps
    if count is not None and count > limits.steps:
        found = f"{shown(count)}, expected at most {limits.steps}"
        raise ApiError(400, f"num_inference_steps: found {found} on this server", "num_inference_steps")
    return asked, settings


def request_of(
    fields: HowFields, model: Model, steps: int, frames: int, fps: float, asked: dict[str, Any]
) -> dict[str, Any]:
    """What a job keeps of its request, with a seed where none was given."""
    scale = model.config.guidance_scale if fields.guidance_scale is None else fields.guidance_scale
    return {
        "prompt": fields.prompt,
        "negative_prompt": fields.negative_prompt,
        "seed": secrets.randbelow(_RANDOM_SEEDS) if fields.seed is None else check_seed(fields.seed),
        "speed": fields.speed,
        "num_inference_steps": steps,
        "guidance_scale": float(scale),
        "size": model.size,
        "num_frames": frames,
        "fps": fps,
        "seconds": playing_time(frames, fps),
        "settings": asked,
    }


def most_frames(model: Model, limits: Limits) -> int:
    """How many frames of the engines' size this server makes at most."""
    held = _MOST_HELD // (model.config.height * model.config.width * 3)
    return max(model.config.num_frames, min(limits.frames, MAX_FRAMES, held))


def frames_of(fields: HowFields, own: int, fewest: int, most: int, fps: float) -> int:
    """How many frames are asked for, by their number or the seconds that they play: `own` where neither is given;
    ApiError unless they are `fewest` to `most`."""
    given = fields.num_frames
    if given is not None and not fewest <= given <= most:
        expected = f"{fewest} to {most}, and {own} by itself"
        raise ApiError(400, f"num_frames: found {shown(given)}, expected {expected}", "num_frames")
    if fields.seconds is None:
        return own if given is None else given
    try:
        frames = float(fields.seconds) * fps
    except ValueError:
        frames = float("nan")
    found = round(frames) if abs(frames) < 1e9 else 0
    whole = abs(frames - found) / fps < 1e-3
    if not (whole and fewest <= found <= most and given in (None, found)):
        wanted = own if given is None else given
        said = f"{excerpt(fields.seconds)}, expected {playing_time(wanted, fps)}: {wanted} frames at {fps:g} a second"
        others = f"what another whole number of frames takes, {fewest} to {most}"
        raise ApiError(400, f"seconds: found {said}, or {others}", "seconds")
    return found


def hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
