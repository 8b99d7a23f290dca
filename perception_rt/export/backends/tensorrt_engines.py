"""Builds TensorRT engines of the graphs of a stage, and counts what was fused.

Attention, rotation and the update of a cache are layers of their own in TensorRT's network. Those
layers are not decomposable: where there is no fused kernel for one, the build fails. With
`--allow-unfused` it does not, and what an older TensorRT has no layer for is spelled out for it.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import onnx
import onnx.inliner

from perception_rt.errors import BackendError, ExportError
from perception_rt.export.backends.tensorrt_profiles import Profile, profiles
from perception_rt.export.plan import HERE, Plan
from perception_rt.memory import peak_rss_bytes
from perception_rt.package.contract import GraphSpec
from perception_rt.tensorrt_library import TensorRt, find_tensorrt, gpu_capability

# The layer that each operator must be in TensorRT's network.
_LAYERS = {
    "Attention": "ATTENTION_OUTPUT",
    "RotaryEmbedding": "ROTARY_EMBEDDING",
    "TensorScatter": "KV_CACHE_UPDATE",
    "LayerNormalization": "NORMALIZATION",
    "QuantizeLinear": "QUANTIZE",
    "DequantizeLinear": "DEQUANTIZE",
}
DECOMPOSABLE = ("Attention", "RotaryEmbedding")  # ONNX defines these by others
_MOST_WORDS = 600  # of TensorRT's own, in an error


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """An engine and how it came about.

    Attributes:
        data: the serialized engine.
        seconds: that the build took.
        layers: of the network, by type; what the fused operators became, and products.
    """

    data: Any
    seconds: float
    layers: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeEngine:
    """The engine of a graph, and what the manifest's record says of it."""

    data: memoryview
    record: dict[str, Any]


class EngineMaker(Protocol):
    """Where the engines of a package come from.

    Attributes:
        label: of the TensorRT that built them.
    """

    label: str

    def engine(self, graph: str, spec: GraphSpec, file: Path, gpu: str) -> MadeEngine:
        """The engine of a graph, in an ONNX file, for a compute capability or HERE."""


class EngineBuilder:
    """Builds the engines of a plan."""

    def __init__(self, plan: Plan) -> None:
        """BackendError unless the installed TensorRT can do that here."""
        self._plan = plan
        self._library = library_for(plan.engines, refittable=plan.refittable)
        self._max_length = plan.max_length
        self.label = self._library.label

    def engine(self, graph: str, spec: GraphSpec, file: Path, gpu: str) -> MadeEngine:
        """Builds one; ExportError if TensorRT does not."""
        engine = build_engine(
            self._library,
            file,
            spec,
            operator_counts(file),
            capability=gpu,
            profiles=profiles(graph, self._max_length),
            allow_unfused=self._plan.allow_unfused,
            refittable=self._plan.refittable,
        )
        data = memoryview(engine.data)
        record = {
            "seconds": round(engine.seconds, 2),
            "bytes": data.nbytes,
            "layers": dict(engine.layers),
            "peak_rss_bytes": peak_rss_bytes(),
        }
        return MadeEngine(data=data, record=record)


def engine_name(graph: str, gpu: str) -> str:
    """The file of an engine in its package."""
    return f"{graph}.{gpu}.engine"


def build_engine(
    library: TensorRt,
    file: Path,
    spec: GraphSpec,
    operators: Mapping[str, int],
    *,
    capability: str,
    profiles: Sequence[Profile],
    allow_unfused: bool = False,
    refittable: bool = False,
) -> BuiltEngine:
    """Builds one engine.

    Args:
        library: the TensorRT that builds it.
        file: the ONNX graph, its weights beside it.
        spec: its inputs and outputs.
        operators: how many of each type the graph has.
        capability: a compute capability, as in "sm89", or HERE.
        profiles: ranges of the dynamic sizes, each an optimization profile.
        allow_unfused: attention without a fused kernel may be taken apart, and attention and
            rotation that the library has no layer for.
        refittable: the engine has no weights: they are put in when it is loaded.

    Raises:
        ExportError: TensorRT refuses the graph, something is not fused, or the build fails.
    """
    trt = library.api
    log = _Log(trt)
    builder = trt.Builder(log.logger)
    network = builder.create_network(strongly_typed_flag(trt))
    parser = trt.OnnxParser(network, log.logger)
    missing = library.lacks(operators)
    if missing:
        _check_missing(library, file.name, missing, allow_unfused)
        parsed = parser.parse(spelled_out(file, missing), str(file))
    else:
        parsed = parser.parse_from_file(str(file))
    if not parsed:
        raise ExportError(f"{library.label} cannot read {file.name}: {log.words()}")
    layers = _census(network)
    if not allow_unfused:
        _check_census(file.name, layers, operators)
    config = builder.create_builder_config()
    if library.builds_ahead:
        config.num_compute_capabilities = 1
        name = "CURRENT" if capability == HERE else capability.upper()
        if not config.set_compute_capability(getattr(trt.ComputeCapability, name), 0):
            raise ExportError(f"{library.label} refuses {capability}: {log.words()}")
    for ranges in profiles:
        if config.add_optimization_profile(_profile(builder, spec, ranges)) < 0:
            raise ExportError(f"{library.label} refuses a profile of {file.name}: {log.words()}")
    if refittable:
        for flag in (trt.BuilderFlag.REFIT, trt.BuilderFlag.STRIP_PLAN):
            config.set_flag(flag)
    if allow_unfused:
        for attention in _attentions(trt, network):
            attention.decomposable = True
    started = time.monotonic()
    data = builder.build_serialized_network(network, config)
    if data is None:
        raise ExportError(
            f"{library.label} cannot build {file.name} for {capability}: {log.words()}"
        )
    return BuiltEngine(data=data, seconds=time.monotonic() - started, layers=dict(layers))


def library_for(engines: Sequence[str], *, refittable: bool = False) -> TensorRt:
    """The TensorRT that builds for all of these here; BackendError if none does."""
    library = find_tensorrt(ahead=any(name != HERE for name in engines))
    check_engines(library, engines)
    if refittable and gpu_capability() is None:
        # Tried with 1.7: it runs kernels on the weights then, even of a single product.
        raise BackendError(f"{library.label} builds refittable engines only where a GPU is")
    return library


def operator_counts(file: Path) -> Counter[str]:
    """How many operators of each type a graph has; its weights are not read."""
    model = onnx.load(str(file), load_external_data=False)
    return Counter(node.op_type for node in model.graph.node)


def check_engines(library: TensorRt, engines: Sequence[str]) -> None:
    """BackendError unless the library can build for all of these here."""
    for name in engines:
        if name == HERE:
            gpu = gpu_capability()
            if gpu is None:
                raise BackendError(
                    f"there is no GPU to build for; name compute capabilities by --target, "
                    f"{_known(library)}"
                )
            if library.builds_ahead and gpu not in library.capabilities:
                raise BackendError(
                    f"{library.label} does not build for the GPU that is here, {gpu}, "
                    f"{_known(library)}; NVIDIA's tensorrt may"
                )
        elif name not in library.capabilities:
            raise BackendError(f"{library.label} does not build for {name}, {_known(library)}")


def _known(library: TensorRt) -> str:
    if not library.builds_ahead:
        return f"which {library.name} cannot: only tensorrt_rtx builds ahead of time"
    return f"out of {', '.join(library.capabilities)}"


class _Log:
    """Collects what TensorRT says of errors instead of printing it."""

    def __init__(self, trt: Any) -> None:
        self.lines: list[str] = []
        lines, errors = self.lines, (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)
        has_gpu = gpu_capability() is not None

        class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                # A machine without a GPU says so too, which a build ahead of time does not need.
                if severity in errors and (has_gpu or "Cuda Runtime" not in message):
                    lines.append(message)

        self.logger = Logger()

    def words(self) -> str:
        """The errors in one line."""
        return " ".join(" ".join(self.lines).split())[:_MOST_WORDS] or "it gave no reason"


def strongly_typed_flag(trt: Any) -> int:
    """The flag of networks whose types are the graph's own; later versions know no others."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _census(network: Any) -> Counter[str]:
    """Layers by type."""
    layers = (network.get_layer(index) for index in range(network.num_layers))
    return Counter(layer.type.name for layer in layers)


def _check_census(name: str, layers: Mapping[str, int], operators: Mapping[str, int]) -> None:
    """ExportError unless every operator that must be one layer is one."""
    wanted: Counter[str] = Counter()
    for operator, layer in _LAYERS.items():
        if operators.get(operator, 0):
            wanted[layer] += operators[operator]
    wrong = [
        f"{layers.get(layer, 0)} {layer} layers, not {count}"
        for layer, count in wanted.items()
        if layers.get(layer, 0) != count
    ]
    if wrong:
        raise ExportError(
            f"{name} became a network of {', '.join(wrong)}; --allow-unfused builds it all the same"
        )


def _check_missing(
    library: TensorRt, name: str, missing: Sequence[str], allow_unfused: bool
) -> None:
    """ExportError for operators without a layer, unless they may be spelled out."""
    fixed = [operator for operator in missing if operator not in DECOMPOSABLE]
    if fixed or not allow_unfused:
        advice = "it is too old for this model" if fixed else "--allow-unfused spells them out"
        raise ExportError(
            f"{library.label} has no layers for {', '.join(fixed or missing)} of {name}; {advice}"
        )


def spelled_out(file: Path, operators: Sequence[str]) -> bytes:
    """A graph in which these operators are what ONNX defines them to be, in simpler ones."""
    model = onnx.load(str(file), load_external_data=False)
    simple = onnx.inliner.inline_selected_functions(
        model, [("", operator) for operator in operators], inline_schema_functions=True
    )
    return simple.SerializeToString()


def _attentions(trt: Any, network: Any) -> Iterator[Any]:
    """The attentions of a network."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type.name == "ATTENTION_INPUT":
            layer.__class__ = trt.IAttentionInputLayer  # the interface knows no other cast
            yield layer.attention


def _profile(builder: Any, spec: GraphSpec, ranges: Profile) -> Any:
    """Every input's shapes, of which a dynamic size has a least, a usual and a largest."""
    profile = builder.create_optimization_profile()
    for source in spec.inputs:
        shapes = [
            tuple(ranges[size][which] if isinstance(size, str) else size for size in source.shape)
            for which in range(3)
        ]
        profile.set_shape(source.name, *shapes)
    return profile
