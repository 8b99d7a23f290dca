"""CUDA driver calls for backends: memory, copies, streams and graphs.

Needs `cuda-bindings` and NVIDIA's driver, but neither the toolkit nor torch. All calls use the
device's primary context, so that other libraries in the process see the same memory.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Any

import numpy as np

from perception_rt.errors import BackendError, CapacityError

Array = np.ndarray[Any, Any]
DType = np.dtype[Any]

_OUT_OF_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"
_ALLOCATORS = ("cuMemAlloc", "cuMemHostAlloc")
# The calling thread's own stream: waiting for the whole device would break captures elsewhere.
_THREAD_STREAM = 2  # CU_STREAM_PER_THREAD


class Cuda:
    """The first GPU of this machine. Safe to use from several threads.

    Attributes:
        capability: compute capability, such as "sm89".
        driver_version: CUDA version of the driver, such as 13000.
        name: name of the GPU.
    """

    def __init__(self, driver: Any = None) -> None:
        """Initialises CUDA.

        Args:
            driver: the module of driver calls; None for `cuda.bindings.driver`.

        Raises:
            BackendError: `cuda-bindings`, the driver or a GPU is missing.
        """
        self._driver: Any = driver or _bindings()
        try:
            self._call("cuInit", 0)
        except RuntimeError as error:  # cuda-bindings finds no driver
            raise BackendError(f"there is no NVIDIA driver: {error}") from None
        if self._call("cuDeviceGetCount") == 0:
            raise BackendError("there is no GPU")
        self._device = self._call("cuDeviceGet", 0)
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        major, minor = (
            self._call(
                "cuDeviceGetAttribute",
                getattr(
                    self._driver.CUdevice_attribute,
                    f"CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{name}",
                ),
                self._device,
            )
            for name in ("MAJOR", "MINOR")
        )
        self.capability = f"sm{major}{minor}"
        self.driver_version = int(self._call("cuDriverGetVersion"))
        name = self._call("cuDeviceGetName", 128, self._device)
        self.name = name.split(b"\0")[0].decode(errors="replace")

    def new_stream(self) -> int:
        """Handle of a new stream."""
        self.bind()
        return int(self._call("cuStreamCreate", 1))  # CU_STREAM_NON_BLOCKING

    def free_stream(self, stream: int) -> None:
        """Destroys a stream once its work is done."""
        self._free("cuStreamDestroy", stream)

    def allocate(self, nbytes: int) -> "Memory":
        """Device memory; CapacityError if there is not enough."""
        self.bind()
        address = int(self._call("cuMemAlloc", nbytes))
        return Memory(address, nbytes, lambda: self._free("cuMemFree", address))

    def allocate_pinned(self, nbytes: int) -> "HostMemory":
        """Pinned host memory, which the device can copy from and to."""
        self.bind()
        address = int(self._call("cuMemHostAlloc", nbytes, 0))
        return HostMemory(address, nbytes, lambda: self._free("cuMemFreeHost", address))

    def clear(self, box: "Box") -> None:
        """Sets device bytes to zero and waits for it."""
        self.bind()
        for plane in range(box.depth):
            address = box.address + plane * box.plane
            if box.height == 1:  # a 2D call would limit the pitch
                self._call("cuMemsetD8Async", address, 0, box.width, _THREAD_STREAM)
            else:
                sizes = box.pitch, 0, box.width, box.height
                self._call("cuMemsetD2D8Async", address, *sizes, _THREAD_STREAM)
        self.wait(_THREAD_STREAM)

    def copy(self, source: "Box", target: "Box") -> None:
        """Copies bytes between device and host, or within one, and waits for it."""
        assert source.sizes == target.sizes
        self.bind()
        kinds, job = self._driver.CUmemorytype, self._driver.CUDA_MEMCPY3D()
        job.WidthInBytes, job.Height, job.Depth = source.sizes
        for side, box in (("src", source), ("dst", target)):
            kind = "HOST" if box.on_host else "DEVICE"
            setattr(job, f"{side}MemoryType", getattr(kinds, f"CU_MEMORYTYPE_{kind}"))
            setattr(job, f"{side}{kind.capitalize()}", box.address)
            setattr(job, f"{side}Pitch", box.pitch)
            setattr(job, f"{side}Height", box.plane // box.pitch)
        self._call("cuMemcpy3DAsync", job, _THREAD_STREAM)
        self.wait(_THREAD_STREAM)

    def copy_in(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Queues a copy from host to device on a stream."""
        self._call("cuMemcpyHtoDAsync", target, source, nbytes, stream)

    def copy_out(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Queues a copy from device to host on a stream."""
        self._call("cuMemcpyDtoHAsync", target, source, nbytes, stream)

    def capture(self, work: Callable[[], None], stream: int) -> "Graph | None":
        """Records, without running it, what `work` queues on a stream; None if it cannot be."""
        # CU_STREAM_CAPTURE_MODE_RELAXED: in other modes the capture would fail when another thread
        # allocates or the garbage collector frees memory meanwhile.
        self._call("cuStreamBeginCapture", stream, self._driver.CUstreamCaptureMode(2))
        try:
            work()
        except BaseException as error:
            with suppress(BackendError, CapacityError):  # a capture that failed has no graph
                self._call("cuGraphDestroy", self._call("cuStreamEndCapture", stream))
            if isinstance(error, BackendError):
                return None
            raise
        try:
            graph = self._call("cuStreamEndCapture", stream)
            try:
                executable = self._call("cuGraphInstantiate", graph, 0)
            finally:
                self._call("cuGraphDestroy", graph)
        except (BackendError, CapacityError):
            return None
        return Graph(
            launch=lambda stream: self._call("cuGraphLaunch", executable, stream),
            free=lambda: self._free("cuGraphExecDestroy", executable),
        )

    def wait(self, stream: int) -> None:
        """Waits until a stream has finished its work; BackendError if any of it failed."""
        self._call("cuStreamSynchronize", stream)

    def bind(self) -> None:
        """Makes the primary context current in this thread; other libraries may change it."""
        self._call("cuCtxSetCurrent", self._context)

    def _free(self, name: str, handle: Any) -> None:
        with suppress(BackendError):  # the driver may be shut down already
            # The garbage collector runs in any thread, whose context must stay as it was.
            self._call("cuCtxPushCurrent", self._context)
            try:
                self._call(name, handle)
            finally:
                self._call("cuCtxPopCurrent")

    def _call(self, name: str, *arguments: Any) -> Any:
        """Calls a driver function; returns its result or raises the error of its status."""
        status, *results = getattr(self._driver, name)(*arguments)
        if int(status) == 0:
            return results[0] if len(results) == 1 else tuple(results) or None
        if status.name == _OUT_OF_MEMORY:
            size = f" for {arguments[0]} bytes" if name in _ALLOCATORS else ""
            raise CapacityError(f"the GPU has no memory{size}")
        raise BackendError(f"CUDA failed: {name} returned {status.name}")


class Graph:
    """Recorded work that can be launched repeatedly; freed when nothing refers to it.

    Attributes:
        launch: queues the work on a stream.
    """

    def __init__(self, *, launch: Callable[[int], object], free: Callable[[], None]) -> None:
        self.launch = launch
        self._free = free

    def __del__(self) -> None:
        self._free()


class Memory:
    """Allocated bytes, freed when nothing refers to this object."""

    def __init__(self, address: int, nbytes: int, free: Callable[[], None]) -> None:
        self.address = address
        self.nbytes = nbytes
        self._free = free

    def __del__(self) -> None:
        self._free()


class HostMemory(Memory):
    """Host memory as a NumPy array, uint8 (nbytes,); its views keep this object alive."""

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {
            "data": (self.address, False), "shape": (self.nbytes,), "typestr": "|u1", "version": 3,
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A region of memory: planes of lines of bytes.

    Attributes:
        address: address of the first byte.
        width: bytes per line.
        height: lines per plane.
        depth: number of planes.
        pitch: bytes from one line to the next.
        plane: bytes from one plane to the next, a multiple of `pitch`.
        on_host: whether the memory is the host's instead of the device's.
    """

    address: int
    width: int
    height: int
    depth: int
    pitch: int
    plane: int
    on_host: bool = False

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Width, height and depth."""
        return self.width, self.height, self.depth


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceArray:
    """A C-contiguous array in device memory that an engine reads and writes.

    Attributes:
        memory: allocation, kept as long as the array.
        address: address of the first element.
        shape: sizes of the dimensions.
        dtype: element type.
    """

    memory: Memory
    address: int
    shape: tuple[int, ...]
    dtype: DType

    def __getitem__(self, rows: slice) -> "DeviceArray":
        """Consecutive rows, in the same memory."""
        start, stop, step = rows.indices(self.shape[0])
        assert step == 1 and start < stop
        shape = (stop - start, *self.shape[1:])
        row = prod(shape[1:]) * self.dtype.itemsize
        return replace(self, address=self.address + start * row, shape=shape)

    def __len__(self) -> int:
        return self.shape[0]


def _bindings() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError:
        raise BackendError(
            "cuda-bindings is not installed: pip install 'perception_rt[tensorrt]'"
        ) from None
    return driver


@cache
def open_cuda() -> Cuda:
    """The GPU, opened once per process; BackendError if that fails."""
    return Cuda()
