"""What both training stages share: one seeded step at a time, resumable at any step, with averaged weights and a log."""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from trip_rt.errors import InputError


@dataclass(frozen=True)
class StageConfig:
    """How one stage trains: AdamW, linear warm-up, a cosine from `lr` to `final_lr · lr`, clipped gradients, averaged weights."""

    steps: int
    batch: int
    lr: float
    warmup: int = 100
    final_lr: float = 0.02
    weight_decay: float = 1e-2
    clip: float = 1.0
    ema_decay: float = 0.998
    save_every: int = 200
    log_every: int = 20

    def lr_at(self, step: int) -> float:
        """The learning rate of step 0 … steps − 1."""
        progress = step / max(self.steps, 1)
        cosine = self.final_lr + (1 - self.final_lr) * (0.5 + 0.5 * math.cos(math.pi * progress))
        return self.lr * min(1.0, (step + 1) / self.warmup) * cosine


def step_rngs(seed: int, step: int) -> tuple[np.random.Generator, torch.Generator]:
    """All of a step's randomness comes from (seed, step), so a resumed run draws what an undisturbed one would."""
    numpy_rng = np.random.default_rng([seed, step])
    return numpy_rng, torch.Generator().manual_seed(int(numpy_rng.integers(2**62)))


def run_stage(
    name: str,
    module: nn.Module,
    config: StageConfig,
    losses_of: Callable[[int], list[Callable[[], Tensor]]],
    folder: Path,
    inputs: str,
) -> nn.Module:
    """Train `module` for `config.steps` steps and return the average of its weights.

    `losses_of(step)` gives the step's loss as equal shards, to be computed side by side and averaged.
    State goes to `folder/<name>.safetensors` every `save_every` steps and at the end; a run that finds it there goes on from it and ends
    in the same bits as one that was never stopped. `inputs` stands for everything else the stage depends on (data, seed, architecture): state
    of other inputs is refused. The loss goes to `folder/<name>.jsonl`.
    """
    state_path, log_path = folder / f"{name}.safetensors", folder / f"{name}.jsonl"
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.99))
    average = copy.deepcopy(module).requires_grad_(False).eval()
    start, elapsed = 0, 0.0
    fingerprint = json.dumps([inputs, config.__dict__ | {"save_every": 0, "log_every": 0}], sort_keys=True)
    if state_path.exists():
        start, elapsed = _load_state(state_path, fingerprint, module, average, optimizer)
    module.train()
    began, losses = time.monotonic() - elapsed, []
    with tqdm(total=config.steps, initial=start, desc=name, unit="step", disable=None) as bar:
        for step in range(start, config.steps):
            for group in optimizer.param_groups:
                group["lr"] = config.lr_at(step)
            loss = _backward(losses_of(step), parameters)
            if not math.isfinite(loss):
                raise InputError(f"{name}, step {step + 1}: the loss is {loss}; train with a lower learning rate in a new folder")
            nn.utils.clip_grad_norm_(parameters, config.clip)
            optimizer.step()
            _average(average, module, min(config.ema_decay, (step + 1) / (step + 10)))
            losses.append(loss)
            bar.update()
            done = step + 1
            if done % config.log_every == 0 or done == config.steps:
                record = {"step": done, "loss": round(float(np.mean(losses)), 6), "seconds": round(time.monotonic() - began, 1)}
                bar.set_postfix(loss=record["loss"])
                losses = []
                with log_path.open("a", encoding="utf-8") as log:
                    log.write(json.dumps(record) + "\n")
            if done % config.save_every == 0 or done == config.steps:
                _save_state(state_path, fingerprint, done, time.monotonic() - began, module, average, optimizer)
    return average


def _backward(shards: list[Callable[[], Tensor]], parameters: list[nn.Parameter]) -> float:
    """Set the parameters' gradients to those of the shards' mean loss, which is returned.

    A single shard uses all of torch's threads. Several get one each: the demo's tensors are too small to keep several
    cores busy on one batch. The sum is in shard order, whoever ends first.
    """
    if len(shards) == 1:
        results = [_gradients(shards[0], parameters)]
    else:
        with ThreadPoolExecutor(len(shards), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            results = list(pool.map(lambda shard: _gradients(shard, parameters), shards))
    for parameter, *gradients in zip(parameters, *(gradients for _, gradients in results), strict=True):
        parameter.grad = sum(gradients[1:], gradients[0]) / len(shards)
    return sum(loss for loss, _ in results) / len(shards)


def _gradients(shard: Callable[[], Tensor], parameters: list[nn.Parameter]) -> tuple[float, tuple[Tensor, ...]]:
    loss = shard()
    return loss.item(), torch.autograd.grad(loss, parameters)


@torch.no_grad()
def _average(average: nn.Module, module: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - decay)


def _save_state(
    path: Path,
    fingerprint: str,
    step: int,
    elapsed: float,
    module: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    tensors = {f"module.{k}": v for k, v in module.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in average.state_dict().items()}
    for i, parameter in enumerate(optimizer.param_groups[0]["params"]):
        tensors |= {f"optimizer.{i}.{k}": v for k, v in optimizer.state[parameter].items()}
    # A copy each, of plain layout: safetensors stores neither shared nor channels-last tensors.
    tensors = {k: v.detach().contiguous().clone() for k, v in tensors.items()}
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(tensors, draft, metadata={"fingerprint": fingerprint, "step": str(step), "elapsed": str(elapsed)})
    os.replace(draft, path)


def _load_state(path: Path, fingerprint: str, module: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        if metadata["fingerprint"] != fingerprint:
            raise InputError(f"{path}: holds a run with other settings; resume with the settings it began with or choose another folder")
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 — it is no dict
    for prefix, target in (("module.", module), ("average.", average)):
        target.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    for i, parameter in enumerate(optimizer.param_groups[0]["params"]):
        prefix = f"optimizer.{i}."
        optimizer.state[parameter] = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return int(metadata["step"]), float(metadata["elapsed"])
