import dataclasses

import pytest
import torch
from diffusers import UNet3DConditionModel
from tiny import TINY, tiny_model
from torch import nn

from trip_reference.model import build_unet
from trip_reference.presets import DEMO, TRIP_256
from trip_reference.temporal_conv import TemporalConv
from trip_reference.unet import ResidualUNet, temporal_convs_as_2d


def test_temporal_conv_equals_conv3d():
    torch.manual_seed(0)
    conv = nn.Conv3d(6, 5, (3, 1, 1), padding=(1, 0, 0))
    x = torch.randn(2, 6, 7, 3, 4)
    expected = conv(x)
    conv.__class__ = TemporalConv
    torch.testing.assert_close(conv(x), expected)


def test_every_3d_convolution_is_replaced_and_the_state_dict_is_diffusers():
    torch.manual_seed(0)
    plain = build_unet(TINY.trip, TINY.unet)
    names = dict(plain.state_dict())
    rewritten = temporal_convs_as_2d(plain)
    assert not [m for m in rewritten.modules() if type(m) is nn.Conv3d]
    assert any(isinstance(m, TemporalConv) for m in rewritten.modules())
    assert {k: v.shape for k, v in names.items()} == {k: v.shape for k, v in rewritten.state_dict().items()}


@pytest.mark.parametrize("condition", ["start", "end", "channel"])
def test_every_frame_comes_back_and_sees_the_first_one_and_the_text(condition):
    model = tiny_model(first_frame=condition)
    config = model.config
    torch.manual_seed(1)
    latents = torch.randn(2, config.latent_channels, config.num_frames, 4, 6)
    first, text, timestep = (
        latents[:, :, 0] + 1,
        torch.randn(2, config.text_length, config.text_width),
        torch.tensor([300]),
    )
    with torch.no_grad():
        out = model.residual_unet(latents, first, timestep, text)
        assert out.shape == latents.shape
        assert not torch.allclose(out, model.residual_unet(latents, first + 1, timestep, text), atol=1e-4)
        assert not torch.allclose(out, model.residual_unet(latents, first, timestep, text + 1), atol=1e-4)
        assert not torch.allclose(out, model.residual_unet(latents, first, timestep + 400, text), atol=1e-4)
        per_sample = model.residual_unet(latents, first, torch.tensor([300, 300]), text)
    torch.testing.assert_close(out, per_sample)


@pytest.mark.parametrize(("condition", "position"), [("start", 0), ("end", -1)])
def test_the_clean_frame_is_added_along_time_and_its_output_dropped(condition, position):
    seen = {}

    class Recorder(nn.Module):
        def forward(self, sample, timestep, encoder_hidden_states):
            seen["sample"] = sample
            return type("Output", (), {"sample": sample * 2})

    module = ResidualUNet(Recorder(), condition)
    latents, first = torch.randn(1, 4, 5, 2, 2), torch.randn(1, 4, 2, 2)
    torch.testing.assert_close(module(latents, first, torch.tensor([1]), None), latents * 2)
    assert seen["sample"].shape[2] == 6
    torch.testing.assert_close(seen["sample"][:, :, position], first)


def test_full_size_unet_is_modelscopes():
    with torch.device("meta"):
        unet = build_unet(TRIP_256.trip, TRIP_256.unet)
        stacked = build_unet(dataclasses.replace(TRIP_256.trip, first_frame="channel"), TRIP_256.unet)
    assert sum(p.numel() for p in unet.parameters()) == 1_411_233_860
    assert stacked.conv_in.in_channels == 8
    assert isinstance(unet, UNet3DConditionModel)


def test_demo_unet_keeps_the_full_sizes_layout():
    assert set(DEMO.unet) == set(TRIP_256.unet)
    assert DEMO.unet["down_block_types"][-1] == TRIP_256.unet["down_block_types"][-1] == "DownBlock3D"
