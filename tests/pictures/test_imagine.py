"""trip-imagine: pictures by tiny models of each of the four kinds, on to clips, and what it refuses."""

import json
import shutil

import numpy as np
import pytest
from once import made_once
from PIL import Image
from tiny_pipelines import tiny_pipeline

from trip_pictures import pipelines
from trip_pictures.command import main
from trip_pictures.pictures import control_map, make_picture
from trip_rt import InputError

WORDS = "a red ball"
KINDS = ("sd", "sdxl", "edit", "controlnet")


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return made_once(
        tmp_path_factory, "pipelines", lambda folder: {kind: tiny_pipeline(kind, folder / kind) for kind in KINDS}
    )


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo = np.full((40, 60, 3), 255, np.uint8)
    photo[10:30, 20:40] = (200, 30, 30)
    Image.fromarray(photo).save("photo.png")
    return tmp_path


@pytest.fixture
def imagine(here, capsys):
    def run(*words):
        code = main([*map(str, words), "--picture-steps", "2"])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def refuse(imagine):
    def run(*words):
        code, out, err = imagine(*words)
        assert code == 2 and not out and len(err.strip().splitlines()) == 1, err
        assert "Traceback" not in err
        return err

    return run


@pytest.mark.parametrize(("kind", "options"), [
    ("sd", []),
    ("sdxl", []),
    ("edit", ["--edit", "photo.png"]),
    ("sd", ["--control", "canny", "photo.png", "--control-model", "controlnet"]),
    ("sd", ["--control", "depth", "photo.png", "--control-model", "controlnet"]),
])  # fmt: skip
def test_a_picture(imagine, models, kind, options):
    options = [models.get(word, word) for word in options]
    code, out, err = imagine(WORDS, "--model", models[kind], "-o", "made.png", *options, "--json")
    figures = json.loads(out)
    assert code == 0 and figures["picture"] == "made.png" and figures["words"] == WORDS, err
    made = np.asarray(Image.open("made.png"))
    assert made.shape[2] == 3 and f"{made.shape[1]}x{made.shape[0]}" == figures["size"] and made.std() > 1
    imagine(WORDS, "--model", models[kind], "-o", "again.png", *options)
    np.testing.assert_array_equal(np.asarray(Image.open("again.png")), made)
    imagine(WORDS, "--model", models[kind], "-o", "other.png", *options, "--seed", 5)
    assert (np.asarray(Image.open("other.png")) != made).any()


def test_what_is_followed_matters(models, here):
    pipeline = pipelines.open_pipeline(str(models["sd"]), "control", str(models["controlnet"]))
    network = pipeline.controlnet
    for layer in (network.controlnet_cond_embedding.conv_out, *network.controlnet_down_blocks):
        layer.weight.data.normal_()  # they begin at zero, and would say nothing
    blank = np.full((40, 60, 3), 255, np.uint8)
    one, other = (
        make_picture(pipeline, WORDS, control=("canny", picture), steps=2) for picture in ("photo.png", blank)
    )
    assert (one != other).any()


def test_control_maps(here):
    photo = np.asarray(Image.open("photo.png"))
    edges = control_map("canny", photo)
    assert edges.shape == photo.shape and set(np.unique(edges)) == {0, 255}
    assert edges[9:12, 25:35].any() and not edges[:8].any() and not edges[14:26, 24:36].any()
    depth = control_map("depth", photo)
    assert (depth[..., 0] == np.asarray(Image.open("photo.png").convert("L"))).all()


def test_from_words_to_a_clip(imagine, models, tiny_bundle):
    then = ["--then", "a red ball rolls to the right", "--bundle", tiny_bundle, "--steps", 2, "--speed", "fast"]
    code, out, err = imagine(WORDS, "--model", models["sd"], *then, "-o", "clip.webp", "--picture", "kept.png")
    assert code == 0 and "clip.webp: 5 frames at 8 a second" in out and "kept.png" in out, err
    with Image.open("clip.webp") as clip:
        assert clip.n_frames == 5 and clip.size == (48, 32)
    assert Image.open("kept.png").size == (64, 64)


def test_size_and_what_is_not_wanted(imagine, models):
    given = [WORDS, "--model", models["sd"], "-o", "made.png"]
    assert imagine(*given, "--picture-size", "50x33")[0] == 0
    assert Image.open("made.png").size == (48, 32)
    imagine(*given, "--picture-guidance-scale", "5")
    plain = np.asarray(Image.open("made.png"))
    imagine(*given, "--picture-guidance-scale", "5", "--picture-negative-prompt", "a blue square")
    assert (np.asarray(Image.open("made.png")) != plain).any()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["-o", "made.jpg"], "made.jpg: expected a file name ending in .png"),
        (["-o", "no/made.png"], "in a folder to write in"),
        (["-o", "clip.mp4", "--then", "it falls"], "found --then without --bundle"),
        (["-o", "made.png", "--bundle", "bundle"], "found --bundle without --then"),
        (["-o", "made.png", "--control", "canny", "photo.png"], "found one of --control and --control-model"),
        (["-o", "made.png", "--control", "pose", "photo.png", "--control-model", "x"], "control: found 'pose'"),
        (["-o", "made.png", "--edit", "none.png"], "none.png"),
        (["-o", "made.png", "--seed", "-1"], "seed: found -1"),
        (["-o", "made.png", "--picture-guidance-scale", "101"], "picture guidance scale: found 101"),
        (
            ["-o", "made.png", "--picture-size", "9999x16"],
            "picture size: found 9999, expected a whole number from 8 to 4096",
        ),
        (["-o", "clip.mp4", "--then", "it falls", "--bundle", "none"], "none"),
    ],
)
def test_bad_options(refuse, models, options, says):
    assert says in refuse(WORDS, "--model", models["sd"], *options)


def test_models_of_another_kind(refuse, models):
    edit = refuse(WORDS, "--model", models["sd"], "-o", "made.png", "--edit", "photo.png")
    assert "found a StableDiffusionPipeline, expected an InstructPix2Pix model" in edit
    words = refuse(WORDS, "--model", models["edit"], "-o", "made.png")
    assert "found a StableDiffusionInstructPix2PixPipeline, expected a text-to-image model" in words
    control = ["--control", "canny", "photo.png", "--control-model", models["sd"]]
    assert "cannot be opened" in refuse(WORDS, "--model", models["sd"], "-o", "made.png", *control)


def broken(models, here, change):
    copy = here / "model"
    shutil.copytree(models["sd"], copy)
    change(copy)
    return copy


def pickled(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))


def of_its_own(folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"unet": ["my_code", "Network"]}))


def another_class(folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "AudioLDMPipeline"}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), "found no model_index.json"),
        (lambda folder: (folder / "model_index.json").write_text("{"), "model_index.json"),
        (lambda folder: (folder / "model_index.json").write_text("[]"), "found no _class_name"),
        (lambda folder: shutil.rmtree(folder / "vae"), "found no folder vae"),
        (lambda folder: (folder / "unet" / "config.json").unlink(), "cannot be opened"),
        (pickled, "found pickled weights, unet/diffusion_pytorch_model.bin, expected .safetensors"),
        (of_its_own, "found unet of ['my_code'], expected diffusers' or transformers'"),
        (another_class, "found a AudioLDMPipeline, expected a text-to-image model"),
        (
            lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"\x08" + b"\0" * 40),
            "cannot be opened",
        ),
    ],
)
def test_broken_and_hostile_models(refuse, models, here, change, says):
    assert says in refuse(WORDS, "--model", broken(models, here, change), "-o", "made.png")


def test_a_hub_out_of_reach(refuse, monkeypatch):
    import diffusers

    def unreachable(*_, **__):
        raise OSError("We couldn't connect to the hub\nto load the files")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", unreachable)
    said = refuse(WORDS, "--model", "some/model", "-o", "made.png")
    assert "some/model: cannot be fetched from the hub (We couldn't connect to the hub" in said
    assert "found no such folder, expected one, or a hub id" in refuse(WORDS, "--model", "nowhere", "-o", "made.png")
    assert "found no such folder" in refuse(WORDS, "--model", "http://a/b", "-o", "made.png")


def test_what_the_pipeline_does_not_take_is_one_line(models):
    pipeline = pipelines.open_pipeline(str(models["sd"]), "words")
    with pytest.raises(InputError, match=r"^picture size: found 0x0"):
        make_picture(pipeline, WORDS, size=(0, 0))
