"""The package that a refit starts from: its decisions, its graphs' structure and its engines."""

import hashlib
from pathlib import Path

import onnx

from perception_rt.errors import ExportError
from perception_rt.export.backends.tensorrt_engines import MadeEngine, engine_name
from perception_rt.package.contract import GraphSpec
from perception_rt.package.reader import Package

_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)


class RefitSource:
    """An exported package whose weights are to be replaced; supplies its refittable engines.

    Attributes:
        refittable: whether its engines hold no weights.
        label: TensorRT that built its engines.
        smoothed: fp8 layers whose channels are smoothed.
        clipped: fp8 layers whose activation ranges clip outliers.
        excluded: layers that do not take the plan's quantisation.
    """

    def __init__(self, package: Package) -> None:
        options = package.manifest.content.target.options
        self._package = package
        self.refittable = bool(options.get("refittable", False))
        self.label = str(options.get("builder"))
        self.smoothed = frozenset(options.get("balanced_layers", ()))
        self.clipped = frozenset(options.get("clipped_layers", ()))
        self.excluded = frozenset((*options["float_layers"], *options.get("block_layers", ())))

    def check(self, graph: str, data: bytes) -> None:
        """ExportError unless an ONNX graph has the structure of the package's."""
        if graph not in self._package.manifest.content.graphs:
            raise ExportError(
                f"the package has no graph {graph!r}: it was made by another version; export anew"
            )
        mine, theirs = structure(data), structure(self._package.read_graph(graph))
        if mine != theirs:
            raise ExportError(
                f"graph {graph!r} of these weights has structure {mine[:12]}, and that of the "
                f"package is {theirs[:12]}: it was made by another version; export anew"
            )

    def engine(self, graph: str, spec: GraphSpec, file: Path, gpu: str) -> MadeEngine:
        """The package's engine of a graph for a GPU; see `EngineMaker.engine`."""
        name = engine_name(graph, gpu)
        record = self._package.manifest.record.get("engines", {})
        return MadeEngine(data=self._package.map(name), record=dict(record.get(name, {})))


def structure(data: bytes) -> str:
    """SHA-256 of an ONNX graph without its float weights.

    Integer constants, and the places of weights in their files, are included.
    """
    model = onnx.load_model_from_string(data)
    for tensor in model.graph.initializer:
        if tensor.data_type in _FLOATS:
            tensor.ClearField("raw_data")
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()
