"""Finds the installed TensorRT and its abilities, by inspection instead of by version.

`tensorrt` (10.13 and later; for language models, 10.15) builds for the GPU in this machine.
`tensorrt_rtx` also builds for other compute capabilities, on a machine without a GPU. Both have the
same Python interface.
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
_OLDEST = (10, 13)  # of tensorrt; tensorrt_rtx has version numbers of its own
# Network methods of operators that are one layer: attention since tensorrt 10.14, rotation and the
# update of a cache since 10.15.
_LAYERS = {
    "Attention": "add_attention",
    "RotaryEmbedding": "add_rotary_embedding",
    "TensorScatter": "add_kv_cache_update",
}


@dataclass(frozen=True, slots=True)
class TensorRt:
    """An installed TensorRT.

    Attributes:
        api: Python module.
        name: "tensorrt" or "tensorrt_rtx".
        version: version string of the module.
    """

    api: Any
    name: str
    version: str

    @property
    def label(self) -> str:
        """Name and version; an engine runs only on the TensorRT that built it."""
        return f"{self.name} {self.version}"

    @property
    def builds_ahead(self) -> bool:
        """Whether it builds for compute capabilities other than this machine's."""
        return hasattr(self.api.IBuilderConfig, "set_compute_capability")

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Compute capabilities that it builds for ahead of time, such as "sm89"."""
        if not self.builds_ahead:
            return ()
        names = (name for name in dir(self.api.ComputeCapability) if name.startswith("SM"))
        return tuple(sorted((name.lower() for name in names), key=lambda name: int(name[2:])))

    def lacks(self, operators: Iterable[str]) -> list[str]:
        """The given ONNX operators that its networks have no layer for."""
        network = self.api.INetworkDefinition
        return sorted(
            name for name in operators if name in _LAYERS and not hasattr(network, _LAYERS[name])
        )


def gpu_capability() -> str | None:
    """Compute capability of the first GPU, such as "sm89"; None if there is no GPU."""
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
    """An installed TensorRT; if there are two, `tensorrt` unless the other one fits better.

    Args:
        ahead: whether it should build ahead of time.
        label: preferred `TensorRt.label`; None for no preference.

    Raises:
        BackendError: no TensorRT that is new enough is installed.
    """
    found = installed()
    return max(found, key=lambda one: (one.label == label, one.builds_ahead or not ahead))


@cache
def installed() -> tuple[TensorRt, ...]:
    """All installed ones, `tensorrt` first."""
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
    except ImportError:  # without NVIDIA's meta package, its two wheels are imported in this order
        import_module("tensorrt_rtx_libs")
        return import_module("tensorrt_rtx_bindings")


LOADERS: dict[str, Callable[[], Any]] = {
    "tensorrt": _load_tensorrt,
    "tensorrt_rtx": _load_rtx,
}
