"""The routes of a running server: what they answer, and what they refuse."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
import urllib.request

import av
import numpy as np
import pytest
from PIL import Image
from server import PROMPT, clip, picture, running

from trip_rt import Animator
from trip_rt.images import load_image
from trip_rt.serving import results
from trip_rt.serving.api_errors import ApiError
from trip_rt.serving.clip_request import ClipFields, Limits, new_job
from trip_rt.serving.models import read_models

LONG = {"num_inference_steps": 900}


@pytest.fixture(scope="module")
def server(tiny_bundle, tmp_path_factory):
    data = tmp_path_factory.mktemp("served") / "data"
    with running(tiny_bundle, data, "--max-steps", "1000", "--max-queued", "3") as server:
        yield server


def error_of(answer):
    status, body = answer
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"].isprintable()
    return status, body["error"]["param"], body["error"]["message"]


def events(server, id, kind="events", headers=None):
    """The whole stream of a job."""
    request = urllib.request.Request(f"{server.url}/v1/videos/{id}/{kind}", headers=headers or {})
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        blocks = response.read().decode().split("\n\n")
    found = []
    for block in blocks:
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line and not line.startswith(":"))
        if fields:
            found.append((fields.get("id"), fields["event"], json.loads(fields["data"])))
    return found


def frames_of(mp4):
    with av.open(io.BytesIO(mp4)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_a_clip(server, tiny_bundle, tmp_path):
    status, job = server.ask("POST", "/v1/videos", clip(seed=7, fps=5, speed="fast", num_inference_steps=3))
    assert status == 200 and job["status"] == "queued" and job["queue"] == {"position": 0, "expected_wait_s": 0.0}
    assert (job["seed"], job["seconds"], job["size"], job["model"]) == (7, "1", "48x32", "tiny")
    done = server.wait(job["id"])
    assert done["status"] == "completed" and (done["progress"], done["steps_done"], done["steps"]) == (100, 3, 3)
    assert done["engine"]["backend"] == "onnxruntime" and done["parity"]["passed"] is True
    assert set(done["stage_durations"]) == {"denoise", "decode", "encode"} and done["expires_at"] > time.time()
    with Animator(tiny_bundle) as animator:
        frames = animator(io.BytesIO(picture()), PROMPT, seed=7, speed="fast", num_inference_steps=3).frames
    results.write(tmp_path, frames, 5)
    for variant, name in (("video", "video.mp4"), ("thumbnail", "thumbnail.webp"), ("spritesheet", "spritesheet.jpg")):
        status, content = server.ask("GET", f"/v1/videos/{job['id']}/content?variant={variant}")
        assert status == 200 and content == (tmp_path / name).read_bytes()


@pytest.mark.parametrize("length", [{"num_frames": 12}, {"seconds": "1.5"}, {"seconds": "1.5", "num_frames": 12}])
def test_a_longer_clip(server, tiny_bundle, length):
    _, job = server.ask("POST", "/v1/videos", clip(seed=7, num_inference_steps=2, **length))
    assert (job["num_frames"], job["seconds"]) == (12, "1.5")
    told = [data for _, event, data in events(server, job["id"]) if event == "decoding"]
    assert all(data["num_frames"] == 12 for data in told)
    done = server.wait(job["id"])
    # Three windows of five frames: each of them counts.
    assert done["status"] == "completed" and (done["steps_done"], done["steps"]) == (6, 6)
    _, content = server.ask("GET", f"/v1/videos/{job['id']}/content")
    assert len(frames_of(content)) == 12


def test_a_larger_clip(server, tiny_bundle):
    _, job = server.ask("POST", "/v1/videos", clip(seed=7, num_inference_steps=2, size="144x96"))
    assert job["size"] == "144x96"
    told = [data for _, event, data in events(server, job["id"], "frames") if event == "frame"]
    shown = [np.asarray(Image.open(io.BytesIO(base64.b64decode(data["png"])))) for data in told]
    with Animator(tiny_bundle) as animator:
        frames = animator(io.BytesIO(picture()), PROMPT, seed=7, num_inference_steps=2, size="144x96").frames
    np.testing.assert_array_equal(np.stack(shown), frames)
    assert server.wait(job["id"])["status"] == "completed"


def extension(id, **fields):
    return {"prompt": "it goes up", "video": {"id": id}, **fields}


def followed(tiny_bundle, frame, **settings):
    """The frames that go on from this one of a clip of the picture."""
    with Animator(tiny_bundle) as animator:
        first = load_image(io.BytesIO(picture()), 32, 48, "crop")
        latents = animator.follow(first, frame, "it goes up", 9, num_inference_steps=2, **settings)
        return np.concatenate(list(animator.decode(latents)))


def test_a_clip_goes_on(server, tiny_bundle):
    clip_before = server.wait(server.create(seed=7, num_inference_steps=2, fps=5)["id"])
    shown = frames_of(server.ask("GET", f"/v1/videos/{clip_before['id']}/content")[1])
    for fields, origin, count, steps in (({}, 4, 4, 2), ({"from_frame": 2, "num_frames": 6}, 2, 6, 4)):
        body = extension(clip_before["id"], seed=9, num_inference_steps=2, **fields)
        status, job = server.ask("POST", "/v1/videos/extensions", body)
        assert status == 200 and (job["extends"], job["from_frame"]) == (clip_before["id"], origin), job
        assert (job["num_frames"], job["fps"], job["seconds"], job["steps"]) == (count, 5, f"{count / 5:g}", steps)
        told = [data for _, event, data in events(server, job["id"], "frames") if event == "frame"]
        new = [np.asarray(Image.open(io.BytesIO(base64.b64decode(data["png"])))) for data in told]
        settings = {"num_frames": fields["num_frames"]} if "num_frames" in fields else {}
        np.testing.assert_array_equal(np.stack(new), followed(tiny_bundle, shown[origin], **settings))
        done = server.wait(job["id"])
        assert done["status"] == "completed" and done["steps_done"] == steps
        clip_before, shown = done, frames_of(server.ask("GET", f"/v1/videos/{job['id']}/content")[1])
        assert len(shown) == count


def test_what_goes_on_outlives_the_clip_before(server):
    clip_before = server.wait(server.create(num_inference_steps=1)["id"])
    blocker = server.create(**LONG)
    _, job = server.ask("POST", "/v1/videos/extensions", extension(clip_before["id"]))
    server.ask("DELETE", f"/v1/videos/{clip_before['id']}")
    server.ask("DELETE", f"/v1/videos/{blocker['id']}")
    assert server.wait(job["id"])["status"] == "completed"


NO_EXTENSION = [
    ({"prompt": ""}, "prompt"),
    ({"video": None}, "video"),
    ({"video": {"id": 3}}, "video"),
    ({"video": {}}, "video"),
    ({"from_frame": 5}, "from_frame"),
    ({"from_frame": -1}, "from_frame"),
    ({"num_frames": 0}, "num_frames"),
    ({"num_frames": 257}, "num_frames"),
    ({"seconds": "0.3"}, "seconds"),
    ({"size": "144x96"}, "size"),
    ({"model": "other"}, "model"),
    ({"num_inference_steps": 1001}, "num_inference_steps"),
    ({"path": [[0.3, 0.5], [0.6, 0.25]]}, "path"),
    ({"fit": "crop"}, "fit"),
    ({"input_reference": clip()["input_reference"]}, "input_reference"),
]


def test_what_cannot_go_on(server):
    clip_before = server.wait(server.create(num_inference_steps=1)["id"])
    for fields, param in NO_EXTENSION:
        body = extension(clip_before["id"]) | fields
        status, found, message = error_of(server.ask("POST", "/v1/videos/extensions", body))
        assert (status, found) == (400, param) and "found" in message and "expected" in message, fields
    assert error_of(server.ask("POST", "/v1/videos/extensions", extension("video_0")))[:2] == (404, "video")
    larger = server.wait(server.create(num_inference_steps=1, size="144x96")["id"])
    assert error_of(server.ask("POST", "/v1/videos/extensions", extension(larger["id"])))[:2] == (400, "video")
    unfinished = server.create(**LONG)
    status, answer = server.ask("POST", "/v1/videos/extensions", extension(unfinished["id"]))
    assert (status, answer["error"]["param"], answer["error"]["code"]) == (409, "video", "not_ready")
    server.ask("DELETE", f"/v1/videos/{unfinished['id']}")


def test_a_clip_along_a_path(steered_export, tmp_path):
    path = [[0.3, 0.5], [0.6, 0.25]]
    with running(steered_export.bundle, tmp_path / "data") as server:
        (model,) = server.ask("GET", "/v1/models")[1]["data"]
        assert model["steered"] is True
        jobs = [
            server.ask("POST", "/v1/videos", clip(seed=7, num_inference_steps=2, **fields))[1]
            for fields in ({"path": path}, {"path": path, "control_scale": 0}, {})
        ]
        assert [job["path"] for job in jobs] == [path, path, None]
        assert [server.wait(job["id"])["status"] for job in jobs] == ["completed"] * 3
        contents = [server.ask("GET", f"/v1/videos/{job['id']}/content")[1] for job in jobs]
    assert contents[0] != contents[1] == contents[2]


def test_a_form(server):
    fields = {"prompt": "ein roter Ball", "seed": "18446744073709551615", "guidance_interval": "0.1,0.9"}
    boundary = "b0undary"
    parts = [f'--{boundary}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in fields.items()]
    name = 'Content-Disposition: form-data; name="input_reference"; filename="../../etc/p.png"'
    body = "".join(parts).encode() + f"--{boundary}\r\n{name}\r\n\r\n".encode() + picture()
    request = urllib.request.Request(server.url + "/v1/videos", body + f"\r\n--{boundary}--\r\n".encode())
    request.add_header("content-type", f"multipart/form-data; boundary={boundary}")
    with urllib.request.urlopen(request) as response:
        job = json.load(response)
    assert job["seed"] == 2**64 - 1 and server.wait(job["id"])["status"] == "completed"


def test_events(server):
    job = server.create(num_inference_steps=40)
    told = events(server, job["id"])
    names = [name for _, name, _ in told]
    assert names[-1] == "completed" and told[-1][2]["id"] == job["id"]
    steps = [data["steps_done"] for _, name, data in told if name == "step"]
    assert steps == list(range(steps[0], 41)) and names.count("completed") == 1
    ids = [int(id) for id, _, _ in told]
    assert ids == sorted(set(ids))
    assert [name for _, name, _ in events(server, job["id"])] == ["completed"]


def test_events_go_on_where_they_stopped(server):
    job = server.create(**LONG)
    with urllib.request.urlopen(f"{server.url}/v1/videos/{job['id']}/events", timeout=60) as response:
        while not (line := response.readline().decode()).startswith("id: 5"):
            assert line
    told = events(server, job["id"], headers={"Last-Event-ID": "5"})
    assert told[0][0] == "6" and told[-1][1] == "completed"


def test_frames_come_while_the_rest_is_decoded(server, tiny_bundle):
    blocker, job = server.create(num_inference_steps=300), server.create()
    told = events(server, job["id"], "frames")
    assert [name for _, name, _ in told] == ["frame"] * 5 + ["end"] and told[-1][2] == {"status": "completed"}
    assert [data["index"] for _, _, data in told[:5]] == list(range(5))
    live = [np.asarray(Image.open(io.BytesIO(base64.b64decode(data["png"])))) for _, _, data in told[:5]]
    with Animator(tiny_bundle) as animator:
        assert (animator(io.BytesIO(picture()), PROMPT, seed=job["seed"]).frames == live).all()
    later = events(server, job["id"], "frames")
    kept = [np.asarray(Image.open(io.BytesIO(base64.b64decode(data["png"])))) for _, _, data in later[:5]]
    _, mp4 = server.ask("GET", f"/v1/videos/{job['id']}/content")
    assert len(later) == 6 and np.array_equal(kept, frames_of(mp4))  # by then they are the video's
    server.wait(blocker["id"])


def test_the_same_seed_gives_the_same_clip(server):
    jobs = [server.create(seed=3) for _ in range(2)]
    first, second = (server.ask("GET", f"/v1/videos/{server.wait(job['id'])['id']}/content")[1] for job in jobs)
    assert first == second
    seeds = {server.wait(server.create()["id"])["seed"] for _ in range(3)}
    assert len(seeds) == 3


def test_pages(server):
    ids = [server.wait(server.create()["id"])["id"] for _ in range(3)]
    _, page = server.ask("GET", "/v1/videos?limit=2")
    assert [job["id"] for job in page["data"]] == ids[:0:-1] and page["has_more"] and page["object"] == "list"
    assert (page["first_id"], page["last_id"]) == (ids[2], ids[1])
    _, page = server.ask("GET", f"/v1/videos?limit=1&after={ids[1]}")
    assert [job["id"] for job in page["data"]] == ids[:1]
    _, page = server.ask("GET", f"/v1/videos?order=asc&after={ids[0]}&limit=100")
    assert [job["id"] for job in page["data"]] == ids[1:] and not page["has_more"]
    assert error_of(server.ask("GET", "/v1/videos?after=video_0"))[:2] == (404, "after")


def test_a_job_that_is_not_finished_has_no_content(server):
    job = server.create(**LONG)
    status, _, message = error_of(server.ask("GET", f"/v1/videos/{job['id']}/content"))
    assert status == 409 and "expected it completed" in message
    assert server.ask("DELETE", f"/v1/videos/{job['id']}")[1]["deleted"] is True
    assert server.ask("GET", f"/v1/videos/{job['id']}")[0] == 404


def test_cancel_keeps_the_job(server):
    job = server.create(**LONG)
    server.wait(job["id"], "in_progress")
    status, cancelled = server.ask("POST", f"/v1/videos/{job['id']}/cancel")
    assert status == 200 and cancelled["status"] == "cancelled"
    assert error_of(server.ask("POST", f"/v1/videos/{job['id']}/cancel"))[0] == 409
    assert [name for _, name, _ in events(server, job["id"])] == ["cancelled"]


def test_the_queue_is_bounded(server):
    running_job = server.create(**LONG)
    server.wait(running_job["id"], "in_progress")
    waiting = [server.create() for _ in range(3)]
    assert waiting[0]["queue"]["position"] == 0
    request = urllib.request.Request(server.url + "/v1/videos", json.dumps(clip()).encode())
    request.add_header("content-type", "application/json")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 429 and int(refused.value.headers["retry-after"]) >= 1
    server.ask("DELETE", f"/v1/videos/{running_job['id']}")
    assert {server.wait(job["id"])["status"] for job in waiting} == {"completed"}


def test_an_idempotency_key(server):
    key = {"Idempotency-Key": "k1"}
    first, second = (server.ask("POST", "/v1/videos", clip(), key)[1]["id"] for _ in range(2))
    assert first == second  # though no seed was named
    status, param, _ = error_of(server.ask("POST", "/v1/videos", clip(prompt="another"), key))
    assert (status, param) == (409, "idempotency_key")


def test_sync(server):
    status, mp4 = server.ask("POST", "/v1/videos/sync", clip(seed=1))
    assert status == 200 and len(frames_of(mp4)) == 5


def test_who_hangs_up_cancels(server):
    body = json.dumps(clip(**LONG)).encode()
    head = "POST /v1/videos/sync HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(body)}"
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        while server.ask("GET", "/v1/videos?limit=1")[1]["data"][0]["status"] != "in_progress":
            time.sleep(0.01)
    assert server.wait(server.ask("GET", "/v1/videos?limit=1")[1]["data"][0]["id"])["status"] == "cancelled"


REFUSED = [
    ({"prompt": " "}, "prompt"),
    ({"prompt": "x" * 2001}, "prompt"),
    ({"prompt": "\ud800"}, None),
    ({"prompt": 3}, "prompt"),
    ({"negative_prompt": "x" * 2001}, "negative_prompt"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"speed": "quick"}, "speed"),
    ({"solver": "euler"}, "solver"),
    ({"num_inference_steps": 1001}, "num_inference_steps"),
    ({"num_inference_steps": 0}, "num_inference_steps"),
    ({"guidance_scale": 101}, "guidance_scale"),
    ({"guidance_interval": [0.9, 0.1]}, "guidance_interval"),
    ({"guidance_interval": [0.9]}, "guidance_interval"),
    ({"feature_reuse": 0}, "feature_reuse"),
    ({"fit": "stretch"}, "fit"),
    ({"fps": 0}, "fps"),
    ({"size": "64x64"}, "size"),
    ({"size": "24x16"}, "size"),
    ({"size": "large"}, "size"),
    ({"size": "7680x5120"}, "size"),
    ({"path": [[0.3, 0.5], [0.6, 0.25]]}, "path"),
    ({"path": [[0.3, 0.5], [0.6, 2]]}, "path"),
    ({"path": [[0.3, 0.5]]}, "path"),
    ({"path": "right"}, "path"),
    ({"control_scale": 11}, "control_scale"),
    ({"control_guidance_start": 0.5, "control_guidance_end": 0.2}, "control_guidance_end"),
    ({"num_frames": 4}, "num_frames"),
    ({"num_frames": 257}, "num_frames"),
    ({"seconds": "0.5"}, "seconds"),
    ({"seconds": "1.03"}, "seconds"),
    ({"seconds": "1.5", "num_frames": 11}, "seconds"),
    ({"seconds": "40"}, "seconds"),
    ({"seconds": "1e300"}, "seconds"),
    ({"seconds": "nan"}, "seconds"),
    ({"seconds": "long"}, "seconds"),
    ({"color": "red"}, "color"),
    ({"input_reference": None}, "input_reference"),
    ({"input_reference": {"file_id": "file-1"}}, "input_reference"),
    ({"input_reference": {"image_url": "https://example.com/a.png"}}, "input_reference"),
    ({"input_reference": {"image_url": "file:///etc/passwd"}}, "input_reference"),
    ({"input_reference": {"image_url": "data:image/png;base64,ä"}}, "input_reference"),
    ({"input_reference": {"image_url": "data:image/png;base64,"}}, "input_reference"),
    ({"input_reference": {"image_url": "data:image/png;base64,aGFsbG8="}}, "input_reference"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED)
def test_what_is_refused(server, fields, param):
    status, found, _ = error_of(server.ask("POST", "/v1/videos", clip(**fields)))
    assert (status, found) == (400, param)


def test_an_unknown_model(server):
    assert error_of(server.ask("POST", "/v1/videos", clip(model="sora-2")))[:2] == (404, "model")
    assert server.ask("GET", "/v1/models/tiny")[1]["id"] == "tiny" and server.ask("GET", "/v1/models/x")[0] == 404


def test_a_picture_of_too_many_pixels(tiny_bundle, tmp_path):

    (model,) = read_models([f"a={tiny_bundle}"], 1).values()
    file = io.BytesIO()
    Image.new("L", (1001, 1000)).save(file, "PNG")
    for limits in (Limits(megapixels=1), Limits(upload_bytes=100)):
        with pytest.raises(ApiError) as refused:
            new_job(ClipFields(prompt="a"), file.getvalue(), model, limits, "", None)
        assert refused.value.param == "input_reference" and refused.value.status in (400, 413)


def raw(server, head, body=b"", chunks=()):
    """The status that raw bytes get."""
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), 20) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
        try:
            for chunk in chunks:
                connection.sendall(b"%x\r\n%s\r\n" % (len(chunk), chunk))
        except OSError:
            pass  # it has seen enough
        return int(connection.makefile("rb").readline().split()[1])


def test_bodies_are_bounded_before_they_are_read(server):
    head = "POST /v1/videos HTTP/1.1\nhost: localhost\ncontent-type: application/json\n"
    assert raw(server, head + "content-length: 99999999999") == 413
    assert raw(server, head + "transfer-encoding: chunked", chunks=[b"x" * (1 << 20)] * 30) == 413


@pytest.mark.parametrize("header", ["content-length: O", "transfer-encoding: x", "no colon", "content-length: -1"])
def test_what_is_no_http(server, header):
    assert raw(server, f"POST /v1/videos HTTP/1.1\nhost: localhost\n{header}") in (400, 413, 415)
    assert server.ask("GET", "/healthz")[0] == 200


def test_other_hosts_and_other_sites(server):
    assert raw(server, "GET /v1/models HTTP/1.1\nhost: attacker.example") == 403
    assert raw(server, "GET /v1/models HTTP/1.1\nhost: [::1]:8000") == 200
    port = server.url.rpartition(":")[2]
    for header, status in (
        ("origin: http://attacker.example", 403),
        ("origin: null", 403),
        ("sec-fetch-site: cross-site", 403),
        ("sec-fetch-site: same-origin", 404),
        (f"origin: http://127.0.0.1:{port}", 404),
    ):
        head = f"DELETE /v1/videos/x HTTP/1.1\nhost: 127.0.0.1:{port}\n{header}"
        assert raw(server, head) == status


def test_headers_of_all_answers(server):
    for path in ("/", "/v1/models", "/page/page.js", "/docs", "/nowhere"):
        try:
            headers = urllib.request.urlopen(server.url + path).headers
        except urllib.error.HTTPError as error:
            headers = error.headers
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]


@pytest.mark.parametrize(
    "path",
    ["/page/../routes.py", "/page/%2e%2e/routes.py", "/page//etc/passwd", "/v1/videos/..%2f..%2fjobs.db/content"],
)
def test_no_path_leads_out(server, path):
    assert raw(server, f"GET {path} HTTP/1.1\nhost: localhost") == 404


def test_nothing_is_fetched_from_elsewhere(server):
    for path in ("/", "/docs", "/page/page.js", "/page/page.css"):
        text = urllib.request.urlopen(server.url + path).read().decode()
        assert "//cdn" not in text and "https://" not in text.replace("https://www.w3.org", "")


def test_metrics(server):
    assert server.wait(server.create()["id"])["status"] == "completed"
    _, text = server.ask("GET", "/metrics")
    assert b'trip_jobs_finished_total{model="tiny",state="completed"}' in text and b"trip_step_seconds_count" in text


KEYS = "alice aaaaaaaaaaaaaaaaaaaa\n# a comment\n\nbob bbbbbbbbbbbbbbbbbbbb\n"


def test_keys(tiny_bundle, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(KEYS, encoding="utf-8")
    alice, bob = ({"Authorization": f"Bearer {letter * 20}"} for letter in "ab")
    with running(tiny_bundle, tmp_path / "data", "--api-keys", str(keys), "--no-ui", "--no-metrics") as server:
        for headers in ({}, {"Authorization": "Bearer " + "c" * 20}, {"Authorization": "Basic " + "a" * 20}):
            assert error_of(server.ask("POST", "/v1/videos", clip(), headers))[0] == 401
            assert server.ask("GET", "/v1/models", headers=headers)[0] == 401
        assert server.ask("GET", "/healthz")[0] == 200 and server.ask("GET", "/readyz")[0] == 200
        _, job = server.ask("POST", "/v1/videos", clip(), alice)
        for method, rest in (("GET", ""), ("GET", "/content"), ("GET", "/events"), ("DELETE", ""), ("POST", "/cancel")):
            assert server.ask(method, f"/v1/videos/{job['id']}{rest}", headers=bob)[0] == 404
        assert server.ask("GET", "/v1/videos", headers=bob)[1]["data"] == []
        assert server.ask("POST", "/v1/videos/extensions", extension(job["id"]), bob)[0] == 404
        assert [each["id"] for each in server.ask("GET", "/v1/videos", headers=alice)[1]["data"]] == [job["id"]]
        assert server.ask("GET", "/metrics", headers=alice)[0] == 404 and server.ask("GET", "/")[0] == 404
        assert "a" * 20 not in server.log and PROMPT not in server.log


def test_several_models(tiny_bundle, tmp_path):
    with running(f"one={tiny_bundle}", tmp_path / "data", f"two={tiny_bundle}", "--workers", "2") as server:
        assert len(server.workers()) == 4
        jobs = [server.create(model=name, seed=5) for name in ("one", "two")]
        first, second = (server.ask("GET", f"/v1/videos/{server.wait(job['id'])['id']}/content")[1] for job in jobs)
        assert first == second and server.create()["model"] == "one"


def test_many_at_once(server):
    """Three threads ask, list and listen; all clips are made."""
    found = []

    def ask():
        for _ in range(5):
            status, job = server.ask("POST", "/v1/videos", clip())
            if status == 429:
                time.sleep(0.1)
                continue
            assert events(server, job["id"])[-1][1] == "completed"
            found.append(job["id"])

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) >= 5 and len(set(found)) == len(found)
