"""Jobs of the same settings are made together where the bundle's engines take several clips at a time."""

from __future__ import annotations

import io
import shutil

import pytest
from server import PROMPT, picture, running

from trip_export.export import ExportOptions, export_bundle
from trip_rt import Animator
from trip_rt.serving import results


@pytest.mark.slow
def test_jobs_are_made_together(tiny_checkpoint, tiny_bundle, tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    export_bundle(tiny_checkpoint, bundle, ExportOptions(batch=2, backends=("onnxruntime",), add=True, speedups=False))
    with running(f"two={bundle}@48x32-5f-b2", tmp_path / "data", "--max-steps", "1000") as server:
        long = server.create(num_inference_steps=900, seed=9)
        server.wait(long["id"], "in_progress")
        asked = [server.create(seed=seed, num_inference_steps=steps) for seed, steps in enumerate((3, 4, 3, 3, 4))]
        server.ask("DELETE", f"/v1/videos/{long['id']}")
        made = [server.wait(job["id"]) for job in asked]
        began = [job["stage_durations"]["denoise"] for job in made]
        # The first and the third, the second and the fifth; the fourth is alone.
        assert began[0] == began[2] and began[1] == began[4] and began[3] not in began[:3]
        with Animator(bundle, profile="48x32-5f-b2") as animator:
            for job in made:
                steps = job["num_inference_steps"]
                clip = animator(io.BytesIO(picture()), PROMPT, seed=job["seed"], num_inference_steps=steps)
                (tmp_path / "expected").mkdir(exist_ok=True)
                results.write(tmp_path / "expected", clip.frames, clip.fps)
                _, content = server.ask("GET", f"/v1/videos/{job['id']}/content?variant=spritesheet")
                assert content == (tmp_path / "expected" / "spritesheet.jpg").read_bytes()
