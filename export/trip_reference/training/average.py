"""The running average of the trained weights, which is what a run leaves behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class Average:
    """ā ← ā + (1 − d)·(θ − ā) for every parameter θ, d rising from 0.1 to `decay` so that the first weights are soon
    forgotten.

    It holds tensors like the parameters' own: shards where those are sharded.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float):
        self.decay = decay
        self.parameters = dict(parameters)
        self.tensors = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step `step`, counted from 0."""
        decay = min(self.decay, (step + 1) / (step + 10))
        for name, parameter in self.parameters.items():
            self.tensors[name].lerp_(parameter.detach(), 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the model has the averaged weights."""
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
