"""The answers of the API, for its description in OpenAPI."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every error."""

    error: Error


class VideoFailure(BaseModel):
    code: str
    message: str


class Place(BaseModel):
    """Of a job that waits."""

    position: int = Field(description="0 for the next one.")
    expected_wait_s: float


class Video(BaseModel):
    """A job and, once it is completed, its clip."""

    id: str
    object: Literal["video"]
    model: str
    status: Literal["queued", "in_progress", "completed", "failed", "cancelled"]
    progress: int = Field(ge=0, le=100, description="Of the steps that are done; 100 once the clip can be had.")
    created_at: int
    started_at: int | None
    completed_at: int | None
    expires_at: int | None = Field(description="When it is removed.")
    error: VideoFailure | None
    prompt: str
    negative_prompt: str
    seed: int
    speed: str
    num_inference_steps: int
    guidance_scale: float
    size: str
    path: list[tuple[float, float]] | None
    extends: str | None = Field(description="The clip that it goes on from.")
    from_frame: int | None = Field(description="The frame of that clip that it follows, counted from 0.")
    num_frames: int
    fps: float
    seconds: str
    steps_done: int
    steps: int
    attempt: int = Field(description="How often it was begun.")
    queue: Place | None
    engine: dict[str, Any] | None = Field(description="What made it.")
    parity: dict[str, Any] | None = Field(description="How near the engines came to the PyTorch model at export.")
    inference_time_s: float | None
    stage_durations: dict[str, float] | None
    peak_memory_mb: float | None
    warnings: list[str]


class VideoList(BaseModel):
    object: Literal["list"]
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(BaseModel):
    id: str
    object: Literal["video.deleted"]
    deleted: Literal[True]


class SpeedChoice(BaseModel):
    num_inference_steps: int
    expected_s: float = Field(description="Seconds that a clip is expected to take.")


class ModelChoice(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    size: str
    num_frames: int
    fps: float
    seconds: str
    guidance_scale: float
    speeds: dict[str, SpeedChoice]
    steered: bool = Field(description="Whether a path may steer its clips.")
    batch: int
    workers: int
    ready: bool
    engine: dict[str, Any]
    parity: dict[str, Any]


class RequestLimits(BaseModel):
    upload_bytes: int
    megapixels: float
    prompt_characters: int
    steps: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelChoice]
    limits: RequestLimits


class Health(BaseModel):
    status: str


class Readiness(BaseModel):
    status: Literal["ready", "starting", "stopping"]
    workers: dict[str, int] = Field(description="Those that can make clips, for each model.")
