"""What clients send to `trip-serve`: bodies of requests for a clip, and the file of API keys."""

import asyncio
import base64
import io
import json

import numpy as np
import pytest
from fuzzing import damaged, fuzz_area, mutated_json
from hypothesis import strategies as st
from PIL import Image
from server import clip, picture

from trip_rt.errors import InputError
from trip_rt.serving.api_keys import ApiKeys, read_keys
from trip_rt.serving.clip_request import Limits
from trip_rt.serving.models import read_models
from trip_rt.serving.routes import create_app
from trip_rt.serving.service import NoRoom
from trip_rt.settings import Settings

FIELDS = {
    "speed": "fast",
    "seed": 7,
    "fps": 8,
    "num_inference_steps": 9,
    "guidance_interval": [0.1, 0.9],
    "fit": "crop",
}
HEAD = b'--b\r\nContent-Disposition: form-data; name="'
FORM = (
    HEAD
    + b'prompt"\r\n\r\na ball rolls\r\n'
    + HEAD
    + b'seed"\r\n\r\n7\r\n'
    + HEAD
    + b'input_reference"; filename="p.png"\r\nContent-Type: image/png\r\n\r\n'
    + picture()
    + b"\r\n--b--\r\n"
)


class Taker:
    """Stands in for the service: keeps what it is asked to add, and has no room for it."""

    def __init__(self, models):
        self.models, self.taken = models, []

    async def add(self, new):
        self.taken.append(new)
        raise NoRoom


async def answer(app, kind, chunks):
    """Status and body of the answer to a request that arrives in these chunks."""
    scope = {"type": "http", "method": "POST", "path": "/v1/videos", "raw_path": b"/v1/videos", "query_string": b""}
    scope |= {"headers": [(b"content-type", kind), (b"host", b"localhost")], "http_version": "1.1", "scheme": "http"}
    waiting = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    waiting.append({"type": "http.request", "body": b"", "more_body": False})
    sent = []

    async def receive():
        return waiting.pop(0) if waiting else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    await app(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


@pytest.mark.filterwarnings("ignore")
@fuzz_area("requests to the server", quick=80, full=3000)
def test_requests(fuzz, tiny_bundle):
    models = read_models([f"tiny={tiny_bundle}"], 1)
    service, limits = Taker(models), Limits()
    app, model = create_app(service, limits, ApiKeys()), models["tiny"]

    def ask(drawn):
        kind, body, cut = drawn
        service.taken.clear()
        chunks = [body[:cut], body[cut:]]
        status, said = asyncio.run(answer(app, kind, chunks))
        error = json.loads(said)["error"]
        if not service.taken:
            assert 400 <= status < 500, (status, error)
            raise InputError(error["message"])
        (new,) = service.taken
        request = json.loads(json.dumps(new.request))  # as the store gives it back
        assert status == 507 and 1 <= new.steps <= limits.steps
        assert request["prompt"].strip() and 0 <= request["seed"] < 2**64 and request["fps"] > 0
        assert len(Settings(**request["settings"]).steps(model.config)) == new.steps
        pixels = np.asarray(Image.open(io.BytesIO(new.picture)))
        assert pixels.shape == (model.config.height, model.config.width, 3)

    cuts = st.integers(0, 400)
    as_json = st.tuples(st.just(b"application/json"), mutated_json([clip(**FIELDS)]), cuts)
    as_form = st.tuples(st.just(b"multipart/form-data; boundary=b"), damaged([FORM]), cuts)
    url = base64.b64encode(picture()).decode()
    strings = st.text(max_size=12).map(
        lambda text: json.dumps({"prompt": text, "input_reference": f"data:;base64,{url}"})
    )
    other = st.sampled_from([b"", b"text/plain", b"multipart/form-data", b"application/json; charset=latin-1"])
    as_other = st.tuples(other | st.binary(max_size=20), damaged([FORM]), cuts)
    texts = st.tuples(st.just(b"application/json"), strings.map(str.encode), cuts)
    fuzz(as_json | as_form | as_other | texts, ask)


@fuzz_area("files of API keys", quick=20, full=500)
def test_api_keys(fuzz, tmp_path):
    def read(data):
        (tmp_path / "keys").write_bytes(data)
        keys = read_keys(tmp_path / "keys")
        assert keys.required

    fuzz(damaged([b"alice aaaaaaaaaaaaaaaaaaaaaa\n# two\nbob bbbbbbbbbbbbbbbbbbbbbbbb\n"]), read, folder=tmp_path)
