"""Work in a process of its own: what breaks a CUDA context or runs for too long takes nothing else with it."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trip_rt.files import whole_file

Keep = Callable[[dict[str, Any]], None]


class Skipped(Exception):
    """What this machine plainly lacks; work that raises anything else has failed."""


def missing(*libraries: str) -> list[str]:
    """Those that are not installed."""
    return [name for name in libraries if importlib.util.find_spec(name) is None]


def require(*libraries: str) -> None:
    """Skipped where one of them is not installed."""
    if names := missing(*libraries):
        raise Skipped(f"found no {', '.join(names)}; pip install {' '.join(names)}")


def apart(work: Callable[[Keep], dict[str, Any]], seconds: float) -> dict[str, Any]:
    """What `work` returns, with its "state": done, red (its "passed" is False), skipped (it raised Skipped) or failed,
    the last two with a "reason" of one line.

    `work` runs in a fork of this process, which must not have touched CUDA, for at most `seconds`. What it handed to
    its `keep` before it failed or was cut off is in the result all the same.
    """
    with tempfile.TemporaryDirectory(prefix="trip-") as folder:
        path = Path(folder) / "figures.json"
        sys.stdout.flush()
        sys.stderr.flush()
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            _run(work, path)
        status = _wait(child, seconds)
        result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        if status is None:
            result |= {"state": "failed", "reason": f"cut off after its {seconds:.0f} s"}
        elif status != 0 or "state" not in result:
            code = os.waitstatus_to_exitcode(status)
            result |= {
                "state": "failed",
                "reason": f"its process died of {signal.Signals(-code).name if code < 0 else f'exit code {code}'}",
            }
        return result | {"seconds": round(time.monotonic() - began, 1)}


def one_line(error: BaseException) -> str:
    """An error for a table."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:250]}"


def _run(work: Callable[[Keep], dict[str, Any]], path: Path) -> None:
    """The child's whole life."""
    os.setsid()
    os.dup2(2, 1)  # stdout's last line is the parent's
    kept: dict[str, Any] = {}

    def keep(figures: dict[str, Any]) -> None:
        kept.update(figures)
        with whole_file(path) as part:
            part.write_text(json.dumps(_finite(kept)))

    code = 1
    try:
        try:
            figures = work(keep)
            keep({**figures, "state": "red" if figures.get("passed") is False else "done"})
        except Skipped as error:
            keep({"state": "skipped", "reason": " ".join(str(error).split())[:250]})
        except Exception as error:  # the other parts are worth having all the same
            keep({"state": "failed", "reason": one_line(error)})
        code = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int, seconds: float) -> int | None:
    """The child's status, or None where it had to be ended."""
    began = time.monotonic()
    try:
        while time.monotonic() - began < seconds:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                return status
            time.sleep(0.02)
    except BaseException:
        _end(child)
        raise
    _end(child)
    return None


def _end(child: int) -> None:
    """With all that it started: it leads a session of its own."""
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:  # not yet a leader, or gone
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become words."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
