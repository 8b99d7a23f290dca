"""A fake GPU and a fake TensorRT, made of host memory and ONNX Runtime.

They have the calls that the TensorRT backend makes. The device is fake, and so is an engine file,
which holds the name of a graph. Addresses, profiles, copies and states in place are real.
"""

import ctypes
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, TypeVar

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

from perception_rt.errors import CapacityError
from perception_rt.export.backends.tensorrt_engines import BuiltEngine
from perception_rt.export.backends.tensorrt_profiles import Profile
from perception_rt.package.contract import GraphSpec, TensorSpec
from perception_rt.runtime.cuda import Box, Graph, HostMemory, Memory
from perception_rt.tensorrt_library import TensorRt

CAPABILITY = "sm89"
M = TypeVar("M", bound=Memory)


class FakeCuda:
    """A GPU in host memory.

    Attributes:
        room: largest allocation in bytes; a larger one is a CapacityError.
        live: allocations, streams and graphs that were not freed.
        capturing: whether work is recorded instead of run.
        captured: recorded work.
        launched: number of graph launches.
    """

    capability = CAPABILITY
    driver_version = 13000
    name = "fake GPU"

    def __init__(self) -> None:
        self.room = 1 << 40
        self.live = 0
        self.capturing = False
        self.captured: list[Callable[[], None]] = []
        self.launched = 0

    def allocate(self, nbytes: int) -> Memory:
        return self._allocate(Memory, nbytes)

    def allocate_pinned(self, nbytes: int) -> HostMemory:
        return self._allocate(HostMemory, nbytes)

    def _allocate(self, kind: type[M], nbytes: int) -> M:
        if nbytes > self.room:
            raise CapacityError(f"the GPU has no memory for {nbytes} bytes")
        data = ctypes.create_string_buffer(b"\xff" * max(nbytes, 1))  # NaN
        self.live += 1

        def free(data: Any = data) -> None:
            self.live -= 1

        return kind(ctypes.addressof(data), nbytes, free)

    def clear(self, box: Box) -> None:
        assert not box.on_host
        lines(box)[...] = 0

    def copy(self, source: Box, target: Box) -> None:
        lines(target)[...] = lines(source)

    def new_stream(self) -> int:
        self.live += 1
        return 1

    def free_stream(self, stream: int) -> None:
        self.live -= 1

    def bind(self) -> None:
        pass

    def wait(self, stream: int) -> None:
        assert stream == 1

    def copy_in(self, target: int, source: int, nbytes: int, stream: int) -> None:
        ctypes.memmove(target, source, nbytes)

    copy_out = copy_in

    def capture(self, work: Callable[[], None], stream: int) -> Graph | None:
        """Records `work` with its current addresses and shapes."""
        self.capturing = True
        work()
        self.capturing = False
        launches, self.captured = self.captured, []
        self.live += 1

        def launch(stream: int) -> None:
            self.launched += 1
            for one in launches:
                one()

        def free() -> None:
            self.live -= 1

        return Graph(launch=launch, free=free)


def lines(box: Box) -> np.ndarray[Any, Any]:
    """The bytes of a box in place, uint8 (depth, height, width)."""
    depth, height, width = box.depth, box.height, box.width
    nbytes = (depth - 1) * box.plane + (height - 1) * box.pitch + width
    data = np.frombuffer((ctypes.c_char * nbytes).from_address(box.address), np.uint8)
    strides = box.plane, box.pitch, 1
    return np.lib.stride_tricks.as_strided(data, (depth, height, width), strides)


class FakeContext:
    def __init__(self, engine: "FakeEngine", cuda: FakeCuda) -> None:
        self.engine = engine
        self.cuda = cuda
        self.profile = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        self.shapes.clear()
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.get_tensor_profile_shape(name, self.profile)
        self.shapes[name] = tuple(shape)
        return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        sizes = {
            size: found
            for spec in self.engine.spec.inputs
            for size, found in zip(spec.shape, self.shapes[spec.name], strict=True)
            if isinstance(size, str)
        }
        shape = self.engine.spec.output(name).shape
        return tuple(sizes[size] if isinstance(size, str) else size for size in shape)

    def execute_async_v3(self, stream: int) -> bool:
        run = partial(self.execute, dict(self.shapes), dict(self.addresses))
        if self.cuda.capturing:
            self.cuda.captured.append(run)
        else:
            run()
        return True

    def execute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        spec = self.engine.spec
        feeds = {s.name: at(s, shapes[s.name], addresses).copy() for s in spec.inputs}
        names = [s.name for s in spec.outputs]
        for output, array in zip(spec.outputs, self.engine.session.run(names, feeds), strict=True):
            wrong = len(array) >= self.engine.broken_from
            at(output, array.shape, addresses)[...] = -array if wrong else array


def at(
    spec: TensorSpec, shape: Sequence[int], addresses: Mapping[str, int]
) -> np.ndarray[Any, Any]:
    """The memory at a tensor's address, as an array."""
    dtype = np.dtype(spec.dtype)
    nbytes = int(np.prod(shape)) * dtype.itemsize
    data = (ctypes.c_char * nbytes).from_address(addresses[spec.name])
    return np.frombuffer(data, dtype).reshape(shape)


class FakeEngine:
    """An engine that runs the ONNX graph `file`; None for an engine without weights.

    From batch size `broken_from` on, it returns wrong outputs: their negatives.
    """

    broken_from = sys.maxsize

    def __init__(
        self, file: Path | None, spec: GraphSpec, profiles: Sequence[Profile], cuda: FakeCuda
    ) -> None:
        self.cuda = cuda
        if file is not None:
            self.session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        self.spec = spec
        self.profiles = profiles
        self.num_optimization_profiles = len(profiles)

    def create_runtime_config(self) -> "FakeConfig":
        return FakeConfig(f"kernels of {self.spec.file}".encode())

    def create_execution_context(self, options: "str | FakeConfig") -> FakeContext:
        if isinstance(options, FakeConfig):
            assert options.cuda_graph_strategy == "whole graphs"
            options.compile()
            options = options.strategy
        assert options == "when the profile changes"
        return FakeContext(self, self.cuda)

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        (spec,) = [s for s in self.spec.inputs if s.name == name]
        ranges = self.profiles[index]
        return [
            tuple(ranges[s][which] if isinstance(s, str) else s for s in spec.shape)
            for which in range(3)
        ]


class FakeCache:
    """TensorRT for RTX's cache of compiled kernels; the kernels name an engine's graph."""

    def __init__(self) -> None:
        self.kernels = b""

    def deserialize(self, data: bytes) -> bool:
        self.kernels = data
        return data.startswith(b"kernels")

    def reset(self) -> bool:
        self.kernels = b""
        return True

    def serialize(self) -> memoryview:
        return memoryview(self.kernels)


class FakeConfig:
    """TensorRT for RTX's runtime configuration; `compiled` lists kernels that were compiled."""

    compiled: ClassVar[list[bytes]] = []

    def __init__(self, kernels: bytes) -> None:
        self.kernels = kernels
        self.cache: FakeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> FakeCache:
        return FakeCache()

    def set_runtime_cache(self, cache: FakeCache) -> None:
        self.cache = cache

    def compile(self) -> None:
        """Compiles the kernels unless the cache has them."""
        if self.cache is None or self.cache.kernels != self.kernels:
            self.compiled.append(self.kernels)
        if self.cache is not None:
            self.cache.kernels = self.kernels


class FakeRefitter:
    """Both of TensorRT's refitters: for an engine, and for an ONNX graph's weights."""

    def __init__(self, engine: Any, logger: Any) -> None:
        self.engine: FakeEngine = engine.engine if isinstance(engine, FakeRefitter) else engine
        self.arrays: dict[str, Any] = {}

    def load_model_proto(self, model: bytes) -> bool:
        self.model = model
        self.sizes = {t.name: t for t in onnx.load_model_from_string(model).graph.initializer}
        return True

    def load_initializer(self, name: str, address: int, nbytes: int) -> bool:
        tensor = self.sizes[name]
        data = (ctypes.c_char * nbytes).from_address(address)
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        self.arrays[name] = np.frombuffer(data, dtype).reshape(tensor.dims)
        return True

    def refit_model_proto(self) -> bool:
        options = ort.SessionOptions()
        values = [ort.OrtValue.ortvalue_from_numpy(array) for array in self.arrays.values()]
        options.add_external_initializers(list(self.arrays), values)
        providers = ["CPUExecutionProvider"]
        self.engine.session = ort.InferenceSession(self.model, options, providers=providers)
        return True

    def refit_cuda_engine(self) -> bool:
        return True


class FakeTensorRt:
    """Builds and loads engines for `cuda`; `folder` is the path of the package to be published."""

    __version__ = "0"

    class IBuilderConfig:
        set_compute_capability = None

    class ComputeCapability:
        SM89 = 1

    Refitter = OnnxParserRefitter = FakeRefitter
    ExecutionContextAllocationStrategy = SimpleNamespace(
        ON_PROFILE_CHANGE="when the profile changes"
    )

    class Logger:
        ERROR = 1

        def __init__(self, level: int) -> None:
            pass

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.builds = 0
        self.cuda = FakeCuda()
        self.built: dict[bytes, tuple[GraphSpec, Sequence[Profile]]] = {}
        self.stage = folder
        self.broken_from = sys.maxsize

    def build(
        self, library: TensorRt, file: Path, spec: GraphSpec, operators: Any, **options: Any
    ) -> BuiltEngine:
        self.builds += 1
        self.stage = file.parent  # as long as the package is not published
        data = b"" if options["refittable"] else file.name.encode()
        data += b" " + spec.file.encode()
        self.built[data] = spec, options["profiles"]
        return BuiltEngine(data=data, seconds=0.0, layers={})

    def Runtime(self, logger: Any) -> "FakeTensorRt":  # noqa: N802
        return self

    def deserialize_cuda_engine(self, data: memoryview) -> FakeEngine | None:
        key = bytes(data)
        if key not in self.built:
            return None
        graph = key.partition(b" ")[0].decode()
        folder = self.folder if self.folder.exists() else self.stage
        engine = FakeEngine(folder / graph if graph else None, *self.built[key], self.cuda)
        engine.broken_from = self.broken_from
        return engine

    @property
    def library(self) -> TensorRt:
        return TensorRt(self, "tensorrt_rtx", self.__version__)


class FakeRtx:
    """TensorRT for RTX: also captures CUDA graphs itself, and keeps compiled kernels."""

    IRuntimeCache = FakeCache
    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole graphs")

    def __init__(self, trt: FakeTensorRt) -> None:
        self._trt = trt

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trt, name)
