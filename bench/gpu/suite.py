"""tests/gpu as a part of the run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from typing import Any

from gpu.cases import ROOT, Context

_PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--confcutdir", "tests/gpu")


def tests(context: Context) -> dict[str, Any]:
    """How many tests passed, failed and were skipped, which none may be on a GPU.

    They are dealt out to as many processes as there are CPU cores, at most eight: most of their time goes into
    compiling kernels, one at a time.
    """
    listing = _pytest("--collect-only", "tests/gpu")
    lines = listing.communicate()[0].splitlines()
    names = [line for line in lines if "::" in line]
    if listing.returncode or not names:
        return {"passed": False, "failures": lines[-9:]}
    count = min(8, os.cpu_count() or 1, len(names))
    processes = [_pytest(*names[index::count]) for index in range(count)]
    tally: Counter[str] = Counter()
    failures: list[str] = []
    for process in processes:
        lines = process.communicate()[0].splitlines()
        for number, outcome in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1] if lines else ""):
            tally[outcome] += int(number)
        named = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        failures += named or ([f"pytest ended with {process.returncode}", *lines[-3:]] if process.returncode else [])
        context.keep({"tests": dict(tally), "failures": failures})
    expected = tally["passed"] + (tally["skipped"] if context.dry else 0)
    return {"tests": dict(tally), "failures": failures, "passed": expected == len(names) and not failures}


def _pytest(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*_PYTEST, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
