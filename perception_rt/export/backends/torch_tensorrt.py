"""`--route torch-tensorrt`: builds an encoder's engines with Torch-TensorRT from exported programs.

The package has the same ONNX graphs, and engines with the same inputs and outputs. Torch-TensorRT
builds on a GPU, for that GPU, with one profile per engine. Language models need the ONNX route,
since Torch-TensorRT does not update caches in place.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from perception_rt.errors import BackendError, ExportError
from perception_rt.export.backends.tensorrt_engines import MadeEngine, check_engines
from perception_rt.export.backends.tensorrt_profiles import whole_range
from perception_rt.memory import peak_rss_bytes
from perception_rt.package import contract
from perception_rt.package.contract import GraphSpec, TensorSpec
from perception_rt.tensorrt_library import find_tensorrt

DEVICE = "cuda"
_MAX_QUOTE = 600  # characters of Torch-TensorRT's message in an error


class TorchTensorRt:
    """Builds the engines of an encoder.

    Args:
        engines: compute capabilities to build for, as in a plan.
        modules: returns the float16 module of a graph.

    Raises:
        BackendError: Torch-TensorRT is not installed, or there is no GPU.
    """

    def __init__(self, engines: Sequence[str], modules: Callable[[str], nn.Module]) -> None:
        self._compile = load_compiler()
        library = find_tensorrt()
        check_engines(library, engines)
        self.label = library.label
        self._modules = modules

    def engine(self, graph: str, spec: GraphSpec, file: Path, gpu: str) -> MadeEngine:
        """Builds an engine; ExportError quotes Torch-TensorRT's message."""
        (source,) = spec.inputs
        sizes = whole_range(graph)
        program = export_program(self._modules(graph), source, sizes)
        low, usual, high = (_shape(source, size) for size in sizes)
        kinds: Any = import_module("torch_tensorrt")
        dtype = getattr(torch, source.dtype)
        outputs = tuple(output.name for output in spec.outputs)
        is_chain = contract.graph_kind(graph) == contract.FEATURES
        options = {
            "arg_inputs": (
                kinds.Input(min_shape=low, opt_shape=usual, max_shape=high, dtype=dtype),
            ),
            # In the structure of `forward`'s arguments and results.
            "arg_input_binding_names": (source.name,),
            "output_binding_names": outputs if is_chain else outputs[0],
            "require_full_compilation": True,
            "immutable_weights": True,
        }
        try:
            data = self._compile(program, **options)
        except Exception as error:  # of any class: it is about this graph
            words = " ".join(str(error).split())[:_MAX_QUOTE]
            raise ExportError(f"torch-tensorrt cannot build {graph!r}: {words}") from error
        record = {"bytes": len(data), "peak_rss_bytes": peak_rss_bytes()}
        return MadeEngine(data=memoryview(data), record={**record, "route": "torch-tensorrt"})


def load_compiler() -> Callable[..., bytes]:
    """The function that builds an engine from a program; BackendError unless it is installed."""
    try:
        dynamo: Any = import_module("torch_tensorrt.dynamo")
    except ImportError as error:
        raise BackendError(
            f"--route torch-tensorrt needs {error.name}: pip install torch-tensorrt"
        ) from None
    found: Callable[..., bytes] = dynamo.convert_exported_program_to_serialized_trt_engine
    return found


def export_program(module: nn.Module, source: TensorSpec, sizes: tuple[int, int, int]) -> Any:
    """Exports a module on the GPU, with a batch from the first of the sizes to the last."""
    low, usual, high = sizes
    module = module.to(DEVICE).eval().requires_grad_(False)
    dtype = getattr(torch, source.dtype)
    example = torch.zeros(_shape(source, usual), dtype=dtype, device=DEVICE)
    batch = torch.export.Dim(contract.BATCH, min=low, max=high)
    return torch.export.export(module, (example,), dynamic_shapes=({0: batch},))


def _shape(source: TensorSpec, batch: int) -> tuple[int, ...]:
    return tuple(batch if isinstance(size, str) else size for size in source.shape)
