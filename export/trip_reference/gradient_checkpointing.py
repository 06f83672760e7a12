"""Gradient checkpointing for diffusers' 3D-UNet, which has none of its own: the
backward pass computes activations again."""

from __future__ import annotations

from functools import partial

from diffusers.models.resnet import ResnetBlock2D, TemporalConvLayer
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from torch import nn
from torch.utils.checkpoint import checkpoint

_SEGMENTS = (ResnetBlock2D, TemporalConvLayer, Transformer2DModel, TransformerTemporalModel)


def checkpoint_gradients(unet: nn.Module) -> int:
    """Keep only the inputs of the network's residual blocks, convolutions over time and transformers, in place; returns
    how many there are.

    Chen et al. 2016 (arXiv 1604.06174), at the grain of those blocks: one more forward pass, gradients the same.
    Dropout draws again what it drew. Names and weights of the network stay as they are.
    """
    segments = [module for module in unet.modules() if isinstance(module, _SEGMENTS)]
    for module in segments:
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    return len(segments)
