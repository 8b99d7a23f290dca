"""Runs Meta's Perception Encoder and Perception Language Model as compiled engines, without torch.

`load` opens a package that `perception-export` made. All names but the errors are imported on first
use, so that `import perception_rt` is quick.
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
    from perception_rt.processing.boxes import Box, draw_box, format_box
    from perception_rt.processing.image import ImageSpec
    from perception_rt.runtime.embedder import Embedder
    from perception_rt.runtime.generation.handle import Handle
    from perception_rt.runtime.generation.messages import chat_request
    from perception_rt.runtime.generator import Generator
    from perception_rt.runtime.load import load
    from perception_rt.runtime.request import (
        Exchange,
        GenerationProgress,
        GeneratorStats,
        Request,
        Result,
        Score,
        Timings,
    )

_LAZY = {
    "Box": "perception_rt.processing.boxes",
    "Embedder": "perception_rt.runtime.embedder",
    "Exchange": "perception_rt.runtime.request",
    "GenerationProgress": "perception_rt.runtime.request",
    "Generator": "perception_rt.runtime.generator",
    "GeneratorStats": "perception_rt.runtime.request",
    "Handle": "perception_rt.runtime.generation.handle",
    "ImageSpec": "perception_rt.processing.image",
    "Request": "perception_rt.runtime.request",
    "Result": "perception_rt.runtime.request",
    "Score": "perception_rt.runtime.request",
    "Timings": "perception_rt.runtime.request",
    "chat_request": "perception_rt.runtime.generation.messages",
    "draw_box": "perception_rt.processing.boxes",
    "format_box": "perception_rt.processing.boxes",
    "load": "perception_rt.runtime.load",
}

__all__ = [
    "BackendError",
    "Box",
    "CapacityError",
    "CheckpointError",
    "Embedder",
    "Exchange",
    "ExportError",
    "GenerationProgress",
    "Generator",
    "GeneratorStats",
    "Handle",
    "ImageSpec",
    "InputError",
    "PackageError",
    "PerceptionError",
    "Request",
    "Result",
    "Score",
    "Timings",
    "__version__",
    "chat_request",
    "draw_box",
    "format_box",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'perception_rt' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
