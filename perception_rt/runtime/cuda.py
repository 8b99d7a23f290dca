"""The few calls of CUDA's driver that a backend needs: memory, copies, streams, graphs.

By `cuda-bindings` and NVIDIA's driver alone: no toolkit, no torch. Everything happens in the
device's primary context, so that other libraries of the process see the same memory.
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
# The calling thread's own: to wait for the whole device would break captures in other threads.
_THREAD_STREAM = 2  # CU_STREAM_PER_THREAD


class Cuda:
    """The first GPU of this machine. Safe to use from several threads.

    Attributes:
        capability: as in "sm89".
        driver_version: of CUDA, as in 13000.
        name: of the GPU.
    """

    def __init__(self) -> None:
        """Starts CUDA; BackendError says what is missing."""
        try:
            from cuda.bindings import driver
        except ImportError:
            raise BackendError(
                "cuda-bindings is not installed: pip install 'perception_rt[tensorrt]'"
            ) from None
        self._driver: Any = driver
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
                    driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{name}"
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
        """A stream, as an integer."""
        self.bind()
        return int(self._call("cuStreamCreate", 1))  # CU_STREAM_NON_BLOCKING

    def free_stream(self, stream: int) -> None:
        """Gives a stream back, after what it has to do."""
        self._free("cuStreamDestroy", stream)

    def allocate(self, nbytes: int) -> "Memory":
        """Memory of the device; CapacityError if there is not enough."""
        self.bind()
        address = int(self._call("cuMemAlloc", nbytes))
        return Memory(address, nbytes, lambda: self._free("cuMemFree", address))

    def allocate_pinned(self, nbytes: int) -> "HostMemory":
        """Memory of the host that the device copies from and to."""
        self.bind()
        address = int(self._call("cuMemHostAlloc", nbytes, 0))
        return HostMemory(address, nbytes, lambda: self._free("cuMemFreeHost", address))

    def clear(self, box: "Box") -> None:
        """Zeros over bytes of the device; returns when they are there."""
        self.bind()
        for plane in range(box.depth):
            address = box.address + plane * box.plane
            if box.height == 1:  # whose pitch would have a limit
                self._call("cuMemsetD8Async", address, 0, box.width, _THREAD_STREAM)
            else:
                sizes = box.pitch, 0, box.width, box.height
                self._call("cuMemsetD2D8Async", address, *sizes, _THREAD_STREAM)
        self.wait(_THREAD_STREAM)

    def copy(self, source: "Box", target: "Box") -> None:
        """Copies bytes of the device or the host to either; returns when they are there."""
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
        """Host to device, in the order of the stream."""
        self._call("cuMemcpyHtoDAsync", target, source, nbytes, stream)

    def copy_out(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Device to host, in the order of the stream."""
        self._call("cuMemcpyDtoHAsync", target, source, nbytes, stream)

    def capture(self, work: Callable[[], None], stream: int) -> "Graph | None":
        """What `work` puts on a stream, as one graph; not done yet. None if it cannot be one."""
        # CU_STREAM_CAPTURE_MODE_RELAXED: other threads may allocate meanwhile, and this one's
        # collector may free, which in another mode would end the capture.
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
        """Until the stream has done everything; BackendError if any of it failed."""
        self._call("cuStreamSynchronize", stream)

    def bind(self) -> None:
        """Makes the primary context this thread's; others may have set another one."""
        self._call("cuCtxSetCurrent", self._context)

    def _free(self, name: str, handle: Any) -> None:
        with suppress(BackendError):  # of a process that ends
            # A collector runs in any thread, and leaves its context as it was.
            self._call("cuCtxPushCurrent", self._context)
            try:
                self._call(name, handle)
            finally:
                self._call("cuCtxPopCurrent")

    def _call(self, name: str, *arguments: Any) -> Any:
        """A function of the driver; its result, or the error that its status stands for."""
        status, *results = getattr(self._driver, name)(*arguments)
        if int(status) == 0:
            return results[0] if len(results) == 1 else tuple(results) or None
        if status.name == _OUT_OF_MEMORY:
            size = f" for {arguments[0]} bytes" if name in _ALLOCATORS else ""
            raise CapacityError(f"the GPU has no memory{size}")
        raise BackendError(f"CUDA failed: {name} returned {status.name}")


class Graph:
    """Work on a stream that is launched as one, again and again; freed when nothing refers to it.

    Attributes:
        launch: puts it on a stream.
    """

    def __init__(self, *, launch: Callable[[int], object], free: Callable[[], None]) -> None:
        self.launch = launch
        self._free = free

    def __del__(self) -> None:
        self._free()


class Memory:
    """Bytes at an address, freed when nothing refers to them."""

    def __init__(self, address: int, nbytes: int, free: Callable[[], None]) -> None:
        self.address = address
        self.nbytes = nbytes
        self._free = free

    def __del__(self) -> None:
        self._free()


class HostMemory(Memory):
    """Bytes that NumPy sees, uint8 (nbytes,): its views keep this object alive."""

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {
            "data": (self.address, False), "shape": (self.nbytes,), "typestr": "|u1", "version": 3,
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """Bytes in planes of lines.

    Attributes:
        address: of the first.
        width: bytes of a line.
        height: lines of a plane.
        depth: planes.
        pitch: bytes from one line to the next.
        plane: bytes from one plane to the next, a multiple of `pitch`.
        on_host: or on the device.
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
    """A C-contiguous array in the device's memory, for an engine to read and write.

    Attributes:
        memory: kept as long as the array.
        address: of its first element.
        shape: sizes.
        dtype: of its elements.
    """

    memory: Memory
    address: int
    shape: tuple[int, ...]
    dtype: DType

    def __getitem__(self, rows: slice) -> "DeviceArray":
        """Some rows that follow each other, in the same memory."""
        start, stop, step = rows.indices(self.shape[0])
        assert step == 1 and start < stop
        shape = (stop - start, *self.shape[1:])
        row = prod(shape[1:]) * self.dtype.itemsize
        return replace(self, address=self.address + start * row, shape=shape)

    def __len__(self) -> int:
        return self.shape[0]


@cache
def open_cuda() -> Cuda:
    """The one of this process; BackendError if it cannot be had."""
    return Cuda()
