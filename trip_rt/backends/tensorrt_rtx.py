"""TensorRT for RTX on an NVIDIA GPU. A plan's kernels are half compiled: the library finishes them for the GPU when it
opens the plan, and `kernel_cache` keeps what it made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from trip_rt.backends.kernel_cache import KernelCache
from trip_rt.backends.tensorrt import TensorRTEngine
from trip_rt.devices import Buffer, Work
from trip_rt.errors import InputError
from trip_rt.manifest import EngineSpec


class TensorRTRTXEngine(TensorRTEngine):
    """One plan in one execution context whose scratch memory is ours, without which no CUDA graph could record it."""

    backend: ClassVar[str] = "tensorrt-rtx"
    modules: ClassVar[tuple[str, ...]] = ("tensorrt_rtx",)
    capturable = False  # until the library says so of the bound plan
    _scratch: Buffer | None = None
    _cache: KernelCache | None = None
    _compiled: Any = None  # the library's IRuntimeCache, which it fills as it compiles

    def _load(self, path: Path) -> None:
        super()._load(path.with_name(plan_for(self.spec, self._machine.compute_capability)))

    def _new_context(self, plan: bytes) -> Any:
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        machine = self._machine
        self._cache = KernelCache(plan, machine.gpu, machine.compute_capability, machine.version)
        self._compiled = config.create_runtime_cache()
        if kept := self._cache.load():
            self._compiled.deserialize(kept)  # False where it is another driver's: then all is compiled again
            self._logger.take()
        config.set_runtime_cache(self._compiled)
        context = self._engine.create_execution_context(config)
        if context is not None and (size := self._engine.device_memory_size_v2):
            self._scratch = self.device.zeros("uint8", (size,))
            context.set_device_memory(self._scratch.address, size)
        return context

    def bind(self, buffers: Mapping[str, Buffer]) -> Work:
        run = super().bind(buffers)
        self.capturable = self._context.is_stream_capturable(self.device.stream)

        def work() -> None:
            run()
            if self._cache:  # the first run is queued, so that every kernel is compiled
                self._cache.save(bytes(self._compiled.serialize()))
                self._cache = None

        return work

    def close(self) -> None:
        self._scratch = self._compiled = self._cache = None
        super().close()


def plan_for(spec: EngineSpec, capability: str) -> str:
    """The name of the plan for a GPU of that compute capability, one of those in the target; InputError where the
    manifest lists a plan too few or too many."""
    if spec.target.get("plan") != "per capability":
        return spec.file
    capabilities = spec.target["compute_capabilities"].split()
    if len(capabilities) != len(spec.files):
        raise InputError(
            f"{spec.file}: found {len(spec.files)} plans, expected one for each of {', '.join(capabilities)}; export"
            " the bundle again"
        )
    return spec.files[capabilities.index(capability)]
