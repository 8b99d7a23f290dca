"""ONNX Runtime, on CPU or CUDA. A device that cannot be had is an error, never another device."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# ONNX Runtime keeps and sends telemetry from the moment it is loaded, unless it is told before.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime as ort

from perception_rt.errors import BackendError, InputError
from perception_rt.package.reader import Package
from perception_rt.targets import get_target

Array = np.ndarray[Any, Any]

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
DOMAINS = frozenset({"", "com.microsoft"})


def devices() -> list[str]:
    """The devices that the installed ONNX Runtime was built for."""
    available = ort.get_available_providers()
    return [device for device, provider in _PROVIDERS.items() if provider in available]


class OnnxRuntimeEngine:
    """An inference session; ONNX Runtime allows concurrent runs on one."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session: ort.InferenceSession | None = session

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Computes the named outputs."""
        session = self._session
        if session is None:
            raise BackendError("the ONNX Runtime session is closed")
        feeds = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        try:
            results: list[Array] = session.run(list(outputs), feeds)
        except Exception as error:  # its errors share no base class
            raise BackendError(f"ONNX Runtime failed: {type(error).__name__}") from error
        return results

    def close(self) -> None:
        """Drops the session; runs in flight end first."""
        self._session = None


def open_session(
    package: Package, graph: str, *, device: str, threads: int | None
) -> OnnxRuntimeEngine:
    """Opens a graph from verified bytes: ONNX Runtime itself opens no file.

    Args:
        package: an open package for this backend.
        graph: name of the graph.
        device: "cpu" or "cuda".
        threads: of one run; None for one per physical core.
    """
    target = package.manifest.content.target
    _check_device(target.backend, target.precision, device)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Sequential runs of a graph that is a chain; threads work inside an operator.
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    if threads is not None:
        options.intra_op_num_threads = threads
    spec = package.manifest.content.graphs[graph]
    data = [package.map(name) for name in spec.data]
    if data:
        lengths = [len(view) for view in data]
        options.add_external_initializers_from_files_in_memory(list(spec.data), data, lengths)
    model = package.read_graph(graph, domains=DOMAINS)
    try:
        session = ort.InferenceSession(model, options, providers=[_PROVIDERS[device]])
    except Exception as error:
        raise BackendError(
            f"ONNX Runtime cannot open graph {graph!r}: {type(error).__name__}"
        ) from error
    if session.get_providers()[0] != _PROVIDERS[device]:
        raise BackendError(
            f"ONNX Runtime could not start {_PROVIDERS[device]}; none is used instead"
        )
    return OnnxRuntimeEngine(session)


def _check_device(backend: str, precision: str, device: str) -> None:
    if device not in _PROVIDERS:
        raise InputError(f"unknown device {device!r:.40}; known are {', '.join(_PROVIDERS)}")
    devices = get_target(backend).precisions.get(precision, ())
    if device not in devices:
        raise BackendError(
            f"a {precision} package for {backend} does not run on {device}; it runs on "
            f"{', '.join(devices) or 'no device'}"
        )
    if _PROVIDERS[device] not in ort.get_available_providers():
        raise BackendError(
            f"{_PROVIDERS[device]} is not in this ONNX Runtime; it has "
            f"{', '.join(ort.get_available_providers())}"
        )
