"""Which TensorRT is installed, and what it can do: found out, never assumed from a version.

`tensorrt` (10.13 and later; of language models, 10.15) builds for the GPU that is there.
`tensorrt_rtx` also builds ahead of time for compute capabilities, on a machine without any GPU.
Both have the same Python interface.
"""

import ctypes
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from perception_rt.errors import BackendError

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_OLDEST = (10, 13)  # of tensorrt; tensorrt_rtx counts anew
# What a network has for each operator that is one layer: attention since tensorrt 10.14, rotation
# and the update of a cache since 10.15.
_LAYERS = {
    "Attention": "add_attention",
    "RotaryEmbedding": "add_rotary_embedding",
    "TensorScatter": "add_kv_cache_update",
}


@dataclass(frozen=True, slots=True)
class TensorRt:
    """An installed TensorRT.

    Attributes:
        api: its Python module.
        name: "tensorrt" or "tensorrt_rtx".
        version: as it states it.
    """

    api: Any
    name: str
    version: str

    @property
    def label(self) -> str:
        """Name and version; an engine runs on exactly the one that built it."""
        return f"{self.name} {self.version}"

    @property
    def builds_ahead(self) -> bool:
        """Whether it builds for compute capabilities that are not here."""
        return hasattr(self.api.IBuilderConfig, "set_compute_capability")

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Those that it builds for ahead of time, as in "sm89"."""
        if not self.builds_ahead:
            return ()
        names = (name for name in dir(self.api.ComputeCapability) if name.startswith("SM"))
        return tuple(sorted((name.lower() for name in names), key=lambda name: int(name[2:])))

    def lacks(self, operators: Iterable[str]) -> list[str]:
        """Those of the ONNX operators that its networks have no layer for."""
        network = self.api.INetworkDefinition
        return sorted(
            name for name in operators if name in _LAYERS and not hasattr(network, _LAYERS[name])
        )


def gpu_capability() -> str | None:
    """Of the first GPU that CUDA's driver finds here, as in "sm89"; None if there is none."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    device, count, major, minor = (ctypes.c_int() for _ in range(4))
    is_here = (
        driver.cuInit(0) == 0
        and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
        and count.value > 0
        and driver.cuDeviceGet(ctypes.byref(device), 0) == 0
        and driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device) == 0
        and driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device) == 0
    )
    return f"sm{major.value}{minor.value}" if is_here else None


def find_tensorrt(*, ahead: bool = False, label: object = None) -> TensorRt:
    """One that is installed: of two, `tensorrt`, unless the other one fits better.

    Args:
        ahead: it should build ahead of time.
        label: it should be this one.

    Raises:
        BackendError: none is installed, or none that is new enough.
    """
    found = installed()
    return max(found, key=lambda one: (one.label == label, one.builds_ahead or not ahead))


@cache
def installed() -> tuple[TensorRt, ...]:
    """All that are here, `tensorrt` first."""
    found, old = [], ""
    for name, load in LOADERS.items():
        try:
            api = load()
        except ImportError:
            continue
        version = str(api.__version__)
        if name == "tensorrt" and tuple(map(int, version.split(".")[:2])) < _OLDEST:
            old = f"tensorrt {version} is too old, at least {'.'.join(map(str, _OLDEST))} is needed"
        else:
            found.append(TensorRt(api, name, version))
    if not found:
        raise BackendError(
            f"{old or 'TensorRT is not installed'}: pip install 'perception_rt[tensorrt]', or "
            "NVIDIA's tensorrt"
        )
    return tuple(found)


def _load_tensorrt() -> Any:
    return import_module("tensorrt")


def _load_rtx() -> Any:
    try:
        return import_module("tensorrt_rtx")
    except ImportError:  # the wheels without NVIDIA's meta package; the libraries come first
        import_module("tensorrt_rtx_libs")
        return import_module("tensorrt_rtx_bindings")


LOADERS: dict[str, Callable[[], Any]] = {
    "tensorrt": _load_tensorrt,
    "tensorrt_rtx": _load_rtx,
}
