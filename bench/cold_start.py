"""A process of its own that makes one clip and prints, as JSON, when it got how far and how much memory it took: bench/latency.py starts it.

    python bench/cold_start.py STARTED runtime BUNDLE BACKEND SPEED PICTURE PROMPT
    python bench/cold_start.py STARTED pytorch CHECKPOINT STEPS

STARTED is the clock's (time.monotonic) reading just before the process was started.
"""

from __future__ import annotations

import json
import sys
import time

MILESTONES = ("import", "open", "first step", "first frame", "clip")


def runtime(passed: dict[str, float], clock: float, bundle: str, backend: str, speed: str, picture: str, prompt: str) -> None:
    from trip_rt import Animator

    passed["import"] = time.monotonic() - clock
    with Animator(bundle, backend) as animator:
        passed["open"] = time.monotonic() - clock

        def on_step(done: int, total: int) -> None:
            passed.setdefault("first step", time.monotonic() - clock)

        for _ in animator.stream(picture, prompt, speed=speed, on_step=on_step):
            passed.setdefault("first frame", time.monotonic() - clock)
    passed["clip"] = time.monotonic() - clock


def pytorch(passed: dict[str, float], clock: float, folder: str, steps: str) -> None:
    import torch

    from trip_reference import checkpoint
    from trip_reference.sampling import sample
    from trip_rt.speed import Speed, loop_steps

    model = checkpoint.from_pretrained(folder)
    config = model.config
    with torch.inference_mode():
        text = model.encode_text(torch.ones(2, config.text_length, dtype=torch.long))
        first_frame = model.encode_image(torch.zeros(1, 3, config.height, config.width))
        noise = torch.randn(1, config.latent_channels, config.num_frames, config.latent_height, config.latent_width)
        latents = sample(model, first_frame, noise, text, loop_steps(config, Speed(num_inference_steps=int(steps))))
        model.decode(latents[0].transpose(0, 1))
    passed["clip"] = time.monotonic() - clock


if __name__ == "__main__":
    started, what, *rest = sys.argv[1:]
    milestones: dict[str, float] = {}
    {"runtime": runtime, "pytorch": pytorch}[what](milestones, float(started), *rest)
    from timing import peak_memory_mb

    print(json.dumps({"seconds": milestones, "peak_memory_mb": peak_memory_mb()}))
