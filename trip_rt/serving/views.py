"""A job as clients of `/v1/videos` see it: OpenAI's video object, and what trip-rt adds; and what is kept for that of a
clip that is made."""

from __future__ import annotations

from typing import Any

from trip_rt.serving.jobs import Job
from trip_rt.serving.protocol import Made


def video(job: Job, steps_done: int, queue: dict[str, Any] | None) -> dict[str, Any]:
    """The video object of a job that has done so many steps; `queue` is its place while it waits."""
    result = job.result or {}
    seconds = result.get("stage_durations", {})
    asked = {name: value for name, value in job.request.items() if name != "settings"}
    return {
        "id": job.id,
        "object": "video",
        "model": job.model,
        "status": job.state,
        "progress": _progress(job, steps_done),
        "created_at": int(job.created_at),
        "started_at": _whole(job.started_at),
        "completed_at": _whole(job.finished_at) if job.state == "completed" else None,
        "expires_at": _whole(job.expires_at),
        "error": vars(job.failure) if job.failure else None,
        **({"path": None, "extends": None, "from_frame": None} | asked),  # which some jobs lack
        "steps_done": steps_done,
        "steps": job.steps,
        "attempt": job.attempt,
        "queue": queue,
        "engine": result.get("engine"),
        "parity": result.get("parity"),
        "inference_time_s": round(sum(seconds.values()), 4) if seconds else None,
        "stage_durations": seconds or None,
        "peak_memory_mb": result.get("peak_memory_mb"),
        "warnings": result.get("warnings", []),
    }


def result_of(name: str, made: Made, engine: dict[str, Any], parity: dict[str, Any]) -> dict[str, Any]:
    """What a completed job keeps: the `name` of its files, how they were made, and by what."""
    return {
        "name": name,
        "bytes": made.bytes,
        "stage_durations": made.seconds,
        "warnings": list(made.warnings),
        "peak_memory_mb": made.peak_memory_mb,
        "engine": engine,
        "parity": {name: value for name, value in parity.items() if name != "components"},
    }


def _progress(job: Job, steps_done: int) -> int:
    """Of the steps that are done; 100 once the clip can be had."""
    if job.state == "completed":
        return 100
    return min(99, 100 * steps_done // max(1, job.steps))


def _whole(moment: float | None) -> int | None:
    return None if moment is None else int(moment)
