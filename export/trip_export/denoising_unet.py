"""The residual UNet as a denoising step runs it: the same weights and the same result, without what diffusers' network
does twice."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers import UNet3DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from trip_reference.unet import ResidualUNet, with_first_frame, without_first_frame

# Keys and values of the text, [B, L, width] each, by the cross-attention they are for.
Texts = dict[Attention, tuple[Tensor, Tensor]]


class TextProjection(nn.Module):
    """The text's keys and values for all cross-attentions, once a clip: diffusers' network computes them for every
    frame of every step."""

    def __init__(self, unet: UNet3DConditionModel):
        super().__init__()
        self.projections = nn.ModuleList(
            projection for attention in cross_attentions(unet) for projection in (attention.to_k, attention.to_v)
        )

    def forward(self, text: Tensor) -> Tensor:
        """[2B, L, D] → [2B, L, K]: keys and values of the first cross-attention, of the second, …"""
        return torch.cat([projection(text) for projection in self.projections], dim=-1)


class DenoisingUNet(nn.Module):
    """A ResidualUNet that takes the text as `TextProjection` makes it.

    `guided`: latents and first frames come twice, once for each of guidance's halves, and are equal; what comes before
    the first cross-attention is computed once. `shallow`: only the outermost layer, on deep features that another step
    left (DeepCache, Ma et al. 2023). `controlled`: a ControlEncoder's features are the inputs' next. The network given
    is changed: it can no longer be called by itself.
    """

    def __init__(self, residual_unet: ResidualUNet, guided: bool, shallow: bool, controlled: bool = False):
        super().__init__()
        self.unet = _arranged(residual_unet.unet)
        self.first_frame = residual_unet.first_frame
        self.guided, self.shallow, self.controlled = guided, shallow, controlled

    def forward(
        self, latents: Tensor, first_frame: Tensor, timestep: Tensor, context: Tensor, *more: Tensor
    ) -> tuple[Tensor, ...]:
        """latents: [B, C, F, h, w]; first_frame: [B, C, h, w]; timestep: [1]; context: [B, L, K]; `more`, where
        controlled, the control's features, for one of guidance's halves, and, where shallow, deep ones: [B, F', C', h,
        w] each.

        Returns the residual noise [B, C, F, h, w] and, from the whole network, its features; F' counts the clean frame
        where that is one of them.
        """
        unet, clips = self.unet, len(context)
        control = more[0] if self.controlled else None
        features = more[-1] if self.shallow else None
        if self.guided:
            latents, first_frame = latents[: clips // 2], first_frame[: clips // 2]
        texts = _split(unet, context)
        time = unet.time_embedding(unet.time_proj(timestep))  # [1, width], the same for all clips and frames
        x = with_first_frame(latents, first_frame, self.first_frame).transpose(1, 2)  # [B, F', C, h, w]
        frames = x.shape[1]
        x = unet.conv_in(x.flatten(0, 1))  # [B·F', C', h, w]
        if control is not None:
            x = x + _as_many(control.flatten(0, 1), len(x))
        (x,) = unet.transformer_in(x, num_frames=frames, return_dict=False)
        skips = [x]
        last = unet.up_blocks[-1]
        if features is None:
            x = self._all_but_the_last_layer(x, skips, time, frames, texts)
            features = x.unflatten(0, (clips, frames))
        x = _layer(
            last,
            len(last.resnets) - 1,
            torch.cat([features.flatten(0, 1), _as_many(skips[0], clips * frames)], dim=1),
            time,
            frames,
            texts,
        )
        x = unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))
        residual = without_first_frame(x.unflatten(0, (clips, frames)).transpose(1, 2), self.first_frame)
        return (residual,) if self.shallow else (residual, features)

    def _all_but_the_last_layer(
        self, x: Tensor, skips: list[Tensor], time: Tensor, frames: int, texts: Texts
    ) -> Tensor:
        for block in self.unet.down_blocks:
            for i in range(len(block.resnets)):
                x = _layer(block, i, x, time, frames, texts)
                skips.append(x)
            for downsampler in block.downsamplers or ():
                x = downsampler(x)
                skips.append(x)
        mid = self.unet.mid_block
        x = mid.temp_convs[0](mid.resnets[0](x, time), num_frames=frames)
        for attention, temporal, resnet, convolution in zip(
            mid.attentions, mid.temp_attentions, mid.resnets[1:], mid.temp_convs[1:], strict=True
        ):
            x = temporal(attention(x, frames, texts), num_frames=frames, return_dict=False)[0]
            x = convolution(resnet(x, time), num_frames=frames)
        for block in self.unet.up_blocks:
            for i in range(len(block.resnets)):
                if len(skips) == 1:
                    return x
                x = _layer(block, i, torch.cat([x, _as_many(skips.pop(), len(x))], dim=1), time, frames, texts)
            for upsampler in block.upsamplers or ():
                x = upsampler(x)
        raise AssertionError("a UNet has a skip for each of its upward layers")


def _layer(block: nn.Module, i: int, x: Tensor, time: Tensor, frames: int, texts: Texts) -> Tensor:
    x = block.temp_convs[i](block.resnets[i](x, time), num_frames=frames)
    if getattr(block, "has_cross_attention", False):
        x = block.temp_attentions[i](block.attentions[i](x, frames, texts), num_frames=frames, return_dict=False)[0]
    return x


def _as_many(x: Tensor, count: int) -> Tensor:
    """`x` at length `count`: repeated for both halves of guidance where it is still computed for one."""
    return x if len(x) == count else torch.cat([x, x])


class _TextTransformer(Transformer2DModel):
    """Self-attention within each frame, then cross-attention of all of a clip's frames at once to its text."""

    def forward(self, x: Tensor, frames: int, texts: Texts) -> Tensor:
        """[B·F', C, h, w] → the same, or for twice as many clips where `x` is still for one of guidance's halves."""
        height, width = x.shape[2:]
        tokens, _ = self._operate_on_continuous_inputs(x)  # [B·F', h·w, C]
        for block in self.transformer_blocks:
            tokens = tokens + block.attn1(block.norm1(tokens))
            query, (key, value) = block.attn2.to_q(block.norm2(tokens)), texts[block.attn2]
            count = len(key) * frames
            query, tokens = _as_many(query, count), _as_many(tokens, count)
            attended = _attention(
                block.attn2, query.unflatten(0, (-1, frames)).flatten(1, 2), key, value
            )  # [B, F'·h·w, C]
            tokens = tokens + attended.unflatten(1, (frames, -1)).flatten(0, 1)
            tokens = tokens + block.ff(block.norm3(tokens))
        if self.use_linear_projection:
            tokens = self.proj_out(tokens)
        x_new = tokens.transpose(1, 2).unflatten(2, (height, width))
        return _as_many(x, len(x_new)) + (x_new if self.use_linear_projection else self.proj_out(x_new))


class _SplitGEGLU(nn.Module):
    """GEGLU by two products: cutting the result of one in halves would copy it."""

    def __init__(self, geglu: GEGLU):
        super().__init__()
        width = geglu.proj.out_features // 2
        self.value, self.gate = (_rows(geglu.proj, start, width) for start in (0, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.value(x) * F.gelu(self.gate(x))


def _rows(linear: nn.Linear, start: int, count: int) -> nn.Linear:
    """The layer that computes `count` of `linear`'s outputs, on the same memory."""
    part = nn.Linear(linear.in_features, count, device="meta")
    part.weight, part.bias = (
        nn.Parameter(whole[start : start + count], requires_grad=False) for whole in (linear.weight, linear.bias)
    )
    return part


def _attention(attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention from projected tokens [B, n, C] to [B, L, C], and the output projection."""
    heads = [tokens.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for tokens in (query, key, value)]
    return attention.to_out[0](F.scaled_dot_product_attention(*heads, scale=attention.scale).transpose(1, 2).flatten(2))


def cross_attentions(unet: UNet3DConditionModel) -> Iterator[Attention]:
    """The cross-attentions to the text, in the order in which the network calls them."""
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        for transformer in getattr(block, "attentions", ()):
            for transformer_block in transformer.transformer_blocks:
                yield transformer_block.attn2


def _split(unet: UNet3DConditionModel, context: Tensor) -> Texts:
    attentions = list(cross_attentions(unet))
    parts = iter(
        context.split(
            [projection.out_features for attention in attentions for projection in (attention.to_k, attention.to_v)],
            dim=-1,
        )
    )
    return dict(zip(attentions, zip(parts, parts, strict=True), strict=True))


def _arranged(unet: UNet3DConditionModel) -> UNet3DConditionModel:
    """Replace, in place, the modules of diffusers that this file computes in another way."""
    for module in unet.modules():
        if type(module) is Transformer2DModel:
            module.__class__ = _TextTransformer
        if isinstance(module, FeedForward) and isinstance(module.net[0], GEGLU):
            module.net[0] = _SplitGEGLU(module.net[0])
    return unet
