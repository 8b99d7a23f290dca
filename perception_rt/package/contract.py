"""Names, inputs and outputs of engine graphs; each name is spelled here only.

The exporter builds graphs to these records, the manifest stores them, and the runtime checks each
call against them. Standard library only.

Legend: N batch (dynamic), H W pixels, T tokens, D embedding channels, C width, V vocabulary;
L logit positions, K key and value heads, S cache slots, E channels per head.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from perception_rt.errors import PackageError
from perception_rt.targets import ONNX

# Graphs of a Perception Encoder package. All of them share one weights file.
VISION = "vision"  # uint8 images -> what the reference's vision `forward` returns
PIXELS = "pixels"  # the same from already normalised float pixels
FEATURES = "features"  # uint8 images -> tapped blocks, no final norm; see `features_part`
ATTENTION = "attention"  # output of the last block -> attention of the pooling probe
PYRAMID = "pyramid"  # uint8 images -> feature pyramid of a detection backbone, its only graph
TEXT = "text"  # token ids -> text features, not normalised

# Graphs of a Perception Language Model package, beside `vision` and `pixels` for tiles. The decoder
# is cut into parts of whole layers, so that an export has only one part in memory at a time. The
# first part takes the output of `embed`, each later one the hidden state of the part before it.
EMBED = "embed"  # token ids -> hidden
DECODER = "decoder_"  # hidden, cache -> hidden, or logits from the last part; see `decoder_part`

# Inputs.
IMAGES_U8 = "images"  # uint8 (N, H, W, 3), RGB
PIXELS_F32 = "pixels"  # float32 (N, 3, H, W), normalised
TOKENS = "tokens"  # int64 (N, T)
HIDDEN = "hidden"  # float32 (N, T, C)
PAST_LENGTHS = "past_lengths"  # int32 (N,): tokens already in the cache; unless all 0, T or N is 1
LOGIT_POSITIONS = "logit_positions"  # int64 (N, L): indices of the tokens to predict from

# Outputs.
EMBEDDING = "embedding"  # float32 (N, D) of a pooled tower, or (N, T, C) of a tower without pool
ATTENTION_MAPS = "attention_maps"  # float32 (N, heads of the pooling probe, T)
LEVELS = ("p2", "p3", "p4", "p5", "p6")  # float32 (N, channels, h, w), of strides 4 to 64 pixels
TEXT_EMBEDDING = "text_embedding"  # float32 (N, D)

IMAGE_FEATURES = "image_features"  # float32 (N, image tokens per tile, C of the decoder)
HIDDEN_OUT = "next_hidden"  # float32 (N, T, C)
LOGITS = "logits"  # float32 (N, L, V)
# Engines on a GPU also return the likeliest token except the image token: copying a row of logits
# to the host takes long.
TOP_LOGIT = "top_logit"  # float32 (N, L)
TOP_ID = "top_id"  # int64 (N, L)

# Tensors in each decoder graph, float32 (longest sequence, E / 2): one row per position.
ROTARY_TABLES = ("decoder.rope_cos", "decoder.rope_sin")

# Names of dynamic dimensions.
BATCH = "batch"
LENGTH = "length"  # T of a decoder
SLOTS = "slots"  # S
POSITIONS = "positions"  # L

# Largest call of a decoder; engines are built for these sizes.
CHUNK_TOKENS = 128  # prompt tokens of one sequence
ENGINE_SEQUENCES = 8  # sequences with one token each
ENGINE_POSITIONS = 9  # logit positions of one sequence: guessed tokens and one more

DTYPES = ("uint8", "int8", "int32", "int64", "float16", "float32")

# Keys of a graph in a manifest.
_REQUIRED, _OPTIONAL = {"data", "file", "inputs", "outputs"}, {"backend", "kind"}
_NAME = re.compile(r"[a-z0-9._-]{1,64}")  # backend or kind
_SIDE = "([1-9][0-9]{0,3})"
_IMAGE_GRAPH = re.compile(
    rf"({VISION}|{PIXELS}|{FEATURES}|{ATTENTION}|{PYRAMID})(?:_[0-9]+)?(?:_{_SIDE}x{_SIDE})?"
)
_KEYS, _VALUES = "key_cache_", "value_cache_"


def tap_name(layer: int) -> str:
    """Output name of the block at a non-negative `layer`."""
    return f"block_{layer}"


def features_part(index: int) -> str:
    """Name of the graph at an index from 0 in the chain of tapped blocks.

    The first takes images, each later one the last block that the graph before it returns.
    """
    return FEATURES if index == 0 else f"{FEATURES}_{index}"


def sized(graph: str, size: tuple[int, int]) -> str:
    """Name of an encoder's graph for a further image size, (height, width) in pixels."""
    return f"{graph}_{size[0]}x{size[1]}"


def size_of(graph: str) -> tuple[int, int] | None:
    """The further image size that an encoder's graph is for; None for the package's own."""
    found = _IMAGE_GRAPH.fullmatch(graph)
    return None if found is None or found[2] is None else (int(found[2]), int(found[3]))


def graph_kind(graph: str) -> str:
    """An encoder's graph without part and image size; the name itself for other graphs."""
    found = _IMAGE_GRAPH.fullmatch(graph)
    return graph if found is None else found[1]


def decoder_part(index: int) -> str:
    """Name of the decoder graph at an index from 0."""
    return f"{DECODER}{index}"


def key_cache(layer: int) -> str:
    """Input name of a decoder layer's keys, float32 or float16 (N, K, S, E).

    They are written in place: the output `updated(name)` must be bound to the input's memory.
    """
    return f"{_KEYS}{layer}"


def value_cache(layer: int) -> str:
    """Input name of a decoder layer's values; see `key_cache`."""
    return f"{_VALUES}{layer}"


def is_cache(name: str) -> bool:
    """Whether an input holds keys or values."""
    return name.startswith((_KEYS, _VALUES))


def updated(cache: str) -> str:
    """Output name of the cache input `cache` after a call."""
    return f"{cache}_out"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One input or output: name, numpy dtype name, and shape with names for dynamic sizes."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Strict inverse of `to_dict`; PackageError on anything else."""
        if not isinstance(data, dict) or set(data) != {"name", "dtype", "shape"}:
            raise PackageError("a tensor spec must have exactly the keys dtype, name, shape")
        name, dtype, shape = data["name"], data["dtype"], data["shape"]
        if not isinstance(name, str) or not 1 <= len(name) <= 64:
            raise PackageError("a tensor spec's name must be a string of 1 to 64 characters")
        if dtype not in DTYPES:
            raise PackageError(f"tensor {name!r}: dtype must be one of {list(DTYPES)}")
        if not isinstance(shape, list) or len(shape) > 8:
            raise PackageError(f"tensor {name!r}: shape must be a list of at most 8 sizes")
        for size in shape:
            if not (type(size) is int and 0 < size < 2**31) and not (
                isinstance(size, str) and 0 < len(size) <= 64
            ):
                raise PackageError(f"tensor {name!r}: a size is a positive integer or a name")
        return cls(name=name, dtype=dtype, shape=tuple(shape))


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSpec:
    """One engine graph.

    Attributes:
        file: path of the graph in the package.
        data: paths of the files that hold its weights.
        inputs: its inputs, in order.
        outputs: its outputs, in order.
        backend: name of the backend that runs it; None for the package's own.
        kind: format of `file`: ONNX, or a name that the backend's record in `targets` lists.
    """

    file: str
    data: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    backend: str | None = None
    kind: str = ONNX

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `backend` and `kind` are left out where they are the default."""
        values: dict[str, Any] = {
            "file": self.file,
            "data": list(self.data),
            "inputs": [t.to_dict() for t in self.inputs],
            "outputs": [t.to_dict() for t in self.outputs],
        }
        if self.backend is not None:
            values["backend"] = self.backend
        if self.kind != ONNX:
            values["kind"] = self.kind
        return values

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Strict inverse of `to_dict`; PackageError on anything else."""
        if not isinstance(data, dict) or set(data) - _OPTIONAL != _REQUIRED:
            raise PackageError(
                f"a graph must have the keys {', '.join(sorted(_REQUIRED))}, may have "
                f"{' and '.join(sorted(_OPTIONAL))}, and has no other key"
            )
        for key in sorted(_OPTIONAL & set(data)):
            if not isinstance(data[key], str) or not _NAME.fullmatch(data[key]):
                raise PackageError(f"a graph's {key} must be 1 to 64 characters of [a-z0-9._-]")
        if data.get("kind") == ONNX:
            raise PackageError(f"a graph of kind {ONNX} must leave out its kind")
        if not isinstance(data["file"], str):
            raise PackageError("a graph's file must be a string")
        for key in ("data", "inputs", "outputs"):
            if not isinstance(data[key], list):
                raise PackageError(f"a graph's {key} must be a list")
        if not all(isinstance(name, str) for name in data["data"]):
            raise PackageError("a graph's data must be a list of file names")
        spec = cls(
            file=data["file"],
            data=tuple(data["data"]),
            inputs=tuple(TensorSpec.from_dict(t) for t in data["inputs"]),
            outputs=tuple(TensorSpec.from_dict(t) for t in data["outputs"]),
            backend=data.get("backend"),
            kind=data.get("kind", ONNX),
        )
        names = [t.name for t in spec.inputs + spec.outputs]
        if len(set(names)) != len(names):
            raise PackageError(f"graph {spec.file!r}: a tensor name occurs twice")
        return spec

    def output(self, name: str) -> TensorSpec:
        """The output called `name`."""
        for spec in self.outputs:
            if spec.name == name:
                return spec
        raise PackageError(f"graph {self.file!r} has no output {name!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSignature:
    """Inputs and outputs of one graph, in the order in which an export lists them."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def batched(name: str, dtype: str, *sizes: int | str) -> TensorSpec:
    """A tensor with a batch dimension in front."""
    return TensorSpec(name=name, dtype=dtype, shape=(BATCH, *sizes))


def check_signatures(
    graphs: Mapping[str, GraphSpec], signatures: Mapping[str, GraphSignature]
) -> None:
    """PackageError unless there is a graph for each signature, and no other.

    The order of inputs and of outputs, and the names of dynamic sizes, are free.
    """
    for name in sorted(graphs.keys() - signatures.keys()):
        raise PackageError(f"graph {name!a:.80} is none of {sorted(signatures)}")
    for name, signature in signatures.items():
        spec = required_graph(graphs, name)
        _check_tensors(name, "input", spec.inputs, signature.inputs)
        _check_tensors(name, "output", spec.outputs, signature.outputs)


def required_graph(graphs: Mapping[str, GraphSpec], name: str) -> GraphSpec:
    """The graph `name`; PackageError if there is none."""
    if name not in graphs:
        raise PackageError(f"no graph {name!r}, there are {sorted(graphs)}")
    return graphs[name]


def _check_tensors(
    graph: str, kind: str, found: tuple[TensorSpec, ...], wanted: tuple[TensorSpec, ...]
) -> None:
    have = {tensor.name: tensor for tensor in found}
    want = {tensor.name: tensor for tensor in wanted}
    for name in sorted(set(have) ^ set(want)):
        state = "an unknown" if name in have else "no"
        raise PackageError(f"graph {graph!r} has {state} {kind} {name!a:.80}")
    for name, tensor in want.items():
        if have[name].dtype != tensor.dtype or _sizes(have[name]) != _sizes(tensor):
            raise PackageError(
                f"{kind} {name!r} of graph {graph!r} must be {tensor.dtype} {tensor.shape}, "
                f"not {have[name].dtype} {have[name].shape}"
            )


def _sizes(spec: TensorSpec) -> list[int]:
    """The shape, with 0 for dynamic sizes."""
    return [size if isinstance(size, int) else 0 for size in spec.shape]
