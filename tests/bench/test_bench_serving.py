"""The load benchmark runs at a tiny size and says what it should; nothing here looks at a time."""

import json
import math

import serving


def numbers(value):
    """All of them, in whatever it is."""
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_serving_at_a_tiny_size(tiny_bundle, tmp_path, capsys):
    output = tmp_path / "figures.json"
    counts = {"clients": 6, "clips": 4, "rounds": 1, "cancels": 3, "starts": 1, "small-clips": 20}
    options = [word for name, count in counts.items() for word in (f"--{name}", str(count))]
    arguments = [str(tiny_bundle), *options, "--small-bundle", str(tiny_bundle), "--json", str(output)]
    assert serving.main(arguments) == 0, capsys.readouterr().err
    figures = json.loads(output.read_text())

    rates, served = figures["clips_per_minute"], figures["served"]
    assert rates["rounds"] == [{name: rates[name] for name in ("bare", "served", "served_of_bare")}]
    assert served["clips"] >= 4 and set(served["cpu_seconds"]) == {"server", "worker", "clients"}
    assert set(figures["status_ms"]) == {"p50", "p95", "p99", "max", "requests"}
    assert figures["status_ms"]["requests"] >= 3

    cancel = figures["cancel"]
    assert set(cancel["stopped_ms"]) == set(cancel["step_ms"]) == {"p50", "p95", "p99", "max"}
    assert cancel["cancels"] == 3 >= cancel["within_a_step_and_100_ms"] and cancel["steps"] == 200
    assert len(figures["cold_start"]["seconds"]) == 1

    memory = figures["memory"]
    assert memory["clips"] == 20 and memory["every"] == 2
    for name in ("server", "worker"):
        assert len(memory[name]["mb"]) == 10
        assert math.isfinite(memory[name].pop("kb_per_clip"))  # which may well be below 0
    parts = ("clips_per_minute", "status_ms", "cold_start", "memory")
    found = [number for part in parts for number in numbers(figures[part])]
    found += [served["seconds"], *numbers(cancel["stopped_ms"]), *numbers(cancel["step_ms"])]
    assert all(math.isfinite(number) and number > 0 for number in found)
    printed = capsys.readouterr()
    assert "served/bare" in printed.out and "status request" in printed.out and "kB a clip" in printed.out


def test_what_cannot_be_measured_is_said_before_anything_is_started(tiny_bundle, tmp_path, capsys):
    assert serving.main([str(tiny_bundle), "--clients", "1"]) == 2
    assert serving.main([str(tiny_bundle), "--json", str(tmp_path / "none" / "figures.json")]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert printed[0] == "bench/serving.py: --clients: found 1, expected at least 2"
    assert printed[1].endswith("found no such folder, expected one to write to")
