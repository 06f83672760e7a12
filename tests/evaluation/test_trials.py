"""The trials' command, on budgets of two steps."""

import json

import pytest

from trip_reference import checkpoint, trials
from trip_reference.trials import GROUPS, RECIPE, Budget, Trial, main, run_trials, table

VAE = "checkpoints/demo"


def test_trials_train_what_differs_and_keep_what_is_done(tmp_path):
    budget = Budget("demo-small", VAE, minutes=1, steps=2, clips=4, judged=2)
    asked = [
        Trial("two clips / λ by frame", ("run.batch=2",), trip={"gate": "frame"}, unet={"layers_per_block": 2}),
        Trial("endless", clips=0),
    ]
    results = run_trials(asked, 1, budget, tmp_path, 1)
    assert [result["trial"] for result in results] == [trial.name for trial in asked]
    assert [result["clips_seen"] for result in results] == [4, 16]
    assert all(result["steps"] == 2 and result["loss"] > 0 and result["rms_999"] > 0 for result in results)
    assert {result["shape"] for result in results} <= {0.0, 50.0, 100.0}
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and path.name != "latents-demo-small-4"]
    written = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert len(written) == 2
    assert run_trials(asked, 1, budget, tmp_path, 1) == results
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")} == written


def test_a_start_is_what_the_trial_says(tmp_path):
    budget = Budget("demo-small", VAE, minutes=1, steps=2, clips=4, judged=1)
    for group in GROUPS.values():
        for trial in group:
            if trial.trip or trial.unet:
                trials._write_start(trial, 0, budget, tmp_path / "start")
                config = checkpoint.load_config(tmp_path / "start")
                assert {name: getattr(config, name) for name in trial.trip} == trial.trip
                unet = json.loads((tmp_path / "start" / "unet" / "config.json").read_text())
                assert {name: unet[name] for name in trial.unet} == json.loads(json.dumps(trial.unet))
                assert config.scaling_factor == checkpoint.load_config(VAE).scaling_factor


def test_every_trial_has_settings_that_the_recipe_knows():
    from trip_reference.training.config import load_config

    names = [trial.name for group in GROUPS.values() for trial in group if trial is not RECIPE]
    assert len(set(names)) == len(names)
    for group in GROUPS.values():
        for trial in group:
            load_config("demo", None, trial.settings)


def test_a_table_has_means_and_spreads():
    rows = [dict.fromkeys([key for _, key, _ in trials.COLUMNS], float(seed)) | {"trial": "a"} for seed in (1, 3)]
    text = table([*rows, rows[0] | {"trial": "b"}]).splitlines()
    assert len(text) == 4
    assert text[2].startswith("| a | 2 ± 1 | 2.0000 ± 1.4142 |")
    assert text[3].startswith("| b | 1 | 1.0000 |")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gate", "--seeds", "0"], "seeds: found 0, expected at least 1"),
        (["gate", "--minutes", "0"], "minutes: found 0, expected more than 0"),
        (["gate", "--clips", "0"], "clips: found 0, expected at least 1"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, words, message):
    assert main([*words, "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
