"""Traces a torch module to a small ONNX dialect that every lowering starts from.

The module lives on the meta device: no weight is read here. Two operators of our own domain stand
for what backends differ in, `Linear` and `Attention`; everything else is standard ONNX. A lowering
must replace both, so no backend ever has to recognise attention in a pattern of small operators.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript import opset23 as op
from onnxscript import values
from torch import Tensor, nn

from perception_rt.models.layers import Rope, sdpa_attention

DOMAIN = "perception_rt"
OPSET = 23


@torch.library.custom_op("perception_rt::attention", mutates_args=())
def _attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    causal: bool,
) -> Tensor:
    rope = None if cos is None or sin is None else Rope(cos, sin)
    return sdpa_attention(query, key, value, heads=heads, rope=rope, causal=causal)


@_attention_op.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    causal: bool,
) -> Tensor:
    return torch.empty_like(query)


def traced_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    heads: int,
    rope: Rope | None = None,
    causal: bool = False,
) -> Tensor:
    """The `Attention` kernel to build a module with before tracing it."""
    cos, sin = rope or (None, None)
    result: Tensor = _attention_op(query, key, value, cos, sin, heads, causal)
    return result


@cache
def _operator(name: str, inputs: tuple[str, ...], attributes: tuple[str, ...]) -> values.Op:
    """An operator of our domain; an input whose name ends in `?` is optional."""
    parameter = onnx.defs.OpSchema.FormalParameter
    option = onnx.defs.OpSchema.FormalParameterOption
    attribute = onnx.defs.OpSchema.Attribute
    schema = onnx.defs.OpSchema(
        name,
        DOMAIN,
        1,
        inputs=[
            parameter(n, "T", param_option=option.Optional if n[-1] == "?" else option.Single)
            for n in inputs
        ],
        outputs=[parameter("y", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "")],
        attributes=[
            attribute(n, onnx.defs.OpSchema.AttrType.INT, "", required=True) for n in attributes
        ],
    )
    return values.Op(values.Opset(DOMAIN, 1), name, schema)


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    return _operator("Linear", ("x", "weight", "bias?"), ())(x, weight, bias)


def _attention(
    query: Any, key: Any, value: Any, cos: Any, sin: Any, heads: int, causal: bool
) -> Any:
    operator = _operator("Attention", ("q", "k", "v", "cos?", "sin?"), ("heads", "causal"))
    return operator(query, key, value, cos, sin, heads=heads, causal=int(causal))


def _split(x: Any, size: int, dim: int = 0) -> Any:
    """aten.split with equal parts, as one Split instead of a sequence and its elements."""
    parts = -(-x.shape[dim] // size)
    return op.Split(x, axis=dim, num_outputs=parts)


_TRANSLATIONS: dict[Any, Any] = {
    torch.ops.aten.linear.default: _linear,
    torch.ops.aten.split.Tensor: _split,
    torch.ops.perception_rt.attention.default: _attention,
}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter's notes on optional packages; its errors are raised, not logged."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@dataclass(frozen=True, slots=True)
class Traced:
    """A traced module: its graph, and the value behind each output name.

    Two names may share a value: the last block's tokens are the embedding of a tower without head.
    """

    graph: ir.Graph
    outputs: Mapping[str, ir.Value]


def trace(
    module: nn.Module, example: Tensor, *, input_name: str, output_names: Sequence[str]
) -> Traced:
    """Traces `module`, on the meta device, with a dynamic first dimension.

    Args:
        module: returns one tensor per name in `output_names`.
        example: a meta tensor of the input's dtype and shape, with a batch of at least 2.
        input_name: name of the graph's only input.
        output_names: names of the graph's outputs.

    Returns:
        The graph; its initializers carry the parameters' names and shapes, and no data.
    """
    batch = {0: torch.export.Dim("batch")}
    with _quiet(), torch.no_grad():
        program = torch.export.export(module.eval(), (example,), dynamic_shapes=(batch,))
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table=_TRANSLATIONS,
            input_names=[input_name],
            optimize=False,
            verbose=False,
        )
    assert exported is not None
    graph = exported.model.graph
    return Traced(graph, dict(zip(output_names, graph.outputs, strict=True)))
