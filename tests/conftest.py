"""How the tests are run, and fixtures: the tiny model as a checkpoint and as bundles, each made once a test run.

Nothing heavy is imported before a test runs: the process that only deals tests out to workers needs none of it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from once import made_once

if TYPE_CHECKING:
    from fuzzing import Fuzz

    from trip_export.export import ExportResult
    from trip_rt import Animator

WORKERS = 2  # what the tests' time is counted on
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a worker; torch reads it when it is imported


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Two workers, unless -n, --pdb or --collect-only says otherwise or single files or tests are named, for which a
    second start would not pay."""
    option = config.option
    if (
        config.pluginmanager.hasplugin("xdist")
        and not hasattr(config, "workerinput")
        and option.numprocesses is None
        and not (option.usepdb or option.collectonly)
        and not any(".py" in argument for argument in config.args)
    ):
        option.numprocesses, option.dist = WORKERS, "worksteal"


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") or not getattr(config.option, "tx", None):  # else the workers run the tests
        from torch import cuda

        if not cuda.is_available():
            os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes an export comes first: of two workers one makes it while the other begins with the rest."""
    items.sort(key=lambda item: "tiny_checkpoint" not in getattr(item, "fixturenames", ()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the fuzz tests took in, those of xdist's workers together."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    if counts := [value for report in reports for name, value in report.user_properties if name == "fuzz"]:
        from fuzzing import table

        terminalreporter.section("fuzz tests")
        for line in table(counts):
            terminalreporter.write_line(line)


@pytest.fixture
def fuzz(request: pytest.FixtureRequest) -> Fuzz:
    """Runs inputs of the area that `fuzzing.fuzz_area` names."""
    from fuzzing import PROPERTY, Fuzz

    fuzz = Fuzz(*request.param)
    request.node.user_properties.append((PROPERTY, fuzz.counts))
    return fuzz


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import save_tiny

    return made_once(tmp_path_factory, "tiny-checkpoint", save_tiny)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A square tiny model after a step of training that moves nothing."""
    from training_runs import train_start

    return made_once(tmp_path_factory, "trained", train_start)


@pytest.fixture(scope="session")
def tiny_export(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """The export of `tiny_checkpoint`; its `bundle` must not be changed by a test."""

    def make(folder: Path) -> ExportResult:
        from trip_export.export import export_bundle

        return export_bundle(tiny_checkpoint, folder)

    return made_once(tmp_path_factory, "tiny-bundle", make)


@pytest.fixture(scope="session")
def tiny_control_folder(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_control import save_tiny_control

    return made_once(tmp_path_factory, "tiny-control", lambda folder: save_tiny_control(tiny_checkpoint, folder))


@pytest.fixture(scope="session")
def steered_export(
    tiny_checkpoint: Path, tiny_control_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> ExportResult:
    """As `tiny_export`, with a control."""

    def make(folder: Path) -> ExportResult:
        from trip_export.export import export_bundle
        from trip_export.plan import ExportOptions

        return export_bundle(tiny_checkpoint, folder, ExportOptions(control=tiny_control_folder))

    return made_once(tmp_path_factory, "steered-bundle", make)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_export: ExportResult) -> Path:
    return tiny_export.bundle


@pytest.fixture(scope="session")
def both_backends(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle, which lists its files for OpenVINO too."""
    from sealed import with_openvino

    return made_once(tmp_path_factory, "both-backends", lambda folder: with_openvino(tiny_bundle, folder))


@pytest.fixture(scope="session")
def tiny_animator(tiny_bundle: Path) -> Animator:
    from trip_rt import Animator

    return Animator(tiny_bundle)
