"""A checkpoint to a bundle: build the engines that are new, reuse those that are not, measure parity, and write the
manifest last."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import no_grad
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from trip_engines.check import animator_for
from trip_engines.onnx_engine import finish_onnx_engine, to_precision
from trip_engines.parity import Parity, measure
from trip_engines.quantisation import conditional, quantise
from trip_engines.recording import Reference, Sample
from trip_engines.tensorrt_build import LIBRARIES, BuiltPlan, build_engine
from trip_export.components import Component, component
from trip_export.kernels import build_kernel
from trip_export.memory import check_memory
from trip_export.onnx_export import OPSET, export_onnx
from trip_export.plan import ExportOptions, Plan
from trip_export.record import record
from trip_export.store import Store, store
from trip_reference import checkpoint
from trip_rt.arithmetic import LEAST_GFLOP, parity_name
from trip_rt.backends import EngineOptions, engine_class
from trip_rt.bundle import MANIFEST, TOKENIZER, Bundle
from trip_rt.components import ALL, QUANTISED, Quantised, quantised_name
from trip_rt.errors import InputError
from trip_rt.manifest import EngineSpec, KernelSpec, Manifest, Profile, serialise
from trip_rt.process_memory import forget_peak, give_back_memory, machine_memory_gb, peak_memory_mb
from trip_rt.sampling.step import Arithmetic


@dataclass(frozen=True)
class Stage:
    """What a part of an export took: time, and resident memory at most, a builder's process with it."""

    seconds: float
    peak_memory_gb: float

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s, peak memory {self.peak_memory_gb:.1f} GB"


@dataclass(frozen=True)
class ExportResult:
    """What an export did: engines built and reused, what each stage of it took, each traced graph's operators before
    and after simplification, the TensorRT plans built, the parity of each backend, and that of UNets that compute in
    less than fp32, which may fail: then no runtime takes them by itself."""

    bundle: Path
    profile: str = ""
    built: list[str] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)
    stages: dict[str, Stage] = field(default_factory=dict)
    operators: dict[str, tuple[Counter[str], Counter[str]]] = field(default_factory=dict)
    plans: dict[str, list[BuiltPlan]] = field(default_factory=dict)
    parity: dict[str, Parity] = field(default_factory=dict)
    less: dict[str, Parity] = field(default_factory=dict)


def export_bundle(
    source: Path, bundle: Path, options: ExportOptions | None = None, note: Callable[[str], None] = lambda text: None
) -> ExportResult:
    """Export checkpoint `source` to the folder `bundle`.

    Files are named after the hash of all they are built from, so a new one never overwrites one that the present
    manifest speaks of: at every moment the folder is a whole bundle, the old or the new one, and a rerun takes up the
    files that an interrupted export finished. Components are loaded one at a time. InputError for an unusable
    checkpoint, shape or folder, a backend that cannot be built for here, or too little memory."""
    plan = Plan(source, options or ExportOptions())
    told = check_memory(plan.memory_gb, machine_memory_gb())
    with store(bundle) as locked:
        note(told)
        return _Export(plan, locked, note).run()


class _Export:
    """One run of an export, holding its bundle's folder."""

    def __init__(self, plan: Plan, store: Store, note: Callable[[str], None]):
        self.plan, self.options, self.store, self.note = plan, plan.options, store, note
        self.engines: dict[str, EngineSpec] = {}  # by key
        self.result = ExportResult(store.bundle)

    def run(self) -> ExportResult:
        kept = self._kept()
        if self.options.precision != "fp32":
            _ = self.reference  # recorded first: the choice of what stays fp32 needs it
        engines = {
            name: {backend: self._engine(name, backend) for backend in self.plan.backends_of(name)}
            for name in self.plan.components
        }
        profile = self._merged(engines, self._kernels(), kept)
        self.store.write(TOKENIZER, self.plan.tokenizer_json.encode())
        if self.plan.steps:
            bundle = Bundle(self.store.bundle, self._manifest([profile]), self.plan.tokenizer_json)
            # Plans come last: that of their graphs may be known by then.
            for backend in sorted(self.options.backends, key=LIBRARIES.__contains__):
                self.result.parity[backend] = self._parity(bundle, profile, backend)
                for arithmetic in self._less(profile, backend):
                    name = parity_name(backend, arithmetic)
                    self.result.less[name] = self._parity(bundle, profile, backend, arithmetic)
            both = self.result.parity | self.result.less
            measured = {name: parity.to_json() for name, parity in both.items()}
            profile = dataclasses.replace(profile, parity={**profile.parity, **measured})
        profiles = [profile if other.name == profile.name else other for other in kept]
        manifest = self._manifest(profiles if profile in profiles else [*profiles, profile])
        self.store.write(MANIFEST, serialise(manifest))
        self.store.remove_others({*manifest.files, MANIFEST})
        return dataclasses.replace(self.result, profile=profile.name)

    def _kept(self) -> list[Profile]:
        """The profiles that `add` keeps."""
        previous = self.store.previous
        if not (self.options.add and previous):
            return []
        if (previous.config, previous.source) != (self.plan.checkpoint_config, self.plan.hashes):
            raise InputError(
                f"{self.store.bundle}: was made from another checkpoint than {self.plan.source}; export it without"
                " --add, or elsewhere"
            )
        self.store.files |= previous.files
        return list(previous.profiles)

    def _merged(
        self, engines: dict[str, dict[str, EngineSpec]], kernels: dict[str, KernelSpec], kept: list[Profile]
    ) -> Profile:
        """The profile asked for, with what one of the same shapes had for other backends."""
        config, reference = self.plan.config, self.plan.reference_name
        profile = Profile(
            num_frames=config.num_frames,
            height=config.height,
            width=config.width,
            batch=self.options.batch,
            decode_frames=self.plan.decode_frames,
            context_width=self.plan.context_width,
            features_shape=self.plan.features_shape,
            engines=engines,
            kernels=kernels,
            reference=reference,
            parity={},
            quantised_from=_quantised_from(engines),
        )
        before = next((other for other in kept if other.name == profile.name), None)
        if before is None:
            return profile
        engines = {
            name: {**before.engines.get(name, {}), **engines.get(name, {})} for name in {**before.engines, **engines}
        }
        return dataclasses.replace(
            profile,
            engines=engines,
            quantised_from=_quantised_from(engines),
            kernels={**before.kernels, **kernels},
            parity=before.parity if before.reference == reference else {},
        )

    def _manifest(self, profiles: list[Profile]) -> Manifest:
        if self.plan.steps:
            _ = self.reference  # recorded now, if nothing needed it yet
        manifest = Manifest(
            config=self.plan.checkpoint_config,
            vocabulary=self.plan.vocabulary,
            profiles=tuple(profiles),
            files={},
            built_with=self.plan.versions | {"python": platform.python_version()},
            source=self.plan.hashes,
            control=self.plan.control,
        )
        specs = (*manifest.engine_specs(), *manifest.kernel_specs())
        spoken_of = {
            TOKENIZER,
            *(profile.reference for profile in profiles),
            *(name for spec in specs for name in spec.files),
        } - {""}
        return dataclasses.replace(manifest, files={name: self.store.files[name] for name in spoken_of})

    def _kernels(self) -> dict[str, KernelSpec]:
        """The fused step for GPUs, in the export's precision, built if it has to be."""
        if not self.options.gpus:
            return {}
        key = self.plan.kernel_key
        if spec := self.store.finished(key):
            self.result.reused.append("fused step")
            self.note("fused step: unchanged, reused")
            return {self.options.precision: spec}
        fusion = checkpoint.from_pretrained(self.plan.source, only=ALL["tnf"].part).fusion
        with self._stage("fused step"):
            try:
                spec = build_kernel(
                    fusion,
                    self.plan.config,
                    self.options.precision,
                    self.options.gpus,
                    key,
                    self.store.bundle,
                    self.note,
                )
            except RuntimeError as error:
                raise InputError(
                    f"{error}; or leave that GPU out of --gpus, which then runs the engine of tnf"
                ) from error
            self.store.finish(spec)
        self.note(f"fused step: compiled for {len(spec.cubins)} kinds of GPU in {self.result.stages['fused step']}")
        return {self.options.precision: spec}

    def _engine(self, name: str, backend: str) -> EngineSpec:
        """The engine of a component for a backend, built if it has to be."""
        ingredients = self.plan.ingredients(name)
        if backend == "inductor":
            return self._reused_or_built(
                name, backend, self.plan.key(**ingredients, inductor=self.plan.inductor), self._build_inductor
            )
        key = self.plan.key(**ingredients, opset=OPSET)
        if backend in LIBRARIES:
            built_for = self.plan.tensorrt[backend, ALL[name].quantised]
            build = partial(self._build_plan, backend)
            return self._reused_or_built(name, backend, self.plan.key(onnx=key, tensorrt=built_for), build)
        return self._reused_or_built(name, "onnx", key, self._build_onnx)  # ONNX Runtime and OpenVINO run the same file

    def _reused_or_built(self, name: str, kind: str, key: str, build: Callable[[str, str], EngineSpec]) -> EngineSpec:
        if key in self.engines:
            return self.engines[key]
        if spec := self.store.finished(key):
            self.engines[key] = spec
            self.result.reused.append(f"{name} ({kind})")
            self.note(f"{name} ({kind}): unchanged, reused")
            return spec
        engine = f"{name} ({kind})"
        with self._stage(engine):
            spec = self.engines[key] = build(name, key)
            self.store.finish(spec)
        self.result.built.append(engine)
        size = sum(self.store.files[file].bytes for file in spec.files) / 1e6  # some of it may be shared
        self.note(f"{engine}: built in {self.result.stages[engine]}; {size:.1f} MB, {spec.gflop:.4g} GFLOP a call")
        return spec

    def _build_quantised(self, name: str, key: str, quantised: Quantised) -> EngineSpec:
        whole = next(other for other in self.plan.components if quantised_name(other, quantised) == name)
        model = self._engine(whole, "onnxruntime")
        samples = self.reference.samples["unet"]
        if not ALL[name].guided:
            tensors = (*model.inputs, *model.outputs)
            samples = conditional(samples, {tensor.name: tensor.shape[0] for tensor in tensors})
        graph = self.store.draft / f"{name}.onnx"
        policy = quantise(
            self.store.bundle / model.file, graph, quantised, samples, lambda text: self.note(f"{name}: {text}")
        )
        guided = None if ALL[name].guided else self._engine(quantised_name("unet", quantised), "onnxruntime").file
        files = finish_onnx_engine(
            graph, self.store.bundle / f"{name}-{key[:16]}.onnx", guided and self.store.bundle / guided
        )
        return self._spec(name, files, key, policy, model.gflop, {})

    def _build_onnx(self, name: str, key: str) -> EngineSpec:
        if quantised := ALL[name].quantised:
            return self._build_quantised(name, key, quantised)
        graph, gflop = self._graph(name)
        family = ALL[name].variant_of
        model = self._engine(family, "onnxruntime") if family else None
        policy_of, weights_of = (model.policy, self.store.bundle / model.file) if model else (None, None)
        graph, policy = to_precision(
            graph, self.options.precision, self._samples(name), lambda text: self.note(f"{name}: {text}"), policy_of
        )
        files = finish_onnx_engine(graph, self.store.bundle / f"{name}-{key[:16]}.onnx", weights_of)
        return self._spec(name, files, key, policy, gflop, {})

    def _build_plan(self, backend: str, name: str, key: str) -> EngineSpec:
        onnx = self._engine(name, "onnxruntime")
        built, target = build_engine(
            self.store.bundle / onnx.file,
            self.store.bundle / f"{name}-{key[:16]}.plan",
            backend,
            self.options.precision,
            self.plan.build_options(backend, ALL[name].quantised),
            lambda text: self.note(f"{name}: {text}"),
        )
        self.result.plans[f"{name} ({backend})"] = built
        files = tuple(plan.file for plan in built)
        return self._spec(name, files, key, dict(onnx.policy), onnx.gflop, target)

    def _build_inductor(self, name: str, key: str) -> EngineSpec:
        from trip_export.inductor_export import export_inductor

        part, gflop = self._component(name)
        package = self.store.bundle / f"{name}-{key[:16]}.pt2"
        target = export_inductor(part, package, self.options.precision, self.options.device)
        return self._spec(name, (package.name,), key, {}, gflop, target)

    def _spec(
        self, name: str, files: tuple[str, ...], key: str, policy: dict[str, Any], gflop: float, target: dict[str, str]
    ) -> EngineSpec:
        inputs, outputs = self.plan.signatures[name]
        precision = ALL[name].quantised or self.options.precision
        return EngineSpec(files, key, precision, policy, gflop, target, inputs, outputs)

    def _graph(self, name: str) -> tuple[Path, float]:
        """The component's fp32 graph in the draft folder, its weights beside it, and its GFLOP a call."""
        part, gflop = self._component(name)
        graph = self.store.draft / f"{name}.onnx"
        before, after = export_onnx(part, graph)
        del part  # the model with it
        give_back_memory()
        self.result.operators[name] = before, after
        self.note(f"{name}: {before.total()} operators traced, {after.total()} after simplification")
        return graph, gflop

    def _component(self, name: str) -> tuple[Component, float]:
        model = checkpoint.from_pretrained(self.plan.source, ALL[name].part, self.options.control)
        model.config = self.plan.config
        part = component(model, name, self.options.batch, self.plan.decode_frames)
        with FakeTensorMode(allow_non_fake_inputs=True), no_grad(), FlopCounterMode(display=False) as counter:
            part.module(*part.inputs.values())
        return part, counter.get_total_flops() / 1e9

    def _samples(self, name: str) -> list[Sample]:
        return self.reference.samples[name] if self.options.precision != "fp32" else []

    @cached_property
    def reference(self) -> Reference:
        """The PyTorch model's own run, recorded once for a checkpoint and a set of shapes."""
        name, key = self.plan.reference_name, self.plan.reference_key
        with contextlib.suppress(InputError):
            reference = Reference.load(self.store.bundle / name, key)
            if self.store.unchanged(name):
                self.note("reference run: unchanged, reused")
                return reference
        self.note(f"reference run: {self.plan.steps} steps in PyTorch")
        with self._stage("reference run"):
            model = checkpoint.from_pretrained(self.plan.source, control=self.options.control)
            model.config = self.plan.config
            reference = record(
                model, self.plan.tokenizer_json, self.options.batch, self.plan.decode_frames, self.plan.steps
            )
            del model  # before engines need the memory
            reference.save(self.store.draft / name, key)
            self.store.adopt(name)
        self.note(f"reference run: recorded in {self.result.stages['reference run']}")
        return reference

    def _less(self, profile: Profile, backend: str) -> list[Arithmetic]:
        """What else than these engines' own precision a runtime may take by itself (trip_rt.arithmetic)."""
        unet, less = profile.engines["unet"][backend], list[Arithmetic]()
        if backend == "openvino" and unet.precision == "fp32" and unet.gflop >= LEAST_GFLOP:
            less.append("bf16")
        less += [name for name in QUANTISED if backend in profile.engines.get(quantised_name("unet", name), {})]
        return less

    def _parity(self, bundle: Bundle, profile: Profile, backend: str, arithmetic: Arithmetic = "own") -> Parity:
        """The parity of one backend: as measured before, where nothing it depends on has changed."""
        name = backend if arithmetic == "own" else parity_name(backend, arithmetic)
        for before in self.store.previous.profiles if self.store.previous else ():
            same = [
                before.engines.get(component, {}).get(backend) == engines[backend]
                for component, engines in profile.engines.items()
            ]
            if (
                before.name == profile.name
                and before.reference == profile.reference
                and all(same)
                and name in before.parity
            ):
                self.note(f"parity of {name}: unchanged, reused")
                return Parity.from_json(dict(before.parity[name]))
        if backend in LIBRARIES:
            try:
                engine_class(backend).probe(profile.engines["unet"][backend], EngineOptions())
            except InputError as error:
                self.note(f"parity of {name}: measured on the graphs of its plans, which do not run here ({error})")
                parity = self._parity_of_graphs(bundle, profile, arithmetic)
                return dataclasses.replace(parity, measured_on=f"the graphs of the plans: {parity.measured_on}")
        return self._measured(bundle, profile, backend, arithmetic)

    def _parity_of_graphs(self, bundle: Bundle, profile: Profile, arithmetic: Arithmetic) -> Parity:
        """The parity of the graphs that plans are built from; a plan's target names its graph's hash."""
        known = self.result.parity if arithmetic == "own" else self.result.less
        name = "onnxruntime" if arithmetic == "own" else parity_name("onnxruntime", arithmetic)
        if name in known:
            return known[name]
        graphs = {name: {"onnxruntime": self._engine(name, "onnxruntime")} for name in profile.engines}
        profile = dataclasses.replace(profile, engines=graphs)
        bundle = Bundle(bundle.folder, self._manifest([profile]), bundle.tokenizer_json)
        return self._measured(bundle, profile, "onnxruntime", arithmetic)

    def _measured(self, bundle: Bundle, profile: Profile, backend: str, arithmetic: Arithmetic = "own") -> Parity:
        own = arithmetic == "own"
        stage = f"parity of {backend if own else parity_name(backend, arithmetic)}"
        self.note(f"{stage}: measuring {self.plan.steps} steps")
        with self._stage(stage):
            animator, measured_on = animator_for(bundle, profile, backend, arithmetic)
            with animator:
                precision = self.options.precision if own else arithmetic
                parity = measure(animator, self.reference, precision, measured_on, arithmetic)
            del animator
        self.note(f"{stage}: measured in {self.result.stages[stage]}")
        return parity

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """A part of the work whose time and memory the result tells, without those of stages within it. What it leaves
        behind is given back to the system at its end."""

        def others() -> float:
            return sum(stage.seconds for stage in self.result.stages.values())

        began = time.monotonic() - others()
        forget_peak()
        yield
        seconds, own = time.monotonic() - others() - began, peak_memory_mb() / 1e3
        give_back_memory()
        forget_peak()
        builder = max((plan.peak_memory_gb for plan in self.result.plans.get(name, [])), default=0.0)
        self.result.stages[name] = Stage(round(seconds, 1), round(own + builder, 2))


def _quantised_from(engines: Mapping[str, Mapping[str, EngineSpec]]) -> dict[Quantised, int]:
    """The timestep from which on all quantised UNets of a kind are close enough."""
    least: dict[Quantised, int] = {}
    for name, specs in engines.items():
        if quantised := ALL[name].quantised:
            found = [spec.policy["from_timestep"] for spec in specs.values()]
            least[quantised] = max(least.get(quantised, 0), *found)
    return least
