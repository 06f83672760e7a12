"""The optimisers of a training run: AdamW, or Muon for the matrices inside the networks and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from trip_reference.training.config import OptimizerConfig

MOMENTUM = 0.95
# What Muon leaves to AdamW by their names: embeddings, and the layers where latents come in and go out.
_ENDS = ("embed", "conv_in.", "conv_out.", "in_proj.", "out_proj.")
_ITERATIONS = 5
_POLYNOMIAL = 3.4445, -4.7750, 2.0315


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], rates: Callable[[str], float], config: OptimizerConfig
) -> Optimizer:
    """An optimiser of `parameters`, in groups of one highest rate each, which a group keeps as `highest`."""
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        by_muon = config.name == "muon" and parameter.ndim >= 2 and not any(end in name for end in _ENDS)
        groups.setdefault((rates(name), by_muon), []).append(parameter)
    return MuonAdamW(
        [{"params": own, "lr": lr, "highest": lr, "muon": muon} for (lr, muon), own in groups.items()],
        betas=(config.betas[0], config.betas[1]),
        weight_decay=config.weight_decay,
    )


def moments_of(optimizer: Optimizer) -> dict[Tensor, set[str]]:
    """The names of what `optimizer` keeps for each of its parameters."""
    return {
        parameter: {"momentum"} if group.get("muon") else {"step", "exp_avg", "exp_avg_sq"}
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


class MuonAdamW(torch.optim.AdamW):
    """AdamW, but Muon for the groups with `muon` set (Jordan et al. 2024, kellerjordan.github.io/posts/muon): the
    momentum of a matrix is made orthogonal before it is taken for a step.

    A convolution's weight is the matrix [out, in · kernel]. Steps are scaled so that their entries have AdamW's usual
    size, and one rate suits both (Liu et al. 2025, arXiv 2502.16982). torch.optim.Muon takes no convolutions, and
    one matrix at a time; those of one shape go together here.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["muon"]]
            super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self._muon_step(group)

    def _muon_step(self, group: dict[str, Any]) -> None:
        alike: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                alike.setdefault(tuple(parameter.flatten(1).shape), []).append(parameter)
        for shape, parameters in alike.items():
            updates = []
            for parameter in parameters:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
                updates.append(parameter.grad.lerp(momentum, MOMENTUM).flatten(1))  # Nesterov's
            scale = 0.2 * max(shape) ** 0.5  # of an orthogonal matrix's entries, to an RMS of 0.2
            for parameter, update in zip(parameters, orthogonal(torch.stack(updates)), strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.reshape(parameter.shape), alpha=-group["lr"] * scale)


def orthogonal(matrices: Tensor) -> Tensor:
    """The matrices [n, rows, columns] with their singular values brought near 1 by Newton–Schulz iterations, in bf16,
    which is exact enough for a direction."""
    x = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    x = x.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _POLYNOMIAL
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    x = x.to(matrices.dtype)
    return x.mT if matrices.shape[-2] > matrices.shape[-1] else x
