"""The few calls of CUDA's driver that a backend needs: memory, copies, streams, graphs.

By `cuda-bindings` and NVIDIA's driver alone: no toolkit, no torch. Everything happens in the
device's primary context, so that other libraries of the process see the same memory.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np

from perception_rt.errors import BackendError, CapacityError

Array = np.ndarray[Any, Any]

_OUT_OF_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"
_ALLOCATORS = ("cuMemAlloc", "cuMemHostAlloc", "cuMemAllocManaged")


class Cuda:
    """The first GPU of this machine. Safe to use from several threads.

    Attributes:
        capability: as in "sm89".
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
        major, minor, shares = (
            self._call(
                "cuDeviceGetAttribute",
                getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}"),
                self._device,
            )
            for name in (
                "COMPUTE_CAPABILITY_MAJOR",
                "COMPUTE_CAPABILITY_MINOR",
                "CONCURRENT_MANAGED_ACCESS",
            )
        )
        self._shares_memory = bool(shares)
        self.capability = f"sm{major}{minor}"
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

    def allocate_pinned(self, nbytes: int) -> "Memory":
        """Memory of the host that the device copies from and to."""
        self.bind()
        address = int(self._call("cuMemHostAlloc", nbytes, 0))
        return Memory(address, nbytes, lambda: self._free("cuMemFreeHost", address))

    def allocate_shared(self, nbytes: int) -> "Memory":
        """Memory that both see at one address, preferably the device's own; zeroed.

        Raises:
            CapacityError: the device has not as much to spare.
            BackendError: the system lets only one of both see it at a time, as on Windows.
        """
        self.bind()
        if not self._shares_memory:
            raise BackendError(f"{self.name} and the host cannot share memory on this system")
        free, _ = self._call("cuMemGetInfo")
        if nbytes > free:  # else the driver would take the host's memory instead
            raise CapacityError(f"the GPU has no memory for {nbytes} bytes, {free} are free")
        address = int(self._call("cuMemAllocManaged", nbytes, 1))  # CU_MEM_ATTACH_GLOBAL
        memory = Memory(address, nbytes, lambda: self._free("cuMemFree", address))
        location = self._driver.CUmemLocation()
        location.type = self._driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        location.id = 0
        advice = self._driver.CUmem_advise.CU_MEM_ADVISE_SET_PREFERRED_LOCATION
        self._call("cuMemAdvise", address, nbytes, advice, location)
        # On a stream of its own: waiting for all of the device would break captures elsewhere.
        stream = self.new_stream()
        try:
            self._call("cuMemsetD8Async", address, 0, nbytes, stream)
            self.wait(stream)
        finally:
            self.free_stream(stream)
        return memory

    def copy_in(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Host to device, in the order of the stream."""
        self._call("cuMemcpyHtoDAsync", target, source, nbytes, stream)

    def copy_out(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Device to host, in the order of the stream."""
        self._call("cuMemcpyDtoHAsync", target, source, nbytes, stream)

    def capture(self, work: Callable[[], None], stream: int) -> "Graph | None":
        """What `work` puts on a stream, as one graph; not done yet. None if it cannot be one."""
        # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may allocate meanwhile.
        self._call("cuStreamBeginCapture", stream, self._driver.CUstreamCaptureMode(1))
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
        # Of memory that the host sees, NumPy's views keep this object alive.
        self.__array_interface__ = {
            "data": (address, False), "shape": (nbytes,), "typestr": "|u1", "version": 3,
        }  # fmt: skip

    def __del__(self) -> None:
        self._free()


@cache
def open_cuda() -> Cuda:
    """The one of this process; BackendError if it cannot be had."""
    return Cuda()
