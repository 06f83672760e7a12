"""TRIP's Triton kernels, in Triton's interpreter where there is no GPU, held to the PyTorch model in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jit_compile import jit_cubins
from kernel_cases import BOUNDS, fusion_of, guarded, rms_ratio, step_buffers
from tiny import DEMO, tiny_model

from trip_kernels.compile import ACCEPTED_SPILL, CAPABILITIES, compile_fused_step
from trip_kernels.fuse_noise import fuse_noise, shape_of
from trip_kernels.fused_step import fused_step, fused_step_ref
from trip_kernels.packing import pack, packed_tensors, tile_shape, weight_layout
from trip_kernels.tile_choices import Tile
from trip_reference.presets import TRIP_256
from trip_reference.training.config import load_config
from trip_reference.training.denoiser import Denoiser
from trip_rt.sampling.schedule import alpha_bars
from trip_rt.sampling.step_table import COLUMNS


def inputs(
    batch, channels, frames, height, width, timesteps, schedule=TRIP_256.trip.schedule, dtype=torch.float32, seed=0
):
    """The arguments of a fusion: latents noised to `timesteps`, everything but them surrounded by NaN in memory."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(batch, channels, height, width, generator=generator)
    clean = first[:, :, None] + 0.3 * torch.randn(batch, channels, frames, height, width, generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    alpha_bar = torch.from_numpy(alpha_bars(schedule))[timesteps]
    signal, sigma = alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()
    wide = (slice(None),) + (None,) * 4
    latents = signal[wide] * clean + sigma[wide] * noise
    residual = noise + 0.1 * torch.randn(clean.shape, generator=generator)
    return *(guarded(tensor.to(dtype)) for tensor in (latents, first, residual)), signal, sigma, torch.tensor(timesteps)


# In the interpreter a program costs the same however large its tile is.
LARGE = Tile(pixels=8, warps=4, stages=1)


def in_double(fusion, arguments):
    double = tiny_copy(fusion).double()
    return double(*(tensor.double() if tensor.is_floating_point() else tensor for tensor in arguments))


def tiny_copy(fusion):
    import copy

    return copy.deepcopy(fusion)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(
    ("frames", "batch", "height", "width", "timesteps"),
    [
        (1, 1, 1, 1, [999]),
        (3, 3, 1, 5, [0, 500, 999]),
        (8, 1, 3, 2, [0]),
        (16, 2, 3, 1, [0, 999]),
        (17, 1, 1, 3, [999]),
        (24, 2, 1, 2, [1]),
    ],
)
def test_fused_noise(frames, batch, height, width, timesteps, dtype):
    fusion = fusion_of(num_frames=frames)
    arguments = inputs(batch, 8, frames, height, width, timesteps, dtype=dtype)
    noise = fuse_noise(fusion, *arguments, compute=dtype, tile=LARGE)
    assert noise.dtype == dtype and noise.shape == arguments[0].shape
    assert rms_ratio(noise, in_double(fusion, arguments)) <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("preset", [DEMO, TRIP_256], ids=["demo", "trip-256"])
def test_fused_noise_at_the_models_own_sizes(preset, dtype):
    fusion = fusion_of(tnf=preset.trip.tnf, latent_channels=preset.trip.latent_channels, num_frames=16)
    arguments = inputs(1, preset.trip.latent_channels, 16, 1, 3, [200], preset.trip.schedule, dtype)
    assert rms_ratio(fuse_noise(fusion, *arguments, compute=dtype), in_double(fusion, arguments)) <= BOUNDS[dtype]


@pytest.mark.parametrize("fusion", ["tnf", "linear", "none"])
@pytest.mark.parametrize(("normalize_prior", "gate"), [(True, "frame"), (False, "frame"), (True, "matched")])
def test_every_fusion_in_both_forms_of_the_prior_and_with_every_gate(fusion, normalize_prior, gate):
    model = fusion_of(fusion=fusion, normalize_prior=normalize_prior, gate=gate)
    arguments = inputs(2, 8, 5, 2, 3, [0, 700])
    assert rms_ratio(fuse_noise(model, *arguments, tile=LARGE), in_double(model, arguments)) <= 1e-5


def test_every_element_is_written(monkeypatch):
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **_: torch.full_like(tensor, float("nan")))
    assert fuse_noise(fusion_of(), *inputs(2, 8, 5, 3, 5, [0, 999]), tile=LARGE).isfinite().all()


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3),
    st.sampled_from([8, 10, 16]), st.integers(1, 3), st.sampled_from(list(BOUNDS)), st.integers(0, 999),
)  # fmt: skip
def test_fused_noise_of_any_shape(batch, channels, frames, height, width, heads, per_head, layers, dtype, timestep):
    fusion = fusion_of(
        num_frames=frames, latent_channels=channels, hidden_size=heads * per_head, num_heads=heads, num_layers=layers
    )
    arguments = inputs(batch, channels, frames, height, width, [timestep], dtype=dtype)
    assert (
        rms_ratio(fuse_noise(fusion, *arguments, compute=dtype, tile=LARGE), in_double(fusion, arguments))
        <= BOUNDS[dtype]
    )


def test_one_timestep_serves_the_whole_batch():
    fusion, arguments = fusion_of(), inputs(3, 8, 5, 2, 2, [400, 400, 400])
    shared = (*arguments[:3], *(tensor[:1] for tensor in arguments[3:]))
    assert torch.equal(fuse_noise(fusion, *shared, tile=LARGE), fuse_noise(fusion, *arguments, tile=LARGE))


def test_inputs_need_not_be_contiguous():
    fusion, arguments = fusion_of(), inputs(2, 8, 5, 2, 3, [3, 300])
    strided = [tensor.transpose(1, -1).contiguous().transpose(1, -1) for tensor in arguments[:3]]
    assert not strided[0].is_contiguous()
    assert torch.equal(
        fuse_noise(fusion, *strided, *arguments[3:], tile=LARGE), fuse_noise(fusion, *arguments, tile=LARGE)
    )


def test_shapes_that_do_not_belong_together_are_refused():
    latents, first, residual, *rest = inputs(2, 8, 5, 2, 3, [3, 300])
    with pytest.raises(ValueError, match="found shapes"):
        fuse_noise(fusion_of(), latents, first[:1], residual, *rest)


def test_the_gradient_is_the_references():
    fusion, arguments = fusion_of(), inputs(2, 8, 5, 2, 3, [100, 600])
    gradients = []
    for op in (fusion, lambda *tensors: fuse_noise(fusion, *tensors, tile=LARGE)):
        latents, first, residual, *rest = arguments
        fusion.zero_grad()
        residual = residual.detach().requires_grad_()
        op(latents, first, residual, *rest).square().mean().backward()
        assert latents.grad is None
        gradients.append([residual.grad, *(parameter.grad for parameter in fusion.parameters())])
    for expected, gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


def test_a_model_trains_through_the_kernel():
    model = tiny_model(num_frames=3, height=16, width=16)
    latents, _, _, _, _, timestep = inputs(1, 8, 3, 2, 2, [300])
    text = torch.zeros(1, model.config.text_length, model.config.text_width)
    gradients = []
    for fused_kernel in (False, True):
        model.zero_grad()
        Denoiser(model, load_config("demo").loss, fused_kernel)(
            latents, torch.zeros_like(latents), timestep, text=text
        ).backward()
        gradients.append(model.residual_unet.unet.conv_out.weight.grad)
    assert rms_ratio(gradients[1], gradients[0]) < 1e-5


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(("batch", "frames", "height", "width"), [(1, 5, 3, 5), (2, 16, 1, 3), (3, 1, 2, 2)])
def test_fused_step(batch, frames, height, width, dtype):
    fusion = fusion_of(num_frames=frames)
    buffers = step_buffers(batch, 8, frames, height, width)
    double = {
        name: tensor.double() if name != "table" and tensor.is_floating_point() else tensor.clone()
        for name, tensor in buffers.items()
    }
    reference = tiny_copy(fusion).double()
    for timestep, row in ((749, 2), (499, 3), (249, 4), (0, 5)):
        fused_step(fusion, **buffers, compute=dtype, tile=LARGE)
        fused_step_ref(reference, **double)
        assert int(buffers["timestep"]) == timestep == int(double["timestep"]) and int(buffers["step"]) == row == int(
            double["step"]
        )
        assert torch.equal(buffers["latents"][:batch], buffers["latents"][batch:])
        assert max(rms_ratio(buffers[name], double[name]) for name in ("latents", "history")) <= BOUNDS[dtype]
        buffers["residual_noise"].copy_(
            torch.randn(buffers["residual_noise"].shape, generator=torch.Generator().manual_seed(row))
        )
        double["residual_noise"].copy_(buffers["residual_noise"])
    assert torch.equal(buffers["latents"][:, :, 0], buffers["first_frame"]), "the clip starts with the picture"


def test_the_beginning_only_holds_frame_1():
    fusion = fusion_of()
    buffers = step_buffers(1, 8, 5, 2, 3)
    buffers["step"].zero_()
    before = buffers["latents"].clone()
    fused_step(fusion, **buffers)
    assert torch.equal(buffers["latents"][:, :, 1:], before[:, :, 1:]) and int(buffers["timestep"]) == 999
    signal, sigma = (
        buffers["table"][0, COLUMNS.index(f"next_{name}")] for name in ("sqrt_alpha_bar", "sqrt_one_minus_alpha_bar")
    )
    expected = signal * buffers["first_frame"][:1] + sigma * buffers["first_noise"]
    torch.testing.assert_close(buffers["latents"][:1, :, 0], expected)


def packed_tensor(weights, shape, dtype, name):
    """One tensor of the packed weights, the modulation that of the first timestep."""
    tensor, start = packed_tensors(shape, dtype)[name], getattr(weight_layout(shape, dtype), name)
    return weights[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)


def test_weights_are_padded_with_zeros_and_folded():
    fusion = fusion_of(hidden_size=12, num_heads=3)
    shape = shape_of(fusion, 8, 5)
    assert (shape.width_p, shape.head_p, shape.context_p, shape.channels_p, shape.frames) == (16, 16, 16, 16, 16)
    packed = {dtype: pack(fusion, shape, dtype, torch.arange(2)) for dtype in (*BOUNDS, torch.float64)}
    query, qkv = (
        packed_tensor(packed[torch.float16], shape, torch.float16, name) for name in ("cross_query", "self_qkv")
    )
    assert query.shape == (2, 3, 1, 16, 16) and qkv.shape == (2, 3, 3, 1, 16, 16) and qkv.dtype == torch.float16
    assert not qkv[..., 12:, :].any() and not qkv[..., 4:].any() and qkv[..., :12, :4].all()
    two_parts, exact = (
        packed_tensor(packed[dtype], shape, dtype, "self_out") for dtype in (torch.float32, torch.float64)
    )
    assert two_parts.shape == (2, 3, 2, 16, 16) and exact.shape == (2, 3, 1, 16, 16)
    assert (two_parts.double().sum(-3) - exact[..., 0, :, :]).abs().max() < 1e-7


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("layers", [0, 3])
def test_packed_tensors_lie_one_after_the_other(layers, dtype):
    fusion = fusion_of(fusion="tnf" if layers else "linear", num_layers=layers)
    shape = shape_of(fusion, 8, 5)
    layout, end = weight_layout(shape, dtype), 0
    for name, tensor in packed_tensors(shape, dtype).items():
        start = getattr(layout, name)
        assert start % 256 == 0 and end <= start < end + 256
        end = start + tensor.nbytes
    modulation = packed_tensors(shape, dtype)["modulation"]
    assert name == "modulation" and modulation.dtype == torch.float32 and modulation.shape == (layers, 2, 2, 16)
    weights = pack(fusion, shape, dtype, torch.arange(7))
    assert weights.dtype == torch.uint8 and len(weights) == end + 6 * modulation.nbytes


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("kind", ["tnf", "linear"])
def test_the_kernels_read_nothing_but_the_packed_tensors(monkeypatch, kind, dtype):
    def between_nans(fusion, shape, compute, timesteps):
        weights, layout = pack(fusion, shape, compute, timesteps), weight_layout(shape, compute)
        tensors = packed_tensors(shape, compute)
        whole = torch.full((len(weights) + 512,), 0xFF, dtype=torch.uint8)  # NaN as fp16, as bf16 and as fp32
        for name, tensor in tensors.items() if kind == "tnf" else [("gate", tensors["gate"])]:
            start = getattr(layout, name)
            end = len(weights) if name == "modulation" else start + tensor.nbytes
            whole[256 + start : 256 + end] = weights[start:end]
        return whole[256:-256]

    monkeypatch.setattr("trip_kernels.fuse_noise.pack", between_nans)
    monkeypatch.setattr("trip_kernels.fused_step.pack", between_nans)
    fusion, arguments = fusion_of(fusion=kind), inputs(2, 8, 5, 2, 3, [0, 999])
    noise = fuse_noise(fusion, *arguments, compute=dtype, tile=LARGE)
    assert rms_ratio(noise, in_double(fusion, arguments)) <= BOUNDS[dtype]
    buffers = step_buffers(1, 8, 5, 2, 3)
    fused_step(fusion, **buffers, compute=dtype, tile=LARGE)
    assert buffers["latents"].isfinite().all() and buffers["history"].isfinite().all()


def test_machine_code_without_a_gpu(tmp_path):
    said = []
    shape = tile_shape(8, 5, True, False, 16, 4, 2)
    (step,) = compile_fused_step(shape, torch.float16, ["9.0"], said.append)
    assert step.cubin[:4] == b"\x7fELF" and step.spilled_bytes == 0 and 0 < step.registers <= 255
    assert step.parameters[:3] == ("latents", "first_frame", "first_noise")
    assert step.parameters[-5:] == ("weights", "batch", "pixels", "scratch", "scratch")
    assert said == [f"fused step: {step.describe()}"] and "0 bytes spilled" in said[0]
    # What Triton's JIT launches is the same code, at batch 1 and with any number of pixels.
    cubins = jit_cubins(shape, torch.float16, step.tile, "9.0", [(1, 1), (1, 64), (16, 64), (3, 5)], tmp_path)
    assert cubins == [step.cubin] * 4


def test_unknown_compute_capabilities_are_named():
    with pytest.raises(ValueError, match=r"found 9\.9, expected"):
        compile_fused_step(tile_shape(8, 5, True, False, 16, 4, 2), torch.float16, ["9.9"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("config", [DEMO.trip, TRIP_256.trip], ids=["demo", "trip-256"])
def test_no_gpu_spills_much_at_the_models_own_sizes(config, dtype):
    tnf = config.tnf
    shape = tile_shape(
        config.latent_channels,
        config.num_frames,
        config.normalize_prior,
        config.gate == "matched",
        tnf.hidden_size,
        tnf.num_heads,
        tnf.num_layers,
    )
    said = []
    steps = compile_fused_step(shape, dtype, note=said.append)
    assert [step.capability for step in steps] == list(CAPABILITIES)
    assert all(step.spilled_bytes <= ACCEPTED_SPILL for step in steps)
    assert all(f"{step.spilled_bytes} bytes spilled" in line for step, line in zip(steps, said, strict=True))


@pytest.mark.slow
def test_a_spill_fails_the_build():
    with pytest.raises(RuntimeError, match="found no tile that spills at most 32 bytes"):
        compile_fused_step(tile_shape(4, 24, True, False, 256, 4, 2), torch.float32, ["8.6"])
