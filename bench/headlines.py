"""The figures that README.md and docs/speed.md quote, out of bench/results/, as Markdown.

    python bench/headlines.py             # README.md, under "How fast is it"
    python bench/headlines.py --tables    # docs/speed.md, under "Beside other ways to run the model"

tests/bench/test_headlines.py compares both files with this text. Paste it again after every new measurement.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
HEADING = "## How fast is it"
TABLES_HEADING = "## Beside other ways to run the model"
WIDTH = 110  # columns of a line
SPEEDS = ("exact", "balanced", "fast")
_RIVALS = {
    "openvino": "the plain ONNX export on OpenVINO",
    "onnxruntime": "the plain ONNX export on ONNX Runtime",
    "compile": "`torch.compile`, frozen",
    "inductor": "AOTInductor, frozen",
    "eager": "PyTorch eager",
}
_LESS = {
    "trip-rt-bf16": "**trip-rt in bf16**",
    "openvino-bf16": "the plain ONNX export on OpenVINO in bf16",
    "trip-rt-int8": "**trip-rt in int8**",
    "openvino-int8": "the plain ONNX export, quantised by ONNX Runtime, on OpenVINO",
}
_LIBRARIES = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime", "torch": "PyTorch"}
_MODELS = ("bench", "demo")
GPU = "nvidia-h200.json"
_KERNELS = ("fused, from its cubin, as a graph", "torch.compile, as a graph")  # of a run of `make gpu`


def headlines(folder: Path = RESULTS) -> dict[str, Any]:
    """The figures by name: milliseconds are p50; `_times` says how many times as long as trip-rt a rival takes, paired
    round by round (median, p5 and p95)."""
    latency = {name: json.loads((folder / f"latency_{name}.json").read_text()) for name in _MODELS}
    if latency["bench"]["machine"] != latency["demo"]["machine"]:
        raise ValueError(
            "found latency_bench.json and latency_demo.json of two machines, expected one; measure both again"
        )
    ways = json.loads((folder / "speeds_demo.json").read_text())
    figures: dict[str, Any] = {"machine": latency["demo"]["machine"], "speed_clips": ways["clips"]}
    for name, file in latency.items():
        guided = file["guided_step"]
        every = {rival: row["p50"] for rival, row in guided["milliseconds"].items()}
        milliseconds = {rival: every[rival] for rival in (*_RIVALS, *_LESS) if rival in every}
        figures[f"{name}_step_ms"] = every["trip-rt"]
        figures[f"{name}_rivals_ms"] = milliseconds
        figures[f"{name}_rivals_times"] = guided["times_as_long_as_trip_rt"]
        exact = [rival for rival in milliseconds if rival in _RIVALS]
        figures[f"{name}_best_rival"] = min(exact, key=milliseconds.__getitem__)
        figures[f"{name}_memory_mb"] = file["cold_start"]["exact"]["peak_memory_mb"]
        figures[f"{name}_pytorch_memory_mb"] = file["pytorch_peak_memory_mb"]
        for speed in SPEEDS:
            figures[f"{name}_clip_s_{speed}"] = file["clips"][speed]["p50"] / 1000
            figures[f"{name}_clip_times_faster_{speed}"] = file["clips"][speed]["times_faster"]
            figures[f"{name}_fresh_process_{speed}"] = file["cold_start"][speed]
    for speed in SPEEDS:
        figures[f"times_faster_{speed}"] = ways["ways"][speed]["times_faster"]
        figures[f"psnr_{speed}"] = {key: ways["ways"][speed][f"psnr_{key}"] for key in ("mean", "min")}
    gpu = json.loads((folder / GPU).read_text())
    kernel = {name: gpu["parts"]["kernel"]["fp16"][name] for name in _KERNELS}
    figures |= {"gpu": gpu["machine"]["gpu"], "gpu_us": {name: row["median"] for name, row in kernel.items()}}
    return figures


def markdown(figures: dict[str, Any]) -> str:
    """What README.md holds, word for word: four headline figures and a table of the speeds."""
    items = [*map(_against_best, [figures] * 2, _MODELS), _clip(figures), _kernel(figures)]
    bullets = "\n".join(_wrapped(f"- {item}", "  ") for item in items)
    return "\n\n".join([_machine(figures["machine"]), bullets, _speeds(figures)])


def tables(figures: dict[str, Any]) -> str:
    """What docs/speed.md holds, word for word: all ways to run a guided step, and whole processes."""
    parts = [_machine(figures["machine"]), _steps(figures), _processes(figures), _bench_speeds(figures)]
    return "\n\n".join([*parts, _memory(figures)])


def section(text: str, heading: str = HEADING) -> str:
    """What stands in a Markdown file under a heading of the second level; "" where it has none."""
    _, _, rest = f"\n{text}".partition(f"\n{heading}\n")
    return rest.partition("\n## ")[0]


def _machine(about: dict[str, Any]) -> str:
    libraries = ", ".join(f"{title} {about[name]}" for name, title in _LIBRARIES.items())
    return _wrapped(f"Measured in fp32 on {about['cpu']}, {about['threads']} threads, with {libraries}.")


def _against_best(figures: dict[str, Any], model: str) -> str:
    rival = figures[f"{model}_best_rival"]
    times = figures[f"{model}_rivals_times"][rival]
    return (
        f"A guided step of the `{model}` model takes **{_ms(figures[f'{model}_step_ms'])} ms** (p50). Its best rival,"
        f" {_RIVALS[rival]}, takes {_ms(figures[f'{model}_rivals_ms'][rival])} ms, **{times['median']:.2f} times** as"
        f" long (p5 to p95: {times['p5']:.2f} to {times['p95']:.2f})."
    )


def _clip(figures: dict[str, Any]) -> str:
    exact, fast = (f"{figures[f'demo_clip_s_{speed}']:.2f}" for speed in ("exact", "fast"))
    return f"A clip of the `demo` model takes **{exact} s** at speed `exact` and **{fast} s** at speed `fast` (p50)."


def _kernel(figures: dict[str, Any]) -> str:
    fused, compiled = (figures["gpu_us"][name] for name in _KERNELS)
    return (
        f"On an {figures['gpu']}, in fp16 at full size, the fused kernel does all that follows the UNet in"
        f" **{fused:.0f} µs**; torch.compile in a CUDA graph takes {compiled:.0f} µs, **{compiled / fused:.1f} times**"
        " as long."
    )


def _steps(figures: dict[str, Any]) -> str:
    lines = [
        "| guided step, ms (p50) | `bench` model | times trip-rt | `demo` model | times trip-rt |",
        "| --- | ---: | ---: | ---: | ---: |",
        f"| **trip-rt** | **{_ms(figures['bench_step_ms'])}** | | **{_ms(figures['demo_step_ms'])}** | |",
    ]
    ran = figures["bench_rivals_ms"].keys() | figures["demo_rivals_ms"].keys()
    for rival, title in (_RIVALS | {name: _LESS[name] for name in _LESS if name in ran}).items():
        cells = [title]
        for model in _MODELS:
            if rival in figures[f"{model}_rivals_ms"]:
                times = figures[f"{model}_rivals_times"][rival]["median"]
                cells += [_ms(figures[f"{model}_rivals_ms"][rival]), f"{times:.2f}"]
            else:
                cells += ["not run", ""]
        lines.append(_row(cells))
    return "\n".join(lines)


def _speeds(figures: dict[str, Any]) -> str:
    clips = figures["speed_clips"]
    lines = [
        f"| `demo` model | a clip, s | times faster ({clips} clips) | dB to `exact`, mean | least |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for speed in SPEEDS:
        likeness = figures[f"psnr_{speed}"]
        decibels = ("", "") if speed == "exact" else (f"{likeness['mean']:.1f}", f"{likeness['min']:.1f}")
        seconds, times = f"{figures[f'demo_clip_s_{speed}']:.2f}", f"{figures[f'times_faster_{speed}']:.2f}"
        lines.append(_row([f"`{speed}`", seconds, times, *decibels]))
    return "\n".join(lines)


def _processes(figures: dict[str, Any]) -> str:
    lines = [
        "| model, speed | a clip, s | fresh process: import, s | open, s | first step, s | clip, s | peak MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for model in _MODELS:
        for speed in SPEEDS:
            process = figures[f"{model}_fresh_process_{speed}"]
            moments = [f"{process['seconds'][name]:.2f}" for name in ("import", "open", "first step", "clip")]
            cells = [f"{figures[f'{model}_clip_s_{speed}']:.2f}", *moments, f"{process['peak_memory_mb']:.0f}"]
            lines.append(_row([f"`{model}`, `{speed}`", *cells]))
    return "\n".join(lines)


def _bench_speeds(figures: dict[str, Any]) -> str:
    times = " and ".join(f"{figures[f'bench_clip_times_faster_{speed}']:.1f}" for speed in ("balanced", "fast"))
    return _wrapped(
        "The seconds of a fresh process count from its start. On the `bench` model `balanced` and `fast` are"
        f" {times} times as fast as `exact`."
    )


def _memory(figures: dict[str, Any]) -> str:
    rows = [
        f"{figures[f'{model}_memory_mb']:.0f} MB on the `{model}` model"
        f" (PyTorch: {figures[f'{model}_pytorch_memory_mb']:.0f} MB)"
        for model in _MODELS
    ]
    return _wrapped(
        f"Peak memory of a process that makes a clip: {' and '.join(rows)}. PyTorch's clip is one of two steps."
    )


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _row(cells: list[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.1f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print the figures that README.md quotes.")
    parser.add_argument("--tables", action="store_true", help="print those of docs/speed.md instead")
    print((tables if parser.parse_args().tables else markdown)(headlines()))
