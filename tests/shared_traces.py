"""Traces equal modules once per test run.

Tracing takes most of a small export and is the same for every precision; lowerings only read it.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
from torch import Tensor, nn

from perception_rt.export.graph import trace

_EVERY_MODULES = frozenset(vars(nn.Module()))


def _value(value: Any) -> Any:
    """A key that is equal for equal values; other objects are told apart by their addresses."""
    if isinstance(value, Tensor):
        data = None if value.is_meta else value.detach().contiguous().numpy().tobytes()
        return value.dtype, tuple(value.shape), data
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    if isinstance(value, Mapping):
        return tuple((key, _value(item)) for key, item in value.items())
    if isinstance(value, tuple | list):
        return tuple(_value(item) for item in value)
    if isinstance(value, trace.CachedAttention):  # each module has its own; `start` sets its state
        return type(value)
    return repr(value)


def _structure(module: nn.Module) -> Any:
    own = [
        (name, type(part), _value({k: v for k, v in vars(part).items() if k not in _EVERY_MODULES}))
        for name, part in module.named_modules()
    ]
    return tuple(own), _value(dict(module.named_parameters())), _value(dict(module.named_buffers()))


_trace = trace.trace
# Modules are kept, so that no address in a key is used again.
_done: dict[Any, tuple[nn.Module, trace.Traced]] = {}


def _shared(
    module: nn.Module,
    examples: Mapping[str, Tensor],
    *,
    dynamic: Mapping[str, Mapping[int, str]],
    output_names: Sequence[str],
) -> trace.Traced:
    key = (_structure(module), _value(examples), _value(dynamic), tuple(output_names))
    if key not in _done:
        traced = _trace(module, examples, dynamic=dynamic, output_names=output_names)
        _done[key] = (module, traced)
    return _done[key][1]


def share() -> None:
    """Makes all exports share traces for the rest of the process."""
    trace.trace = _shared
    # torch.onnx parses the functions of onnxscript's library anew for every trace.
    library = import_module("torch.onnx._internal._lazy_import").onnxscript_apis
    library.get_torchlib_ops = cache(library.get_torchlib_ops)


def forget() -> None:
    """Drops all traces, for a test of tracing itself."""
    _done.clear()
