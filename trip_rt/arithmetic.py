"""What the UNet computes in: its engines' own precision, that of quantised engines beside them, or bf16 on a CPU."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Literal

from trip_rt.backends.base import Engine, EngineOptions
from trip_rt.components import QUANTISED, quantised_name
from trip_rt.errors import InputError
from trip_rt.manifest import EngineSpec, Profile
from trip_rt.sampling.step import Arithmetic, Step

Asked = Literal["auto", "fp32", "bf16", "int8", "fp8"]
LESS: tuple[Arithmetic, ...] = ("bf16", *QUANTISED)

# A call below this is over so soon that opening a second engine takes more than many clips gain: the demo's, of 5
# GFLOP, takes 0.78 of its time in int8, and opening that 3 s.
LEAST_GFLOP = 50.0
# The share of the time in fp32, at most: a clip should not hang on the noise of a measurement.
WORTH = 0.85


def parity_name(backend: str, arithmetic: Arithmetic) -> str:
    """Under which a manifest keeps the parity of a backend's UNets that compute so."""
    return f"{backend} in {arithmetic}"


class Chooser:
    """What the runs of one Animator compute in. `auto` takes the fastest of what was close enough to PyTorch at export;
    that is measured once, when it is first asked for.

    `engine_class` and `options` are those of the profile's engines in use. `seconds(arithmetic)` measures a call of the
    UNet, `drop(arithmetic)` frees it.
    """

    def __init__(
        self,
        engine_class: type[Engine],
        options: EngineOptions,
        profile: Profile,
        seconds: Callable[[Arithmetic], float],
        drop: Callable[[Arithmetic], None],
    ):
        self._engine_class, self._options, self._profile = engine_class, options, profile
        self._spec = profile.engines["unet"][engine_class.backend]
        self._seconds, self._drop = seconds, drop
        self._lock = threading.Lock()
        self._auto: tuple[Arithmetic, str] | None = None

    def __call__(self, asked: Asked) -> Arithmetic:
        """What a run computes in; InputError where what is asked for cannot be had."""
        if asked == "auto":
            return self.auto()[0]
        if asked == "fp32" or asked == self._spec.precision:
            return "own"
        if reason := self.impossible(asked):
            expected = {
                "bf16": "fp32 engines of OpenVINO on a CPU that has bf16",
                "int8": "one that was exported with --int8",
                "fp8": "one that was exported with --fp8, on a GPU that has fp8",
            }
            raise InputError(f"arithmetic: found {reason}, expected {expected[asked]}")
        return asked

    def steps(self, asked: Asked, steps: Sequence[Step]) -> list[Step]:
        """The steps of a run that asks for that, each with what it computes in: quantised networks fail where little
        noise is left, and there is none of the outermost layer alone."""
        taken = self(asked)

        def fails(step: Step) -> bool:
            return taken in QUANTISED and (step.shallow or step.timestep < self._profile.quantised_from.get(taken, 0))

        return [dataclasses.replace(step, arithmetic="own" if fails(step) else taken) for step in steps]

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
        reasons = {arithmetic: self.impossible(arithmetic) or self._unwise(arithmetic) for arithmetic in LESS}
        candidates = [arithmetic for arithmetic in LESS if not reasons[arithmetic]]
        if not candidates:
            told = [
                reason for arithmetic, reason in reasons.items() if arithmetic == "bf16" or self._quantised(arithmetic)
            ]
            return "own", f"{own}: {'; '.join(told)}"
        whole = self._seconds("own")
        shares = {arithmetic: self._seconds(arithmetic) / whole for arithmetic in candidates}
        best = min(candidates, key=shares.__getitem__)
        for arithmetic in candidates:
            if arithmetic != best or shares[best] > WORTH:
                self._drop(arithmetic)
        told = [f"{share:.2f} in {arithmetic}" for arithmetic, share in shares.items()]
        measured = f"the UNet's share of its time in {own} is {' and '.join(told)} here"
        return (best, f"{best}: {measured}") if shares[best] <= WORTH else ("own", f"{own}: {measured}")

    def impossible(self, arithmetic: Arithmetic) -> str:
        """Why a run cannot compute so here, or "" where it can."""
        if arithmetic in QUANTISED:
            spec = self._quantised(arithmetic)
            if spec is None:
                return f"a bundle without {arithmetic} engines for {self._engine_class.backend}"
            try:
                self._engine_class.probe(spec, self._options)
            except InputError as error:
                return str(error)
            return ""
        if self._spec.precision != "fp32":
            return f"engines of {self._spec.precision}"
        return "" if self._engine_class.lowers() else f"{self._engine_class.backend} without bf16 on this machine"

    def _quantised(self, arithmetic: Arithmetic) -> EngineSpec | None:
        """The quantised UNet of that arithmetic."""
        if arithmetic not in QUANTISED:
            return None
        return self._profile.engines.get(quantised_name("unet", arithmetic), {}).get(self._engine_class.backend)

    def _unwise(self, arithmetic: Arithmetic) -> str:
        if self._spec.gflop < LEAST_GFLOP:
            return f"the UNet is too small for {arithmetic} to pay"
        parity = self._profile.parity.get(parity_name(self._engine_class.backend, arithmetic))
        if parity is None:
            return f"the bundle does not say how close {arithmetic} comes to PyTorch"
        return "" if parity.get("passed") else f"{arithmetic} was not close enough to PyTorch at export"
