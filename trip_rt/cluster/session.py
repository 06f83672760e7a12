"""A command's connection to Ray."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Iterator
from typing import Any

from trip_rt.errors import InputError, one_line, printable

LOCAL = "local"


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """To the cluster at `address`, or to one of this machine that ends with the context (LOCAL). InputError where there
    is none. Ray sends nothing to its makers and shows no dashboard."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # as later versions do, which warn of it
    import ray

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        options: dict[str, Any] = {"include_dashboard": False} if address == LOCAL else {"address": address}
        ray.init(logging_level=logging.WARNING, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(
            f"--ray: cannot reach {printable(address[:200])} ({one_line(error, 200)}), expected a Ray cluster such as"
            " auto, HOST:6379 or ray://HOST:10001"
        ) from error
    finally:
        for number, handler in before.items():  # Ray's own would end the process without cleaning up
            signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()
