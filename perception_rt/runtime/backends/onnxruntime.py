"""ONNX Runtime on CPU, CUDA or its TensorRT provider; it never falls back to another device.

On a GPU, a decoder's caches are in device memory and bound as both input and output, so that no
step copies them. The GPU devices have not been verified on a GPU yet.
"""

import io
import os
import platform
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

# ONNX Runtime sends telemetry from the moment it is loaded, unless this is set before.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime as ort

from perception_rt.errors import BackendError, InputError
from perception_rt.package.contract import FEATURES, graph_kind, updated
from perception_rt.package.plm_graphs import CacheShape
from perception_rt.package.reader import Package
from perception_rt.runtime.backends.onnx_weights import FP8, FP8_BYTES, external_tensors
from perception_rt.runtime.cache.cuda_block import DeviceBlock
from perception_rt.runtime.cache.kv_block import CacheBlock
from perception_rt.runtime.cuda import open_cuda
from perception_rt.runtime.session import State
from perception_rt.targets import operator_domains

Array = np.ndarray[Any, Any]

_CPU_INFO = Path("/proc/cpuinfo")
_CUDA = "CUDAExecutionProvider"
# By default, CUDA rounds float32 products to TF32, which has 10 bits of mantissa.
_OPTIONS = {_CUDA: {"use_tf32": "0"}}
# Providers by device; the first is required. TensorRT takes the parts of a graph that it supports
# and builds engines for them when the graph is opened.
PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": (_CUDA,),
    "tensorrt": ("TensorrtExecutionProvider", _CUDA),
}
# ONNX Runtime's name of the memory that holds a decoder's caches, by device.
PLACES = {"cpu": "cpu", "cuda": "cuda", "tensorrt": "cuda"}

# Both packages have the same files, and the one that was installed last wins.
_INSTALL_GPU = (
    'pip install "perception_rt[gpu]" && pip uninstall -y onnxruntime && '
    "pip install --force-reinstall --no-deps onnxruntime-gpu"
)
_RELEASE_S = 0.02  # time between releases of mapped weights, in which some 40 MB are read


def devices() -> list[str]:
    """Names of the devices that the installed ONNX Runtime was built for."""
    available = ort.get_available_providers()
    return [device for device, providers in PROVIDERS.items() if providers[0] in available]


def block_maker(device: str) -> Callable[[CacheShape, int, int], CacheBlock] | None:
    """The function that makes cache blocks in GPU memory; None for the CPU."""
    return None if device == "cpu" else partial(DeviceBlock, open_cuda())


class OnnxRuntimeEngine:
    """An inference session; ONNX Runtime allows concurrent runs on one."""

    def __init__(
        self, session: ort.InferenceSession, weights: Mapping[str, Array], place: str = "cpu"
    ) -> None:
        """Wraps an open session.

        Args:
            session: the session.
            weights: external tensors of the graph.
            place: ONNX Runtime's name of the memory that holds states.
        """
        self._place = place
        self._session: ort.InferenceSession | None = session
        self._weights = weights  # kept alive: the session refers to tensors that it did not repack

    def run(
        self, inputs: Mapping[str, Array], outputs: Sequence[str], state: Mapping[str, State]
    ) -> list[Array]:
        """Computes the named outputs and updates the state in place."""
        session = self._session
        if session is None:
            raise BackendError("the ONNX Runtime session is closed")
        feeds = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        try:
            if state:
                return _run_bound(session, feeds, outputs, state, self._place)
            results: list[Array] = session.run(list(outputs), feeds)
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise BackendError(f"ONNX Runtime failed: {type(error).__name__}") from error
        return results

    def close(self) -> None:
        """Drops the session; runs in progress finish first."""
        self._session = None


def check_device(device: str) -> None:
    """BackendError unless this ONNX Runtime has the device; InputError for an unknown name."""
    if device not in PROVIDERS:
        raise InputError(f"unknown device {device!r:.40}; known are {', '.join(PROVIDERS)}")
    if device != "cpu":
        load_cuda()
    if device not in devices():
        raise BackendError(
            f"{PROVIDERS[device][0]} is not in this ONNX Runtime; it has "
            f"{', '.join(ort.get_available_providers())}. For a GPU: {_INSTALL_GPU}"
        )


@cache
def load_cuda() -> None:
    """Loads CUDA libraries that pip installed; they are on no search path."""
    with redirect_stdout(io.StringIO()):  # prints what it does not find, which may be on the path
        ort.preload_dlls(directory="")


def open_session(
    package: Package,
    graph: str,
    *,
    device: str,
    threads: int | None,
    cache_dir: Path | None = None,
) -> OnnxRuntimeEngine:
    """Opens a graph from verified bytes; ONNX Runtime itself opens no file.

    Args:
        package: an open package.
        graph: name of the graph.
        device: "cpu", "cuda", or "tensorrt" for ONNX Runtime's TensorRT provider.
        threads: threads of one run; None for one per physical core.
        cache_dir: ignored.

    Raises:
        PackageError: the graph is damaged or has operators of other domains.
        BackendError: ONNX Runtime cannot open the graph or start the device.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if saturates(platform.machine()):
        # Selects integer products that are exact, but slower and take twice the memory.
        options.add_session_config_entry("session.x64quantprecision", "1")
    # Leaves Q/DQ pairs in place: versions before 1.32 move fp8 pairs across a Slice, which has no
    # fp8 kernel. No CPU kernel would fuse them.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    # The graph is a chain of operators; threads work inside each operator.
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    if graph_kind(graph) == FEATURES:
        # Threads of a graph wait in a busy loop after its run, in which the next of the chain runs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    domains = operator_domains(package.manifest.content.backend_of(graph))
    model = package.read_graph(graph, domains=domains)
    weights = external_tensors(package, model)
    options.add_external_initializers(list(weights), [_value(a) for a in weights.values()])
    try:
        with _releasing(package, package.graph(graph).data):
            session = ort.InferenceSession(
                model,
                options,
                providers=[
                    (name, _OPTIONS[name]) if name in _OPTIONS else name
                    for name in PROVIDERS[device]
                ],
                enable_fallback=0,  # else it falls back to the CPU and prints a line
            )
    except Exception as error:
        raise BackendError(
            f"ONNX Runtime cannot open graph {graph!r} on {device}: {type(error).__name__}"
        ) from error
    if session.get_providers()[0] != PROVIDERS[device][0]:
        raise BackendError(
            f"ONNX Runtime could not start {PROVIDERS[device][0]}, and no other is used instead"
        )
    return OnnxRuntimeEngine(session, weights, PLACES[device])


def _run_bound(
    session: ort.InferenceSession,
    feeds: Mapping[str, Array],
    outputs: Sequence[str],
    state: Mapping[str, State],
    place: str,
) -> list[Array]:
    """Runs with each state's memory bound as both input and output.

    The other inputs and outputs are in host memory; ONNX Runtime copies them as needed. Making
    values over NumPy memory in each call costs 1.5 microseconds each, and no value can outlive its
    memory.
    """
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
    for name, held in state.items():
        address = held.ctypes.data if isinstance(held, np.ndarray) else held.address
        where = (place, 0, held.dtype, held.shape, address)
        binding.bind_input(name, *where)
        binding.bind_output(updated(name), *where)
    for name in outputs:
        binding.bind_output(name)
    session.run_with_iobinding(binding)
    return [value.numpy() for value in binding.get_outputs()[len(state) :]]


@contextmanager
def _releasing(package: Package, files: Sequence[str]) -> Iterator[None]:
    """Releases the pages of mapped files repeatedly while a session is made from them.

    ONNX Runtime reads and repacks one weight after the other. Pages that it has read would stay in
    memory beside the repacked copies. A page that it needs again is read from the file again.
    """
    done = threading.Event()

    def release() -> None:
        while not done.wait(_RELEASE_S):
            for file in files:
                package.release(file)

    thread = threading.Thread(target=release, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        for file in files:
            package.release(file)


@cache
def saturates(machine: str, cpu_info: Path = _CPU_INFO) -> bool:
    """Whether uint8 by int8 products may overflow: x86 without VNNI adds pairs in 16 bits.

    A processor that cannot be identified may be such a one, since exact products are only slower.

    Args:
        machine: name of the architecture, from `platform.machine`.
        cpu_info: Linux' description of the processor.
    """
    if machine.lower() in ("arm64", "aarch64"):
        return False
    try:
        return "vnni" not in cpu_info.read_text(errors="replace")
    except OSError:  # not Linux
        return True


def _value(array: Array) -> ort.OrtValue:
    """An ONNX Runtime value over the array's memory."""
    if array.dtype == FP8_BYTES:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint8), FP8)
    return ort.OrtValue.ortvalue_from_numpy(array)
