"""README.md and docs/speed.md quote what bench/results/ holds."""

import json
import shutil
from pathlib import Path

import pytest
from headlines import HEADING, RESULTS, TABLES_HEADING, WIDTH, headlines, markdown, section, tables
from latency import _PEERS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def results(tmp_path):
    for name in ("latency_bench", "latency_demo", "speeds_demo", "nvidia-h200"):
        shutil.copy(RESULTS / f"{name}.json", tmp_path)
    return tmp_path


def changed(path, change):
    figures = json.loads(path.read_text())
    change(figures)
    path.write_text(json.dumps(figures))


@pytest.mark.parametrize(
    ("page", "heading", "printed", "option"),
    [("README.md", HEADING, markdown, ""), ("docs/speed.md", TABLES_HEADING, tables, " --tables")],
)
def test_the_pages_quote_the_measured_figures(page, heading, printed, option):
    text = printed(headlines())
    quoted = section((ROOT / page).read_text(encoding="utf-8"), heading)
    absent = [line for line in text.splitlines() if line not in quoted.splitlines()]
    assert text in quoted, f"{page}: put what bench/headlines.py{option} prints under {heading!r}; not there: {absent}"


def test_lines_are_short_enough_for_the_readme():
    figures = headlines()
    assert max(map(len, (markdown(figures) + "\n" + tables(figures)).splitlines())) <= WIDTH


def test_a_section_ends_where_the_next_begins():
    text = f"# Title\n\n{HEADING}\n\nfast\n\n### by how much\n\ntwice\n\n## How good\n\nwell\n"
    assert section(text) == "\nfast\n\n### by how much\n\ntwice\n"
    assert section(f"{HEADING}\nfirst\n") == "first\n" and section("# Title\n") == ""


def test_the_best_rival_is_the_fastest_one_that_ran(results):
    def change(figures):
        medians = {"trip-rt": 90.0, "eager": 110.0, "compile": 99.0}
        figures["guided_step"]["milliseconds"] = {name: {"p50": value} for name, value in medians.items()}
        figures["guided_step"]["times_as_long_as_trip_rt"] = {
            "eager": {"median": 1.2, "p5": 1.1, "p95": 1.3}, "compile": {"median": 1.1, "p5": 1.05, "p95": 1.2},
        }  # fmt: skip

    changed(results / "latency_bench.json", change)
    figures = headlines(results)
    assert (figures["bench_step_ms"], figures["bench_best_rival"]) == (90.0, "compile")
    text = " ".join(markdown(figures).split())  # without line breaks
    assert "takes **90.0 ms** (p50). Its best rival, `torch.compile`, frozen, takes 99.0 ms, **1.10 times**" in text
    assert "| the plain ONNX export on OpenVINO | not run | |" in tables(figures)


def test_figures_of_two_machines_stand_in_no_table(results):
    changed(results / "latency_demo.json", lambda figures: figures["machine"].update(threads=64))
    with pytest.raises(ValueError, match=r"found latency_bench.json and latency_demo.json of two machines"):
        headlines(results)


def test_every_rival_of_latency_has_a_name_in_the_table(results):
    def change(figures):
        guided = figures["guided_step"]
        guided["milliseconds"] |= {name: {"p50": 5000.0} for name in _PEERS}
        guided["times_as_long_as_trip_rt"] |= {name: {"median": 5.35, "p5": 5.0, "p95": 6.0} for name in _PEERS}

    changed(results / "latency_bench.json", change)
    assert tables(headlines(results)).count("| 5000 | 5.35 |") == len(_PEERS)
