"""`--route torch-tensorrt`: engines of an encoder by Torch-TensorRT, from the exported program.

The package is the same: ONNX graphs, to be compared with, and engines with the same inputs and
outputs. Torch-TensorRT builds on a GPU, for that GPU, and one profile for each engine. Language
models go by ONNX: their caches are updated in place.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from perception_rt.checkpoint.source import WeightSource
from perception_rt.errors import BackendError, ExportError
from perception_rt.export.backends.tensorrt_engines import MadeEngine, check_engines
from perception_rt.export.backends.tensorrt_profiles import whole_range
from perception_rt.export.components.component import load_module
from perception_rt.export.plan import ExportPlan
from perception_rt.memory import peak_rss_bytes
from perception_rt.models.text import TextTower
from perception_rt.models.vision import VisionTower
from perception_rt.package import contract
from perception_rt.package.contract import GraphSpec, TensorSpec
from perception_rt.processing.image import ImageSpec
from perception_rt.tensorrt_library import find_tensorrt

DEVICE = "cuda"
_MOST_WORDS = 600  # of Torch-TensorRT's own, in an error


class TorchTensorRt:
    """Builds the engines of an encoder."""

    def __init__(self, plan: ExportPlan, source: WeightSource) -> None:
        """BackendError unless Torch-TensorRT and a GPU are here."""
        self._compile = load_compiler()
        library = find_tensorrt()
        check_engines(library, plan.engines)
        self.label = library.label
        self._plan = plan
        self._source = source

    def engine(self, graph: str, spec: GraphSpec, file: Path, gpu: str) -> MadeEngine:
        """Builds one; ExportError with Torch-TensorRT's words if it does not."""
        (source,) = spec.inputs
        sizes = whole_range(graph)
        program = export_program(self._module(graph), source, sizes)
        low, usual, high = (_shape(source, size) for size in sizes)
        kinds: Any = import_module("torch_tensorrt")
        dtype = getattr(torch, source.dtype)
        outputs = tuple(output.name for output in spec.outputs)
        options = {
            "arg_inputs": (
                kinds.Input(min_shape=low, opt_shape=usual, max_shape=high, dtype=dtype),
            ),
            # In the structure of what `forward` takes and returns.
            "arg_input_binding_names": (source.name,),
            "output_binding_names": outputs if graph == contract.FEATURES else outputs[0],
            "require_full_compilation": True,
            "immutable_weights": True,
        }
        try:
            data = self._compile(program, **options)
        except Exception as error:  # whatever it raises, it is about this graph
            words = " ".join(str(error).split())[:_MOST_WORDS]
            raise ExportError(f"torch-tensorrt cannot build {graph!r}: {words}") from error
        record = {"bytes": len(data), "peak_rss_bytes": peak_rss_bytes()}
        return MadeEngine(data=memoryview(data), record={**record, "route": "torch-tensorrt"})

    def _module(self, graph: str) -> nn.Module:
        config = self._plan.config
        if graph == contract.TEXT:
            assert config.text is not None
            with torch.device("meta"):
                text = TextTower(config.text)
            return _Half(load_module(text, self._source, "text."), _same)
        with torch.device("meta"):
            tower = VisionTower(config.vision)
        tower = load_module(tower, self._source, "visual.")
        pixels = Pixels(self._plan.image)
        if graph == contract.FEATURES:
            return _Half(tower, pixels, self._plan.tapped)
        return _Half(tower, pixels)


def load_compiler() -> Callable[..., bytes]:
    """What makes an engine of an exported program; BackendError unless it is installed."""
    try:
        dynamo: Any = import_module("torch_tensorrt.dynamo")
    except ImportError as error:
        raise BackendError(
            f"--route torch-tensorrt needs {error.name}: pip install torch-tensorrt"
        ) from None
    found: Callable[..., bytes] = dynamo.convert_exported_program_to_serialized_trt_engine
    return found


def export_program(module: nn.Module, source: TensorSpec, sizes: tuple[int, int, int]) -> Any:
    """`torch.export` of a module on the GPU, its batch from the first of the sizes to the last."""
    low, usual, high = sizes
    module = module.to(DEVICE).eval().requires_grad_(False)
    dtype = getattr(torch, source.dtype)
    example = torch.zeros(_shape(source, usual), dtype=dtype, device=DEVICE)
    batch = torch.export.Dim(contract.BATCH, min=low, max=high)
    return torch.export.export(module, (example,), dynamic_shapes=({0: batch},))


class Pixels(nn.Module):
    """uint8 (N, H, W, 3) -> normalised float16 (N, 3, H, W)."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: ImageSpec) -> None:
        super().__init__()
        for name in ("mean", "std"):
            values = np.asarray(getattr(spec, name), np.float32).reshape(1, 3, 1, 1)
            self.register_buffer(name, torch.from_numpy(values))

    def forward(self, images: Tensor) -> Tensor:
        """As `processing.image.normalize`."""
        # The cast first: TensorRT does nothing else with uint8.
        planes = images.to(torch.float32).permute(0, 3, 1, 2)
        return ((planes / 255 - self.mean) / self.std).to(torch.float16)


class _Half(nn.Module):
    """A tower in float16, from the package's input to its outputs in float32."""

    def __init__(
        self, tower: Any, entry: Callable[[Tensor], Tensor], taps: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.tower = tower.to(torch.float16)
        self.entry = entry
        self.taps = tuple(taps)

    def forward(self, inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The embedding, or the output of each tapped block."""
        x = self.entry(inputs)
        if not self.taps:
            embedding: Tensor = self.tower(x)
            return embedding.to(torch.float32)
        return tuple(y.to(torch.float32) for y in self.tower.forward_taps(x, self.taps))


def _same(ids: Tensor) -> Tensor:
    return ids


def _shape(source: TensorSpec, batch: int) -> tuple[int, ...]:
    return tuple(batch if isinstance(size, str) else size for size in source.shape)
