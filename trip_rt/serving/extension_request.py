"""What a client asks for that has a clip to go on with: the fields, checked, and the job that they make."""

from __future__ import annotations

import io
import secrets
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from trip_rt import video
from trip_rt.checks import excerpt, shown
from trip_rt.serving.api_errors import ApiError, of_inputs
from trip_rt.serving.clip_request import (
    PARAMS,
    HowFields,
    Limits,
    check_words,
    frames_of,
    hash_of,
    most_frames,
    request_of,
    settings_of,
)
from trip_rt.serving.jobs import Job, NewJob
from trip_rt.serving.models import Model
from trip_rt.serving.results import read_frame


class OfVideo(BaseModel):
    """The clip to go on from."""

    model_config = ConfigDict(extra="forbid")
    id: str = Field(description="Of a completed job of the engines' own size.")


class _NewFrames(HowFields):
    """What says otherwise than for a clip from a picture."""

    model: str | None = Field(None, description="The clip's own, which is the default.")
    size: str | None = Field(None, description="The clip's own, which is the default.")
    seconds: str | None = Field(None, description="How long the new frames play, num_frames / fps.")
    fps: float | None = Field(None, description="Frames a second that they are written with; the clip's own.")
    num_frames: int | None = Field(
        None, description="How many new ones: by default one fewer than the model makes at once; more by several runs."
    )
    from_frame: int | None = Field(
        None, description="The frame of the clip to go on from, counted from 0; the last by default."
    )


class ExtensionJSON(_NewFrames):
    """What the next frames of a clip are made of. Only the prompt and the clip are needed."""

    video: OfVideo


class ExtensionForm(_NewFrames):
    """The same as a form."""

    id: str = Field(alias="video[id]", description="The clip to go on from: a completed job of the engines' own size.")


def of_form(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with `video` as an object, which a form, as OpenAI's client writes it, has no other word for."""
    if "video[id]" not in fields:
        return fields
    return {name: value for name, value in fields.items() if name != "video[id]"} | {
        "video": {"id": fields["video[id]"]}
    }


@of_inputs(PARAMS)
def new_extension(
    fields: ExtensionJSON,
    clip: Job,
    picture: bytes,
    file: Path,
    model: Model,
    limits: Limits,
    owner: str,
    idempotency_key: str | None,
) -> NewJob:
    """The job that goes on from a completed `clip` of this model, whose video is `file` and which began with `picture`;
    ApiError for what cannot be gone on with so. It takes a while: it decodes the video."""
    check_words(fields, limits)
    for name, given, own in (("model", fields.model, clip.model), ("size", fields.size, clip.request["size"])):
        if given not in (None, own):
            found = f"{excerpt(str(given))}, expected {own}, the clip's own"
            raise ApiError(400, f"{name}: found {found}; leave it out", name)
    if clip.request["size"] != model.size:
        found = f"a clip of {clip.request['size']}, expected one of the engines' own size, {model.size}"
        raise ApiError(400, f"video: found {found}; make it without a larger size", "video")
    fps = float(clip.request["fps"] if fields.fps is None else fields.fps)
    video.check_fps(fps)
    each, last = model.config.num_frames - 1, clip.request["num_frames"] - 1
    frames = frames_of(fields, max(1, each), 1, most_frames(model, limits), fps)
    from_frame = last if fields.from_frame is None else fields.from_frame
    if not 0 <= from_frame <= last:
        raise ApiError(400, f"from_frame: found {shown(from_frame)}, expected 0 to {last}, the last one", "from_frame")
    asked, settings = settings_of(fields, limits, None, None if frames == each else frames)
    runs = settings.runs(model.config)
    steps = len(settings.steps(model.config))
    origin = io.BytesIO()
    try:
        frame = read_frame(file, from_frame)
    except FileNotFoundError as error:
        raise ApiError(404, "video: it was deleted just now", "video", "not_found") from error
    pixels = frame[: model.config.height, : model.config.width]  # a video of odd sides has a row or column more
    Image.fromarray(pixels).save(origin, "PNG", compress_level=1)
    request = request_of(fields, model, steps, frames, fps, asked)
    return NewJob(
        owner=owner,
        model=model.name,
        request=request | {"extends": clip.id, "from_frame": from_frame},
        picture=picture,
        steps=steps * runs,
        batch_key=secrets.token_hex(16),  # of no other job: the engines go on with one clip at a time
        fingerprint=hash_of(fields.model_dump() | {"model": model.name}),
        idempotency_key=idempotency_key,
        origin=origin.getvalue(),
    )
