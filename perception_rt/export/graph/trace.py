"""Traces a torch module to a small ONNX dialect, from which every lowering starts.

The module is on the meta device, so no weight is read. Operators of our own domain stand for
whatever backends do differently: `Linear`, `Embedding`, `Attention`, and `CachedAttention` for
attention over a key-value cache. Everything else is standard ONNX. A lowering replaces our
operators, so no backend has to recognise attention in a pattern of small operators.

Legend: N sequences, T tokens, C channels, K key and value heads, S cache slots, E channels per
head.
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
def _(query: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(query)


def traced_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    heads: int,
    kv_heads: int | None = None,
    rope: Rope | None = None,
    causal: bool = False,
    mask: Any = None,
) -> Tensor:
    """The attention kernel of modules that are traced, on (N, T, C)."""
    assert kv_heads in (None, heads), "grouped heads need a cache"
    assert mask is None, "masks are for training"
    cos, sin = rope or (None, None)
    result: Tensor = _attention_op(query, key, value, cos, sin, heads, causal)
    return result


@torch.library.custom_op("perception_rt::cached_attention", mutates_args=())
def _cached_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    past_lengths: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError("this operator is traced only")


@_cached_attention_op.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(keys), torch.empty_like(values)


class CachedAttention:
    """The attention kernel with key-value caches, for tracing one module once.

    Each call uses the caches of the next layer, so layers must attend in order.

    Attributes:
        updated: updated keys and values of the layers so far, alternately.
    """

    def __init__(self) -> None:
        self._caches: Iterator[tuple[Tensor, Tensor]] = iter(())
        self._past_lengths: Tensor | None = None
        self.updated: list[Tensor] = []

    def start(self, past_lengths: Tensor, caches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Sets the layers' caches (N, K, S, E), and the number of tokens (N,) in them."""
        self._past_lengths, self._caches, self.updated = past_lengths, iter(caches), []

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        heads: int,
        kv_heads: int | None = None,
        rope: Rope | None = None,
        causal: bool = False,
        mask: Any = None,
    ) -> Tensor:
        """Attends from (N, T, C) to the cache and itself; `rope` has a row per position."""
        assert causal and mask is None and rope is not None and self._past_lengths is not None
        keys, values = next(self._caches)
        result = _cached_attention_op(
            query, key, value, keys, values, self._past_lengths, *rope, heads, kv_heads or heads
        )
        self.updated += result[1:]
        return result[0]


@cache
def _operator(
    name: str, inputs: tuple[str, ...], attributes: tuple[str, ...], outputs: int = 1
) -> values.Op:
    """An operator of our domain; inputs whose names end in `?` are optional."""
    parameter = onnx.defs.OpSchema.FormalParameter
    option = onnx.defs.OpSchema.FormalParameterOption
    attribute = onnx.defs.OpSchema.Attribute
    integers = {"ids": "I", "past_lengths": "I"}
    schema = onnx.defs.OpSchema(
        name,
        DOMAIN,
        1,
        inputs=[
            parameter(
                n,
                integers.get(n, "T"),
                param_option=option.Optional if n[-1] == "?" else option.Single,
            )
            for n in inputs
        ],
        outputs=[parameter(f"y{i}", "T") for i in range(outputs)],
        type_constraints=[
            ("T", ["tensor(float)", "tensor(float16)"], ""),
            ("I", ["tensor(int32)", "tensor(int64)"], ""),
        ],
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


def _cached_attention(*inputs: Any) -> Any:
    """Takes q, k, v, keys, values, past_lengths, cos, sin, and the attributes heads, kv_heads."""
    names = ("q", "k", "v", "keys", "values", "past_lengths", "cos", "sin")
    *operands, heads, kv_heads = inputs
    operator = _operator("CachedAttention", names, ("heads", "kv_heads"), 3)
    return operator(*operands, heads=heads, kv_heads=kv_heads)


def _embedding(weight: Any, ids: Any, *_: Any, **__: Any) -> Any:
    return _operator("Embedding", ("weight", "ids"), ())(weight, ids)


def _rms_norm(x: Any, shape: Any, weight: Any, eps: float) -> Any:
    return op.RMSNormalization(x, weight, axis=-1, epsilon=eps)


def _conv2d(
    x: Any, weight: Any, bias: Any = None, stride: Any = (1, 1), padding: Any = (0, 0), *_: Any
) -> Any:
    """Translates aten.conv2d without the zero bias that torch's own translation computes."""
    return op.Conv(x, weight, bias, strides=stride, pads=[*padding, *padding])


def _conv_transpose2d(x: Any, weight: Any, bias: Any = None, stride: Any = (1, 1), *_: Any) -> Any:
    """Translates aten.conv_transpose2d without padding."""
    return op.ConvTranspose(x, weight, bias, strides=stride)


def _split(x: Any, size: int, dim: int = 0) -> Any:
    """Translates aten.split into equal parts to one Split, and not to a sequence."""
    parts = -(-x.shape[dim] // size)
    return op.Split(x, axis=dim, num_outputs=parts)


_TRANSLATIONS: dict[Any, Any] = {
    torch.ops.aten.linear.default: _linear,
    torch.ops.aten.split.Tensor: _split,
    torch.ops.aten.embedding.default: _embedding,
    torch.ops.aten.rms_norm.default: _rms_norm,
    torch.ops.aten.conv2d.default: _conv2d,
    torch.ops.aten.conv_transpose2d.input: _conv_transpose2d,
    torch.ops.perception_rt.attention.default: _attention,
    torch.ops.perception_rt.cached_attention.default: _cached_attention,
}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter's notes on optional packages; errors are raised all the same."""
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
    """A traced module: its graph, and the graph value of each output name.

    Two names may share a value, as the last block's tokens and the embedding of a tower without
    head do.
    """

    graph: ir.Graph
    outputs: Mapping[str, ir.Value]


def trace(
    module: nn.Module,
    examples: Mapping[str, Tensor],
    *,
    dynamic: Mapping[str, Mapping[int, str]],
    output_names: Sequence[str],
) -> Traced:
    """Traces a module on the meta device.

    Args:
        module: takes one list of inputs, and returns one tensor per name in `output_names`.
        examples: meta tensor of each input, in order; dynamic sizes must be at least 2.
        dynamic: names of dynamic sizes by input and axis; equal names mean equal sizes.
        output_names: names of the outputs.

    Returns:
        The graph, whose initializers have the parameters' names and shapes, and no data.
    """
    sizes = {name for axes in dynamic.values() for name in axes.values()}
    dims = {name: torch.export.Dim(name) for name in sorted(sizes)}
    shapes = [{axis: dims[name] for axis, name in dynamic.get(key, {}).items()} for key in examples]
    arguments = (list(examples.values()),)
    with _quiet(), torch.no_grad():
        program = torch.export.export(module.eval(), arguments, dynamic_shapes=(shapes,))
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table=_TRANSLATIONS,
            input_names=list(examples),
            optimize=False,
            verbose=False,
        )
    assert exported is not None
    graph = exported.model.graph
    return Traced(graph, dict(zip(output_names, graph.outputs, strict=True)))
