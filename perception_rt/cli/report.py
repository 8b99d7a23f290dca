"""Describes a package, its defects, and the backends that can run here, in plain lines."""

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from perception_rt._version import __version__
from perception_rt.errors import PerceptionError, escaped
from perception_rt.families import FAMILIES
from perception_rt.limits import DEFAULT_LIMITS
from perception_rt.package import contract
from perception_rt.package.contract import GraphSpec, TensorSpec
from perception_rt.package.manifest import MANIFEST_FILE, Content, Manifest
from perception_rt.package.names import locate
from perception_rt.package.onnx_scan import GraphScan, scan_graph
from perception_rt.package.pe_graphs import further_sizes
from perception_rt.package.reader import open_package, verify_package
from perception_rt.plm_config import PlmConfig
from perception_rt.targets import ONNX, TARGETS
from perception_rt.tensorrt_library import find_tensorrt

# Each starts the note on a package that cannot be used.
DAMAGED, MISSING, NO_PACKAGE = "damaged", "missing", "not a package"
UNUSABLE = (DAMAGED, MISSING, NO_PACKAGE)

_OPTIONAL = (
    *("onnxruntime", "numpy", "pillow", "av", "tiktoken", "tokenizers", "sentencepiece"),
    *("torch", "onnx", "onnxscript", "openvino"),
)

# Weight formats of a language model by precision; `blocks` is an option of the target.
_FORMATS = {
    "fp32": "float32 throughout",
    "fp16": "float16 throughout",
    "int8": "int8 in tower, decoder blocks, embedding and head",
    "int4": "int8 in tower, {blocks} in decoder blocks, int4 in embedding and head",
}
# The library that reads each kind of tokenizer; "bytes" needs none.
_LIBRARIES = {"tiktoken": "tiktoken", "hf": "tokenizers", "sentencepiece": "sentencepiece"}

_FLOATS = (1, 10)  # of TensorProto.DataType: float32, float16
_NBITS, _ACCURACY_INT8 = "MatMulNBits", 4


def describe(manifest: Manifest) -> list[str]:
    """Returns a human-readable summary of a package."""
    content, record, image = manifest.content, manifest.record, manifest.content.image
    lines = [
        f"{content.name}  {manifest.id}",
        f"target      {content.target.backend}, {content.target.precision}",
        f"images      {_pairs(image)}",
        *_describe_sizes(content),
        f"weights     {_pairs(content.weights)}",
        f"versions    {_pairs(content.versions)}",
        *(_describe_plm(content) if _generates(content) else ()),
    ]
    for name, graph in content.graphs.items():
        caches = _caches(graph)
        shown = [f"{t.name} {t.dtype} {_shape(t)}" for t in graph.inputs if t not in caches]
        shown += [f"{len(caches)} caches"] if caches else []
        outputs = graph.outputs
        more = f" and {len(outputs) - 1} more" if len(outputs) > 1 else ""
        first = f"{outputs[0].name} {_shape(outputs[0])}{more}"
        how = [f"by {graph.backend}"] if graph.backend is not None else []
        how += [f"of kind {graph.kind}"] if graph.kind != ONNX else []
        title = " ".join([name, *how])
        lines.append(f"graph       {title}: {', '.join(shown)} -> {first}")
    lines += [
        f"file        {path}: {entry.size_bytes:,} bytes" for path, entry in content.files.items()
    ]
    engines = content.target.options.get("engines")
    if isinstance(engines, Mapping) and engines:
        builder = str(content.target.options.get("builder"))
        lines.append(f"engines     {', '.join(engines)!a:.80}, built by {builder!a:.60}")
    batch = ", batch 1" + (" on the CPU, not its engine" if engines is not None else "")
    parts = (("fidelity", ""), ("latency", batch), ("engine_fidelity", ""), ("engine_latency", ""))
    for part, note in parts:
        measured = record.get(part)
        for name, result in measured.items() if isinstance(measured, Mapping) else ():
            lines.append(f"{part:<11} {name}{note}: {_pairs(result)}")
    if "evaluation" in record:
        lines += [f"evaluation  {line}" for line in evaluation_lines(record["evaluation"])]
    return lines


def evaluation_lines(evaluation: Any) -> list[str]:
    """A line per score of an evaluation that an export recorded (`Report.summary`).

    Records are not checked when a package is opened, so one of another form gives a line too.
    """
    lines = []
    try:
        other = evaluation["against"] and evaluation["against"]["precision"]
        for part in evaluation["parts"]:
            lost = _values(part["against"]["points_lost"]) if part["against"] else {}
            for name, value in _values(part["metrics"]).items():
                title = " ".join(filter(None, [evaluation["task"], part["name"], name]))
                cost = f", {lost[name]:.2f} points lost against {other}" if name in lost else ""
                lines.append(escaped(f"{title}: {100 * value:.2f} %{cost}"))
    except (KeyError, TypeError, ValueError):
        return ["not in a form that this version knows"]
    return lines


def _values(figures: list[dict[str, Any]]) -> dict[str, float]:
    return {figure["name"]: figure["value"] for figure in figures}


def _generates(content: Content) -> bool:
    family = FAMILIES.get(content.family)
    return family is not None and family.generates


def _describe_sizes(content: Content) -> list[str]:
    """A line about the image sizes besides the default; none if there is one size."""
    sizes = further_sizes(content.graphs)
    shown = ", ".join(f"{height}x{width}" for height, width in sizes)
    return [f"more sizes  {shown}"] if sizes else []


def _describe_plm(content: Content) -> list[str]:
    """The lines for language models: decoder, formats, tiles, cache and tokenizer."""
    config, target = PlmConfig.from_dict(content.architecture), content.target
    decoder, parts = config.decoder, _decoder_parts(content)
    sizes = {
        "layers": decoder.n_layers,
        "dim": decoder.dim,
        "parts": len(parts),
        "vocab_size": decoder.vocab_size,
        "max_seqlen": decoder.max_seqlen,
    }
    formats = _FORMATS.get(target.precision, target.precision)
    formats = formats.replace("{blocks}", str(target.options.get("blocks")))
    cached = sum(_bytes_per_token(tensor) for graph in parts.values() for tensor in _caches(graph))
    tokenizer = "none: token ids only" if content.text is None else _pairs(content.text)
    return [
        f"decoder     {_pairs(sizes)}",
        f"formats     {formats}",
        f"tiles       {config.tokens_per_tile} tokens each",
        f"cache       {cached:,} bytes per token, {cached * decoder.max_seqlen:,} for max_seqlen",
        f"tokenizer   {tokenizer}",
    ]


def lint(path: str | os.PathLike[str]) -> list[str]:
    """Returns notes on defects and oddities of a package; damage is a note, not an error.

    Raises:
        InputError: there is no demo of this name.
    """
    path, expect = locate(path)
    if not os.path.lexists(path):
        return [f"{MISSING}: there is no file or folder of this name"]
    if not (Path(path) / MANIFEST_FILE).is_file():
        return [f"{NO_PACKAGE}: an engine package is a folder with {MANIFEST_FILE}"]
    try:
        manifest = verify_package(path, expect=expect)
        plm_notes = _lint_plm(path, manifest) if _generates(manifest.content) else []
    except PerceptionError as error:
        return [f"{DAMAGED}: {error}"]
    content, record = manifest.content, manifest.record
    notes = ["intact: all files match the manifest"]
    if content.weights.get("source") == "random":
        notes.append("random weights: for timing only")
    if not record.get("fidelity"):
        notes.append("no fidelity record: the package never passed an export gate")
    if content.versions.get("perception_rt") != __version__:
        notes.append(
            f"made by perception_rt {content.versions.get('perception_rt')}, not {__version__}"
        )
    left = content.target.options.get("float_layers")
    if left:
        notes.append(f"{len(left)} linear layers stay in float: 8 bits would lose accuracy")
    if content.target.precision == "fp16":
        notes.append("fp16 is for GPUs: on a CPU it is no faster than fp32; int8 is faster")
    backends = dict.fromkeys(content.backend_of(name) for name in content.graphs)
    notes += [f"this version does not know backend {b}" for b in backends if b not in TARGETS]
    return notes + plm_notes


def _lint_plm(path: str | os.PathLike[str], manifest: Manifest) -> list[str]:
    """The notes for language models; InputError if the architecture is unusable."""
    content = manifest.content
    config, parts = PlmConfig.from_dict(content.architecture), _decoder_parts(content)
    notes = []
    library = None if content.text is None else _LIBRARIES.get(str(content.text.get("kind")))
    if content.text is None:
        notes.append("no tokenizer: takes token ids only; export it with --tokenizer for text")
    elif library is not None and find_spec(library) is None:
        notes.append(f'{library} is not installed: pip install "perception_rt[plm]"')
    by_blocks = content.target.options.get("block_layers")
    if by_blocks:
        notes.append(
            f"{len(by_blocks)} linear layers are int8 by blocks: by rows would lose accuracy"
        )
    for name, graph in parts.items():
        outputs = {tensor.name for tensor in graph.outputs}
        stale = [t.name for t in _caches(graph) if contract.updated(t.name) not in outputs]
        if stale:
            notes.append(f"{name}: {len(stale)} caches are read but never updated: {stale[0]}")
    for name, scan in _scans(path, manifest).items():
        slow = _float_products(scan)
        if slow:
            notes.append(f"{name}: {slow} {_NBITS} compute in float: accuracy_level is not 4")
        quantized = content.target.precision in ("int8", "int4")
        if quantized and name in parts and _has_float_head(scan, config):
            notes.append(f"{name}: the head is not quantised, and each token reads all of it")
    return notes


def _scans(path: str | os.PathLike[str], manifest: Manifest) -> dict[str, GraphScan]:
    """Scans of the package's ONNX graphs, by name."""
    with open_package(path, expect=manifest.id) as package:
        return {
            name: scan_graph(package.read(graph.file))
            for name, graph in manifest.content.graphs.items()
            if graph.kind == ONNX
        }


def _float_products(scan: GraphScan) -> int:
    """Counts products with integer weights and float activations, which are slow."""
    products = zip(scan.nodes, scan.integers, strict=True)
    levels = [values.get("accuracy_level", 0) for (op, _), values in products if op == _NBITS]
    return sum(level != _ACCURACY_INT8 for level in levels)


def _has_float_head(scan: GraphScan, config: PlmConfig) -> bool:
    size = sorted((config.decoder.dim, config.decoder.vocab_size))
    return any(t.kind in _FLOATS and sorted(t.shape) == size for t in scan.externals)


def _decoder_parts(content: Content) -> dict[str, GraphSpec]:
    graphs = content.graphs.items()
    return {name: graph for name, graph in graphs if name.startswith(contract.DECODER)}


def _caches(graph: GraphSpec) -> list[TensorSpec]:
    return [t for t in graph.inputs if contract.is_cache(t.name)]


def _bytes_per_token(cache: TensorSpec) -> int:
    _, heads, _, channels = cache.shape
    assert isinstance(heads, int) and isinstance(channels, int)
    return heads * channels * int(cache.dtype.lstrip(ascii_lowercase)) // 8


def environment() -> dict[str, Any]:
    """Returns versions of installed libraries, and the backends that can run here."""
    return {
        "perception_rt": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **{name: _version(name) for name in _OPTIONAL},
        "backends": _backends(),
        "image limit": f"{DEFAULT_LIMITS.image_pixels:,} pixels",
    }


def _backends() -> dict[str, str]:
    result = {
        "reference": "cpu (predictable outputs for tests, not a model)",
        "native": _native(),
    }
    if find_spec("onnxruntime") is None:
        return result | {"onnxruntime": "not installed: pip install perception_rt"}
    from perception_rt.runtime.backends.onnxruntime import devices

    result |= {"onnxruntime": ", ".join(devices())}
    try:
        library = find_tensorrt()
    except PerceptionError as error:
        return result | {"tensorrt": str(error)}
    ahead = ", ".join(library.capabilities)
    return result | {"tensorrt": library.label + (f", builds for {ahead}" if ahead else "")}


def _native() -> str:
    """The instruction sets of the native decoder; or the reason why it is not there."""
    from perception_rt.native.library import instruction_sets

    try:
        sets = instruction_sets()
    except PerceptionError as error:
        return str(error)
    wrong = [f"{name} is disabled: its results are wrong" for name, ok in sets.items() if not ok]
    return f"cpu ({', '.join([*(name for name, ok in sets.items() if ok), *wrong])})"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def environment_lines(found: Mapping[str, Any]) -> list[str]:
    """Returns what `environment` found as text, one fact a line."""
    lines = []
    for name, value in found.items():
        if isinstance(value, Mapping):
            lines += [f"{name}:", *(f"  {key}: {item}" for key, item in value.items())]
        else:
            lines.append(f"{name}: {value}")
    return lines


def _shape(tensor: TensorSpec) -> str:
    return f"({', '.join(map(str, tensor.shape))})"


def _pairs(values: Any) -> str:
    if not isinstance(values, Mapping):
        return _shown(values)
    return ", ".join(f"{name} {_shown(value)}" for name, value in values.items())


def _shown(value: Any) -> str:
    """A JSON value as words."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.7g}"
    if isinstance(value, Mapping):
        return f"({_pairs(value)})"
    if isinstance(value, list | tuple):
        return " ".join(map(_shown, value)) or "none"
    return str(value)
