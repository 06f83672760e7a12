"""The running average of the trained weights, which is what a run leaves behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class Average:
    """ā ← ā + (1 − d)·(θ − ā) for every parameter θ, d rising from 0.1 to `decay` so that the first weights are soon
    forgotten.

    Its tensors are like the parameters: sharded where those are. torch's AveragedModel does not fit: it copies the
    whole module, frozen parts included, and its first update takes the weights as they are instead of averaging them.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float):
        self.decay = decay
        self.parameters = dict(parameters)
        self.tensors = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average in the weights after step `step`, counted from 0."""
        decay = min(self.decay, (step + 1) / (step + 10))
        for name, parameter in self.parameters.items():
            self.tensors[name].lerp_(parameter.detach(), 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside this context the model has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            own = parameter.detach().clone()
            parameter.copy_(self.tensors[name])
            self.tensors[name].copy_(own)
