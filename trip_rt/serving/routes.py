"""The routes: `/v1/videos` as OpenAI's clients speak it, and what trip-rt adds."""

# Annotations are not postponed here: FastAPI reads them, and some name what is local to `create_app`.
import asyncio
import base64
import errno
import io
import logging
import os
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from fastapi import Depends, FastAPI, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from PIL import Image
from pydantic import BaseModel
from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from trip_rt.checks import excerpt
from trip_rt.serving import schemas
from trip_rt.serving.api_errors import ApiError
from trip_rt.serving.api_keys import ApiKeys
from trip_rt.serving.clip_request import (
    ClipFields,
    ClipForm,
    ClipJSON,
    Limits,
    PictureURL,
    from_data_url,
    new_job,
    parsed,
)
from trip_rt.serving.database import StoreUnavailable
from trip_rt.serving.extension_request import ExtensionForm, ExtensionJSON, OfVideo, new_extension, of_form
from trip_rt.serving.guard import Guard
from trip_rt.serving.jobs import Job, NewJob
from trip_rt.serving.models import Model
from trip_rt.serving.results import SPRITESHEET, THUMBNAIL, VIDEO
from trip_rt.serving.service import Closing, NoRoom, Service
from trip_rt.serving.store import OtherRequest, QueueFull

log = logging.getLogger("trip-serve")
PAGE = Path(__file__).with_name("page")
_UPLOAD_S = 60.0  # that a request may take to arrive
_DECODES = 2  # pictures at a time
_CONTENT = {
    "video": (VIDEO, "video/mp4"),
    "thumbnail": (THUMBNAIL, "image/webp"),
    "spritesheet": (SPRITESHEET, "image/jpeg"),
}
_ERRORS = {
    400: "The request is wrong; `param` names the field.",
    401: "An API key is needed.",
    403: "The request came from another site, or for another host.",
    404: "There is no such thing, or it is another's.",
    405: "Not with this method.",
    408: "The request took too long to arrive.",
    409: "Not in this state.",
    413: "The request is too large.",
    415: "Neither a form nor JSON.",
    416: "There is no such range.",
    429: "The queue is full; `Retry-After` says when to come again.",
    500: "The engine failed; `error.code` says how.",
    503: "Not now; `Retry-After` says when to come again.",
    507: "Results take as much of the disk as they may.",
}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What an operation may answer besides what was asked for."""
    return {
        status: {"model": schemas.ErrorAnswer, "description": _ERRORS[status]}
        for status in (400, 401, 403, 503, *statuses)
    }


def create_app(
    service: Service,
    limits: Limits,
    keys: ApiKeys,
    hosts: tuple[str, ...] = (),
    page: bool = True,
    metrics: bool = True,
) -> FastAPI:
    """The application. `hosts` are the only names it answers to, any if there are none; `page` and `metrics` say
    whether it has those."""
    app: FastAPI = FastAPIOffline(
        title="trip-rt",
        description="One picture and one sentence in, a short video out.",
        redoc_url=None,
        redirect_slashes=False,  # to an address that is wrong behind a proxy
        swagger_ui_parameters={"validatorUrl": None},
    )
    app.add_middleware(Guard, most_bytes=limits.body_bytes, hosts=hosts)
    _handle_errors(app)
    decodes = asyncio.Semaphore(_DECODES)

    def owner(authorization: Annotated[str | None, Header(include_in_schema=False)] = None) -> str:
        return keys.owner(authorization)

    Owner = Annotated[str, Depends(owner)]

    async def found(video_id: str, owner: Owner) -> Job:
        job = await service.get(video_id, owner)
        if job is None:
            raise _no_video(video_id)
        return job

    Found = Annotated[Job, Depends(found)]

    def answer(job: Job) -> JSONResponse:
        headers = {} if job.finished else {"openai-poll-after-ms": str(service.poll_after_ms(job))}
        return JSONResponse(service.view(job), headers=headers)

    def model_of(name: str | None) -> Model:
        model = next(iter(service.models.values())) if name is None else service.models.get(name)
        if model is None:
            message = f"model: found {excerpt(str(name))}, expected one of {', '.join(service.models)}"
            raise ApiError(404, message, "model", "model_not_found")
        return model

    async def queued(new: NewJob) -> Job:
        try:
            return await service.add(new)
        except QueueFull as error:
            retry = {"Retry-After": str(service.retry_after_s(new.model))}
            raise ApiError(429, "queue: found it full; come again later", code="queue_full", headers=retry) from error

    async def added(request: Request, owner: str, idempotency_key: str | None) -> Job:
        sent, picture, url = await _received(request, limits)
        if picture is None:
            if url is None:
                message = "input_reference: found none, expected the picture to begin with"
                raise ApiError(400, message, "input_reference")
            picture = from_data_url(url)
        fields = parsed(sent, ClipFields)
        model = model_of(fields.model)
        async with decodes:
            new = await asyncio.to_thread(new_job, fields, picture, model, limits, owner, idempotency_key)
        return await queued(new)

    IdempotencyKey = Annotated[
        str | None,
        Header(min_length=1, max_length=255, description="The same key and request again give the same job."),
    ]
    body = _body(ClipForm, ClipJSON)
    creation = _errors(404, 408, 409, 413, 415, 429, 507)

    @app.post("/v1/videos", response_model=schemas.Video, responses=creation, openapi_extra=body, tags=["videos"])
    async def create(request: Request, owner: Owner, idempotency_key: IdempotencyKey = None) -> Any:
        """Ask for a clip. The answer comes at once; follow the job by its id."""
        return answer(await added(request, owner, idempotency_key))

    @app.post(
        "/v1/videos/sync",
        response_class=FileResponse,
        responses={200: {"content": {"video/mp4": {}}, "description": "The clip."}, **creation, **_errors(500)},
        openapi_extra=body,
        tags=["videos"],
    )
    async def create_and_wait(request: Request, owner: Owner, idempotency_key: IdempotencyKey = None) -> Any:
        """Ask for a clip and wait for it. Whoever hangs up cancels it."""
        job = await added(request, owner, idempotency_key)
        waiting = asyncio.create_task(service.finished(job))
        gone = asyncio.create_task(_gone(request))
        try:
            await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                await service.cancel(job.id, owner)
        finally:
            for task in (waiting, gone):
                task.cancel()
        done = waiting.result() if waiting.done() and not waiting.cancelled() else None
        if done is None:
            message = "the server is going down, or the job was deleted"
            raise ApiError(503, message, code="stopping", headers={"Retry-After": "10"})
        if done.state != "completed":
            failure = done.failure
            code = failure.code if failure else done.state
            status = 500 if failure and code != "invalid_request" else 409
            raise ApiError(status, failure.message if failure else f"the job was {done.state}", code=code)
        took = service.view(done)["inference_time_s"]
        headers = {"x-request-id": done.id, "x-inference-time-s": str(took)}
        return FileResponse(await service.file(done, VIDEO), media_type="video/mp4", headers=headers)

    @app.post(
        "/v1/videos/extensions",
        response_model=schemas.Video,
        responses=creation,
        openapi_extra=_body(ExtensionForm, ExtensionJSON),
        tags=["videos"],
    )
    async def extend(request: Request, owner: Owner, idempotency_key: IdempotencyKey = None) -> Any:
        """Ask for the frames that follow a completed clip, or one of its frames, by a sentence. The new job's clip is
        of the new frames alone. What has hardly changed since the picture that the first clip began with is put back
        to it, so that long chains drift less."""
        sent, picture, url = await _received(request, limits)
        if picture is not None or url is not None:
            message = "input_reference: found one, expected none: the clip goes on from its own frame"
            raise ApiError(400, message, "input_reference")
        fields = parsed(of_form(sent), ExtensionJSON)
        job = await service.get(fields.video.id, owner)
        if job is None:
            raise _no_video(fields.video.id, "video")
        model = model_of(job.model)
        if job.state != "completed":
            raise ApiError(409, f"video: found it {job.state}, expected it completed", "video", "not_ready")
        began_with, file = await service.picture(job), await service.file(job, VIDEO)
        if began_with is None:
            raise _no_video(job.id, "video")
        async with decodes:
            new = await asyncio.to_thread(
                new_extension, fields, job, began_with, file, model, limits, owner, idempotency_key
            )
        return answer(await queued(new))

    @app.get("/v1/videos", response_model=schemas.VideoList, responses=_errors(404), tags=["videos"])
    async def list_videos(
        owner: Owner,
        after: Annotated[str | None, Query(max_length=100)] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> Any:
        """Jobs, newest first; `after` is the last id of the page before."""
        page = await service.page(owner, after, limit, order == "asc")
        if page is None:
            raise _no_video(after or "", "after")
        jobs, more = page
        data = [service.view(job) for job in jobs]
        first, last = (jobs[0].id, jobs[-1].id) if jobs else (None, None)
        return JSONResponse({"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": more})

    @app.get("/v1/videos/{video_id}", response_model=schemas.Video, responses=_errors(404), tags=["videos"])
    async def retrieve(job: Found) -> Any:
        """How a job stands. While it is not finished, `openai-poll-after-ms` says when it pays to ask again."""
        return answer(job)

    @app.get(
        "/v1/videos/{video_id}/content",
        response_class=FileResponse,
        responses={
            200: {
                "content": {"video/mp4": {}, "image/webp": {}, "image/jpeg": {}},
                "description": "The clip, its first frame, or all its frames on one picture.",
            },
            206: {"description": "The range of bytes that was asked for."},
            **_errors(404, 409, 416),
        },
        tags=["videos"],
    )
    async def content(job: Found, variant: Literal["video", "thumbnail", "spritesheet"] = "video") -> Any:
        """The files of a completed job."""
        if job.state != "completed":
            raise ApiError(409, f"video: found it {job.state}, expected it completed", code="not_ready")
        name, media_type = _CONTENT[variant]
        path = await service.file(job, name)
        filename = f"{job.id}{Path(name).suffix}"
        return _File(path, media_type=media_type, filename=filename, content_disposition_type="inline")

    @app.delete("/v1/videos/{video_id}", response_model=schemas.Deleted, responses=_errors(404), tags=["videos"])
    async def delete(video_id: str, owner: Owner) -> Any:
        """Remove a job and its files; one that is being made stops at its next step."""
        if not await service.delete(video_id, owner):
            raise _no_video(video_id)
        return JSONResponse({"id": video_id, "object": "video.deleted", "deleted": True})

    @app.post(
        "/v1/videos/{video_id}/cancel", response_model=schemas.Video, responses=_errors(404, 409), tags=["videos"]
    )
    async def cancel(job: Found, owner: Owner) -> Any:
        """Stop a job at its next step and keep it, as cancelled."""
        cancelled = await service.cancel(job.id, owner)
        if cancelled is None:
            raise ApiError(409, "video: found it finished, expected it queued or in progress", code="finished")
        return answer(cancelled)

    @app.get("/v1/videos/{video_id}/events", response_class=EventSourceResponse, responses=_errors(404), tags=["live"])
    async def events(
        job: Found, last_event_id: Annotated[int | None, Header(ge=0, le=1 << 31)] = None
    ) -> AsyncIterator[ServerSentEvent]:
        """What happens to a job: `queued` with its place, `in_progress`, every `step`, `decoding`, and at the end
        `completed`, `failed`, `cancelled` (each with the job), `deleted`, or `stopping` where the server goes down."""
        start = 0 if last_event_id is None else last_event_id + 1
        async for number, name, data in service.events(job, start):
            if name != "frame":
                yield ServerSentEvent(id=str(number), event=name, data=data)

    @app.get("/v1/videos/{video_id}/frames", response_class=EventSourceResponse, responses=_errors(404), tags=["live"])
    async def frames(job: Found) -> AsyncIterator[ServerSentEvent]:
        """Each `frame` of a clip, a PNG in base64, as soon as it is decoded; `restart` where the job is begun anew; and
        `end`."""
        total = job.request["num_frames"]
        async for name, data in service.frames(job):
            if name == "frame":
                index, pixels = data
                png = io.BytesIO()
                Image.fromarray(pixels).save(png, "PNG", compress_level=1)
                encoded = base64.b64encode(png.getvalue()).decode()
                yield ServerSentEvent(event="frame", data={"index": index, "num_frames": total, "png": encoded})
            else:
                yield ServerSentEvent(event=name, data={"status": data} if data else {})

    def choice(model: Model) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": int(service.began),
            "owned_by": "trip-rt",
            "size": model.size,
            "num_frames": model.config.num_frames,
            "fps": float(model.config.fps),
            "seconds": model.seconds(model.config.fps),
            "guidance_scale": float(model.config.guidance_scale),
            "speeds": model.speeds(),
            "steered": model.steered,
            "batch": model.profile.batch,
            "workers": model.workers,
            "ready": model.ready_workers > 0,
            "engine": model.engine,
            "parity": model.parity,
        }

    @app.get("/v1/models", response_model=schemas.ModelList, responses=_errors(), tags=["models"])
    async def models(owner: Owner) -> Any:
        """The models that are served, and what a request may ask for at most."""
        data = [choice(model) for model in service.models.values()]
        return JSONResponse({"object": "list", "data": data, "limits": asdict(limits)})

    @app.get("/v1/models/{model_id}", response_model=schemas.ModelChoice, responses=_errors(404), tags=["models"])
    async def model(model_id: str, owner: Owner) -> Any:
        """One of them."""
        return JSONResponse(choice(model_of(model_id)))

    @app.get("/healthz", response_model=schemas.Health, responses=_errors(), tags=["operation"])
    async def healthy() -> Any:
        """Whether the server answers."""
        return JSONResponse({"status": "ok"})

    @app.get(
        "/readyz", response_model=schemas.Readiness, responses={503: {"model": schemas.Readiness}}, tags=["operation"]
    )
    async def ready() -> Any:
        """Whether every model has a worker that is warm."""
        workers = {model.name: model.ready_workers for model in service.models.values()}
        status = "stopping" if service.closing else "ready" if all(workers.values()) else "starting"
        return JSONResponse({"status": status, "workers": workers}, 200 if status == "ready" else 503)

    if metrics:

        @app.get(
            "/metrics",
            response_class=Response,
            responses={200: {"content": {"text/plain": {}}}, **_errors()},
            tags=["operation"],
        )
        async def measured(owner: Owner) -> Response:
            """Counters, gauges and histograms for Prometheus."""
            return Response(await service.metrics_text(), media_type="text/plain; version=0.0.4")

    if page:

        @app.get("/", include_in_schema=False)
        async def index() -> FileResponse:
            return FileResponse(PAGE / "index.html")

        app.mount("/page", StaticFiles(directory=PAGE))
    _describe(app)
    return app


def _body(form: type[BaseModel], json: type[BaseModel]) -> dict[str, Any]:
    """The description of a body that comes as either."""
    schema = json.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)  # `_describe` has them
    content = {
        "multipart/form-data": {"schema": form.model_json_schema()},
        "application/json": {"schema": schema},
    }
    return {"requestBody": {"required": True, "content": content}}


def _describe(app: FastAPI) -> None:
    """Have the description say what FastAPI does not know: the objects in bodies, that what is wrong is
    answered with 400 and not 422, and that a stream's errors are JSON."""
    description = app.openapi()
    described = description["components"]["schemas"]
    for part in (PictureURL, OfVideo):
        described[part.__name__] = part.model_json_schema()
    for unused in ("HTTPValidationError", "ValidationError"):
        described.pop(unused, None)
    for operations in description["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            for status, answer in operation["responses"].items():
                if status >= "400" and "text/event-stream" in answer["content"]:
                    answer["content"] = {"application/json": answer["content"]["text/event-stream"]}


class _File(FileResponse):
    """A file, or the part of it that was asked for; ApiError for a part that it does not have, and where it is gone."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def answer(message: Message) -> None:
            if (status := message.get("status")) in (400, 416):  # Starlette's own, as text
                size = Headers(raw=message["headers"]).get("content-range")
                headers = {"Content-Range": size} if size else {}
                raise ApiError(status, "range: expected bytes=FIRST-LAST within the file", "range", headers=headers)
            await send(message)

        try:
            await super().__call__(scope, receive, answer)
        except (FileNotFoundError, RuntimeError) as error:  # the latter is Starlette's, where it finds no file
            if os.path.exists(self.path):
                raise
            raise ApiError(404, "video: it was deleted just now", "video_id", "not_found") from error


async def _received(request: Request, limits: Limits) -> tuple[dict[str, Any], bytes | None, Any]:
    """The fields of a request for a clip, the picture in it, and the address in its place."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        async with asyncio.timeout(_UPLOAD_S):
            if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
                return await _form(request, limits)
            if kind == "application/json":
                return await _json(request)
    except TimeoutError as error:
        raise ApiError(408, f"body: found it unfinished after {_UPLOAD_S:g} s; send it again") from error
    found = excerpt(kind or "no type")
    raise ApiError(415, f"body: found {found}, expected multipart/form-data or application/json")


async def _form(request: Request, limits: Limits) -> tuple[dict[str, Any], bytes | None, Any]:
    """The fields of a form, the file in it, and the address in its place."""
    try:
        async with request.form(max_files=1, max_fields=64, max_part_size=limits.body_bytes) as form:
            texts = [(name, value) for name, value in form.multi_items() if isinstance(value, str)]
            fields: dict[str, Any] = dict(texts)
            for name in [name for name in fields if name.endswith("[]")]:  # how OpenAI's client writes a list
                del fields[name]
                fields[name.removesuffix("[]")] = [value for other, value in texts if other == name]
            files = {name: file for name, file in form.multi_items() if isinstance(file, UploadFile)}
            file = files.pop("input_reference", None)
            if files:
                name = next(iter(files))
                expected = (
                    "the id of a clip of this server's as video[id]" if name == "video" else "input_reference alone"
                )
                raise ApiError(400, f"body: found a file as {excerpt(name)}, expected {expected}", name)
            # The second is how OpenAI's client writes an object's field in a form.
            url = fields.pop("input_reference", fields.pop("input_reference[image_url]", None))
            return fields, await file.read() if file is not None else None, url
    except HTTPException as error:  # Starlette's own, of a damaged form
        raise ApiError(400, f"body: found a damaged form ({excerpt(str(error.detail))})") from error


async def _json(request: Request) -> tuple[dict[str, Any], None, Any]:
    try:
        fields = msgspec.json.decode(await request.body())
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ApiError(400, f"body: found no JSON ({excerpt(str(error))})") from error
    if not isinstance(fields, dict):
        raise ApiError(400, "body: found no JSON object, expected one")
    reference = fields.pop("input_reference", None)
    return fields, None, reference.get("image_url") if isinstance(reference, dict) else reference


async def _gone(request: Request) -> None:
    """Returns once the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _no_video(id: str, param: str = "video_id") -> ApiError:
    return ApiError(404, f"video: found none of the id {excerpt(id)}", param, "not_found")


def _handle_errors(app: FastAPI) -> None:
    def answer(error: ApiError) -> JSONResponse:
        return JSONResponse(error.envelope(), error.status, error.headers)

    @app.exception_handler(ApiError)
    async def api(request: Request, error: ApiError) -> Response:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        param = str(first["loc"][-1]).replace("-", "_")
        return answer(ApiError(400, f"{param}: {first['msg'][:1].lower()}{first['msg'][1:]}", param))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return answer(ApiError(error.status_code, str(error.detail).lower(), headers=dict(error.headers or {})))

    @app.exception_handler(OtherRequest)
    async def other_request(request: Request, error: OtherRequest) -> Response:
        message = "idempotency-key: found it used for another request, expected a new one"
        return answer(ApiError(409, message, "idempotency_key", "idempotency_key_reused"))

    @app.exception_handler(NoRoom)
    async def no_room(request: Request, error: NoRoom) -> Response:
        message = "storage: found results at their limit; delete some, or wait until they expire"
        return answer(ApiError(507, message, code="storage_full"))

    @app.exception_handler(OSError)
    async def disk(request: Request, error: OSError) -> Response:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return await unexpected(request, error)
        log.error("the disk is full: %s", error)
        return answer(ApiError(507, "storage: found the disk full; come again later", code="storage_full"))

    @app.exception_handler(Closing)
    async def closing(request: Request, error: Closing) -> Response:
        return answer(ApiError(503, "the server is going down", code="stopping", headers={"Retry-After": "10"}))

    @app.exception_handler(StoreUnavailable)
    async def unavailable(request: Request, error: StoreUnavailable) -> Response:
        log.error("the store does not answer: %s", error)
        return answer(ApiError(503, "the jobs cannot be reached now", code="store_busy", headers={"Retry-After": "2"}))

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # to nobody

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        log.exception("a fault of the server's", exc_info=error)
        return answer(ApiError(500, "the server has made a mistake; its log says which"))
