"""The application on a real Ray: the command, and what lost machines do to jobs."""

from __future__ import annotations

import os

import psutil
import pytest
from server import running

CLIP = {"seed": 7, "num_inference_steps": 3}


def test_the_command_serves_on_ray_and_ends_with_all_it_started(tiny_bundle, tmp_path):
    with running(tiny_bundle, tmp_path / "data", "--ray", "--threads", "1") as server:
        started = psutil.Process(server.process.pid).children(recursive=True)
        assert server.ask("GET", "/readyz") == (200, {"status": "ready", "workers": {"tiny": 1}})
        done = server.wait(server.create(**CLIP)["id"])
        assert done["status"] == "completed" and done["engine"]["backend"] == "onnxruntime"
        long = server.create(num_inference_steps=200)
        assert server.wait(long["id"], "in_progress")["status"] == "in_progress"
        assert server.ask("POST", f"/v1/videos/{long['id']}/cancel")[1]["status"] == "cancelled"
        status, _, content = server.exchange("GET", f"/v1/videos/{done['id']}/content")
        assert status == 200 and content[4:8] == b"ftyp"
        assert server.stop() == 143
    assert "Traceback" not in server.log and server.log.rstrip().endswith("terminated")
    _, left = psutil.wait_procs(started, 10)
    assert left == []
    (name,) = os.listdir(tmp_path / "data" / "clips")
    assert name == f"{done['id']}-1"


@pytest.mark.slow
def test_lost_machines_lose_no_job(tiny_bundle):
    from ray_serving import losses, served

    with served(tiny_bundle, 8766) as application:
        found = losses(application, count=100, kills=3)
    assert found["completed"] == 100 and found["begun_again"] > 0 and found["results_in_place"]
    assert found["listeners_that_heard_the_end"] == found["listeners"] and found["reconnections"] > 0
