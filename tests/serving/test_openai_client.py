"""The service as OpenAI's own Python client sees it."""

from __future__ import annotations

import base64
import io
import time

import av
import numpy as np
import openai
import pytest
from PIL import Image
from server import HOSTS, PROMPT, picture, running

LONG = {"num_inference_steps": 1000}
DATA_URL = "data:image/png;base64," + base64.b64encode(picture()).decode()

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the client's, of its own videos


@pytest.fixture(scope="module", params=HOSTS)
def client(tiny_bundle, tmp_path_factory, request):
    data = tmp_path_factory.mktemp("served") / "data"
    with (
        running(tiny_bundle, data, "--max-steps", "1000", "--max-queued", "2", *request.param) as server,
        openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0, timeout=30) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def clip(client):
    """A finished one."""
    extra = {"seed": 2**64 - 1, "speed": "fast", "num_inference_steps": 3, "guidance_interval": [0.1, 0.9]}
    file = ("photo.png", picture(), "image/png")
    return client.videos.create_and_poll(prompt=PROMPT, input_reference=file, extra_body=extra)


def make(client, prompt=PROMPT, extra_body=None, **fields):
    """The job of a new clip, not waited for, its picture as a data URL. The client's types allow that as its
    `input_reference`, but the client takes files alone there."""
    body = {"input_reference": {"image_url": DATA_URL}} | (extra_body or {})
    return client.videos.create(prompt=prompt, extra_body=body, **fields)


def test_a_picture_as_a_file(clip):
    assert (clip.object, clip.status, clip.progress, clip.error) == ("video", "completed", 100, None)
    assert clip.id.startswith("video_") and clip.prompt == PROMPT and clip.model == "tiny"
    assert (clip.size, clip.seconds) == ("48x32", "0.625")
    assert clip.created_at <= clip.completed_at < clip.expires_at
    # What OpenAI's videos do not have, the client passes on as it came.
    assert (clip.seed, clip.speed, clip.steps, clip.num_frames, clip.fps) == (2**64 - 1, "fast", 3, 5, 8)
    assert set(clip.stage_durations) == {"denoise", "decode", "encode"} and clip.engine["backend"] == "onnxruntime"


def test_a_picture_from_disk(client, tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(picture())
    with path.open("rb") as file:
        job = client.videos.create(prompt=PROMPT, input_reference=file, size="48x32", seconds="0.625", model="tiny")
    assert job.status == "queued" and job.queue["position"] == 0
    done = client.videos.poll(job.id, poll_interval_ms=20)
    assert (done.id, done.status) == (job.id, "completed")


def test_a_picture_as_a_data_url(client, clip):
    same = {"seed": clip.seed, "speed": "fast", "num_inference_steps": 3, "guidance_interval": [0.1, 0.9]}
    done = client.videos.poll(make(client, extra_body=same).id, poll_interval_ms=20)
    assert done.status == "completed" and done.id != clip.id
    first, second = (client.videos.download_content(id).read() for id in (clip.id, done.id))
    assert first == second  # however the picture came


def go_on(client, id, extra_body=None, **fields):
    """The client's own check takes files alone for `video`, against its types, so the clip's id goes around it."""
    body = {"video": {"id": id}} | (extra_body or {})
    return client.videos.extend(prompt="it goes up", seconds="1", video=openai.omit, extra_body=body, **fields)


def test_a_clip_goes_on(client, clip):
    asked = {"extra_body": {"num_inference_steps": 1, "from_frame": 2}, "extra_headers": {"Idempotency-Key": "more"}}
    job = go_on(client, clip.id, **asked)
    assert (job.extends, job.from_frame, job.seconds, job.num_frames) == (clip.id, 2, "1", 8)
    done = client.videos.poll(job.id, poll_interval_ms=20)
    assert done.status == "completed" and go_on(client, clip.id, **asked) == done
    with pytest.raises(openai.ConflictError):
        go_on(client, clip.id, extra_headers=asked["extra_headers"])
    with pytest.raises(openai.NotFoundError) as error:
        go_on(client, "video_0")
    assert (error.value.param, error.value.code) == ("video", "not_found")
    with pytest.raises(openai.BadRequestError) as error:
        client.videos.extend(prompt="it goes up", seconds="1", video=("clip.mp4", b"a video"))
    assert error.value.param == "video" and "expected the id" in error.value.body["message"]
    client.videos.delete(job.id)  # other tests count the jobs


def test_json(client):
    """The client writes forms; `post` sends JSON."""
    body = {"prompt": PROMPT, "input_reference": {"image_url": DATA_URL}, "guidance_interval": [0.2, 1], "fps": 10}
    job = client.post("/videos", body=body, cast_to=openai.types.Video)
    assert client.videos.poll(job.id, poll_interval_ms=20).status == "completed" and job.seconds == "0.5"


def test_when_to_ask_again(client):
    job = make(client, extra_body=LONG)
    answer = client.videos.with_raw_response.retrieve(job.id)
    assert 250 <= int(answer.headers["openai-poll-after-ms"]) <= 5000 and answer.parse().id == job.id
    client.videos.delete(job.id)


def test_retrieve(client, clip):
    assert client.videos.retrieve(clip.id) == clip


@pytest.mark.parametrize(("variant", "kind"), [("thumbnail", "WEBP"), ("spritesheet", "JPEG")])
def test_download_a_picture(client, clip, variant, kind):
    answer = client.videos.download_content(clip.id, variant=variant)
    assert answer.response.headers["content-type"] == f"image/{kind.lower()}"
    with Image.open(io.BytesIO(answer.read())) as image:
        assert image.format == kind and image.size == ((48, 32) if kind == "WEBP" else (144, 64))


def test_download_a_video(client, clip, tmp_path):
    for answer in (client.videos.download_content(clip.id), client.videos.download_content(clip.id, variant="video")):
        assert answer.response.headers["content-type"] == "video/mp4"
        answer.write_to_file(tmp_path / "clip.mp4")
        with av.open(str(tmp_path / "clip.mp4")) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, float(stream.average_rate)) == ("h264", 8)
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        assert frames.shape == (5, 32, 48, 3) and frames.std() > 1


def test_pages(client, clip):
    for _ in range(5):
        client.videos.poll(make(client, extra_body={"num_inference_steps": 1}).id, poll_interval_ms=20)
    newest = [job.id for job in client.videos.list(limit=100)]
    assert len(newest) >= 6 and newest[-1] == clip.id and len(set(newest)) == len(newest)
    page = client.videos.list(limit=2)
    assert [job.id for job in page.data] == newest[:2] and page.has_next_page()
    assert [job.id for job in page.get_next_page().data] == newest[2:4]
    assert [job.id for job in client.videos.list(limit=2)] == newest  # the client turns the pages
    assert [job.id for job in client.videos.list(limit=4, order="asc")] == newest[::-1]
    assert [job.id for job in client.videos.list(after=newest[-2])] == newest[-1:]
    with pytest.raises(openai.NotFoundError) as error:
        client.videos.list(after="video_0")
    assert error.value.param == "after"


def test_delete(client):
    job = make(client)
    gone = client.videos.delete(job.id)
    assert (gone.id, gone.object, gone.deleted) == (job.id, "video.deleted", True)
    for ask in (client.videos.retrieve, client.videos.download_content, client.videos.delete):
        with pytest.raises(openai.NotFoundError) as error:
            ask(job.id)
        assert (error.value.code, error.value.type, error.value.param) == ("not_found", "not_found_error", "video_id")


def test_cancelled(client):
    """OpenAI's videos cannot be cancelled; its client takes the word as it comes."""
    job = make(client, extra_body=LONG)
    client.post(f"/videos/{job.id}/cancel", cast_to=openai.types.Video)
    assert client.videos.poll(job.id).status == "cancelled"


def test_a_clip_that_is_not_finished(client):
    job = make(client, extra_body=LONG)
    with pytest.raises(openai.ConflictError) as error:
        client.videos.download_content(job.id)
    assert error.value.code == "not_ready"
    client.videos.delete(job.id)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": " "}, "prompt"),
        ({"size": "1280x720"}, "size"),
        ({"seconds": "0.3"}, "seconds"),
        ({"extra_body": {"seed": -1}}, "seed"),
        ({"extra_body": {"colour": "red"}}, "colour"),
        ({"extra_body": {"input_reference": {"image_url": "https://example.com/a.png"}}}, "input_reference"),
        ({"extra_body": {"input_reference": {"file_id": "file-1"}}}, "input_reference"),
        ({"extra_body": {"input_reference": None}, "input_reference": b"no picture"}, "input_reference"),
    ],
)
def test_bad_requests(client, fields, param):
    with pytest.raises(openai.BadRequestError) as error:
        make(client, **fields)
    assert (error.value.param, error.value.type) == (param, "invalid_request_error")
    assert "found" in error.value.body["message"] and "expected" in error.value.body["message"]


def test_models(client):
    (model,) = client.models.list()
    assert (model.id, model.object, model.owned_by, model.ready) == ("tiny", "model", "trip-rt", True)
    assert client.models.retrieve("tiny") == model
    for ask in (lambda: client.models.retrieve("sora-2"), lambda: make(client, model="sora-2")):
        with pytest.raises(openai.NotFoundError) as error:
            ask()
        assert (error.value.param, error.value.code) == ("model", "model_not_found")


def test_a_full_queue(client):
    jobs = [make(client, extra_body=LONG)]
    until = time.monotonic() + 20
    while client.videos.retrieve(jobs[0].id).status == "queued":
        assert time.monotonic() < until
        time.sleep(0.01)
    jobs += [make(client) for _ in range(2)]
    with pytest.raises(openai.RateLimitError) as error:
        make(client)
    assert error.value.code == "queue_full" and int(error.value.response.headers["retry-after"]) >= 1
    client.videos.delete(jobs[0].id)
    assert [client.videos.poll(job.id, poll_interval_ms=20).status for job in jobs[1:]] == ["completed"] * 2


def test_idempotency(client):
    first, second = (make(client, extra_headers={"Idempotency-Key": "a"}) for _ in range(2))
    assert first.id == second.id
    with pytest.raises(openai.ConflictError) as error:
        make(client, extra_headers={"Idempotency-Key": "a"}, extra_body={"seed": 1})
    assert error.value.code == "idempotency_key_reused"


def test_keys(tiny_bundle, tmp_path):
    keys = tmp_path / "keys.txt"
    keys.write_text("alice sk-0123456789abcdef\n", encoding="utf-8")
    with running(tiny_bundle, tmp_path / "data", "--api-keys", str(keys), ready=False) as server:
        known, unknown = (
            openai.OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0)
            for key in ("sk-0123456789abcdef", "sk-0123456789abcdeg")
        )
        assert list(known.videos.list()) == []
        for ask in (unknown.videos.list, unknown.models.list, lambda: make(unknown)):
            with pytest.raises(openai.AuthenticationError) as error:
                ask()
            assert (error.value.code, error.value.type) == ("invalid_api_key", "authentication_error")
