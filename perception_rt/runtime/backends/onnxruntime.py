"""ONNX Runtime, on CPU or CUDA. A device that cannot be had is an error, never another device."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# ONNX Runtime keeps and sends telemetry from the moment it is loaded, unless it is told before.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime as ort

from perception_rt.errors import BackendError, InputError, PackageError
from perception_rt.package.onnx_scan import scan_graph
from perception_rt.package.reader import Package
from perception_rt.targets import get_target

Array = np.ndarray[Any, Any]

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

# By the values of TensorProto.DataType, for those that our graphs keep outside.
_DTYPES = {
    kind: np.dtype(name)
    for kind, name in ((1, "float32"), (2, "uint8"), (3, "int8"), (7, "int64"), (10, "float16"))
}


def devices() -> list[str]:
    """The devices that the installed ONNX Runtime was built for."""
    available = ort.get_available_providers()
    return [device for device, provider in _PROVIDERS.items() if provider in available]


class OnnxRuntimeEngine:
    """An inference session; ONNX Runtime allows concurrent runs on one."""

    def __init__(self, session: ort.InferenceSession, weights: Mapping[str, Array]) -> None:
        self._session: ort.InferenceSession | None = session
        self._weights = weights  # the session refers to those that it did not repack

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


def check_device(device: str) -> None:
    """BackendError unless the installed ONNX Runtime has the device; InputError if none has."""
    if device not in _PROVIDERS:
        raise InputError(f"unknown device {device!r:.40}; known are {', '.join(_PROVIDERS)}")
    if device not in devices():
        raise BackendError(
            f"{_PROVIDERS[device]} is not in this ONNX Runtime; it has "
            f"{', '.join(ort.get_available_providers())}"
        )


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
    target = get_target(package.manifest.content.target.backend)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Sequential runs of a graph that is a chain; threads work inside an operator.
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    if threads is not None:
        options.intra_op_num_threads = threads
    model = package.read_graph(graph, domains=target.domains)
    weights = _weights(package, model)
    options.add_external_initializers(
        list(weights), [ort.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
    )
    try:
        session = ort.InferenceSession(
            model,
            options,
            providers=[_PROVIDERS[device]],
            enable_fallback=0,  # its own, to the CPU, with a line on standard output
        )
    except Exception as error:
        raise BackendError(
            f"ONNX Runtime cannot open graph {graph!r}: {type(error).__name__}"
        ) from error
    if session.get_providers()[0] != _PROVIDERS[device]:
        raise BackendError(
            f"ONNX Runtime could not start {_PROVIDERS[device]}; none is used instead"
        )
    # The session has repacked the large weights; their pages would only look like its memory.
    for name in package.graph(graph).data:
        package.release(name)
    return OnnxRuntimeEngine(session, weights)


def _weights(package: Package, model: bytes) -> dict[str, Array]:
    """The graph's external tensors as views of verified, mapped files: no copy is made."""
    weights: dict[str, Array] = {}
    for tensor in scan_graph(model).externals:
        dtype = _DTYPES.get(tensor.kind)
        if dtype is None:
            raise PackageError(f"tensor {tensor.name!a:.80} is of a type that is not used here")
        data = package.map(tensor.entries["location"])
        offset = int(tensor.entries.get("offset", "0"))
        count = tensor.size_bytes // dtype.itemsize
        array = np.frombuffer(data, dtype, count, offset)
        weights[tensor.name] = array.reshape(tensor.shape)
    return weights
