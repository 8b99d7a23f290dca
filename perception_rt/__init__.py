"""Run Meta's Perception Encoder as compiled engines, without torch.

`load` opens a package that `perception-export` made. Everything here is imported on first use, so
that `import perception_rt` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from perception_rt._version import __version__
from perception_rt.errors import (
    BackendError,
    CapacityError,
    CheckpointError,
    ExportError,
    InputError,
    PackageError,
    PerceptionError,
)

if TYPE_CHECKING:
    from perception_rt.processing.image import ImageSpec
    from perception_rt.runtime.embedder import Embedder
    from perception_rt.runtime.load import load

_LAZY = {
    "Embedder": "perception_rt.runtime.embedder",
    "ImageSpec": "perception_rt.processing.image",
    "load": "perception_rt.runtime.load",
}

__all__ = [
    "BackendError",
    "CapacityError",
    "CheckpointError",
    "Embedder",
    "ExportError",
    "ImageSpec",
    "InputError",
    "PackageError",
    "PerceptionError",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'perception_rt' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
