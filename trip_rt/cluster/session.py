"""A command's connection to Ray."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

from trip_rt.errors import InputError, one_line, printable

LOCAL = "local"  # as Ray itself calls a new cluster of this machine
_REACHED_S = 5.0


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """To the cluster at `address`, or to one of this machine that ends with the context (LOCAL). InputError where there
    is none. Ray sends nothing to its makers and shows no dashboard."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # as later versions do, which warn of it
    import ray

    if address != LOCAL:
        _check_reachable(address)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        own: dict[str, Any] = {"include_dashboard": False} if address == LOCAL else {}
        ray.init(address, logging_level=logging.WARNING, **own)  # without an address it would join what it finds
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _unreachable(address, error) from error
    finally:
        for number, handler in before.items():  # Ray's own would end the process without cleaning up
            signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """InputError where nobody listens there: Ray itself would look for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host:  # "auto", which Ray knows
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACHED_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise _unreachable(address, error) from error


def _unreachable(address: str, error: Exception) -> InputError:
    return InputError(
        f"--ray: cannot reach {printable(address[:200])} ({one_line(error, 200)}), expected a Ray cluster such as auto,"
        " HOST:6379 or ray://HOST:10001"
    )
