"""Reuse of deep features (DeepCache, Ma et al. 2023) in the unchanged network, by a hook on its last layer. The
exported shallow graphs are compared with this."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from trip_reference.unet import ResidualUNet


class FeatureReuse:
    """A ResidualUNet that can reuse the deep features of its last whole call. A context manager, which removes its
    hook.

    `features` [n, F', C', h, w] are the input of the last layer, without its skip, in the last whole call.
    """

    def __init__(self, residual_unet: ResidualUNet):
        self._network = residual_unet
        self._reuses = False
        # Other threads may run the same network at the same time; the hook must leave their calls alone.
        self._thread = threading.get_ident()
        self.features = torch.empty(0)

    def __enter__(self) -> FeatureReuse:
        self._hook = self._network.unet.up_blocks[-1].resnets[-1].register_forward_pre_hook(self._swap)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def __call__(
        self,
        latents: Tensor,
        first_frame: Tensor,
        timestep: Tensor,
        text: Tensor,
        shallow: bool,
        control_features: Tensor | None = None,
    ) -> Tensor:
        """As ResidualUNet; with `shallow`, on the kept features. For half as many clips as before, the conditional half
        of the features is used."""
        self._reuses, self._clips = shallow, len(latents)
        return self._network(latents, first_frame, timestep, text, control_features)  # type: ignore[no-any-return]

    def _swap(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
        if threading.get_ident() != self._thread:
            return inputs
        x, *rest = inputs
        deep = x.shape[1] - self._network.unet.config.block_out_channels[0]  # the skip comes from the first convolution
        if self._reuses:
            self.features = self.features[-self._clips :]
            return torch.cat([self.features.flatten(0, 1), x[:, deep:]], dim=1), *rest
        self.features = x[:, :deep].unflatten(0, (self._clips, -1))
        return inputs
