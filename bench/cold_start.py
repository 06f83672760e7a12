"""A process of its own that makes one clip and prints, as JSON, when it got how far and how much memory it took:
bench/latency.py starts it.

    python bench/cold_start.py STARTED THREADS runtime BUNDLE BACKEND PROFILE SPEED PICTURE PROMPT
    python bench/cold_start.py STARTED THREADS pytorch CHECKPOINT HEIGHT WIDTH STEPS

STARTED is the clock's (time.monotonic) reading just before the process was started; THREADS 0 leaves them to the
library.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time


def runtime(
    passed: dict[str, float],
    clock: float,
    threads: int,
    bundle: str,
    backend: str,
    profile: str,
    speed: str,
    picture: str,
    prompt: str,
) -> None:
    from trip_rt import Animator
    from trip_rt.backends import EngineOptions

    passed["import"] = time.monotonic() - clock
    with Animator(bundle, backend, profile, EngineOptions(device="cpu", threads=threads or None)) as animator:
        passed["open"] = time.monotonic() - clock

        def on_step(done: int, total: int) -> None:
            passed.setdefault("first step", time.monotonic() - clock)

        for _ in animator.stream(picture, prompt, speed=speed, on_step=on_step):
            passed.setdefault("first frame", time.monotonic() - clock)
    passed["clip"] = time.monotonic() - clock


def pytorch(
    passed: dict[str, float], clock: float, threads: int, folder: str, height: str, width: str, steps: str
) -> None:
    import torch

    from trip_reference import checkpoint
    from trip_reference.sampling import sample
    from trip_rt.settings import Settings

    if threads:
        torch.set_num_threads(threads)
    model = checkpoint.from_pretrained(folder)
    config = dataclasses.replace(model.config, height=int(height), width=int(width))
    with torch.inference_mode():
        text = model.encode_text(torch.ones(2, config.text_length, dtype=torch.long))
        first_frame = model.encode_image(torch.zeros(1, 3, config.height, config.width))
        noise = torch.randn(1, *config.latent_shape)
        latents = sample(model, first_frame, noise, text, Settings(num_inference_steps=int(steps)).steps(config))
        model.decode(latents[0].transpose(0, 1))
    passed["clip"] = time.monotonic() - clock


if __name__ == "__main__":
    started, number, what, *rest = sys.argv[1:]
    milestones: dict[str, float] = {}
    {"runtime": runtime, "pytorch": pytorch}[what](milestones, float(started), int(number), *rest)
    from trip_rt.process_memory import peak_memory_mb

    print(json.dumps({"seconds": milestones, "peak_memory_mb": peak_memory_mb()}))
