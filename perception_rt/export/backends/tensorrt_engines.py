"""Builds TensorRT engines from a stage's graphs, and checks that they are fused.

Attention, rotation and cache updates are single layers in TensorRT's network, and not decomposable:
the build fails if one has no fused kernel. With `--allow-unfused` attention may be decomposed, and
operators that an older TensorRT has no layer for are replaced by their definitions in ONNX.
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

# Layer in TensorRT's network that each operator must become.
_LAYERS = {
    "Attention": "ATTENTION_OUTPUT",
    "RotaryEmbedding": "ROTARY_EMBEDDING",
    "TensorScatter": "KV_CACHE_UPDATE",
    "LayerNormalization": "NORMALIZATION",
    "QuantizeLinear": "QUANTIZE",
    "DequantizeLinear": "DEQUANTIZE",
}
DECOMPOSABLE = ("Attention", "RotaryEmbedding")  # ONNX defines these by simpler operators
_MAX_QUOTE = 600  # characters of TensorRT's messages in an error


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """An engine and how it was built.

    Attributes:
        data: the serialized engine.
        seconds: duration of the build.
        layers: number of layers in the network, by type.
    """

    data: Any
    seconds: float
    layers: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeEngine:
    """The engine of a graph, and its entry in the manifest's record."""

    data: memoryview
    record: dict[str, Any]


class EngineMaker(Protocol):
    """Source of a package's engines.

    Attributes:
        label: name and version of the TensorRT that builds them.
    """

    label: str

    def engine(self, graph: str, spec: GraphSpec, file: Path, gpu: str) -> MadeEngine:
        """The engine of a graph for a GPU.

        Args:
            graph: name of the graph.
            spec: its inputs and outputs.
            file: the ONNX file, its weights beside it.
            gpu: a compute capability such as "sm89", or HERE.
        """


class EngineBuilder:
    """Builds the engines of a plan with the installed TensorRT.

    Raises:
        BackendError: no installed TensorRT can build them on this machine.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._library = library_for(plan.engines, refittable=plan.refittable)
        self._max_length = plan.max_length
        self.label = self._library.label

    def engine(self, graph: str, spec: GraphSpec, file: Path, gpu: str) -> MadeEngine:
        """Builds an engine; see `EngineMaker.engine`."""
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
    """File name of an engine in its package."""
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
        library: TensorRT to build with.
        file: the ONNX graph, its weights beside it.
        spec: inputs and outputs of the graph.
        operators: number of operators in the graph, by type.
        capability: a compute capability such as "sm89", or HERE.
        profiles: ranges of the dynamic sizes, one optimization profile each.
        allow_unfused: whether attention without a fused kernel may be decomposed, and operators
            without a layer replaced.
        refittable: whether the engine holds no weights, which are supplied when it is loaded.

    Raises:
        ExportError: TensorRT refuses the graph, an operator is not fused, or the build fails.
    """
    trt = library.api
    log = _Log(trt)
    builder = trt.Builder(log.logger)
    network = builder.create_network(strongly_typed_flag(trt))
    parser = trt.OnnxParser(network, log.logger)
    missing = library.lacks(operators)
    if missing:
        _check_missing(library, file.name, missing, allow_unfused)
        parsed = parser.parse(inlined(file, missing), str(file))
    else:
        parsed = parser.parse_from_file(str(file))
    if not parsed:
        raise ExportError(f"{library.label} cannot read {file.name}: {log.text()}")
    layers = _census(network)
    if not allow_unfused:
        _check_census(file.name, layers, operators)
    config = builder.create_builder_config()
    if library.builds_ahead:
        config.num_compute_capabilities = 1
        name = "CURRENT" if capability == HERE else capability.upper()
        if not config.set_compute_capability(getattr(trt.ComputeCapability, name), 0):
            raise ExportError(f"{library.label} refuses {capability}: {log.text()}")
    for ranges in profiles:
        if config.add_optimization_profile(_profile(builder, spec, ranges)) < 0:
            raise ExportError(f"{library.label} refuses a profile of {file.name}: {log.text()}")
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
            f"{library.label} cannot build {file.name} for {capability}: {log.text()}"
        )
    return BuiltEngine(data=data, seconds=time.monotonic() - started, layers=dict(layers))


def library_for(engines: Sequence[str], *, refittable: bool = False) -> TensorRt:
    """The installed TensorRT that builds all these engines; BackendError if there is none."""
    library = find_tensorrt(ahead=any(name != HERE for name in engines))
    check_engines(library, engines)
    if refittable and gpu_capability() is None:
        # TensorRT for RTX 1.7 runs kernels on the weights in this mode, whatever the graph is.
        raise BackendError(f"{library.label} builds refittable engines only where a GPU is present")
    return library


def operator_counts(file: Path) -> Counter[str]:
    """Number of operators of each type in a graph; weights are not read."""
    model = onnx.load(str(file), load_external_data=False)
    return Counter(node.op_type for node in model.graph.node)


def check_engines(library: TensorRt, engines: Sequence[str]) -> None:
    """BackendError unless the library can build for all these GPUs on this machine."""
    for name in engines:
        if name == HERE:
            gpu = gpu_capability()
            if gpu is None:
                raise BackendError(
                    "there is no GPU to build for; name compute capabilities by --target, "
                    f"{_known(library)}"
                )
            if library.builds_ahead and gpu not in library.capabilities:
                raise BackendError(
                    f"{library.label} does not build for this machine's GPU, {gpu}, "
                    f"{_known(library)}; NVIDIA's tensorrt may"
                )
        elif name not in library.capabilities:
            raise BackendError(f"{library.label} does not build for {name}, {_known(library)}")


def _known(library: TensorRt) -> str:
    if not library.builds_ahead:
        return f"which {library.name} cannot: only tensorrt_rtx builds ahead of time"
    return f"out of {', '.join(library.capabilities)}"


class _Log:
    """Collects TensorRT's error messages, which would be printed otherwise."""

    def __init__(self, trt: Any) -> None:
        self.lines: list[str] = []
        lines, errors = self.lines, (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)
        has_gpu = gpu_capability() is not None

        class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                # Without a GPU, TensorRT logs an error that does not matter for building ahead.
                if severity in errors and (has_gpu or "Cuda Runtime" not in message):
                    lines.append(message)

        self.logger = Logger()

    def text(self) -> str:
        """The collected errors in one line."""
        return " ".join(" ".join(self.lines).split())[:_MAX_QUOTE] or "no reason was given"


def strongly_typed_flag(trt: Any) -> int:
    """Creation flag of strongly typed networks; 0 for versions that have no others."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _census(network: Any) -> Counter[str]:
    """Number of layers by type."""
    layers = (network.get_layer(index) for index in range(network.num_layers))
    return Counter(layer.type.name for layer in layers)


def _check_census(name: str, layers: Mapping[str, int], operators: Mapping[str, int]) -> None:
    """ExportError unless every operator that must become one layer did."""
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
            f"{name} became a network of {', '.join(wrong)}; --allow-unfused builds it anyway"
        )


def _check_missing(
    library: TensorRt, name: str, missing: Sequence[str], allow_unfused: bool
) -> None:
    """ExportError for operators without a layer, unless they may be replaced."""
    fixed = [operator for operator in missing if operator not in DECOMPOSABLE]
    if fixed or not allow_unfused:
        advice = "it is too old for this model" if fixed else "--allow-unfused replaces them"
        raise ExportError(
            f"{library.label} has no layers for {', '.join(fixed or missing)} of {name}; {advice}"
        )


def inlined(file: Path, operators: Sequence[str]) -> bytes:
    """A graph with these operators replaced by ONNX's definitions of them; returns its bytes."""
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
            layer.__class__ = trt.IAttentionInputLayer  # the only way to cast in this interface
            yield layer.attention


def _profile(builder: Any, spec: GraphSpec, ranges: Profile) -> Any:
    """An optimization profile with least, usual and largest shape of every input."""
    profile = builder.create_optimization_profile()
    for source in spec.inputs:
        shapes = [
            tuple(ranges[size][which] if isinstance(size, str) else size for size in source.shape)
            for which in range(3)
        ]
        profile.set_shape(source.name, *shapes)
    return profile
