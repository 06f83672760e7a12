import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import tiny_model

from trip_export.command import export_main, parity_main
from trip_export.parity import Parity, psnr
from trip_reference import checkpoint
from trip_reference.demo_text import build_tokenizer


def test_psnr_against_a_known_error():
    expected = np.zeros((10, 10))
    assert psnr(expected + 0.1, expected, peak=1.0) == pytest.approx(20)
    assert psnr(expected, expected, peak=1.0) == 200
    assert psnr(expected * np.nan, expected, peak=1.0) == -200


def test_parity_survives_json(tiny_export):
    assert Parity.from_json(json.loads(json.dumps(tiny_export.parity.to_json()))) == tiny_export.parity


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


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (export_main, ["nowhere", "-o", "{tmp}/bundle"], "nowhere: found no model_index.json"),
        (export_main, ["{checkpoint}", "-o", "{checkpoint}/model_index.json"], "model_index.json: cannot be a bundle's folder"),
        (parity_main, ["nowhere", "{checkpoint}"], "nowhere: found no such folder"),
        (parity_main, ["{bundle}", "nowhere"], "nowhere: found no model_index.json"),
    ],
)
def test_bad_input_is_one_line(main, arguments, message, tiny_bundle, tiny_checkpoint, tmp_path, capsys):
    filled = [a.format(tmp=tmp_path, checkpoint=tiny_checkpoint, bundle=tiny_bundle) for a in arguments]
    assert main(filled) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["trip_export.command:export_main", "trip_export.command:parity_main", "trip_reference.train:main"])
def test_help_has_an_example(command):
    module, function = command.split(":")
    code = f"import {module} as m; m.{function}(['--help'])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "example: trip-" in shown.stdout
