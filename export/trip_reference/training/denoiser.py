"""What is trained: text encoder, residual UNet and noise fusion, with TRIP's loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from trip_reference.model import TripModel
from trip_reference.training.config import LossConfig
from trip_rt.sampling.schedule import alpha_bars


class Denoiser(nn.Module):
    """A TripModel without its VAE. Its forward pass is the loss, because DDP and FSDP wrap a module's forward pass.

    Parameter names are the TripModel's: text_encoder.*, residual_unet.*, fusion.* and, where it has one, control.*.
    """

    def __init__(self, model: TripModel, loss: LossConfig, fused_kernel: bool = False):
        super().__init__()
        self.text_encoder, self.residual_unet, self.fusion = model.text_encoder, model.residual_unet, model.fusion
        self.control = model.control
        self.loss, self.fused_kernel = loss, fused_kernel
        self.register_buffer("alpha_bars", torch.from_numpy(alpha_bars(model.config.schedule)), persistent=False)

    def forward(
        self,
        latents: Tensor,
        noise: Tensor,
        timestep: Tensor,
        ids: Tensor | None = None,
        text: Tensor | None = None,
        control: Tensor | None = None,
    ) -> Tensor:
        """The mean over the batch of w(t)·|ε̃ − ε|² (TRIP, eq. 7), with `loss.change` weighted by place too.

        latents, noise: [B, C, F, h, w], clean and of unit variance; timestep: int64 [B]; ids: int64 [B, L], or text:
        [B, L, D] as encoded; control: [B, K, F, h, w], where the model has one.
        """
        alpha_bar = self.alpha_bars[timestep]  # fp64
        signal, sigma = alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()
        noised = signal[:, None, None, None, None] * latents + sigma[:, None, None, None, None] * noise
        if text is None:
            text = self.text_encoder(ids).last_hidden_state
        first_frame = latents[:, :, 0]
        steered = None if self.control is None else self.control(control, first_frame)
        residual = self.residual_unet(noised, first_frame, timestep, text, steered)
        fuse: Callable[..., Tensor] = self.fusion
        if self.fused_kernel:
            from trip_kernels.fuse_noise import fuse_noise  # Triton is there on Linux alone

            fuse = partial(fuse_noise, self.fusion)
        predicted = fuse(noised, first_frame, residual, signal, sigma, timestep)
        squared = (predicted.float() - noise).square()
        if self.loss.change:
            squared = squared * change_weight(latents, self.loss.change)
        error = squared.mean(dim=(1, 2, 3, 4))
        return (error * loss_weight(alpha_bar, self.loss).float()).mean()


def change_weight(latents: Tensor, change: float) -> Tensor:
    """1 + change·min(|z^i − z^1|²/C, 1) [B, 1, F, h, w] of latents [B, C, F, h, w] of unit variance: what moves counts
    more."""
    return 1 + change * (latents - latents[:, :, :1]).square().mean(1, keepdim=True).clamp(max=1)


def loss_weight(alpha_bar: Tensor, config: LossConfig) -> Tensor:
    """w(t) of an ε-prediction, for ᾱ_t [B].

    `min-snr`: min(SNR, γ)/SNR with SNR = ᾱ/(1 − ᾱ) (Hang et al. 2023, arXiv 2303.09556). `clean`: 1/ᾱ up to a bound;
    TRIP's prior makes ε so easy at large t that the plain loss hardly teaches motion to a network that starts from
    nothing.
    """
    match config.weighting:
        case "min-snr":
            snr = alpha_bar / (1 - alpha_bar)
            return snr.clamp(max=config.min_snr_gamma) / snr
        case "clean":
            return (1 / alpha_bar).clamp(max=config.max_weight)
    return torch.ones_like(alpha_bar)
