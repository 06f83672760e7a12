"""What the UNet computes in: its engines' own precision or, where that is fp32, bf16 on a CPU that is faster so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal

from trip_rt.errors import InputError
from trip_rt.manifest import EngineSpec
from trip_rt.sampling.step import Arithmetic

Asked = Literal["auto", "fp32", "bf16"]

# A call below this is over so soon that a second engine costs more than bf16 brings; there bf16 brought nothing.
LEAST_GFLOP = 50.0
# bf16's share of the time in fp32, at most: a clip should not hang on the noise of a measurement.
WORTH = 0.85


def parity_name(backend: str) -> str:
    """Under which a manifest keeps the parity of a backend's fp32 engines that compute in bf16."""
    return f"{backend} in bf16"


class Chooser:
    """What the runs of one Animator compute in. `auto` takes bf16 where that was close enough to PyTorch at export and
    is faster here; that is measured once, when it is first asked for.

    `spec` is the UNet's and `parity` its profile's; `lowers` says whether its engine library can compute in bf16 here
    what was exported in fp32. `seconds(arithmetic)` measures a call of the UNet, `drop(arithmetic)` frees it.
    """

    def __init__(
        self,
        backend: str,
        spec: EngineSpec,
        parity: Mapping[str, Mapping[str, Any]],
        lowers: Callable[[], bool],
        seconds: Callable[[Arithmetic], float],
        drop: Callable[[Arithmetic], None],
    ):
        self._backend, self._spec, self._parity = backend, spec, parity.get(parity_name(backend), {})
        self._lowers, self._seconds, self._drop = lowers, seconds, drop
        self._lock = threading.Lock()
        self._auto: tuple[Arithmetic, str] | None = None

    def __call__(self, asked: Asked) -> Arithmetic:
        """What a run computes in; InputError where bf16 is asked for and cannot be had."""
        if asked == "auto":
            return self.auto()[0]
        if asked == "fp32" or self._spec.precision == "bf16":
            return "own"
        if reason := self._impossible():
            raise InputError(f"arithmetic: found {reason}, expected fp32 engines of OpenVINO on a CPU that has bf16")
        return "bf16"

    def auto(self) -> tuple[Arithmetic, str]:
        """What `auto` takes here, and why."""
        with self._lock:
            if self._auto is None:
                self._auto = self._measured()
            return self._auto

    @property
    def said(self) -> str:
        """What `auto` took, for people."""
        return "not asked for yet" if self._auto is None else self._auto[1]

    def _measured(self) -> tuple[Arithmetic, str]:
        own = self._spec.precision
        if reason := self._impossible() or self._unwise():
            return "own", f"{own}: {reason}"
        share = self._seconds("bf16") / self._seconds("own")
        if share > WORTH:
            self._drop("bf16")
            return "own", f"{own}: in bf16 the UNet takes {share:.2f} of its time here, which is not worth it"
        return "bf16", f"bf16: the UNet takes {share:.2f} of its time in {own} here"

    def _impossible(self) -> str:
        if self._spec.precision != "fp32":
            return f"engines of {self._spec.precision}"
        return "" if self._lowers() else f"{self._backend} without bf16 on this machine"

    def _unwise(self) -> str:
        if not self._parity:
            return "the bundle does not say how close bf16 comes to PyTorch"
        if not self._parity.get("passed"):
            return "bf16 was not close enough to PyTorch at export"
        return "" if self._spec.gflop >= LEAST_GFLOP else "the UNet is too small to gain from bf16"
