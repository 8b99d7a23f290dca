"""Backends as data: what each can run, importable without the backend installed.

Adding a backend takes a record here, a lowering in `export/backends/` and a session in
`runtime/backends/`; see docs/adding-a-backend.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from perception_rt.errors import InputError

PRECISIONS = ("fp32", "fp16", "int8", "int4", "fp8")
ONNX = "onnx"  # the kind of graph files that are ONNX models


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A backend.

    Attributes:
        name: name in `--backend` and in manifests.
        precisions: supported precisions, the default first, each with the devices that run it.
        decoder_devices: devices that run a decoder, for precisions where they are fewer.
        batch_dependent: precisions in which a result depends on the rest of its batch.
        calibrated: precisions whose activation ranges are calibrated during export.
        kinds: kinds of graph files that the session opens; None if it reads no file and stands in
            for every backend.
        domains: operator domains of its ONNX graphs; graphs with any other are refused.
        emitter: "module:class" of the lowering, imported for an export; empty for none.
        session: module with `open_session` and `check_device`, imported at run time.
        install: pip requirement that brings what the session needs; empty for none.
        graph_backend: backend that can run its ONNX graphs on the CPU; an export compares them
            with eager there.
        fixed_slots: whether a decoder's cache always has as many slots as its longest sequence.
        has_engines: whether a package may have, besides graphs, engines compiled for GPUs.
        picks_tokens: whether a decoder returns the likeliest token beside its logits.
        tile_batch: image tiles encoded in one call.
        writer: "module:function" that writes graphs which are no ONNX models; empty for none.
        tower_backend: backend of a package's vision tower, for a backend that runs decoders only.
        channel_multiple: number that divides the width of a decoder and of its feed-forward layers.
        whole_decoder: whether all layers are one graph, and every integer format is in blocks.
        half_caches: precisions with float16 caches, although activations are float32.
        preferred: precisions that an export of a language model takes this backend for, if it can
            run here and no backend is named.
    """

    name: str
    precisions: Mapping[str, tuple[str, ...]]
    domains: frozenset[str]
    emitter: str
    session: str
    install: str
    graph_backend: str = ""
    decoder_devices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    batch_dependent: frozenset[str] = frozenset()
    calibrated: frozenset[str] = frozenset()
    kinds: frozenset[str] | None = frozenset({ONNX})
    fixed_slots: bool = False
    has_engines: bool = False
    picks_tokens: bool = False
    tile_batch: int = 1
    writer: str = ""
    tower_backend: str = ""
    channel_multiple: int = 1
    whole_decoder: bool = False
    half_caches: frozenset[str] = frozenset()
    preferred: frozenset[str] = frozenset()

    @property
    def default_precision(self) -> str:
        """The precision of an export that names none."""
        return next(iter(self.precisions), PRECISIONS[0])

    def opens(self, kind: str) -> bool:
        """Whether the session opens graph files of this kind."""
        return self.kinds is None or kind in self.kinds

    def devices(self, precision: str, *, decodes: bool) -> tuple[str, ...] | None:
        """Devices that run graphs of a precision, a decoder among them or not; None for any."""
        devices = self.precisions.get(precision)
        return self.decoder_devices.get(precision, devices) if decodes else devices


TARGETS: dict[str, Target] = {
    "onnxruntime": Target(
        name="onnxruntime",
        # int8 is dynamic quantization, which the CUDA provider does not have.
        precisions={
            "fp32": ("cpu", "cuda", "tensorrt"),
            "fp16": ("cpu", "cuda", "tensorrt"),
            "int8": ("cpu",),
            "int4": ("cpu",),
        },
        # CUDA has no float32 kernel for attention over a cache; it would run on the CPU.
        decoder_devices={"fp32": ("cpu",)},
        # Activation scales of int8 span the batch.
        batch_dependent=frozenset({"int8"}),
        domains=frozenset({"", "com.microsoft"}),
        emitter="perception_rt.export.backends.onnxruntime:OnnxRuntimeLowering",
        session="perception_rt.runtime.backends.onnxruntime",
        install="perception_rt",
        graph_backend="onnxruntime",
    ),
    # Graphs of standard operators, and engines that TensorRT built from them ahead of time.
    "tensorrt": Target(
        name="tensorrt",
        precisions={"fp16": ("cuda",), "fp8": ("cuda",)},
        calibrated=frozenset({"fp8"}),
        domains=frozenset({""}),
        emitter="perception_rt.export.backends.tensorrt:TensorRtLowering",
        session="perception_rt.runtime.backends.tensorrt",
        install="perception_rt[tensorrt]",
        graph_backend="onnxruntime",
        fixed_slots=True,
        has_engines=True,
        picks_tokens=True,
        tile_batch=16,
    ),
    # Decoders in C++, from weights that are mapped and used in place.
    "native": Target(
        name="native",
        precisions={"fp32": ("cpu",), "int8": ("cpu",), "int4": ("cpu",)},
        kinds=frozenset({"native-decoder"}),
        domains=frozenset(),
        emitter="",
        writer="perception_rt.export.backends.native:write_decoder",
        session="perception_rt.runtime.backends.native",
        install="perception_rt",
        graph_backend="native",
        tower_backend="onnxruntime",
        channel_multiple=16,
        whole_decoder=True,
        half_caches=frozenset({"int8", "int4"}),
        preferred=frozenset({"int4"}),
    ),
    # Predictable outputs without an engine: stands in for any backend in tests.
    "reference": Target(
        name="reference",
        precisions={},
        kinds=None,
        domains=frozenset(),
        emitter="",
        session="perception_rt.runtime.backends.reference",
        install="",
    ),
}


def get_target(backend: str) -> Target:
    """The record of a backend; InputError names the known ones."""
    try:
        return TARGETS[backend]
    except KeyError:
        raise InputError(
            f"unknown backend {backend!r:.40}; known are {', '.join(TARGETS)}"
        ) from None


def default_backend(precision: str | None) -> str:
    """The backend of an export that names none: the first one that has the precision."""
    fitting = (target.name for target in TARGETS.values() if precision in target.precisions)
    return next(fitting, next(iter(TARGETS)))


def operator_domains(backend: str) -> frozenset[str]:
    """Operator domains that ONNX graphs of a backend may use; InputError for an unknown backend."""
    return get_target(backend).domains


def check_precision(target: Target, precision: str) -> None:
    """InputError unless the backend supports the precision."""
    if precision not in PRECISIONS:
        raise InputError(f"unknown precision {precision!r:.40}; known are {', '.join(PRECISIONS)}")
    if precision not in target.precisions:
        have = ", ".join(target.precisions) or "none: it cannot be exported to"
        raise InputError(f"precision {precision} is not for backend {target.name}; it has {have}")
