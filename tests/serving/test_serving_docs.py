"""docs/serving.md: its examples run as they stand, and its tables name what there is."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import av
import pytest
from PIL import Image
from server import ROOT, picture, running

from trip_rt.serving import schemas
from trip_rt.serving.clip_request import ClipJSON, Limits
from trip_rt.serving.command import build_parser
from trip_rt.serving.metrics import Metrics

PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"


def block(language):
    """The one fenced block of that language."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return found


def section(title):
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def named(title, column=0):
    """What is set as code in a column of the first table of a section, in its order."""
    rows = [line.split("|")[1:-1] for line in section(title).splitlines() if line.startswith("| ")]
    return [name for row in rows[1:] for name in re.findall(r"`([^`]+)`", row[column])]


@pytest.fixture(scope="module")
def server(tiny_bundle, tmp_path_factory):
    data = tmp_path_factory.mktemp("served") / "data"
    with running(tiny_bundle, data, "--allow-host", "video.example.org") as server:
        yield server


def run(server, command, code, folder):
    """What the example prints, in a folder with a picture."""
    assert ADDRESS in code
    (folder / "photo.png").write_bytes(picture())
    script = code.replace(ADDRESS, server.url)
    done = subprocess.run([*command, script], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def frames_in(path):
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_the_lines_for_a_shell(server, tmp_path):
    said = run(server, ["bash", "-euo", "pipefail", "-c"], block("bash"), tmp_path)
    job = json.loads((tmp_path / "job.json").read_text())
    assert job["prompt"] == "a blue heart grows" and job["status"] == "queued"
    told = re.findall(r"^event: (\w+)$", said, re.MULTILINE)
    assert told[-1] == "completed" and told.count("completed") == 1
    assert said.endswith(
        json.dumps({"id": job["id"], "object": "video.deleted", "deleted": True}, separators=(",", ":"))
    )
    with Image.open(tmp_path / "frames.jpg") as sheet:
        assert sheet.format == "JPEG" and sheet.size == (144, 64)
    assert frames_in(tmp_path / "clip.mp4") == 5
    second = json.loads((tmp_path / "second.json").read_text())
    assert second["prompt"] == "it spins" and server.wait(second["id"])["status"] == "completed"
    assert server.ask("GET", f"/v1/videos/{job['id']}")[0] == 404


def test_the_example_in_python(server, tmp_path):
    run(server, [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c"], block("python"), tmp_path)
    assert frames_in(tmp_path / "clip.mp4") == 5
    (newest,) = server.ask("GET", "/v1/videos?limit=1")[1]["data"]
    assert (newest["prompt"], newest["speed"], newest["seed"]) == ("a blue heart grows", "fast", 7)


def test_routes(server):
    paths = server.ask("GET", "/openapi.json")[1]["paths"]
    described = {f"{method.upper()} {path}" for path, operations in paths.items() for method in operations}
    assert set(named("Routes")) == described


def test_fields():
    assert sorted(named("A request")) == sorted(ClipJSON.model_fields)
    assert sorted(named("The job")) == sorted(schemas.Video.model_fields)


def test_figures():
    names = {family.name + ("_total" if family.type == "counter" else "") for family in Metrics()._registry.collect()}
    assert set(named("Figures for Prometheus")) == names


def test_errors(server):
    """Every status that is described is in the table, and every code in it is one of the server's own."""
    operations = [each for path in server.ask("GET", "/openapi.json")[1]["paths"].values() for each in path.values()]
    described = {status for operation in operations for status in operation["responses"] if status >= "400"}
    rows = [line.split("|")[1] for line in section("Errors").splitlines() if line.startswith("| ")][1:]
    listed = [status for row in rows for status in re.findall(r"\d{3}", row)]
    assert set(listed) == described | {"405"} and len(set(listed)) == len(listed)
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "trip_rt" / "serving").glob("*.py"))
    failures = section("The job").split("Codes of a failed job:")[1].split("While")[0]
    codes = named("Errors", 1) + re.findall(r"`(\w+)`", failures)
    assert all(f'"{code}"' in source for code in codes)
    assert set(codes) >= {
        word for words in re.findall(r'code="(\w+)"|Failure\("(\w+)"', source) for word in words if word
    }


def test_options():
    """Every option in the text is one, and stands beside its default where a number follows."""
    actions = {name: action for action in build_parser()._actions for name in action.option_strings}
    for name, number in re.findall(r"(--[a-z][a-z-]*)(?:` ([0-9.]+))?", PAGE):
        assert name in actions, name
        if number:
            assert actions[name].default == float(number), (name, number)


def test_the_proxy_lets_every_body_through():
    (megabytes,) = re.findall(r"client_max_body_size (\d+)m;", PAGE)
    assert int(megabytes) << 20 >= Limits().body_bytes


def test_what_the_proxy_asks_for(server):
    """A page's request by way of the proxy, as the server sees it: by the proxy's name, from this origin."""
    (name,) = re.findall(r"`--allow-host (\S+)`", PAGE)
    for headers, status in (
        ({"Host": name, "Origin": f"https://{name}", "Sec-Fetch-Site": "same-origin"}, 404),
        ({"Host": name, "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Host": name, "Origin": "https://clips.example"}, 403),
        ({"Host": "clips.example", "Origin": "https://clips.example"}, 403),
    ):
        assert server.ask("DELETE", "/v1/videos/video_0", headers=headers)[0] == status, headers


def test_it_stays_short():
    prose = [line for line in PAGE.splitlines() if not line.startswith("|")]
    assert len(PAGE.splitlines()) <= 300 and max(map(len, prose)) <= 110
