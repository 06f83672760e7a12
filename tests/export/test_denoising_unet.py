"""The UNet as it is exported against the UNet as it is trained: same weights, same result."""

import copy

import pytest
import torch
from tiny import TINY, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from trip_export.components import component, context_width, features_shape
from trip_export.denoising_unet import DenoisingUNet, TextProjection
from trip_reference.feature_reuse import FeatureReuse
from trip_reference.model import build_unet
from trip_reference.unet import ResidualUNet
from trip_rt.accuracy import relative_errors

DEEP = dict(
    down_block_types=("DownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"),
    up_block_types=("UpBlock3D", "CrossAttnUpBlock3D", "UpBlock3D"),
    block_out_channels=(8, 16, 16),
    layers_per_block=2,
    attention_head_dim=4,
    norm_num_groups=4,
)


def network(first_frame, architecture):
    """A network with no dead path, and inputs for two clips' two halves."""
    config = tiny_model(first_frame=first_frame).config
    torch.manual_seed(0)
    unet = ResidualUNet(build_unet(config, architecture), first_frame).eval().requires_grad_(False)
    for parameter in unet.parameters():
        if not parameter.any():
            parameter.normal_(std=0.05)
    latents, first = torch.randn(2, config.latent_channels, 5, 4, 8), torch.randn(2, config.latent_channels, 4, 8)
    text = torch.randn(4, config.text_length, config.text_width)
    return unet, (torch.cat([latents, latents]), torch.cat([first, first]), torch.tensor([421]), text)


def close(found, expected):
    assert found.shape == expected.shape
    assert relative_errors(found.numpy(), expected.numpy())[1] < 2e-6


@pytest.mark.parametrize("first_frame", ["start", "end", "channel"])
@pytest.mark.parametrize("architecture", [TINY.unet, DEEP], ids=["tiny", "deep"])
def test_the_arranged_network_is_the_trained_one(first_frame, architecture):
    unet, (latents, first, timestep, text) = network(first_frame, architecture)
    context = TextProjection(unet.unet)(text)
    expected = unet(latents, first, timestep, text)
    with FeatureReuse(unet) as reusing:
        reusing(latents, first, torch.tensor([300]), text, shallow=False)
        features = reusing.features
        reused = reusing(latents, first, timestep, text, shallow=True)
        whole = reusing(latents, first, timestep, text, shallow=False)
        of_whole = reusing.features
    assert torch.equal(whole, expected)
    assert float((reused - expected).square().mean()) > 1e-6, "the features matter"

    arranged = DenoisingUNet(copy.deepcopy(unet), guided=True, shallow=False)
    found, found_features = arranged(latents, first, timestep, context)
    close(found, expected)
    close(found_features, of_whole)
    unguided, _ = DenoisingUNet(copy.deepcopy(unet), guided=False, shallow=False)(
        latents[2:], first[2:], timestep, context[2:]
    )
    close(unguided, expected[2:])
    (shallow,) = DenoisingUNet(copy.deepcopy(unet), guided=True, shallow=True)(
        latents, first, timestep, context, features
    )
    close(shallow, reused)
    (conditional,) = DenoisingUNet(unet, guided=False, shallow=True)(
        latents[2:], first[2:], timestep, context[2:], features[2:]
    )
    close(conditional, reused[2:])


def test_no_weight_is_lost_or_added():
    unet, _ = network("start", DEEP)
    expected = sum(parameter.numel() for parameter in unet.parameters())
    projected = sum(parameter.numel() for parameter in TextProjection(unet.unet).parameters())
    assert (
        sum(parameter.numel() for parameter in DenoisingUNet(unet, True, False).parameters()) == expected
        and projected > 0
    )


def test_shapes_are_those_of_the_manifest():
    model = tiny_model()
    for name in ("unet", "unet_unguided", "text_projection"):
        part = component(copy.deepcopy(model), name, 2, 1)
        with torch.no_grad():
            made = part.module(*part.inputs.values())
        shapes = [tuple(tensor.shape) for tensor in (made if isinstance(made, tuple) else (made,))]
        if name == "text_projection":
            assert shapes == [(4, model.config.text_length, context_width(model))]
        else:
            assert shapes[1] == (shapes[0][0], *features_shape(model))


def test_what_is_shared_is_computed_once():
    unet, (latents, first, timestep, text) = network("start", TINY.unet)
    context = TextProjection(unet.unet)(text)

    def flops(module, *inputs):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(*inputs)
        return counter.get_total_flops()

    plain = flops(unet, latents, first, timestep, text)
    guided = flops(DenoisingUNet(copy.deepcopy(unet), True, False), latents, first, timestep, context)
    unguided = flops(DenoisingUNet(copy.deepcopy(unet), False, False), latents[2:], first[2:], timestep, context[2:])
    with FeatureReuse(unet) as reusing:
        reusing(latents, first, timestep, text, shallow=False)
    shallow = flops(DenoisingUNet(unet, True, True), latents, first, timestep, context, reusing.features)
    assert shallow < unguided < guided < plain < 2 * plain and guided < 2 * unguided
