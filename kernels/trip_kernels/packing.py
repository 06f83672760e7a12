"""A NoiseFusion's weights as the kernels take them: folded, padded to the tile sizes of tensor cores, and laid out in
one array of bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ALIGNMENT = 256  # bytes, as cudaMalloc aligns; vectors of 16 bytes are what the kernels load


@dataclass(frozen=True)
class TileShape:
    """The sizes that a kernel is compiled for.

    Those that end in `_p`, and `frames`, are padded to a power of two, and to at least 16 where a matrix product runs
    along them. `layers` is 0 if the model has no TNF.
    """

    channels: int
    width: int
    heads: int
    layers: int
    real_frames: int
    normalize_prior: bool
    matched: bool
    channels_p: int
    context_p: int
    width_p: int
    head_p: int
    frames: int


def tile_shape(
    channels: int, num_frames: int, normalize_prior: bool, matched: bool, width: int, heads: int, layers: int
) -> TileShape:
    """The TileShape of a model's fusion; without layers, `width` and `heads` do not matter."""
    if layers == 0:
        width, heads = 16, 1
    frames = _padded(num_frames) if layers else _power_of_two(num_frames)
    padded = _padded(channels), _padded(2 * channels), _padded(width), _padded(width // heads)
    return TileShape(channels, width, heads, layers, num_frames, normalize_prior, matched, *padded, frames)


@dataclass(frozen=True)
class PackedTensor:
    """The dtype and shape of one packed tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def packed_tensors(shape: TileShape, dtype: torch.dtype) -> dict[str, PackedTensor]:
    """The packed tensors by name, in the order in which they lie in memory.

    The operands of matrix products are [..., parts, rows, columns] in half precision; what is added is fp32.
    `modulation` is that of one timestep and comes last, so no offset depends on the number of timesteps.
    """
    half, parts = torch.float16 if dtype == torch.float32 else dtype, parts_of(dtype)
    per_head = shape.layers, shape.heads
    return {
        "in_proj": PackedTensor(half, (parts, shape.context_p, shape.width_p)),
        "self_qkv": PackedTensor(half, (*per_head, 3, parts, shape.width_p, shape.head_p)),
        "self_out": PackedTensor(half, (*per_head, parts, shape.head_p, shape.width_p)),
        "cross_query": PackedTensor(half, (*per_head, parts, shape.width_p, shape.context_p)),
        "cross_out": PackedTensor(half, (*per_head, parts, shape.context_p, shape.width_p)),
        "out_proj": PackedTensor(half, (parts, shape.width_p, shape.channels_p)),
        "frame_embedding": PackedTensor(torch.float32, (shape.frames, shape.width_p)),
        "bias": PackedTensor(torch.float32, (shape.layers, 2, shape.width_p)),
        "out_bias": PackedTensor(torch.float32, (shape.channels_p,)),
        "gate": PackedTensor(torch.float32, (shape.frames,)),
        "modulation": PackedTensor(torch.float32, (shape.layers, 2, 2, shape.width_p)),
    }


def parts_of(dtype: torch.dtype) -> int:
    """How many half-precision numbers stand for one operand of a matrix product in `dtype`: an fp32 operand is the sum
    of two fp16 numbers."""
    return 2 if dtype == torch.float32 else 1


@dataclass(frozen=True)
class WeightLayout:
    """The byte at which each packed tensor begins. The kernels take it as a compile-time constant.

    `half` is the type of the operands, fp16 or bf16, and `parts` is `parts_of` the precision.
    """

    half: str
    parts: int
    in_proj: int
    self_qkv: int
    self_out: int
    cross_query: int
    cross_out: int
    out_proj: int
    frame_embedding: int
    bias: int
    out_bias: int
    gate: int
    modulation: int


def weight_layout(shape: TileShape, dtype: torch.dtype) -> WeightLayout:
    """The layout of the weights of a kernel that takes its matrix products in `dtype`."""
    starts, end = {}, 0
    for name, tensor in packed_tensors(shape, dtype).items():
        starts[name] = math.ceil(end / ALIGNMENT) * ALIGNMENT
        end = starts[name] + tensor.nbytes
    return WeightLayout("bf16" if dtype == torch.bfloat16 else "fp16", parts_of(dtype), **starts)


def pack(fusion: nn.Module, shape: TileShape, dtype: torch.dtype, timesteps: Tensor) -> Tensor:
    """The weights of the `trip_reference.fusion.NoiseFusion` `fusion` as a uint8 array in the order of `weight_layout`.

    The weights are folded in fp64 and rounded to `dtype` once. The array ends with the modulation, the (1 + scale) and
    shift of the adaptive LayerNorms, at each of `timesteps`, int64 [n].
    """
    layout, tensors = weight_layout(shape, dtype), packed_tensors(shape, dtype)
    size = layout.modulation + len(timesteps) * tensors["modulation"].nbytes
    weights = torch.zeros(size, dtype=torch.uint8, device=timesteps.device)
    for name, values in _folded(fusion, shape, timesteps).items():
        tensor, start = tensors[name], getattr(layout, name)
        rounded = values.float() if tensor.dtype == torch.float32 else _as_operand(values, dtype)
        assert rounded.dtype == tensor.dtype and rounded.shape[-len(tensor.shape) :] == tensor.shape, name
        weights[start : start + rounded.nbytes] = rounded.contiguous().view(torch.uint8).flatten()
    return weights


def _as_operand(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., rows, columns] → [..., parts, rows, columns]."""
    if parts_of(dtype) == 1:
        return matrices.to(dtype).unsqueeze(-3)
    high = matrices.half()
    return torch.stack([high, (matrices - high.double()).half()], -3)


def _folded(fusion: nn.Module, shape: TileShape, timesteps: Tensor) -> dict[str, Tensor]:
    """The packed tensors in fp64, the modulation with a first dimension of timesteps.

    Without TNF, the gate is the only one: the kernels read nothing else.
    """
    state = {name: tensor.detach().double() for name, tensor in fusion.state_dict().items()}
    gate = state["gate"].sigmoid() if "gate" in state else torch.zeros(shape.real_frames, dtype=torch.float64)
    folded = {"gate": _pad(gate, shape.frames)}
    if shape.layers:
        time = fusion.tnf.time_features(timesteps).double()
        folded |= _folded_tnf({name.removeprefix("tnf."): tensor for name, tensor in state.items()}, shape, time)
    return folded


def _folded_tnf(tnf: Mapping[str, Tensor], shape: TileShape, time: Tensor) -> dict[str, Tensor]:
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
