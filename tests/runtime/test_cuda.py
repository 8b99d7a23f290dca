"""Calls of the real cuda-bindings to a fake CUDA driver, and cache blocks in device memory.

The driver is a small library in C (`fake_driver.c`) that a child process loads in place of
NVIDIA's. So everything but the GPU takes part in every call.
"""

import ctypes
import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from fake_gpu import FakeCuda
from hypothesis import given
from hypothesis import strategies as st

from perception_rt.errors import BackendError, CapacityError
from perception_rt.package.plm_graphs import CacheShape
from perception_rt.runtime.cache.cuda_block import DeviceBlock
from perception_rt.runtime.cache.kv_block import CacheBlock
from perception_rt.runtime.cuda import Cuda, open_cuda

SHAPE = CacheShape(layers=3, kv_heads=2, head_dim=4, dtype="float16")
DRIVER = "libcuda.so.1"

pytest.importorskip("cuda.bindings", reason="cuda-bindings has wheels for some systems only")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the compiled fake driver."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("driver")
    source = Path(__file__).with_name("fake_driver.c")
    command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{DRIVER}", "-o", folder / DRIVER, source]
    subprocess.run(command, check=True)
    return folder


def test_the_driver_gets_valid_calls(driver: Path) -> None:
    """A child process runs functions of this file with the fake driver."""
    names = ["streams_and_memory", "captures", "blocks", "no_memory"]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(driver)}
    command = [sys.executable, __file__, *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{name} frees everything" for name in names]


def streams_and_memory() -> None:
    cuda = open_cuda()
    assert (cuda.capability, cuda.name) == ("sm89", "fake GPU")
    assert cuda.driver_version == 13000
    stream, device, host = cuda.new_stream(), cuda.allocate(1000), cuda.allocate_pinned(1000)
    seen = np.asarray(host)
    seen[:] = np.arange(1000) % 251
    cuda.copy_in(device.address, host.address, 1000, stream)
    seen[:] = 0
    cuda.copy_out(host.address, device.address, 1000, stream)
    cuda.wait(stream)
    assert (seen == np.arange(1000) % 251).all()
    cuda.free_stream(stream)


def captures() -> None:
    cuda = open_cuda()
    stream = cuda.new_stream()
    graph = cuda.capture(lambda: None, stream)
    assert graph is not None
    graph.launch(stream)
    graph.launch(stream)
    assert ctypes.CDLL(DRIVER).fake_launched() == 2

    def fails() -> None:
        raise BackendError("no")

    assert cuda.capture(fails, stream) is None
    cuda.free_stream(stream)


def blocks() -> None:
    check_block(open_cuda())


def no_memory() -> None:
    for allocate in (open_cuda().allocate, lambda n: DeviceBlock(open_cuda(), SHAPE, n, 1)):
        with pytest.raises(CapacityError, match=r"the GPU has no memory for \d{14,} bytes"):
            allocate(1 << 46)


def check_block(cuda: Any) -> None:
    """Rows in device memory are copied, read, written and cleared like rows in host memory."""
    mine, theirs = DeviceBlock(cuda, SHAPE, 4, 32), CacheBlock(SHAPE, 4, 32)
    mine_larger, theirs_larger = DeviceBlock(cuda, SHAPE, 2, 50), CacheBlock(SHAPE, 2, 50)
    rng = np.random.default_rng(0)
    snapshot = rng.standard_normal((3, 2, 2, 32, 4)).astype(np.float16)
    for block, larger in ((mine, mine_larger), (theirs, theirs_larger)):
        for row in range(4):
            block.write(row, snapshot + np.float16(row), 32 - row)
        block.copy_row(1, larger, 1, 20)
        block.copy_row(2, block, 3, 7)
        block.clear(1, 11)
        block.clear(0, 0)
        block.write(0, snapshot[:, :, :, :9], 5)
    for block, other in ((mine, theirs), (mine_larger, theirs_larger)):
        for row in range(block.rows):
            for length in (0, 1, block.slots):
                np.testing.assert_array_equal(block.read(row, length), other.read(row, length))
    view = mine.values[1][2:4]
    assert view.shape == (2, 2, 32, 4) and len(view) == 2
    assert view.address - mine.keys[0].address == (3 * 4 + 2) * 2 * 32 * 4 * 2
    for wrong in (lambda: mine.read(4, 1), lambda: mine.clear(0, 33), lambda: mine.values[0][2:2]):
        with pytest.raises(AssertionError):
            wrong()


def test_a_block_in_device_memory_acts_like_one_in_host_memory() -> None:
    cuda = FakeCuda()
    check_block(cuda)
    gc.collect()
    assert cuda.live == 0


@given(
    layers=st.integers(1, 3), heads=st.integers(1, 3), channels=st.integers(1, 5),
    rows=st.integers(1, 3), slots=st.integers(1, 9), data=st.data(),
)  # fmt: skip
def test_any_part_of_a_row_is_kept(
    layers: int, heads: int, channels: int, rows: int, slots: int, data: st.DataObject
) -> None:
    shape = CacheShape(layers=layers, kv_heads=heads, head_dim=channels, dtype="float32")
    block = DeviceBlock(FakeCuda(), shape, rows, slots)  # type: ignore[arg-type]
    row, length = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, slots))
    sizes = (layers, 2, heads, slots, channels)
    snapshot = np.arange(np.prod(sizes), dtype=np.float32).reshape(sizes) + 1
    block.write(row, snapshot, length)
    np.testing.assert_array_equal(block.read(row, length), snapshot[:, :, :, :length])
    assert not block.read(row, slots)[:, :, :, length:].any()
    assert not any(block.read(other, slots).any() for other in range(rows) if other != row)
    block.clear(row, length)
    assert not block.read(row, slots).any()


def test_a_capture_without_memory_is_no_capture() -> None:
    class Driver:
        CUstreamCaptureMode = int
        CUdevice_attribute = SimpleNamespace(
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76,
        )
        calls: ClassVar[list[str]] = []

        def __getattr__(self, name: str) -> Any:
            def call(*arguments: Any) -> tuple[Any, ...]:
                self.calls.append(name)
                if name == "cuGraphInstantiate":
                    return (OutOfMemory(),)
                return 0, b"fake GPU" if name == "cuDeviceGetName" else 7

            return call

    class OutOfMemory:
        name = "CUDA_ERROR_OUT_OF_MEMORY"

        def __int__(self) -> int:
            return 2

    cuda = Cuda(Driver())
    assert cuda.capture(lambda: None, 1) is None
    assert Driver.calls[-1] == "cuGraphDestroy"

    def interrupted() -> None:
        raise KeyboardInterrupt

    Driver.calls.clear()
    with pytest.raises(KeyboardInterrupt):
        cuda.capture(interrupted, 1)
    assert Driver.calls == ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphDestroy"]


if __name__ == "__main__":
    for name in sys.argv[1:]:
        globals()[name]()
        gc.collect()
        assert ctypes.CDLL(DRIVER).fake_live() == 0, name
        print(f"{name} frees everything")
