"""ONNX Runtime, on CPU or CUDA. A device that cannot be had is an error, never another device.

On a GPU, a decoder's caches are in the device's memory, and are bound there as input and as output:
nothing of them is copied from step to step. Not verified on one yet.
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

# ONNX Runtime keeps and sends telemetry from the moment it is loaded, unless it is told before.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime as ort

from perception_rt.errors import BackendError, InputError
from perception_rt.package.contract import updated
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
# By device, the providers that its graphs are given to, the first what must be there. TensorRT
# takes the parts of a graph that it knows, and builds engines of them when the graph is opened.
_CUDA = "CUDAExecutionProvider"
# Products of float32 in float32: its default rounds them to TF32, which has 10 bits.
_OPTIONS = {_CUDA: {"use_tf32": "0"}}
_PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": (_CUDA,),
    "tensorrt": ("TensorrtExecutionProvider", _CUDA),
}
# What ONNX Runtime calls the place of a decoder's caches.
_PLACES = {"cpu": "cpu", "cuda": "cuda", "tensorrt": "cuda"}

_RELEASE_S = 0.02  # between two releases of mapped weights: some 40 MB are read meanwhile


def devices() -> list[str]:
    """The devices that the installed ONNX Runtime was built for."""
    available = ort.get_available_providers()
    return [device for device, providers in _PROVIDERS.items() if providers[0] in available]


def block_maker(device: str) -> Callable[[CacheShape, int, int], CacheBlock] | None:
    """Makes cache blocks in a GPU's memory, of a shape, rows and slots; None for a CPU."""
    return None if device == "cpu" else partial(DeviceBlock, open_cuda())


class OnnxRuntimeEngine:
    """An inference session; ONNX Runtime allows concurrent runs on one."""

    def __init__(
        self, session: ort.InferenceSession, weights: Mapping[str, Array], place: str = "cpu"
    ) -> None:
        """An engine of a session.

        Args:
            session: open.
            weights: what it refers to.
            place: ONNX Runtime's name of where states are.
        """
        self._place = place
        self._session: ort.InferenceSession | None = session
        self._weights = weights  # the session refers to those that it did not repack

    def run(
        self, inputs: Mapping[str, Array], outputs: Sequence[str], state: Mapping[str, State]
    ) -> list[Array]:
        """Computes the named outputs, and updates the state where it is."""
        session = self._session
        if session is None:
            raise BackendError("the ONNX Runtime session is closed")
        feeds = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        try:
            if state:
                return _run_bound(session, feeds, outputs, state, self._place)
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
    if device != "cpu":
        _load_cuda()
    if device not in devices():
        raise BackendError(
            f"{_PROVIDERS[device][0]} is not in this ONNX Runtime; it has "
            f"{', '.join(ort.get_available_providers())}"
        )


@cache
def _load_cuda() -> None:
    """Loads CUDA's libraries where pip put them, if it did: no search path leads there."""
    with redirect_stdout(io.StringIO()):  # of what it does not find; others may be on the path
        ort.preload_dlls(directory="")


def open_session(
    package: Package,
    graph: str,
    *,
    device: str,
    threads: int | None,
    cache_dir: Path | None = None,
) -> OnnxRuntimeEngine:
    """Opens a graph from verified bytes: ONNX Runtime itself opens no file.

    Args:
        package: an open package for this backend.
        graph: name of the graph.
        device: "cpu", "cuda", or "tensorrt" for ONNX Runtime's own use of TensorRT.
        threads: of one run; None for one per physical core.
        cache_dir: nothing is kept there.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if _saturates():
        # Integer products in another way, exact, slower and in twice the memory.
        options.add_session_config_entry("session.x64quantprecision", "1")
    # Q/DQ pairs stay where they are: versions before 1.32 move fp8 ones across a Slice, which does
    # not take them there. No kernel of a CPU would fuse them.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    # Sequential runs of a graph that is a chain; threads work inside an operator.
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
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
                    for name in _PROVIDERS[device]
                ],
                enable_fallback=0,  # its own, to the CPU, with a line on standard output
            )
    except Exception as error:
        raise BackendError(
            f"ONNX Runtime cannot open graph {graph!r} on {device}: {type(error).__name__}"
        ) from error
    if session.get_providers()[0] != _PROVIDERS[device][0]:
        raise BackendError(
            f"ONNX Runtime could not start {_PROVIDERS[device][0]}; none is used instead"
        )
    return OnnxRuntimeEngine(session, weights, _PLACES[device])


def _run_bound(
    session: ort.InferenceSession,
    feeds: Mapping[str, Array],
    outputs: Sequence[str],
    state: Mapping[str, State],
    place: str,
) -> list[Array]:
    """A run in which each state's memory is both an input and the output that updates it.

    Inputs and outputs are in the host's memory; ONNX Runtime copies them where that must be.
    Values over NumPy memory are made for each call: that takes 1.5 microseconds for each, and
    nothing has to be kept that could outlive the memory.
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
    """Gives the pages of mapped files back all the time while a session is made from them.

    ONNX Runtime reads and repacks one weight after the other. What it has read is of no more use
    but would stay in memory until the end, beside the repacked copies. A page that is needed
    again comes from the file again.
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
def _saturates() -> bool:
    """Whether products of uint8 and int8 overflow here: x86 without VNNI adds them in 16 bits."""
    if platform.machine() not in ("x86_64", "AMD64") or not _CPU_INFO.is_file():
        return False
    return "vnni" not in _CPU_INFO.read_text(errors="replace")


def _value(array: Array) -> ort.OrtValue:
    """An array's memory as ONNX Runtime sees it."""
    if array.dtype == FP8_BYTES:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint8), FP8)
    return ort.OrtValue.ortvalue_from_numpy(array)
