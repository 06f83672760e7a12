import importlib
import json
import re
import shutil
import subprocess
import sys

import pytest
from tiny import tiny_model

from trip_engines.parity import Parity
from trip_engines.recording import Reference
from trip_export.command import export_main, parity_main
from trip_reference import checkpoint
from trip_reference.demo_world.text import build_tokenizer
from trip_rt import InputError
from trip_rt.components import REQUIRED, VARIANTS


def test_parity_survives_json(tiny_export):
    parity = tiny_export.parity["onnxruntime"]
    assert Parity.from_json(json.loads(json.dumps(parity.to_json()))) == parity


def test_a_recording_survives_its_file(tiny_bundle, tmp_path):
    (path,) = tiny_bundle.glob("reference-*")
    first = Reference.load(path)
    first.save(tmp_path / "again", "key")
    again = Reference.load(tmp_path / "again", "key")
    assert (again.prompts, again.seeds, again.num_inference_steps) == (first.prompts, first.seeds, 4)
    assert (again.latents == first.latents).all() and (again.frames == first.frames).all()
    counts = {name: len(samples) for name, samples in first.samples.items()}
    assert counts == {name: 4 if name in ("unet", "tnf") else 1 for name in (*REQUIRED, *VARIANTS)}
    for name, samples in first.samples.items():
        for one, other in zip(samples, again.samples[name], strict=True):
            assert set(one.inputs) == set(other.inputs) and (one.output == other.output).all()


@pytest.mark.parametrize("data", [b"", b"nothing", b"\x02\0\0\0\0\0\0\0{}", b"\xff" * 100])
def test_what_is_no_recording(data, tmp_path):
    (tmp_path / "reference").write_bytes(data)
    with pytest.raises(InputError, match="no recording of the model"):
        Reference.load(tmp_path / "reference")


def test_checking_a_bundle(tiny_bundle, tmp_path, capsys):
    assert export_main(["--check", str(tiny_bundle), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["passed"] and figures["parity"]["48x32-5f-b1 onnxruntime"]["latents_psnr"] >= 60
    copy = shutil.copytree(tiny_bundle, tmp_path / "copy")
    (path,) = copy.glob("tnf-*.weights")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert export_main(["--check", str(copy)]) == 2
    assert path.name in capsys.readouterr().err


def test_the_bundle_of_a_checkpoint_passes(tiny_bundle, tiny_checkpoint, capsys):
    assert parity_main([str(tiny_bundle), str(tiny_checkpoint), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["passed"]
    assert max(component["rms_error"] for component in figures["components"].values()) <= 1e-5
    assert min(figures["latents_psnr"], figures["frames_psnr"]) >= 60


def test_a_checkpoint_of_other_weights_fails(tiny_bundle, tmp_path, capsys):
    checkpoint.save_pretrained(tiny_model(seed=1), build_tokenizer(16).to_str(), tmp_path)
    assert parity_main([str(tiny_bundle), str(tmp_path)]) == 1
    assert "parity: FAILED" in capsys.readouterr().out


def test_checking_a_bundle_needs_no_pytorch(tiny_bundle):
    blocked = "import sys; sys.modules.update(dict.fromkeys(['torch', 'diffusers', 'transformers']))"
    code = f"{blocked}; from trip_export.command import export_main; sys.exit(export_main(['--check', sys.argv[1]]))"
    ran = subprocess.run([sys.executable, "-c", code, str(tiny_bundle)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.rstrip().endswith("passed")


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (export_main, ["nowhere", "-o", "{tmp}/bundle"], "nowhere/model_index.json: found no such file"),
        (
            export_main,
            ["{checkpoint}", "-o", "{checkpoint}/model_index.json"],
            "model_index.json: cannot be a bundle's folder",
        ),
        (export_main, ["{checkpoint}"], "expected CHECKPOINT and -o BUNDLE, or --check BUNDLE"),
        (export_main, ["{checkpoint}", "--check", "{bundle}"], "found --check beside CHECKPOINT"),
        (export_main, ["--check", "nowhere"], "nowhere: found no such folder"),
        (parity_main, ["nowhere", "{checkpoint}"], "nowhere: found no such folder"),
        (parity_main, ["{bundle}", "nowhere"], "nowhere/model_index.json: found no such file"),
    ],
)
def test_bad_input_is_one_line(main, arguments, message, tiny_bundle, tiny_checkpoint, tmp_path, capsys):
    filled = [a.format(tmp=tmp_path, checkpoint=tiny_checkpoint, bundle=tiny_bundle) for a in arguments]
    assert main(filled) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not list(tmp_path.iterdir())


COMMANDS = ("trip_reference.training", "trip_reference.data", "trip_reference.evaluation")


@pytest.mark.parametrize(
    "command",
    [
        "trip_export.command:export_main",
        "trip_export.command:parity_main",
        *(f"{package}.command:main" for package in COMMANDS),
    ],
)
def test_help_has_an_example(command, capsys):
    module, _, function = command.partition(":")
    with pytest.raises(SystemExit) as ended:
        getattr(importlib.import_module(module), function)(["--help"])
    assert ended.value.code == 0
    assert re.search(r"examples?:\s+trip-", capsys.readouterr().out)
