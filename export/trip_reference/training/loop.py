"""The training loop: one optimiser over one stretch of steps, on one process or many, by Accelerate."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from trip_reference.progress import Progress
from trip_reference.training.average import Average
from trip_reference.training.config import OptimizerConfig, RunConfig, lr_factor
from trip_reference.training.draws import seed_torch
from trip_reference.training.log import Log
from trip_reference.training.optimizer import build_optimizer
from trip_reference.training.state import Place, load_state, read_place, save_state, whole
from trip_rt.errors import InputError

Batch = dict[str, Any]


class Stopped(KeyboardInterrupt):
    """A signal came, and the run's state is saved."""

    def __init__(self, number: int, step: int):
        super().__init__(f"stopped after step {step}")
        self.signal, self.step = number, step


@dataclass(frozen=True)
class Stretch:
    """The steps `first` to `last` of a run (from 0, over all its stages), with a warm-up and a cosine of their own."""

    name: str
    first: int
    last: int
    warmup: int


@dataclass(frozen=True)
class Hook:
    """Something to do after every `every`th step and after the last."""

    every: int
    act: Callable[[int], None]


def train(
    accelerator: Accelerator,
    module: nn.Module,
    rates: Callable[[str], float],
    stretch: Stretch,
    parts_from: Callable[[Place], Iterable[Batch]],
    inputs_of: Callable[[int, int, Batch], dict[str, Tensor]],
    state: Path,
    run_id: str,
    run: RunConfig,
    optimizer_config: OptimizerConfig,
    log: Log,
    keeps: Callable[[str], bool] = lambda name: True,
    hooks: Callable[[nn.Module, Average], Sequence[Hook]] = lambda module, average: (),
    data_state: Callable[[], list[int]] = list,
) -> dict[str, Tensor]:
    """Train the parameters of `module` that need gradients, and return the average of all it keeps by name, whole and
    on the host.

    The module's forward pass, on what `inputs_of(step, part, batch)` gives, is the loss of one part of a step; a step's
    loss is the mean over its parts and processes. `rates(name)` is a parameter's highest learning rate;
    `parts_from(place)` yields the batches from that place on. The run's state, with the parameters that `keeps` names,
    is kept in the file `state`; one that is there is taken up, and the run ends in the same bits as if it had never
    stopped. `data_state()` is where this process's parts are, for the next `place`; `hooks(module, average)` are acts
    on the way. Raises Stopped once a SIGTERM or SIGINT has been answered by saving, and InputError after too many steps
    in a row without a finite loss.
    """
    learning = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    optimizer = build_optimizer(learning, rates, optimizer_config)
    model, optimizer = accelerator.prepare(module, optimizer)
    inner = accelerator.unwrap_model(model)
    kept = {name: parameter for name, parameter in inner.named_parameters() if keeps(name)}
    names = {parameter: name for name, parameter in kept.items() if parameter.requires_grad}
    average = Average(kept, optimizer_config.ema_decay)
    place = Place(stretch.first)
    if state.exists():
        place = read_place(state, run_id)
        # A stretch at its first step has a new optimiser, and one that is over needs none.
        load_state(
            state, kept, average, optimizer.optimizer if stretch.first < place.step <= stretch.last else None, names
        )
        if accelerator.scaler is not None and place.loss_scale:
            accelerator.scaler.load_state_dict(place.loss_scale)
    log.rewind(place.step)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    began = time.monotonic() - place.seconds

    def save(done: int) -> None:
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        now = Place(done, time.monotonic() - began, tuple(gather_object([data_state()])), scaler)
        save_state(state, run_id, now, kept, average, optimizer.optimizer, names, accelerator.is_main_process)
        accelerator.wait_for_everyone()

    acts = hooks(inner, average)
    model.train()
    bad = 0
    parts = _Timed(parts_from(place))
    with _signals() as caught, _progress(stretch, place, accelerator.is_main_process) as progress:
        for step in range(place.step, stretch.last):
            factor = lr_factor(
                step - stretch.first, stretch.last - stretch.first, stretch.warmup, optimizer_config.final_lr
            )
            for group in optimizer.param_groups:
                group["lr"] = group["highest"] * factor
            loss = torch.zeros((), device=accelerator.device)
            for part in range(run.accumulation):
                batch = next(parts)
                log.warn_of(batch.pop("broken", ()))
                inputs = inputs_of(step, part, batch)
                seed_torch(run.seed, step, part, accelerator.process_index)
                with contextlib.nullcontext() if part == run.accumulation - 1 else accelerator.no_sync(model):
                    share = model(**inputs) / run.accumulation
                    accelerator.backward(share)
                loss += share.detach()
            norm = float(whole(accelerator.clip_grad_norm_(trained, optimizer_config.clip)))
            # One reduction for loss and signal: if any process got a signal, all stop after the same step.
            mean_loss, stopping = accelerator.reduce(
                torch.stack([loss, torch.tensor(float(bool(caught)), device=loss.device)]), "mean"
            ).tolist()
            finite = math.isfinite(mean_loss) and (math.isfinite(norm) or accelerator.scaler is not None)
            if finite:  # an fp16 scaler checks the gradients itself, and lowers its scale where they overflow
                optimizer.step()
                average.update(step)
            optimizer.zero_grad()
            bad = 0 if finite else bad + 1
            done, last = step + 1, step + 1 == stretch.last
            progress.advance()
            log.step(done, mean_loss, norm, optimizer.param_groups, parts.waited, last, progress)
            if bad >= run.max_bad_steps:
                raise InputError(
                    f"{stretch.name}, step {done}: the loss is {mean_loss}, its gradient's norm {norm}, for {bad} steps"
                    f" in a row; go on from {state} with a lower learning rate"
                )
            stop = stopping > 0
            if done % run.save_every == 0 or last or stop:
                save(done)
            if stop:
                raise Stopped(caught[0] if caught else signal.SIGTERM, done)
            for hook in acts:
                if done % hook.every == 0 or last:
                    hook.act(done)
    result = {name: whole(tensor).clone() for name, tensor in average.tensors.items()}
    accelerator.free_memory()
    return result


class _Timed:
    """An iterator that measures how long its caller has waited for it, in seconds."""

    def __init__(self, parts: Iterable[Batch]):
        self.parts, self.waited = iter(parts), 0.0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        began = time.monotonic()
        part = next(self.parts)
        self.waited += time.monotonic() - began
        return part


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT instead of dying of them; a second SIGINT is a KeyboardInterrupt again."""
    caught: list[int] = []

    def catch(number: int, frame: object) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    try:
        before = {number: signal.signal(number, catch) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: there the caller handles signals
        before = {}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _progress(stretch: Stretch, place: Place, shown: bool) -> Progress:
    return Progress(stretch.name, stretch.last - stretch.first, "step", max(place.step - stretch.first, 0), shown)
