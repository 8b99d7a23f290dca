"""Describes this machine for a benchmark's report: processor, memory, load and versions.

The description never names the host or its user.
"""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from perception_rt._version import __version__

_CPUINFO = Path("/proc/cpuinfo")
_MATRIX_FLAGS = ("amx", "avx512", "avx_vnni", "avx2", "fma", "asimd", "sve", "i8mm", "bf16")
_PACKAGES = ("torch", "onnxruntime", "onnx", "onnxscript", "numpy")


def environment() -> dict[str, Any]:
    """Processor, memory, load, and versions of the libraries that a benchmark uses."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpuinfo("model name") or platform.machine(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": len(os.sched_getaffinity(0)),
        "flags": [f for f in _cpuinfo("flags", "Features").split() if f.startswith(_MATRIX_FLAGS)],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "perception_rt": __version__,
        **{name: _version(name) for name in _PACKAGES},
    }


def _cpuinfo(*keys: str) -> str:
    """Value of the first processor's first line whose key is one of `keys`, or an empty string."""
    if not _CPUINFO.is_file():
        return ""
    for line in _CPUINFO.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return ""


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
