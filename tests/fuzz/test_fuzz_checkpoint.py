"""Checkpoint folders: what is accepted is a whole model, each of whose tensors came from its file."""

import json
import shutil

import pytest
import torch
from fuzzing import damaged, fuzz_area, hostile_json, mutated_json
from hypothesis import strategies as st

from trip_reference import checkpoint
from trip_reference.control import CONFIG
from trip_reference.control import WEIGHTS as WEIGHTS_FILE
from trip_reference.data.tokens import tokenizer_of
from trip_rt.tokenizer import PromptTokenizer

CONFIGS = ["trip_config.json", "unet/config.json", "vae/config.json", "text_encoder/config.json"]
WEIGHTS = ["unet", "vae", "text_encoder", "fusion"]


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "copy")


@pytest.fixture(scope="module")
def original(tiny_checkpoint):
    return checkpoint.from_pretrained(tiny_checkpoint)


def check_whole(model, original):
    """The weights are the file's, bit for bit, and the parts work together."""
    expected = original.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, expected[name]), name
    config = model.config
    with torch.no_grad():
        text = model.encode_text(torch.zeros(1, config.text_length, dtype=torch.int64))
        latents = torch.zeros(1, config.latent_channels, config.num_frames, 2, 2)
        assert model.fusion.gate is None or len(model.fusion.gate) == config.num_frames
        noise = model.residual_unet(latents[:, :, :2], latents[:, :, 0], torch.tensor([3]), text)
    assert text.isfinite().all() and noise.isfinite().all()


@fuzz_area("checkpoint configs", quick=24, full=600)
@pytest.mark.parametrize("name", CONFIGS)
def test_configs(fuzz, folder, original, name):
    path = folder / name
    valid = [json.loads(path.read_text())]

    def load(data):
        path.write_bytes(data)
        check_whole(checkpoint.from_pretrained(folder), original)

    fuzz(mutated_json(valid), load, folder=folder, share=1 / len(CONFIGS))


@fuzz_area("checkpoint weights", quick=24, full=600)
@pytest.mark.parametrize("part", WEIGHTS)
def test_weights(fuzz, folder, original, part):
    (path,) = (folder / part).glob("*.safetensors")
    valid = path.read_bytes()
    length = int.from_bytes(valid[:8], "little")
    of = dict(
        unet=lambda model: model.residual_unet.state_dict(),
        vae=lambda model: model.vae.state_dict(),
        text_encoder=lambda model: model.text_encoder.state_dict(),
        fusion=lambda model: model.fusion.state_dict(),
    )[part]
    header, numbers = json.loads(valid[8 : 8 + length]), valid[8 + length :]

    def load(data):
        path.write_bytes(data)
        loaded = checkpoint.from_pretrained(folder, only=part)
        # Numbers may have changed, but each tensor has its shape, and they are numbers.
        for (name, tensor), expected in zip(of(loaded).items(), of(original).values(), strict=True):
            assert tensor.shape == expected.shape and tensor.dtype == torch.float32, name
            assert tensor.isfinite().all(), name

    headers = hostile_json([header]).map(lambda text: len(text).to_bytes(8, "little") + text + numbers)
    fuzz(headers | damaged([valid]), load, folder=folder, share=1 / len(WEIGHTS))


@fuzz_area("controls", quick=24, full=600)
@pytest.mark.parametrize("file", [CONFIG, WEIGHTS_FILE])
def test_controls(fuzz, folder, tiny_control_folder, file):
    control = shutil.copytree(tiny_control_folder, folder / "control")
    expected = checkpoint.from_pretrained(folder, "control", control).control.state_dict()
    valid = (control / file).read_bytes()

    def load(data):
        (control / file).write_bytes(data)
        model = checkpoint.from_pretrained(folder, "control", control)
        for name, tensor in model.control.state_dict().items():
            assert tensor.shape == expected[name].shape and tensor.isfinite().all(), name
        config = model.config
        features = model.encode_control(
            torch.zeros(1, 3, *config.latent_shape[1:]), torch.zeros(1, *config.frame_shape)
        )
        assert features.shape == (1, config.num_frames + 1, 8, *config.latent_shape[2:])

    inputs = mutated_json([json.loads(valid)]) if file == CONFIG else damaged([valid])
    fuzz(inputs, load, folder=folder, share=0.5)


@pytest.mark.filterwarnings("ignore:this model knows no such words", "ignore:the prompt")
@fuzz_area("tokenizer.json", quick=60, full=1500)
def test_tokenizers(fuzz, folder, original):
    path = folder / "tokenizer" / "tokenizer.json"
    valid = [json.loads(path.read_text())]

    def load(data):
        path.write_bytes(data)
        text = checkpoint.load_tokenizer_json(folder)
        config = original.config
        for ids in (
            tokenizer_of(text)(["", "a ball", "x" * 1000, "a ball " * 100]),
            torch.tensor(PromptTokenizer(text, config.text_length, original.vocabulary)(["", "a ball rolls"])),
        ):
            assert ids.shape[1] == config.text_length
            assert ids.min() >= 0 and ids.max() < original.vocabulary

    fuzz(mutated_json(valid) | st.sampled_from([b"", b"{}", b"[]"]), load, folder=folder)
