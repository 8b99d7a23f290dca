"""What a package is, what is wrong with it, and what can run here, in plain lines."""

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from perception_rt._version import __version__
from perception_rt.errors import PerceptionError
from perception_rt.limits import DEFAULT_LIMITS
from perception_rt.package.manifest import Manifest
from perception_rt.package.reader import verify_package
from perception_rt.targets import TARGETS

DAMAGED = "damaged"  # how the note on a package that cannot be used begins

_OPTIONAL = ("onnxruntime", "numpy", "pillow", "av", "torch", "onnx", "onnxscript", "openvino")


def describe(manifest: Manifest) -> list[str]:
    """A manifest in lines."""
    content, record, image = manifest.content, manifest.record, manifest.content.image
    lines = [
        f"{content.name}  {manifest.id}",
        f"target      {content.target.backend}, {content.target.precision}",
        f"images      {_pairs(image)}",
        f"weights     {_pairs(content.weights)}",
        f"versions    {_pairs(content.versions)}",
    ]
    for name, graph in content.graphs.items():
        shown = ", ".join(f"{t.name} {t.dtype}{list(t.shape)}" for t in graph.inputs)
        outputs = graph.outputs
        more = f" and {len(outputs) - 1} more" if len(outputs) > 1 else ""
        first = f"{outputs[0].name} {list(outputs[0].shape)}{more}"
        lines.append(f"graph       {name}: {shown} -> {first}")
    lines += [
        f"file        {path}: {entry.size_bytes:,} bytes" for path, entry in content.files.items()
    ]
    for part, note in (("fidelity", ""), ("latency", ", batch 1")):
        measured = record.get(part)
        for name, result in measured.items() if isinstance(measured, Mapping) else ():
            lines.append(f"{part:<11} {name}{note}: {_pairs(result)}")
    return lines


def lint(path: str | os.PathLike[str]) -> list[str]:
    """What is wrong or remarkable about a package; damage is one of the lines, not an error."""
    try:
        manifest = verify_package(path)
    except PerceptionError as error:
        return [f"{DAMAGED}: {error}"]
    content, record = manifest.content, manifest.record
    notes = ["intact: every file has the bytes that the manifest says"]
    if content.weights.get("source") == "random":
        notes.append("random weights: good for timing only")
    if not record.get("fidelity"):
        notes.append("no fidelity record: the package never passed an export gate")
    if content.versions.get("perception_rt") != __version__:
        notes.append(
            f"made by perception_rt {content.versions.get('perception_rt')}, not {__version__}"
        )
    left = content.target.options.get("float_layers")
    if left:
        notes.append(f"{len(left)} linear layers stay in float: int8 would hurt them")
    if content.target.precision == "fp16":
        notes.append("fp16 is for GPUs: on a CPU it is no faster than fp32, and int8 is")
    if content.target.backend not in TARGETS:
        notes.append(f"backend {content.target.backend} is not known to this version")
    return notes


def environment() -> dict[str, Any]:
    """Versions of what is installed, and what can run here."""
    return {
        "perception_rt": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **{name: _version(name) for name in _OPTIONAL},
        "backends": _backends(),
        "image limit": f"{DEFAULT_LIMITS.image_pixels:,} pixels",
    }


def _backends() -> dict[str, str]:
    result = {"reference": "cpu (predictable outputs for tests, not a model)"}
    if find_spec("onnxruntime") is None:
        return result | {"onnxruntime": "not installed: pip install perception_rt"}
    from perception_rt.runtime.backends.onnxruntime import devices

    return result | {"onnxruntime": ", ".join(devices())}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _pairs(values: Any) -> str:
    if not isinstance(values, Mapping):
        return str(values)
    return ", ".join(f"{name} {value}" for name, value in values.items())
