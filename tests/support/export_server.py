"""A process with everything imported that forks an export for every order, for tests that kill them.

    python export_server.py CHECKPOINT

An order is a line of JSON: `folder`, and what else `Order` has; the answer is the export's exit code and its seconds.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Order:
    """An export to `folder`: killed after so many `seconds`, if it takes them, or as it comes to finish the engine of
    `component`; `traced`, or of the graphs that tests/support/untraced.py makes."""

    folder: str
    seconds: float = 0.0
    component: str = ""
    traced: bool = False


class ExportServer:
    """The other end of it."""

    def __init__(self, checkpoint: Path):
        command = [sys.executable, __file__, str(checkpoint)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, folder: Path, **order: object) -> tuple[int, float]:
        """The export's exit code, negative if it is a signal's, and how many seconds it took."""
        self._process.stdin.write(json.dumps(dataclasses.asdict(Order(str(folder), **order))) + "\n")
        self._process.stdin.flush()
        code, seconds = json.loads(self._process.stdout.readline())
        return code, seconds

    def close(self) -> None:
        self._process.communicate()


def _export(checkpoint: Path, order: Order) -> None:
    import untraced

    from trip_export import export
    from trip_export.plan import ExportOptions

    finish = export.finish_onnx_engine

    def finish_or_die(graph: Path, destination: Path, like: Path | None = None) -> tuple[str, ...]:
        if destination.name.startswith(f"{order.component}-"):
            os.kill(os.getpid(), signal.SIGKILL)
        return finish(graph, destination, like)

    if order.component:
        export.finish_onnx_engine = finish_or_die
    if not order.traced:
        export.export_onnx = untraced.graph_of_a_weight
    export.export_bundle(checkpoint, Path(order.folder), ExportOptions(speedups=not order.traced, parity_steps=1))


def _serve(checkpoint: Path) -> None:
    for heavy in ("diffusers.models.unets.unet_3d_condition", "onnxscript.optimizer", "torch._dynamo", "untraced"):
        importlib.import_module(heavy)
    for line in sys.stdin:
        order, began = Order(**json.loads(line)), time.monotonic()
        if (child := os.fork()) == 0:
            try:
                _export(checkpoint, order)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        if order.seconds:
            time.sleep(order.seconds)
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps([code, time.monotonic() - began]), flush=True)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
