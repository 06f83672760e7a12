"""A NoiseFusion's weights as the kernels want them: folded where that saves work, padded to tensor cores' tiles, layers
and heads stacked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# In the order of the kernels' parameters; `modulation` comes before them all.
WEIGHTS = (
    "in_proj", "frame_embedding", "self_qkv", "self_out", "cross_query", "cross_out", "bias", "out_proj", "out_bias", "gate",
)  # fmt: skip
SINGLE = {"frame_embedding", "bias", "out_bias", "gate", "modulation"}  # added, not multiplied: always fp32


@dataclass(frozen=True)
class TileShape:
    """Sizes that a kernel is compiled for; those ending in `_p` and `frames` are padded: to a power of two, and to 16
    where a matrix product runs along them. `layers` is 0 where the fusion is linear or none."""

    channels: int
    width: int
    heads: int
    layers: int
    real_frames: int
    normalize_prior: bool
    channels_p: int
    context_p: int
    width_p: int
    head_p: int
    frames: int

    def constants(self) -> dict[str, int]:
        """By the names of the kernels' constexpr parameters."""
        return {name.upper(): int(value) for name, value in asdict(self).items()}


def tile_shape(channels: int, num_frames: int, normalize_prior: bool, width: int, heads: int, layers: int) -> TileShape:
    """The TileShape of a model's fusion; with no layers, of its skip alone."""
    if layers == 0:
        width, heads = 16, 1
    frames = _padded(num_frames) if layers else _power_of_two(num_frames)
    padded = _padded(channels), _padded(2 * channels), _padded(width), _padded(width // heads)
    return TileShape(channels, width, heads, layers, num_frames, normalize_prior, *padded, frames)


def pack(fusion: nn.Module, shape: TileShape, dtype: torch.dtype, timesteps: Tensor) -> dict[str, Tensor]:
    """The kernels' weights by name, of the `trip_reference.fusion.NoiseFusion` `fusion`, folded in fp64 and rounded to
    `dtype` once.

    Matrices are [..., parts, rows, columns] of `dtype`, or where that is fp32 of fp16.

    `modulation` [len(timesteps), layers, 2, 2, width_p] are the adaptive LayerNorms' (1 + scale) and shift at
    `timesteps` int64 [n].
    """
    state = {name: tensor.detach().double() for name, tensor in fusion.state_dict().items()}
    gate = state["gate"].sigmoid() if "gate" in state else torch.zeros(shape.real_frames, dtype=torch.float64)
    # Without TNF, the kernel reads the gate alone.
    packed = {name: torch.zeros(1, 16, dtype=torch.float64, device=gate.device) for name in (*WEIGHTS, "modulation")}
    if shape.layers:
        time = fusion.tnf.time_features(timesteps).double()
        packed |= _pack_tnf({name.removeprefix("tnf."): tensor for name, tensor in state.items()}, shape, time)
    packed["gate"] = _pad(gate, shape.frames)
    return {
        name: _as_operand(tensor, dtype) if name not in SINGLE else tensor.float().contiguous()
        for name, tensor in packed.items()
    }


def parts_of(dtype: torch.dtype) -> int:
    """How many half-precision numbers stand for one operand of a matrix product in `dtype`: fp32's are the sum of two
    fp16 numbers."""
    return 2 if dtype == torch.float32 else 1


def _as_operand(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., rows, columns] → [..., parts, rows, columns]."""
    if parts_of(dtype) == 1:
        return matrices.to(dtype).contiguous()
    high = matrices.half()
    return torch.stack([high, (matrices - high.double()).half()], -3)


def _pack_tnf(tnf: Mapping[str, Tensor], shape: TileShape, time: Tensor) -> dict[str, Tensor]:
    width, head, context = shape.width_p, shape.head_p, shape.context_p
    layers = [{name.removeprefix(f"layers.{i}."): tensor for name, tensor in tnf.items()} for i in range(shape.layers)]

    def heads(matrix: Tensor) -> Tensor:  # [heads · d, in] → [heads, d, in]
        return matrix.unflatten(0, (shape.heads, -1))

    def stacked(name: str) -> list[Tensor]:
        return [heads(layer[name]) for layer in layers]

    def out(name: str) -> list[Tensor]:  # [out, heads · d] → [heads, d, out]
        return [heads(layer[name].T) for layer in layers]

    # softmax(x) is 2^(x · log₂ e), normalised: the scores' scale and the change of base go into the query.
    scale = math.log2(math.e) / math.sqrt(shape.width // shape.heads)
    qkv = torch.stack(
        [torch.stack([heads(x[f"self_attention.to_{part}.weight"]).mT for part in "qkv"], 1) for x in layers]
    )
    qkv[:, :, 0] *= scale
    query, key, value = (stacked(f"cross_attention.to_{part}.weight") for part in "qkv")
    norm, project = tnf["norm_out.weight"], tnf["out_proj.weight"]
    return {
        "in_proj": _pad(
            torch.cat([torch.zeros_like(tnf["in_proj.weight"].T), tnf["in_proj.weight"].T]), context, width
        ),
        "frame_embedding": _pad(tnf["frame_embedding"] + tnf["in_proj.bias"], shape.frames, width),
        "self_qkv": _pad(qkv, width, head),
        "self_out": _pad(torch.stack(out("self_attention.to_out.weight")), head, width),
        # q·kᵀ = (W_q x)·(W_k c)ᵀ = (W_kᵀ W_q x)·cᵀ, and W_o (p·W_v c) = (W_o W_v)(p·c)
        "cross_query": _pad(torch.stack([q.mT @ k for q, k in zip(query, key, strict=True)]) * scale, width, context),
        "cross_out": _pad(
            torch.stack([v.mT @ o for v, o in zip(value, out("cross_attention.to_out.weight"), strict=True)]),
            context,
            width,
        ),
        "bias": _pad(
            torch.stack(
                [torch.stack([x[f"{kind}_attention.to_out.bias"] for kind in ("self", "cross")]) for x in layers]
            ),
            2,
            width,
        ),
        "out_proj": _pad((project * norm).T, width, shape.channels_p),
        "out_bias": _pad(project @ tnf["norm_out.bias"] + tnf["out_proj.bias"], shape.channels_p),
        "modulation": _modulation(tnf, layers, shape, time),
    }


def _modulation(tnf: Mapping[str, Tensor], layers: list[dict[str, Tensor]], shape: TileShape, time: Tensor) -> Tensor:
    for index in (0, 2):
        time = F.silu(F.linear(time, tnf[f"time.{index}.weight"], tnf[f"time.{index}.bias"]))
    norms = [
        [F.linear(time, layer[f"norm{i}.modulation.weight"], layer[f"norm{i}.modulation.bias"]) for i in (1, 2)]
        for layer in layers
    ]
    modulation = torch.stack([torch.stack(pair, 1) for pair in norms], 1).unflatten(
        -1, (2, shape.width)
    )  # [n, layers, 2, 2, width]
    return _pad(
        modulation + torch.tensor([1.0, 0.0], dtype=torch.float64, device=time.device)[:, None], 2, shape.width_p
    )


def _pad(tensor: Tensor, *sizes: int) -> Tensor:
    """Zeros after the last dimensions, up to `sizes`."""
    missing = [
        amount
        for have, want in zip(reversed(tensor.shape[-len(sizes) :]), reversed(sizes), strict=True)
        for amount in (0, want - have)
    ]
    return F.pad(tensor, missing)


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def _padded(size: int) -> int:
    return max(16, _power_of_two(size))
