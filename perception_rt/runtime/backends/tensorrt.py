"""TensorRT engines on a GPU, without torch.

Each engine has a stream, on which inputs and outputs are copied through pinned memory. From the
third call with the same shapes and addresses on, as in the steps of a decoder and the tiles of an
image, a call is one launch of a CUDA graph. A decoder's caches are in device memory
(`block_maker`), bound as both inputs and outputs, so that the engine updates them in place.

Not verified on a GPU yet; docs/tensorrt.md lists what is.
"""

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from perception_rt.errors import BackendError, CapacityError, InputError, PackageError
from perception_rt.package.contract import GraphSpec, updated
from perception_rt.package.plm_graphs import CacheShape
from perception_rt.package.reader import Package
from perception_rt.runtime.backends.kernel_cache import KernelCache
from perception_rt.runtime.backends.onnx_weights import external_tensors
from perception_rt.runtime.cache.cuda_block import DeviceBlock
from perception_rt.runtime.cache.kv_block import CacheBlock, States
from perception_rt.runtime.cuda import Cuda, DeviceArray, Graph, HostMemory, Memory, open_cuda
from perception_rt.runtime.session import State
from perception_rt.targets import operator_domains
from perception_rt.tensorrt_library import TensorRt, find_tensorrt

Array = np.ndarray[Any, Any]
DType = np.dtype[Any]
Shape = tuple[int, ...]


def check_device(device: str) -> None:
    """BackendError unless TensorRT and a GPU are available; InputError for an unknown device."""
    if device == "cpu":
        raise BackendError(
            "TensorRT runs on cuda: load(..., device='cuda'), or the graphs on the CPU by "
            "backend='onnxruntime'"
        )
    if device != "cuda":
        raise InputError(f"unknown device {device!r:.40}; TensorRT knows cuda")
    find_tensorrt()
    open_cuda()


def block_maker(device: str) -> Callable[[CacheShape, int, int], CacheBlock]:
    """The function that makes cache blocks in GPU memory."""
    return partial(DeviceBlock, open_cuda())


def open_session(
    package: Package,
    graph: str,
    *,
    device: str,
    threads: int | None,
    cache_dir: Path | None = None,
) -> "TensorRtEngine":
    """Opens a graph's engine that was built for this GPU.

    Args:
        package: an open package for this backend.
        graph: name of the graph.
        device: "cuda".
        threads: ignored.
        cache_dir: directory for kernels that TensorRT for RTX compiles when an engine first runs.

    Raises:
        InputError: `cache_dir` cannot be used.
        BackendError: no engine was built for this GPU by this TensorRT, or it does not load.
    """
    options, cuda = package.manifest.content.target.options, open_cuda()
    library = find_tensorrt(label=options.get("builder"))
    file = engine_file(options, graph, cuda.capability, library.label)
    kernels = None
    if cache_dir is not None and hasattr(library.api, "IRuntimeCache"):
        made_by = f"{library.label} {cuda.capability} {cuda.driver_version} {file}"
        kernels = KernelCache(cache_dir, package_id=package.manifest.id, made_by=made_by)
    engine = TensorRtEngine(library, cuda, package.map(file), package.graph(graph), graph, kernels)
    if options.get("refittable"):
        try:
            engine.refit(*_weights(package, graph))
        except BaseException:
            engine.close()
            raise
    return engine


def _weights(package: Package, graph: str) -> tuple[bytes, Mapping[str, Array]]:
    """The verified bytes of a graph, and its external tensors by name."""
    domains = operator_domains(package.manifest.content.backend_of(graph))
    model = package.read_graph(graph, domains=domains)
    return model, external_tensors(package, model)


def engine_file(options: Mapping[str, Any], graph: str, capability: str, label: str) -> str:
    """Path in the package of the engine that runs a graph here.

    Args:
        options: `target.options` of the manifest.
        graph: name of the graph.
        capability: compute capability of this GPU, such as "sm89".
        label: name and version of this TensorRT.

    Raises:
        BackendError: no engine fits; names the ones that the package has.
        PackageError: the options have another form than exports write.
    """
    engines, builder = options.get("engines", {}), options.get("builder", "nothing")
    if not isinstance(engines, dict) or not isinstance(builder, str):
        raise PackageError("manifest: target.options.engines must be an object")
    files = engines.get(capability, engines.get("here"))
    if not isinstance(files, dict):
        have = ", ".join(sorted(engines)) or "none"
        raise BackendError(
            f"the package has no engines for {capability}, it has {have!a:.80}; export it "
            f"again with --target {capability}"
        )
    if builder != label:
        raise BackendError(
            f"the engines were built by {builder!a:.60}, but {label} is installed here"
        )
    file = files.get(graph)
    if not isinstance(file, str):
        raise BackendError(f"graph {graph!r} has no engine: it runs on the CPU only")
    return file


@dataclass(slots=True)
class _Buffer:
    """Device memory of a tensor, and pinned host memory for its copies."""

    device: Memory
    host: HostMemory


@dataclass(slots=True)
class _Context:
    """An execution context of one profile, and its last call.

    Attributes:
        context: TensorRT's context.
        config: object that made the context and must outlive it.
        asked: shapes of the inputs other than states; None before the first call.
        state: returns the states of the last call if they still exist and were `States`.
        places: buffer, shape and dtype of each output other than states.
        graph: the call as a CUDA graph; None before it is captured, or where it cannot be.
    """

    context: Any
    config: Any
    asked: dict[str, Shape] | None = None
    state: Callable[[], object] = lambda: None
    places: dict[str, tuple[_Buffer, Shape, DType]] = field(default_factory=dict)
    graph: Graph | None = None


class TensorRtEngine:
    """An engine with a context for each profile in use; calls from several threads take turns."""

    def __init__(
        self,
        library: TensorRt,
        cuda: Cuda,
        data: memoryview,
        spec: GraphSpec,
        graph: str,
        kernels: KernelCache | None = None,
    ) -> None:
        """Loads an engine.

        Args:
            library: the TensorRT that built it.
            cuda: the GPU.
            data: serialised engine.
            spec: specification of its graph.
            graph: name of the graph.
            kernels: store of kernels that the library compiles; None to keep none.

        Raises:
            BackendError: the engine does not load.
        """
        self._library = library
        trt = library.api
        self._cuda = cuda
        self._spec = spec
        self._graph = graph
        self._lock = threading.Lock()
        self._buffers: dict[str, _Buffer] = {}
        cuda.bind()
        self._runtime: Any = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engine: Any = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            raise BackendError(f"{library.label} cannot load the engine of graph {graph!r}")
        self._profiles = _profiles(self._engine, spec)
        self._stream = cuda.new_stream()
        self._contexts: dict[int, _Context] = {}  # by profile
        self._kernels = kernels
        self._compiled: Any = None  # TensorRT's cache of kernels
        # TensorRT for RTX captures CUDA graphs itself, once it has compiled kernels for a shape.
        self._captures = not hasattr(trt, "CudaGraphStrategy")

    def refit(self, model: bytes, tensors: Mapping[str, Array]) -> None:
        """Sets the weights of an engine that was built without them.

        Args:
            model: bytes of the ONNX graph that it was built from, or of one with equal structure.
            tensors: external tensors of the graph, by name.

        Raises:
            BackendError: TensorRT refuses the weights.
        """
        trt = self._library.api
        self._cuda.bind()
        logger = trt.Logger(trt.Logger.ERROR)
        refitter = trt.Refitter(self._engine, logger)
        parser = trt.OnnxParserRefitter(refitter, logger)
        taken = (
            parser.load_model_proto(model)
            and all(
                parser.load_initializer(name, array.ctypes.data, array.nbytes)
                for name, array in tensors.items()
            )
            and parser.refit_model_proto()
            and refitter.refit_cuda_engine()
        )
        if not taken:
            raise BackendError(
                f"{self._library.label} refuses the weights of graph {self._graph!r}"
            )

    def run(
        self, inputs: Mapping[str, Array], outputs: Sequence[str], state: Mapping[str, State]
    ) -> list[Array]:
        """Computes the named outputs and updates the state in place."""
        with self._lock:
            if self._engine is None:
                raise BackendError("the TensorRT engine is closed")
            self._cuda.bind()
            try:
                places = self._start(inputs, state)
                for name in outputs:
                    self._fetch(*places[name])
            finally:
                # Also after an error or an interrupt: the device may still write the state.
                self._cuda.wait(self._stream)
            return [_view(*places[name]).copy() for name in outputs]

    def _start(
        self, inputs: Mapping[str, Array], state: Mapping[str, State]
    ) -> dict[str, tuple[_Buffer, Shape, DType]]:
        """Starts a call; returns buffers, shapes and dtypes of its outputs other than states."""
        asked = {name: array.shape for name, array in inputs.items()}
        known = self._contexts.values()
        same = [one for one in known if one.asked == asked and one.state() is state]
        context = same[0] if same else self._prepare(asked, state)
        for name, array in inputs.items():
            self._stage(name, array)
        if context.graph is not None:
            context.graph.launch(self._stream)
            return context.places
        execute = partial(self._execute, context.context)
        execute()
        if same and self._captures:
            # Captured after a run, for the next call: TensorRT prepares for new shapes in a run.
            context.graph = self._cuda.capture(execute, self._stream)
            self._captures = context.graph is not None
        return context.places

    def _prepare(self, asked: dict[str, Shape], state: Mapping[str, State]) -> _Context:
        """The context for a call, with the call's shapes and addresses set."""
        shapes = asked | {name: array.shape for name, array in state.items()}
        states = {name: _address(name, array) for name, array in state.items()}
        profile = self._find_profile(shapes)
        context = self._contexts.get(profile) or self._new_context(profile)
        # A CUDA graph is invalid once its context changes.
        context.asked, context.graph = None, None
        context.places = self._bind(context.context, shapes, states)
        context.asked = asked
        context.state = weakref.ref(state) if isinstance(state, States) else lambda: None
        return context

    def _new_context(self, profile: int) -> _Context:
        """Makes a context with memory for one profile."""
        trt = self._library.api
        options: Any = trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        if hasattr(trt, "CudaGraphStrategy"):
            strategy, options = options, self._engine.create_runtime_config()
            options.set_execution_context_allocation_strategy(strategy)
            options.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            self._attach_kernels(options)
        context = self._engine.create_execution_context(options)
        if context is None:
            raise CapacityError(f"the GPU has no memory to run graph {self._graph!r}")
        if not context.set_optimization_profile_async(profile, self._stream):
            raise CapacityError(
                f"TensorRT refuses profile {profile} of graph {self._graph!r}; the GPU may have no "
                "memory for it"
            )
        made = self._contexts[profile] = _Context(context, options)
        return made

    def _attach_kernels(self, config: Any) -> None:
        """Shares one cache of compiled kernels between contexts, with kernels of earlier runs."""
        if self._kernels is None:
            return
        if self._compiled is None:
            self._compiled = config.create_runtime_cache()
            kept = self._kernels.read()
            if kept is not None and not self._compiled.deserialize(kept):
                self._compiled.reset()
        config.set_runtime_cache(self._compiled)

    def _bind(
        self, context: Any, shapes: Mapping[str, Shape], states: Mapping[str, int]
    ) -> dict[str, tuple[_Buffer, Shape, DType]]:
        """Sets shapes and addresses of a context; returns its outputs other than states."""
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise InputError(f"graph {self._graph!r} refuses {name!r} of shape {shape}")
        addresses = dict(states) | {updated(name): place for name, place in states.items()}
        places: dict[str, tuple[_Buffer, Shape, DType]] = {}
        for spec in self._spec.inputs:
            if spec.name not in states:
                nbytes = prod(shapes[spec.name]) * np.dtype(spec.dtype).itemsize
                addresses[spec.name] = self._buffer(spec.name, nbytes).device.address
        for spec in self._spec.outputs:
            if spec.name not in addresses:
                shape, dtype = tuple(context.get_tensor_shape(spec.name)), np.dtype(spec.dtype)
                buffer = self._buffer(spec.name, prod(shape) * dtype.itemsize)
                addresses[spec.name] = buffer.device.address
                places[spec.name] = buffer, shape, dtype
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise BackendError(f"TensorRT refuses the address of {name!r} of {self._graph!r}")
        return places

    def _execute(self, context: Any) -> None:
        if not context.execute_async_v3(self._stream):
            raise BackendError(f"TensorRT failed to run graph {self._graph!r}")

    def close(self) -> None:
        """Frees the contexts and the engine; a run in progress finishes first."""
        with self._lock:
            if self._engine is None:
                return
            self._cuda.bind()
            try:
                compiled = None if self._compiled is None else self._compiled.serialize()
                if self._kernels is not None and compiled is not None:
                    self._kernels.write(compiled)
            finally:
                self._contexts.clear()
                self._compiled = self._engine = self._runtime = None
                self._buffers.clear()
                self._cuda.free_stream(self._stream)

    def _find_profile(self, shapes: Mapping[str, Shape]) -> int:
        """Index of the first profile that allows all shapes; InputError names an input outside."""
        found: list[str] = []
        for index, ranges in enumerate(self._profiles):
            outside = [
                f"input {name!r} has shape {shape}, and the engine of graph {self._graph!r} takes "
                f"{low} to {high}"
                for name, shape in shapes.items()
                for low, high in [ranges[name]]
                if not all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))
            ]
            if not outside:
                return index
            found = outside
        raise InputError(found[0])

    def _stage(self, name: str, array: Array) -> None:
        """Queues the copy of an input to the device."""
        array, buffer = np.ascontiguousarray(array), self._buffers[name]
        np.asarray(buffer.host)[: array.nbytes] = array.reshape(-1).view(np.uint8)
        self._cuda.copy_in(buffer.device.address, buffer.host.address, array.nbytes, self._stream)

    def _fetch(self, buffer: _Buffer, shape: Shape, dtype: DType) -> None:
        """Queues the copy of an output to the host."""
        nbytes = prod(shape) * dtype.itemsize
        self._cuda.copy_out(buffer.host.address, buffer.device.address, nbytes, self._stream)

    def _buffer(self, name: str, nbytes: int) -> _Buffer:
        """A tensor's buffer of at least `nbytes`; if it grows, all contexts are prepared anew."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.device.nbytes < nbytes:
            for context in self._contexts.values():
                context.asked, context.graph = None, None
                context.places = {}
            device, host = self._cuda.allocate(nbytes), self._cuda.allocate_pinned(nbytes)
            buffer = self._buffers[name] = _Buffer(device, host)
        return buffer


def _profiles(engine: Any, spec: GraphSpec) -> list[dict[str, tuple[Shape, Shape]]]:
    """Smallest and largest shape of each input, by profile."""
    profiles = []
    for index in range(engine.num_optimization_profiles):
        ranges = {}
        for source in spec.inputs:
            low, _, high = engine.get_tensor_profile_shape(source.name, index)
            ranges[source.name] = tuple(low), tuple(high)
        profiles.append(ranges)
    return profiles


def _view(buffer: _Buffer, shape: Shape, dtype: DType) -> Array:
    """Host memory of a buffer as an array."""
    array: Array = np.asarray(buffer.host)[: prod(shape) * dtype.itemsize]
    return array.view(dtype).reshape(shape)


def _address(name: str, state: State) -> int:
    """Device address of a state; BackendError if the state is not in device memory."""
    if not isinstance(state, DeviceArray):
        raise BackendError(f"state {name!r} is in host memory, where a GPU cannot update it")
    return state.address
