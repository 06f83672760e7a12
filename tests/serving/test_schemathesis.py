"""The server holds to its own description: requests that Schemathesis makes from /openapi.json, valid and invalid ones,
get the statuses, content types and bodies that are described there."""

from __future__ import annotations

import base64
import collections
import json
import re

import hypothesis
import pytest
import requests
import schemathesis
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from server import HOSTS, PROMPT, picture, running

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
OPERATIONS = 15
NO_INPUT = {"GET /v1/models", "GET /healthz", "GET /readyz", "GET /metrics"}
# Those that have more than a name in their path, which no text contradicts.
CAN_BE_WRONG = {
    "POST /v1/videos",
    "POST /v1/videos/sync",
    "POST /v1/videos/extensions",
    "GET /v1/videos",
    "GET /v1/videos/{video_id}/content",
    "GET /v1/videos/{video_id}/events",
}
KINDS = {"multipart/form-data": " as a form", "application/json": " as JSON"}
SLOWEST_S = 20
# With a made-up value of one of these a message is no HTTP, and uvicorn answers before the application is asked
# (test_api.py). Hypothesis draws names from the modules that are loaded, so that they come up in some runs alone.
FRAMING = ("connection", "content-length", "expect", "host", "transfer-encoding", "upgrade")
# What these need to succeed is more than a description of types says.
GOOD_FIELDS = {
    "model": st.sampled_from(["tiny"]),
    "seed": st.integers(0, 2**64 - 1),
    "speed": st.sampled_from(["exact", "balanced", "fast"]),
    "solver": st.sampled_from(["ddim", "dpm++", "unipc"]),
    "guidance_scale": st.floats(0, 100),
    "feature_reuse": st.integers(1, 3),
    "negative_prompt": st.text(max_size=20).filter(str.isprintable),
    "fit": st.sampled_from(["crop", "letterbox"]),
    "size": st.just("48x32"),
    "num_frames": st.just(5),
}
GOOD_BODIES = st.fixed_dictionaries({"num_inference_steps": st.integers(1, 3)}, optional=GOOD_FIELDS)
PNG = picture()
DATA_URL = "data:image/png;base64," + base64.b64encode(PNG).decode()


class Jobs:
    """Finished ones, for requests that name one."""

    def __init__(self, server):
        self._server, self._ids = server, []

    def one(self, which):
        """The id of one of three."""
        while len(self._ids) < 3:
            self._ids.append(self._server.wait(self._server.create(num_inference_steps=1)["id"])["id"])
        return self._ids[which]

    def forget(self, id):
        if id in self._ids:
            self._ids.remove(id)


@pytest.fixture(scope="module", params=HOSTS)
def server(tiny_bundle, tmp_path_factory, request):
    data = tmp_path_factory.mktemp("served") / "data"
    with running(tiny_bundle, data, "--max-steps", "20", *request.param) as server:
        yield server


def ask_all(server, each, fewest):
    """`each` requests of every operation that has an input, half of them valid; how often which status came."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    jobs, counts = Jobs(server), collections.Counter()
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == OPERATIONS
    with requests.Session() as session:
        for operation in operations:
            modes = list(GenerationMode) if operation.label in CAN_BE_WRONG else [GenerationMode.POSITIVE]
            most = 2 if operation.label in NO_INPUT else each // len(modes)
            for mode in modes:
                ask(operation.as_strategy(generation_mode=mode), most, jobs, session, counts)
    assert counts.total() >= fewest, counts
    return counts


def ask(strategy, most, jobs, session, counts):
    @hypothesis.seed(0)
    @hypothesis.settings(
        max_examples=most,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(
        case=strategy,
        which=st.sampled_from([None, 0, None, 1, None, 2]),
        good=st.none() | GOOD_BODIES,
        part=st.sampled_from([None, "bytes=10-19", "bytes=0-9", "bytes=99999999-", "bytes=-", "parts=1-2"]),
    )
    def one(case, which, good, part):
        label, named = case.operation.label, None
        if which is not None and "video_id" in case.path_parameters:
            named = case.path_parameters["video_id"] = jobs.one(which)
        elif which is not None and "model_id" in case.path_parameters:
            case.path_parameters["model_id"] = "tiny"
        elif good is not None and case.operation.body and case.media_type is not None:
            form = case.media_type == "multipart/form-data"
            if label.endswith("/extensions"):
                id = jobs.one(which or 0)
                begin = {"video[id]": id} if form else {"video": {"id": id}}
                good = {name: value for name, value in good.items() if name != "fit"}
            else:
                begin = {"input_reference": PNG if form else {"image_url": DATA_URL}}
            case.body = good | {"prompt": PROMPT} | begin
        if part is not None and label.endswith("/content"):
            case.headers["range"] = part
        for name in [name for name in case.headers if name.lower() in FRAMING]:
            del case.headers[name]
        response = case.call(session=session, timeout=SLOWEST_S)
        counts[label + KINDS.get(case.media_type, ""), response.status_code] += 1
        case.validate_response(response, checks=CHECKS)
        assert response.elapsed < SLOWEST_S
        if label.startswith("DELETE") and response.status_code == 200:
            jobs.forget(named)

    one()


SUCCEED = {
    ("POST /v1/videos as a form", 200),
    ("POST /v1/videos as JSON", 200),
    ("POST /v1/videos/sync as a form", 200),
    ("POST /v1/videos/sync as JSON", 200),
    ("POST /v1/videos/extensions as a form", 200),
    ("POST /v1/videos/extensions as JSON", 200),
    ("GET /v1/videos", 200),
    ("GET /v1/videos/{video_id}", 200),
    ("GET /v1/videos/{video_id}/content", 200),
    ("GET /v1/videos/{video_id}/content", 206),
    ("GET /v1/videos/{video_id}/events", 200),
    ("GET /v1/videos/{video_id}/frames", 200),
    ("DELETE /v1/videos/{video_id}", 200),
    ("GET /v1/models", 200),
    ("GET /v1/models/{model_id}", 200),
    ("GET /healthz", 200),
    ("GET /readyz", 200),
    ("GET /metrics", 200),
}
REFUSE = {
    ("POST /v1/videos as a form", 400),
    ("POST /v1/videos as JSON", 400),
    ("POST /v1/videos/sync as a form", 400),
    ("POST /v1/videos/sync as JSON", 400),
    ("POST /v1/videos/extensions as a form", 400),
    ("POST /v1/videos/extensions as JSON", 400),
    ("GET /v1/videos", 400),
    ("GET /v1/videos", 404),
    ("GET /v1/videos/{video_id}", 404),
    ("GET /v1/videos/{video_id}/content", 400),
    ("GET /v1/videos/{video_id}/content", 416),
    ("GET /v1/videos/{video_id}/events", 404),
    ("GET /v1/videos/{video_id}/frames", 404),
    ("POST /v1/videos/{video_id}/cancel", 409),  # the jobs that are named are finished
    ("DELETE /v1/videos/{video_id}", 404),
    ("GET /v1/models/{model_id}", 404),
}


def test_the_description_is_whole(server):
    description = requests.get(f"{server.url}/openapi.json", timeout=SLOWEST_S).json()
    named = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(description)))
    assert named == set(description["components"]["schemas"])
    for operations in description["paths"].values():
        for operation in operations.values():
            assert "422" not in operation["responses"] and operation["description"]


def test_no_redirects(server):
    """A proxy's client could not follow one: the server does not know by what name it was asked for."""
    answer = requests.get(f"{server.url}/v1/videos/", timeout=SLOWEST_S, allow_redirects=False)
    assert answer.status_code == 404 and answer.json()["error"]["type"] == "not_found_error"


# What a sample may miss.
RARE = {("GET /v1/videos/{video_id}/content", 416)}


def test_a_sample(server):
    counts = ask_all(server, 32, 200)
    assert counts.keys() >= SUCCEED | REFUSE - RARE


@pytest.mark.slow
def test_two_thousand(server):
    counts = ask_all(server, 216, 2000)
    assert counts.keys() >= SUCCEED | REFUSE
