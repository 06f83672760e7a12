"""The Triton functions that TRIP's kernels share: they take a tile of pixels through prior, TNF and λ skip in
registers.

The rows of a tile are tokens: rows = pixels · SHAPE.frames, and the frames of a pixel are adjacent. The columns are the
channels of the context [σ_t·ε^{i→1}, Δε̃], of the hidden width, or of the latents; each is padded as packing.py pads
the weights. Sums are fp32; the operands of matrix products have the weights' dtype.

SHAPE is a packing.TileShape and LAYOUT a packing.WeightLayout. `p_weights` points to the bytes of all packed tensors.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter is numpy, which has no bf16 product. Widening the rounded operands does not change the result: tensor
# cores sum in fp32 too.
_WIDEN = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def operands(p_weights, START: tl.constexpr, LAYOUT: tl.constexpr):
    """The pointer to the operands of matrix products that begin at byte START of the weights."""
    HALF: tl.constexpr = tl.bfloat16 if LAYOUT.half == "bf16" else tl.float16
    return (p_weights + START).to(tl.pointer_type(HALF))


@triton.jit
def floats(p_weights, START: tl.constexpr):
    """The pointer to the fp32 numbers that begin at byte START of the weights."""
    return (p_weights + START).to(tl.pointer_type(tl.float32))


@triton.jit
def product(a, b, onto=None):
    """a·b of half-precision operands with fp32 sums; it is added to `onto` if that is given."""
    if _WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, onto)


@triton.jit
def parts(x):
    """Two fp16 numbers whose sum is the fp32 x, to 22 bits or 6e-8, whichever is coarser."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def dot(a, b, T: tl.constexpr):
    """a·b of operands rounded to T, with fp32 sums.

    Tensor cores take fp32 operands in two parts: a·b = a_hi·b_hi + a_hi·b_lo + a_lo·b_hi.
    """
    if tl.float32 == T:
        a_high, a_low = parts(a)
        b_high, b_low = parts(b)
        result = product(a_high, b_high, product(a_low, b_high, product(a_high, b_low)))
    else:
        result = product(a.to(T), b.to(T))
    return result


@triton.jit
def matrix(p, index, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The `index`-th of a stack of matrices."""
    return tl.load(p + index * ROWS * COLUMNS + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def times(x, p_weight, index, COLUMNS: tl.constexpr, PARTS: tl.constexpr, onto=None):
    """x·W, added to `onto` if that is given. W is the `index`-th of the matrices [n, PARTS, columns of x, COLUMNS]; an
    fp32 matrix has two parts, as in `dot`."""
    ROWS: tl.constexpr = x.shape[1]
    weight = matrix(p_weight, index * PARTS, ROWS, COLUMNS)
    if PARTS == 1:
        onto = product(x.to(weight.dtype), weight, onto)
    else:
        high, low = parts(x)
        onto = product(high, matrix(p_weight, index * PARTS + 1, ROWS, COLUMNS), onto)
        onto = product(high, weight, product(low, weight, onto))
    return onto


@triton.jit
def layer_norm(x, WIDTH: tl.constexpr):
    """(x − mean) / sqrt(var + 1e-5) over the first WIDTH columns. The padding stays zero."""
    inside = tl.arange(0, x.shape[1])[None, :] < WIDTH
    centred = tl.where(inside, x - (tl.sum(x, 1) / WIDTH)[:, None], 0.0)
    return centred * tl.rsqrt(tl.sum(centred * centred, 1) / WIDTH + 1e-5)[:, None]


@triton.jit
def attend(q, k, v, T: tl.constexpr, FRAMES: tl.constexpr, REAL_FRAMES: tl.constexpr):
    """softmax₂(q·kᵀ)·v over the frames of each pixel; q, k, v: [rows, d].

    q already includes the factor log₂(e) / sqrt(d), which makes softmax a power of 2.
    """
    PIXELS: tl.constexpr = q.shape[0] // FRAMES
    q = tl.reshape(q, [PIXELS, FRAMES, q.shape[1]])
    k = tl.reshape(k, [PIXELS, FRAMES, k.shape[1]])
    v = tl.reshape(v, [PIXELS, FRAMES, v.shape[1]])
    scores = dot(q, tl.permute(k, (0, 2, 1)), T)
    scores = tl.where(tl.arange(0, FRAMES)[None, None, :] < REAL_FRAMES, scores, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 2, keep_dims=True))
    attended = dot(weights, v, T) / tl.sum(weights, 2, keep_dims=True)
    return tl.reshape(attended, [PIXELS * FRAMES, v.shape[2]])


@triton.jit
def load_tile(p, columns, offset, channel_stride, inside):
    """fp32 [rows, columns]: the channels `columns` of each row's frame, and zero where `inside` is false.

    `offset` [rows] is the offset of the frame's channel 0, and `channel_stride` that from one channel to the next.
    """
    return tl.load(p + offset[:, None] + columns[None, :] * channel_stride, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def prior_tile(
    p_latents,
    p_first_frame,
    columns,
    offset,
    first_offset,
    channel_stride,
    first_stride,
    inside,
    signal,
    prior_scale,
):
    """The image noise prior (z_t − sqrt(ᾱ_t)·z_0^1)·prior_scale in fp32 (TRIP, eq. 4)."""
    latents = load_tile(p_latents, columns, offset, channel_stride, inside)
    first_frame = load_tile(p_first_frame, columns, first_offset, first_stride, inside)
    return (latents - signal * first_frame) * prior_scale


@triton.jit
def modulated(x, p_modulation, WIDTH: tl.constexpr):
    """Adaptive LayerNorm: norm(x)·(1 + scale) + shift. `p_modulation` points to (1 + scale) and shift, [2, padded
    width]."""
    columns = tl.arange(0, x.shape[1])
    scale, shift = tl.load(p_modulation + columns), tl.load(p_modulation + x.shape[1] + columns)
    return layer_norm(x, WIDTH) * scale[None, :] + shift[None, :]


@triton.jit
def add_self_attention(
    x,
    normed,
    p_weights,
    layer,
    SHAPE: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """x plus the attention of the tokens `normed` [rows, width] to those of the same pixel, one head at a time."""
    PARTS: tl.constexpr = LAYOUT.parts
    p_qkv = operands(p_weights, LAYOUT.self_qkv, LAYOUT)
    p_out = operands(p_weights, LAYOUT.self_out, LAYOUT)
    T: tl.constexpr = tl.float32 if PARTS == 2 else p_qkv.dtype.element_ty
    for head in tl.range(SHAPE.heads, disable_licm=True):
        index = layer * SHAPE.heads + head
        q = times(normed, p_qkv, 3 * index, SHAPE.head_p, PARTS)
        k = times(normed, p_qkv, 3 * index + 1, SHAPE.head_p, PARTS)
        v = times(normed, p_qkv, 3 * index + 2, SHAPE.head_p, PARTS)
        x = times(attend(q, k, v, T, SHAPE.frames, SHAPE.real_frames), p_out, index, SHAPE.width_p, PARTS, x)
    return x


@triton.jit
def add_cross_attention(
    x,
    normed,
    context,
    p_weights,
    layer,
    SHAPE: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """x plus the attention of the tokens `normed` [rows, width] to the context [σ_t·ε^{i→1}, Δε̃] [rows, 2·channels] of
    the same pixel.

    Keys and values are linear in a context of a few channels. packing.py therefore folds their projections into those
    of query and output, and the context itself is key and value: q·(W_k c)ᵀ = (W_kᵀ q)·cᵀ.
    """
    PARTS: tl.constexpr = LAYOUT.parts
    p_query = operands(p_weights, LAYOUT.cross_query, LAYOUT)
    p_out = operands(p_weights, LAYOUT.cross_out, LAYOUT)
    T: tl.constexpr = tl.float32 if PARTS == 2 else p_query.dtype.element_ty
    for head in tl.range(SHAPE.heads, disable_licm=True):
        index = layer * SHAPE.heads + head
        q = times(normed, p_query, index, SHAPE.context_p, PARTS)
        attended = attend(q, context, context, T, SHAPE.frames, SHAPE.real_frames)
        x = times(attended, p_out, index, SHAPE.width_p, PARTS, x)
    return x


@triton.jit
def fused_noise(
    p_latents,
    p_first_frame,
    p_residual_noise,
    p_weights,
    i_modulation,
    clip,
    pixel,
    frame,
    inside,
    pixels,
    signal,
    sigma,
    SHAPE: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """ε̃ fp32 [rows, SHAPE.channels_p] of the tokens at `clip`, `pixel` and `frame` [rows]; `i_modulation` is the
    timestep's place in the modulation.

    ε̃ = λ·prior + (1 − λ·σ_t)·Δε̃ + TNF([prior, Δε̃]), with the prior in its normalised form σ_t·ε^{i→1}. In the paper's
    raw form of the prior, 1 stands for σ_t. The matched gate is `trip_reference.fusion.NoiseFusion`'s.
    """
    prior_scale = 1.0 if SHAPE.normalize_prior else 1 / sigma
    CHANNELS: tl.constexpr = SHAPE.channels
    channel_stride = SHAPE.real_frames * pixels  # of [B, C, F, H, W]
    offset = clip * CHANNELS * channel_stride + frame * pixels + pixel
    first_offset = clip * CHANNELS * pixels + pixel
    channel = tl.arange(0, SHAPE.channels_p)
    gate = tl.load(floats(p_weights, LAYOUT.gate) + frame)[:, None]
    real = inside[:, None] & (channel < CHANNELS)[None, :]
    prior = prior_tile(
        p_latents,
        p_first_frame,
        channel,
        offset,
        first_offset,
        channel_stride,
        pixels,
        real,
        signal,
        prior_scale,
    )
    if SHAPE.matched:
        variance = gate * sigma * sigma + (1 - gate) * signal * signal
        of_prior, of_residual = gate * sigma / variance, signal * tl.sqrt((1 - gate) / variance)
        of_correction = of_residual
    else:
        of_prior, of_residual = gate, 1 - gate * (sigma if SHAPE.normalize_prior else 1.0)
        of_correction = 1.0
    noise = of_prior * prior + of_residual * load_tile(p_residual_noise, channel, offset, channel_stride, real)
    if SHAPE.layers > 0:
        # The columns of the context: first the channels of the prior, then those of the residual noise.
        column = tl.arange(0, SHAPE.context_p)
        in_prior = inside[:, None] & (column < CHANNELS)[None, :]
        in_residual = inside[:, None] & ((column >= CHANNELS) & (column < 2 * CHANNELS))[None, :]
        context = prior_tile(
            p_latents,
            p_first_frame,
            column,
            offset,
            first_offset,
            channel_stride,
            pixels,
            in_prior,
            signal,
            prior_scale,
        )
        context += load_tile(p_residual_noise, column - CHANNELS, offset, channel_stride, in_residual)
        WIDTH_P: tl.constexpr = SHAPE.width_p
        PARTS: tl.constexpr = LAYOUT.parts
        hidden = tl.arange(0, WIDTH_P)
        x = times(context, operands(p_weights, LAYOUT.in_proj, LAYOUT), 0, WIDTH_P, PARTS)
        x += tl.load(floats(p_weights, LAYOUT.frame_embedding) + frame[:, None] * WIDTH_P + hidden[None, :])
        p_modulation = floats(p_weights, LAYOUT.modulation) + i_modulation * SHAPE.layers * 4 * WIDTH_P
        p_bias = floats(p_weights, LAYOUT.bias)
        for layer in tl.range(SHAPE.layers, disable_licm=True):
            p_norms = p_modulation + layer * 4 * WIDTH_P
            normed = modulated(x, p_norms, SHAPE.width)
            x = add_self_attention(x, normed, p_weights, layer, SHAPE, LAYOUT)
            x += tl.load(p_bias + layer * 2 * WIDTH_P + hidden)[None, :]
            normed = modulated(x, p_norms + 2 * WIDTH_P, SHAPE.width)
            x = add_cross_attention(x, normed, context, p_weights, layer, SHAPE, LAYOUT)
            x += tl.load(p_bias + (layer * 2 + 1) * WIDTH_P + hidden)[None, :]
        p_out_proj = operands(p_weights, LAYOUT.out_proj, LAYOUT)
        p_out_bias = floats(p_weights, LAYOUT.out_bias)
        correction = times(layer_norm(x, SHAPE.width), p_out_proj, 0, SHAPE.channels_p, PARTS)
        noise += of_correction * (correction + tl.load(p_out_bias + channel)[None, :])
    return noise
