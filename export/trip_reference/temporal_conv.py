"""The convolution over frames, as the UNet and the control have it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class TemporalConv(nn.Conv3d):
    """A (3, 1, 1) convolution run as a 2-D one over [F, H·W]: the same sums, without Conv3d, which is slow on CPUs.

    Weights keep Conv3d's shape, so checkpoints are diffusers'.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.squeeze(-1)  # [out, in, 3, 1]
        return F.conv2d(x.flatten(3), weight, self.bias, padding=(1, 0)).unflatten(3, x.shape[3:])
