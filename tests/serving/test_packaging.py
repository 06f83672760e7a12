"""The image, the compose file and the systemd unit, as far as they can be checked without Docker and systemd."""

from __future__ import annotations

import fnmatch
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from configparser import RawConfigParser
from pathlib import Path

import pytest
import yaml
from server import ROOT

from trip_rt.serving.command import build_parser

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]["trip"]
IGNORED = [
    line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] not in ("#", "")
]


def instructions(name, stage=-1):
    """What the instructions of that name say, in one stage of the Dockerfile."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    stages = re.split(r"^(?=FROM )", text, flags=re.MULTILINE)[1:]
    assert len(stages) == 2
    return re.findall(rf"^{name} (.*)$", stages[stage], re.MULTILINE)


def is_sent(path):
    """Whether a file of the repository reaches the builder: the last rule that matches it decides."""
    sent = True
    for rule in IGNORED:
        pattern = rule.removeprefix("!")
        parents = [path, *map(str, Path(path).parents)]
        if pattern.startswith("**/"):
            hit = any(fnmatch.fnmatch(part, pattern[3:]) for part in path.split("/"))
        else:
            hit = any(fnmatch.fnmatch(parent, pattern) for parent in parents)
        if hit:
            sent = rule.startswith("!")
    return sent


def copied():
    """Sources and destination of each COPY from the repository."""
    return [words.split() for words in instructions("COPY", 0)]


def served(arguments):
    """What trip-serve takes these arguments for."""
    return build_parser().parse_args(arguments)


def test_what_is_copied_is_there_and_is_sent():
    sources = [source for *sources, _ in copied() for source in sources]
    assert set(sources) == {"pyproject.toml", "README.md", "LICENSE", "requirements/constraints.txt", "trip_rt"}
    for source in sources:
        path = ROOT / source
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        assert files
        for file in files:
            assert is_sent(str(file.relative_to(ROOT))) == ("__pycache__" not in file.parts), file


def test_nothing_else_is_sent():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    sources = tuple(source for *sources, _ in copied() for source in sources)
    sent = [path for path in tracked if path and is_sent(path)]
    assert len(sent) > 30 and all(path.startswith(sources) for path in sent)
    assert not is_sent("api-keys.txt") and not is_sent("trip-serve-data/jobs.db") and not is_sent(".git/config")


def test_the_image():
    assert [line.split()[0] for line in instructions("FROM")] == ["python:3.12-slim"]
    assert instructions("USER") == ["10001"] and "--uid 10001" in instructions("RUN")[0]
    assert instructions("VOLUME") == ["/data"] and instructions("EXPOSE") == ["8000"]
    assert instructions("COPY") == ["--from=build /opt/trip /opt/trip"]
    (install,) = instructions("RUN", 0)
    assert "-c requirements/constraints.txt '.[serve]'" in install and "uninstall --yes pip" in install
    entry, command = json.loads(instructions("ENTRYPOINT")[0]), json.loads(instructions("CMD")[0])
    assert entry[0] == "/opt/trip/bin/trip-serve"
    args = served([*entry[1:], *command])
    assert (args.host, args.port, str(args.data), args.bundles) == ("0.0.0.0", 8000, "/data", ["/bundle"])


def test_the_compose_file():
    assert COMPOSE["read_only"] is True and COMPOSE["cap_drop"] == ["ALL"] and "privileged" not in COMPOSE
    assert COMPOSE["security_opt"] == ["no-new-privileges:true"] and COMPOSE["tmpfs"][0].startswith("/tmp:")
    assert "user" not in COMPOSE  # the image's own
    mounts = [volume.split(":") for volume in COMPOSE["volumes"]]
    assert ["./out/demo-bundle", "/bundle", "ro"] in mounts and ["data", "/data"] in mounts
    whole = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    assert set(whole["volumes"]) == {"data"} and set(COMPOSE["secrets"]) == set(whole["secrets"])
    args = served([*json.loads(instructions("ENTRYPOINT")[0])[1:], *COMPOSE["command"]])
    assert args.bundles == ["demo=/bundle"] and str(args.api_keys) == f"/run/secrets/{COMPOSE['secrets'][0]}"
    assert COMPOSE["ports"] == [f"127.0.0.1:{args.port}:{args.port}"]
    assert float(COMPOSE["stop_grace_period"].removesuffix("s")) > args.grace + 5


def unit():
    """The unit of docs/serving.md, and its text."""
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^```ini\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    parser = RawConfigParser(strict=True)
    parser.optionxform = str
    parser.read_string(text)
    return parser["Service"], text


def test_the_systemd_unit():
    service, _ = unit()
    program, *arguments = shlex.split(service["ExecStart"])
    args = served(arguments)
    assert program.endswith("/trip-serve") and args.bundles == ["demo=/srv/demo-bundle"]
    assert str(args.data) == f"/var/lib/{service['StateDirectory']}"
    assert str(args.api_keys) == "%d/" + service["LoadCredential"].split(":")[0]
    assert service["SuccessExitStatus"] == "143" and service["Restart"] == "on-failure"
    assert float(service["TimeoutStopSec"]) > args.grace + 5 and service["DynamicUser"] == "yes"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze")
def test_systemd_takes_the_unit(tmp_path):
    path = tmp_path / "trip.service"
    path.write_text(unit()[1].replace("/opt/trip/bin/trip-serve", sys.executable), encoding="utf-8")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(path)], capture_output=True, text=True, timeout=60
    )
    assert "trip.service" not in done.stderr and done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_image_s_own_installation(both_backends, tmp_path):
    """The pip line of the Dockerfile, on a copy of what it copies, in an environment of its own: no torch, and the
    server starts there and passes the health check."""
    source, place = tmp_path / "source", tmp_path / "trip"
    for *sources, target in copied():
        for each in sources:
            (source / target).mkdir(parents=True, exist_ok=True)
            if (ROOT / each).is_dir():
                shutil.copytree(ROOT / each, source / target, dirs_exist_ok=True)
            else:
                shutil.copy(ROOT / each, source / target)
    (lines,) = instructions("RUN", 0)
    lines = lines.replace("/opt/trip", str(place)).replace("python -m venv", f"{sys.executable} -m venv")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(["bash", "-euc", lines], cwd=source, env=environment, check=True, timeout=600, capture_output=True)
    python = str(place / "bin" / "python")
    look = (
        "import importlib.metadata as m, json;"
        "print(json.dumps({d.name.lower().replace('_', '-'): d.version for d in m.distributions()}))"
    )
    there = json.loads(subprocess.run([python, "-c", look], capture_output=True, text=True, check=True).stdout)
    assert {"trip-rt", "openvino", "fastapi", "uvicorn"} <= set(there)
    assert not {"torch", "triton", "diffusers", "transformers", "onnx", "pip"} & set(there)
    for name in ("fastapi", "sqlalchemy", "numpy", "openvino"):
        assert there[name] == importlib.metadata.version(name), name
    serve = str(place / "bin" / "trip-serve")
    helped = subprocess.run(
        [serve, "--help"], capture_output=True, text=True, cwd=tmp_path, env=environment, check=True
    )
    assert "--api-keys" in helped.stdout
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [serve, f"tiny={both_backends}", "--data", str(tmp_path / "data"), "--port", "0"],
            stderr=log,
            cwd=tmp_path,
            env=environment,
        )
    try:
        until = time.monotonic() + 60
        while "ready after" not in (said := (tmp_path / "log").read_text()):
            assert time.monotonic() < until and server.poll() is None, said
            time.sleep(0.1)
        (address,) = re.findall(r"listening at (\S+)", said)
        _, *words = json.loads(instructions("HEALTHCHECK")[0].split("CMD ")[1])
        check = [python, *(word.replace("http://127.0.0.1:8000", address) for word in words)]
        assert subprocess.run(check, timeout=20).returncode == 0
        for path in ("/", "/docs", "/page/page.js", "/page/examples/heart.png"):
            assert urllib.request.urlopen(address + path).status == 200
    finally:
        server.send_signal(signal.SIGTERM)
        stopped = server.wait(60)
    assert stopped == 143
    assert subprocess.run(check, capture_output=True).returncode != 0  # unhealthy once it is gone
