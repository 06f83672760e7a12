import dataclasses
import json

import pytest
import torch
from diffusers import AutoencoderKL, UNet3DConditionModel
from tiny import TINY, save_published, tiny_model
from tokenizers import Tokenizer

from trip_reference import checkpoint
from trip_reference.presets import PRESETS
from trip_reference.training.config import load_config
from trip_reference.training.start import start_model
from trip_rt import InputError


def test_a_checkpoint_gives_the_same_weights_and_config_back(tiny_checkpoint):
    model, loaded = tiny_model(), checkpoint.from_pretrained(tiny_checkpoint)
    assert loaded.config == model.config
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)


def test_half_precision_on_disk_loads_as_fp32(tmp_path):
    model = tiny_model()
    checkpoint.save_pretrained(model, "{}", tmp_path / "half", torch.float16)
    loaded = checkpoint.from_pretrained(tmp_path / "half")
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            assert loaded.state_dict()[name].dtype == torch.float32
            torch.testing.assert_close(loaded.state_dict()[name], tensor.half().float(), rtol=0, atol=0)
    assert next(model.parameters()).dtype == torch.float32  # saving changes nothing


def test_parts_are_in_their_libraries_own_layout(tiny_checkpoint):
    index = json.loads((tiny_checkpoint / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet3DConditionModel"]
    assert (
        UNet3DConditionModel.from_pretrained(tiny_checkpoint / "unet", low_cpu_mem_usage=False).config.in_channels
        == TINY.trip.latent_channels
    )
    assert (
        AutoencoderKL.from_pretrained(tiny_checkpoint / "vae", low_cpu_mem_usage=False).config.scaling_factor
        == TINY.trip.scaling_factor
    )
    assert not list(tiny_checkpoint.rglob("*.bin"))
    assert not list(tiny_checkpoint.glob(".*"))


def test_saving_over_a_checkpoint_replaces_it(tmp_path):
    checkpoint.save_pretrained(tiny_model(seed=0), "{}", tmp_path)
    checkpoint.save_pretrained(tiny_model(seed=1), "{}", tmp_path)
    expected = tiny_model(seed=1).state_dict()
    for name, tensor in checkpoint.from_pretrained(tmp_path).state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    "broken", ["model_index.json", "trip_config.json", "unet/config.json", "fusion/diffusion_pytorch_model.safetensors"]
)
def test_what_is_missing_is_named(tiny_checkpoint, tmp_path, broken):
    import shutil

    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    (folder / broken).unlink()
    with pytest.raises(InputError, match=broken.split("/")[0]) as caught:
        checkpoint.from_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["unet", "fusion", "text_encoder", "vae"])
def test_truncated_weights_are_named(tiny_checkpoint, tmp_path, part):
    import shutil

    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    (weights,) = (folder / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=part):
        checkpoint.from_pretrained(folder)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return save_published(tmp_path_factory.mktemp("published"))


@pytest.mark.parametrize("condition", ["start", "channel"])
def test_a_model_is_assembled_from_published_parts(published, tmp_path, condition):
    modelscope, stable_diffusion = published
    config = dataclasses.replace(TINY.trip, first_frame=condition)
    model, tokenizer_json = checkpoint.assemble(config, modelscope, stable_diffusion)
    source = UNet3DConditionModel.from_pretrained(modelscope / "unet", low_cpu_mem_usage=False).eval()
    torch.manual_seed(0)
    latents, text = (
        torch.randn(1, config.latent_channels, config.num_frames, 4, 6),
        torch.randn(1, config.text_length, config.text_width),
    )
    with torch.no_grad():
        found = model.residual_unet(latents, latents[:, :, 0], torch.tensor([9]), text)
        if condition == "channel":  # new channels of zeros: it starts as the published network
            torch.testing.assert_close(found, source(latents, 9, text).sample)
    assert found.shape == latents.shape
    checkpoint.save_pretrained(model, tokenizer_json, tmp_path)
    loaded = checkpoint.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.residual_unet.unet.conv_in.weight, model.residual_unet.unet.conv_in.weight)
    ids = Tokenizer.from_str(checkpoint.load_tokenizer_json(tmp_path)).encode("ab " * 40).ids
    assert len(ids) == config.text_length
    assert loaded.encode_text(torch.tensor([ids])).shape == (1, config.text_length, config.text_width)


def test_parts_that_do_not_fit_are_refused(published):
    with pytest.raises(InputError, match="cross_attention_dim: found 16, expected 1024"):
        checkpoint.assemble(dataclasses.replace(TINY.trip, text_width=1024), *published)
    with pytest.raises(InputError, match="unet: not found"):
        checkpoint.assemble(TINY.trip, published[1], published[1])


def test_a_checkpoint_does_not_say_where_its_parts_came_from(tiny_checkpoint, tmp_path):
    checkpoint.save_pretrained(
        checkpoint.from_pretrained(tiny_checkpoint), checkpoint.load_tokenizer_json(tiny_checkpoint), tmp_path / "again"
    )
    assert not [path for path in (tmp_path / "again").rglob("*.json") if str(tiny_checkpoint) in path.read_text()]


def test_training_starts_from_published_parts(published, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    modelscope, stable_diffusion = published
    words = [
        "model.preset=tiny",
        f"model.modelscope={str(modelscope)!r}",
        f"model.stable_diffusion={str(stable_diffusion)!r}",
    ]
    (model, tokenizer_json), (again, _) = (
        start_model(load_config("trip-256", None, words).model, seed=3) for _ in range(2)
    )
    source = UNet3DConditionModel.from_pretrained(modelscope / "unet", low_cpu_mem_usage=False)
    assert all(
        torch.equal(a, b) for a, b in zip(model.residual_unet.unet.parameters(), source.parameters(), strict=True)
    )
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert len(Tokenizer.from_str(tokenizer_json).encode("ab").ids) == TINY.trip.text_length
