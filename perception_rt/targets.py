"""What each backend can express, as data: importable without the backend installed.

Adding a backend is a record here, an emitter in `export/emit/`, and a session in
`runtime/backends/`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from perception_rt.errors import InputError

PRECISIONS = ("fp32", "fp16", "int8", "int4", "fp8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A backend.

    Attributes:
        name: as in `--backend`.
        precisions: those it can express, each with the devices that run it.
        decoder_devices: the devices of language models, for precisions where they are fewer.
        domains: operator domains of its ONNX graphs; a graph with any other is refused.
        emitter: "module:class" of the lowering, imported on export; empty if it has none.
        session: module with `open_session` and `check_device`, imported at run time.
        install: the pip requirement that brings what the session needs; empty for none.
        graph_backend: the backend that can run its graphs too, on the CPU: an export compares them
            with eager there.
        fixed_slots: a decoder's cache has as many slots as its longest sequence, always.
        has_engines: besides graphs, a package may have engines of them for GPUs.
        picks_tokens: a decoder gives the likeliest token beside its logits.
        tile_batch: tiles of an image that are encoded in one call.
    """

    name: str
    precisions: Mapping[str, tuple[str, ...]]
    domains: frozenset[str]
    emitter: str
    session: str
    install: str
    graph_backend: str = ""
    decoder_devices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fixed_slots: bool = False
    has_engines: bool = False
    picks_tokens: bool = False
    tile_batch: int = 1

    def devices(self, precision: str, family: str) -> tuple[str, ...] | None:
        """The devices that run a precision of a model family; None for any."""
        devices = self.precisions.get(precision)
        return self.decoder_devices.get(precision, devices) if family == "plm" else devices


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
        # Attention over a cache has no kernel for float32 there, and would be run on the CPU.
        decoder_devices={"fp32": ("cpu",)},
        domains=frozenset({"", "com.microsoft"}),
        emitter="perception_rt.export.backends.onnxruntime:OnnxRuntimeLowering",
        session="perception_rt.runtime.backends.onnxruntime",
        install="perception_rt",
        graph_backend="onnxruntime",
    ),
    # Graphs in standard operators, and engines of them that TensorRT built ahead of time.
    "tensorrt": Target(
        name="tensorrt",
        precisions={"fp16": ("cuda",), "fp8": ("cuda",)},
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
    # Predictable outputs without an engine: the test double of everything above a session.
    "reference": Target(
        name="reference",
        precisions={},
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


def check_precision(target: Target, precision: str) -> None:
    """InputError unless the target can express the precision."""
    if precision not in PRECISIONS:
        raise InputError(f"unknown precision {precision!r:.40}; known are {', '.join(PRECISIONS)}")
    if precision not in target.precisions:
        have = ", ".join(target.precisions) or "none: it cannot be exported to"
        raise InputError(f"precision {precision} is not for backend {target.name}; it has {have}")
