"""Writes lowered graphs and their weights into a stage: one data file for all graphs of a tower."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from perception_rt.export.lowering import LoweredGraph
from perception_rt.package.contract import GraphSpec, TensorSpec
from perception_rt.package.store import Stage

_ALIGNMENT = 64


def write_graphs(
    stage: Stage, data_file: str, graphs: Mapping[str, LoweredGraph]
) -> dict[str, GraphSpec]:
    """Stages `data_file` and an ONNX file for each graph; returns their specs.

    A weight that several graphs use is written once; one weight is in memory at a time.
    """
    weights = {name: w for graph in graphs.values() for name, w in graph.weights.items()}
    offsets: dict[str, int] = {}
    with stage.open_write(data_file) as writer:
        position = 0
        for name, weight in weights.items():
            padding = -position % _ALIGNMENT
            writer.write(bytes(padding))
            offsets[name] = position + padding
            writer.write(weight.array().reshape(-1).view(np.uint8).data)
            position = offsets[name] + weight.nbytes
    return {
        name: _write_graph(stage, name, graph, data_file, offsets) for name, graph in graphs.items()
    }


def _write_graph(
    stage: Stage, name: str, graph: LoweredGraph, data_file: str, offsets: Mapping[str, int]
) -> GraphSpec:
    onnx_graph = graph.model.graph
    for key, weight in graph.weights.items():
        onnx_graph.initializers[key].const_value = ir.ExternalTensor(
            data_file,
            offsets[key],
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
        data=(data_file,) if graph.weights else (),
        inputs=tuple(_spec(v) for v in onnx_graph.inputs),
        outputs=tuple(_spec(v) for v in onnx_graph.outputs),
    )


def _spec(value: ir.Value) -> TensorSpec:
    assert value.name is not None and value.shape is not None and value.dtype is not None
    shape = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
    return TensorSpec(name=value.name, dtype=value.dtype.numpy().name, shape=shape)
