"""A tile of pixels through prior, TNF and λ skip, all in registers: the Triton functions that every kernel of TRIP's is
made of.

A tile's rows are tokens: `rows` = pixels · FRAMES, the frames of a pixel side by side, padded to a power of two.
Columns are channels of the context [σ_t·ε^{i→1}, Δε̃], of the hidden width, or of the latents, each padded as
packing.py pads the weights. Sums are fp32; matrix products take operands of the weights' dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter, being numpy, knows no bf16 product. Widening rounded operands changes nothing: tensor cores sum in
# fp32 too.
_WIDEN = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def product(a, b, onto=None):
    """a·b, added `onto` where given, of half-precision operands with fp32 sums."""
    if _WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, onto)


@triton.jit
def parts(x):
    """fp32 x as the sum of two fp16 numbers, to 22 bits or 6e-8, whichever is coarser."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def dot(a, b, T: tl.constexpr):
    """a·b of operands rounded to T with fp32 sums. fp32 operands go through tensor cores in two parts: a·b = a_hi·b_hi
    + a_hi·b_lo + a_lo·b_hi."""
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
    """x·W, added `onto` where given, of the `index`-th of the weights [n, PARTS, x's columns, COLUMNS]; as in `dot`, an
    fp32 weight is two parts."""
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
    """(x − mean) / sqrt(var + 1e-5) over the first WIDTH columns; the padding stays zero."""
    inside = tl.arange(0, x.shape[1])[None, :] < WIDTH
    centred = tl.where(inside, x - (tl.sum(x, 1) / WIDTH)[:, None], 0.0)
    return centred * tl.rsqrt(tl.sum(centred * centred, 1) / WIDTH + 1e-5)[:, None]


@triton.jit
def attend(q, k, v, T: tl.constexpr, FRAMES: tl.constexpr, REAL_FRAMES: tl.constexpr):
    """softmax₂(q·kᵀ)·v over the frames of each pixel; q [rows, d] is scaled by log₂(e) / sqrt(d) already, k and v are
    [rows, d]."""
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
def load_tile(p, columns, offset, frame_stride, inside):
    """fp32 [rows, columns]: channel `columns` of each row's frame; `offset` [rows] is where its channel 0 lies. Zero
    outside."""
    return tl.load(p + offset[:, None] + columns[None, :] * frame_stride, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def prior_tile(
    p_latents, p_first_frame, columns, offset, first_offset, channel_stride, first_stride, inside, signal, prior_scale
):
    """The image noise prior (z_t − sqrt(ᾱ_t)·z_0^1)·prior_scale in fp32 (TRIP, eq. 4)."""
    latents = load_tile(p_latents, columns, offset, channel_stride, inside)
    first_frame = load_tile(p_first_frame, columns, first_offset, first_stride, inside)
    return (latents - signal * first_frame) * prior_scale


@triton.jit
def modulated(x, p_modulation, WIDTH: tl.constexpr):
    """Adaptive LayerNorm: norm(x)·(1 + scale) + shift, of [2, padded width] at `p_modulation`; 1 is already in the
    scale."""
    columns = tl.arange(0, x.shape[1])
    scale, shift = tl.load(p_modulation + columns), tl.load(p_modulation + x.shape[1] + columns)
    return layer_norm(x, WIDTH) * scale[None, :] + shift[None, :]


@triton.jit
def add_self_attention(
    x, normed, p_qkv, p_out, layer,
    HEADS: tl.constexpr, HEAD_P: tl.constexpr, FRAMES: tl.constexpr, REAL_FRAMES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """x + the attention of `normed`, tokens [rows, width], to those of the same pixel, one head at a time."""
    T: tl.constexpr = tl.float32 if PARTS == 2 else p_qkv.dtype.element_ty
    for head in tl.range(HEADS, disable_licm=True):
        index = layer * HEADS + head
        q = times(normed, p_qkv, 3 * index, HEAD_P, PARTS)
        k = times(normed, p_qkv, 3 * index + 1, HEAD_P, PARTS)
        v = times(normed, p_qkv, 3 * index + 2, HEAD_P, PARTS)
        x = times(attend(q, k, v, T, FRAMES, REAL_FRAMES), p_out, index, x.shape[1], PARTS, x)
    return x


@triton.jit
def add_cross_attention(
    x, normed, context, p_query, p_out, layer,
    HEADS: tl.constexpr, FRAMES: tl.constexpr, REAL_FRAMES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """x + the attention of `normed`, tokens [rows, width], to the context [σ_t·ε^{i→1}, Δε̃] [rows, 2·channels] of the
    same pixel.

    Keys and values are linear in a context of a few channels. So their projections are folded into the query's and the
    output's (packing.py), and the context itself is key and value: q·(W_k c)ᵀ = (W_kᵀ q)·cᵀ.
    """
    T: tl.constexpr = tl.float32 if PARTS == 2 else p_query.dtype.element_ty
    for head in tl.range(HEADS, disable_licm=True):
        index = layer * HEADS + head
        q = times(normed, p_query, index, context.shape[1], PARTS)
        x = times(attend(q, context, context, T, FRAMES, REAL_FRAMES), p_out, index, x.shape[1], PARTS, x)
    return x


@triton.jit
def fused_noise(
    p_latents, p_first_frame, p_residual_noise, p_modulation,
    p_in_proj, p_frame_embedding, p_self_qkv, p_self_out, p_cross_query, p_cross_out, p_bias, p_out_proj, p_out_bias, p_gate,
    clip, pixel, frame, inside, pixels, signal, sigma,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, LAYERS: tl.constexpr, REAL_FRAMES: tl.constexpr, NORMALIZE_PRIOR: tl.constexpr,
    CHANNELS_P: tl.constexpr, CONTEXT_P: tl.constexpr, WIDTH_P: tl.constexpr, HEAD_P: tl.constexpr, FRAMES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """ε̃ fp32 [rows, CHANNELS_P] of the tokens at `clip`, `pixel` and `frame` [rows]; `p_modulation` is this timestep's
    [LAYERS, 2, 2, WIDTH_P].

    ε̃ = λ·prior + (1 − λ·σ_t)·Δε̃ + TNF([prior, Δε̃]) with the prior in its normalised form σ_t·ε^{i→1}, or in the
    paper's raw one and 1 for σ_t.
    """
    if NORMALIZE_PRIOR:
        prior_scale, gate_sigma = 1.0, sigma
    else:
        prior_scale, gate_sigma = 1 / sigma, 1.0
    channel_stride = REAL_FRAMES * pixels  # of [B, C, F, H, W]
    offset = clip * CHANNELS * channel_stride + frame * pixels + pixel
    first_offset = clip * CHANNELS * pixels + pixel
    channel = tl.arange(0, CHANNELS_P)
    gate = tl.load(p_gate + frame)[:, None]
    real = inside[:, None] & (channel < CHANNELS)[None, :]
    prior = prior_tile(
        p_latents, p_first_frame, channel, offset, first_offset, channel_stride, pixels, real, signal, prior_scale
    )
    noise = gate * prior + (1 - gate * gate_sigma) * load_tile(p_residual_noise, channel, offset, channel_stride, real)
    if LAYERS > 0:
        # The context's columns: first the prior's channels, then those of the residual noise.
        column = tl.arange(0, CONTEXT_P)
        of_prior = inside[:, None] & (column < CHANNELS)[None, :]
        of_residual = inside[:, None] & ((column >= CHANNELS) & (column < 2 * CHANNELS))[None, :]
        context = prior_tile(
            p_latents,
            p_first_frame,
            column,
            offset,
            first_offset,
            channel_stride,
            pixels,
            of_prior,
            signal,
            prior_scale,
        )
        context += load_tile(p_residual_noise, column - CHANNELS, offset, channel_stride, of_residual)
        hidden = tl.arange(0, WIDTH_P)
        x = times(context, p_in_proj, 0, WIDTH_P, PARTS) + tl.load(
            p_frame_embedding + frame[:, None] * WIDTH_P + hidden[None, :]
        )
        for layer in tl.range(LAYERS, disable_licm=True):
            p_shift = p_modulation + layer * 4 * WIDTH_P
            normed = modulated(x, p_shift, WIDTH)
            x = add_self_attention(x, normed, p_self_qkv, p_self_out, layer, HEADS, HEAD_P, FRAMES, REAL_FRAMES, PARTS)
            x += tl.load(p_bias + layer * 2 * WIDTH_P + hidden)[None, :]
            normed = modulated(x, p_shift + 2 * WIDTH_P, WIDTH)
            x = add_cross_attention(
                x, normed, context, p_cross_query, p_cross_out, layer, HEADS, FRAMES, REAL_FRAMES, PARTS
            )
            x += tl.load(p_bias + (layer * 2 + 1) * WIDTH_P + hidden)[None, :]
        noise += times(layer_norm(x, WIDTH), p_out_proj, 0, CHANNELS_P, PARTS) + tl.load(p_out_bias + channel)[None, :]
    return noise
