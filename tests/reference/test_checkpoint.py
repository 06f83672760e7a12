import dataclasses
import json
import os
import resource
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, UNet3DConditionModel
from safetensors.torch import load_file, save_file
from tiny import TINY, save_published, tiny_model
from tokenizers import Tokenizer

from trip_reference import checkpoint
from trip_reference.model import build_vae
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
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    (folder / broken).unlink()
    with pytest.raises(InputError, match=broken.split("/")[0]) as caught:
        checkpoint.from_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["unet", "fusion", "text_encoder", "vae"])
def test_truncated_weights_are_named(tiny_checkpoint, tmp_path, part):
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


@pytest.fixture
def copy(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "copy")


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("unet", {"block_out_channels": [8, -1]}, "block_out_channels.*expected int >= 1|Expected `int` >= 1"),
        ("unet", {"layers_per_block": 2**40}, "layers_per_block: found 1099511627776, expected int <= 8"),
        ("unet", {"down_block_types": ["Evil3D", "DownBlock3D"]}, "Evil3D|enum value"),
        ("unet", {"norm_num_groups": 3}, "found sizes of no UNet3DConditionModel"),
        ("unet", {"_class_name": "UNet2DModel"}, "_class_name: found 'UNet2DModel', expected 'UNet3DConditionModel'"),
        ("unet", {"cross_attention_dim": 32}, "expected \\[.*\\] as config.json says"),
        ("vae", {"scaling_factor": -1}, "scaling_factor: found -1, expected float > 0"),
        ("vae", {"scaling_factor": 0.5}, "VAE scaling_factor: found 0.5, expected 1.0"),
        ("vae", {"latent_channels": "8"}, "latent_channels: found '8', expected int"),
        ("text_encoder", {"hidden_size": 2**31}, "hidden_size: found 2147483648, expected int <= 65536"),
        ("text_encoder", {"num_hidden_layers": 2}, "found no tensor encoder.layers.1"),
        ("text_encoder", {"model_type": "llama"}, "model_type: found 'llama', expected 'clip_text_model'"),
    ],
)
def test_a_part_that_is_not_what_its_config_says_is_refused(copy, part, changes, message):
    change_json(copy / part / "config.json", **changes)
    with pytest.raises(InputError, match=message) as caught:
        checkpoint.from_pretrained(copy)
    assert str(copy) in str(caught.value) and str(caught.value).isprintable()


def test_a_config_of_another_size_than_the_parts_is_refused(copy):
    change_json(copy / "trip_config.json", text_length=8)
    with pytest.raises(InputError, match="max_position_embeddings: found 16, expected 8"):
        checkpoint.from_pretrained(copy)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "fusion"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, tensor: {}, "found no tensor"),
        (lambda name, tensor: {name: tensor, "extra": tensor.clone()}, "found the tensor extra"),
        (lambda name, tensor: {name: tensor[None].contiguous()}, "found shape"),
        (lambda name, tensor: {name: tensor.long()}, "found int64, expected fp32"),
        (lambda name, tensor: {name: tensor * torch.nan}, "a number that is not finite"),
    ],
)
def test_weights_that_lack_what_the_config_asks_for_are_refused(copy, part, change, message):
    """The libraries' loaders give random numbers for what is missing."""
    (path,) = (copy / part).glob("*.safetensors")
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file(tensors | change(name, tensors.pop(name)), path)
    with pytest.raises(InputError, match=message) as caught:
        checkpoint.from_pretrained(copy)
    assert str(path) in str(caught.value)


def test_a_config_cannot_have_code_or_other_folders_loaded(copy):
    """What transformers and diffusers would follow: adapters and their base model, remote code, quantisers."""
    for part in ("unet", "vae", "text_encoder"):
        change_json(
            copy / part / "config.json",
            auto_map={"AutoModel": "evil.Evil"},
            quantization_config={"quant_method": "bitsandbytes"},
            _attn_implementation="stranger/kernel",
        )
        (copy / part / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
        (copy / part / "evil.py").write_text("raise SystemExit('run')")
    expected = tiny_model().state_dict()
    for name, tensor in checkpoint.from_pretrained(copy).state_dict().items():
        assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize(
    "name", ["model_index.json", "trip_config.json", "unet/config.json", "vae/diffusion_pytorch_model.safetensors"]
)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_plain_file_is_not_opened(copy, name, make):
    (copy / name).unlink()
    make(copy / name)  # to open a named pipe would wait for somebody to write to it
    with pytest.raises(InputError, match=r"found a (named pipe|folder)"):
        checkpoint.from_pretrained(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["padding"].update(strategy={"Fixed": 2**40}), "padding: found 1099511627776, expected 16"),
        (lambda data: data.update(truncation=None), "truncation: found None, expected 16"),
        (lambda data: data["truncation"].update(stride=99), "not a tokenizer such as CLIP's"),  # the library panics
        (lambda data: data["truncation"].update(strategy="OnlySecond"), "not a tokenizer such as CLIP's"),
        (lambda data: data["padding"].update(pad_to_multiple_of=7), "not a tokenizer such as CLIP's"),
        (lambda data: data["model"]["vocab"].update(surprise=10**6), "the token id 1000000, expected less than"),
        (lambda data: data["padding"].update(pad_id=10**6), "the token id 1000000, expected less than"),
        (lambda data: data.clear(), "not a tokenizer such as CLIP's"),
    ],
)
def test_a_tokenizer_that_does_not_fit_the_text_encoder_is_refused(copy, change, message):
    path = copy / "tokenizer" / "tokenizer.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=message):
        checkpoint.load_tokenizer_json(copy)


def test_published_weights_of_earlier_libraries_are_read(published, tmp_path):
    """transformers' names with text_model and positions, diffusers' former names of attentions."""
    modelscope, stable_diffusion = published
    older = shutil.copytree(stable_diffusion, tmp_path / "sd")
    text = older / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name}": tensor for name, tensor in load_file(text).items()}
    save_file(tensors | {"text_model.embeddings.position_ids": torch.arange(16)[None]}, text)
    one, _ = checkpoint.assemble(TINY.trip, modelscope, stable_diffusion)
    other, _ = checkpoint.assemble(TINY.trip, modelscope, older)
    for a, b in zip(one.text_encoder.parameters(), other.text_encoder.parameters(), strict=True):
        assert torch.equal(a, b)
    torch.manual_seed(0)
    vae = build_vae(TINY.trip, TINY.vae | dict(mid_block_add_attention=True))
    vae.save_pretrained(tmp_path / "vae")
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    former = [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")]
    tensors = load_file(weights)
    for new, old in former:
        tensors = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): t for name, t in tensors.items()}
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in tensors
    save_file(tensors, weights)
    for a, b in zip(vae.parameters(), checkpoint.load_vae(tmp_path).parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_that_finds_no_room_is_one_line_and_leaves_what_was_there(copy):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # a full disk, as far as libraries can tell
    try:
        with pytest.raises(InputError, match=r"larger than files may be here; make room"):
            checkpoint.save_pretrained(tiny_model(seed=1), "{}", copy)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
