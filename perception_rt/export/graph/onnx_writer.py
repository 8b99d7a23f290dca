"""Writes lowered graphs and their weights into a stage: one data file for each component."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from perception_rt.export.graph.lowering import LoweredGraph
from perception_rt.package.contract import GraphSpec, TensorSpec
from perception_rt.package.store import Stage

_ALIGNMENT = 64

Place = tuple[str, int]  # data file, and offset in bytes


def write_graphs(
    stage: Stage, data_file: str, graphs: Mapping[str, LoweredGraph], places: dict[str, Place]
) -> dict[str, GraphSpec]:
    """Writes a data file, and an ONNX file for each graph; returns the graphs' specs.

    A weight that several graphs use is written once. One weight is in memory at a time, or one
    piece of it.

    Args:
        stage: stage to write into.
        data_file: name of the file for weights that no earlier call wrote.
        graphs: lowered graphs by name.
        places: places of the weights that earlier calls wrote; new weights are added.
    """
    weights = {name: w for graph in graphs.values() for name, w in graph.weights.items()}
    new = {name: weight for name, weight in weights.items() if name not in places}
    if new:
        with stage.open_write(data_file) as writer:
            position = 0
            for name, weight in new.items():
                padding = -position % _ALIGNMENT
                writer.write(bytes(padding))
                places[name] = data_file, position + padding
                for piece in weight.pieces():
                    writer.write(piece.reshape(-1).view(np.uint8).data)
                position += padding + weight.nbytes
    return {name: _write_graph(stage, name, graph, places) for name, graph in graphs.items()}


def _write_graph(
    stage: Stage, name: str, graph: LoweredGraph, places: Mapping[str, Place]
) -> GraphSpec:
    onnx_graph = graph.model.graph
    for key, weight in graph.weights.items():
        data_file, offset = places[key]
        onnx_graph.initializers[key].const_value = ir.ExternalTensor(
            data_file,
            offset,
            weight.nbytes,
            ir.DataType.from_numpy(weight.dtype),
            shape=ir.Shape(weight.shape),
            name=key,
        )
    file = f"{name}.onnx"
    proto = ir.to_proto(graph.model)
    stage.write(file, [proto.SerializeToString(deterministic=True)])
    return GraphSpec(
        file=file,
        data=tuple(sorted({places[key][0] for key in graph.weights})),
        inputs=tuple(_spec(v) for v in onnx_graph.inputs),
        outputs=tuple(_spec(v) for v in onnx_graph.outputs),
    )


def _spec(value: ir.Value) -> TensorSpec:
    assert value.name is not None and value.shape is not None and value.dtype is not None
    shape = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
    return TensorSpec(name=value.name, dtype=value.dtype.numpy().name, shape=shape)
