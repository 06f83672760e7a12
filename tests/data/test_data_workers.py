"""A worker that reads data ends with the process that it reads for, however that ends."""

import os
import signal
import subprocess
import sys
import time

import pytest

PARENT = """
import multiprocessing, time
from trip_reference.data.workers import follow_the_parent

def work(ready):
    follow_the_parent()
    ready.set()
    time.sleep(60)

if __name__ == "__main__":
    context = multiprocessing.get_context("{method}")
    ready = context.Event()
    process = context.Process(target=work, args=(ready,))
    process.start()
    ready.wait()
    print(process.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_worker_ends_with_a_killed_parent(method, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(method=method))
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        os.kill(worker, signal.SIGINT)  # which it leaves to the parent
        time.sleep(0.1)
        os.kill(worker, 0)
        parent.kill()
    until = time.monotonic() + 10
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < until:
            os.kill(worker, 0)
            time.sleep(0.02)
