"""Measures the peak rates of this machine, one limit per process.

A limit is the best of several calls on operands so large that overheads vanish.
"""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.subprocess_task import serve

LIMITS = ("fp32", "bf16", "int8", "read")

_CALLS = 5


def perform(task: Mapping[str, Any]) -> float:
    """Measures the limit that a task names; see `measure_limit`."""
    return measure_limit(task["limit"], threads=task["threads"], quick=task["quick"])


def measure_limit(name: str, *, threads: int | None, quick: bool) -> float:
    """Measures one limit, and raises what the library raises if this machine cannot run it.

    Args:
        name: `fp32`, `bf16` or `int8`, in operations/s, or `read`, in bytes/s. `fp32` is the best
            of torch and ONNX Runtime, `bf16` is torch with packed weights and operands, and `int8`
            is ONNX Runtime's product that also quantizes its activations.
        threads: threads of each library; None for the library's default.
        quick: smaller operands and fewer calls, for a trial run.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    size, calls = (512, 2) if quick else (4096, _CALLS)
    operations = 2 * size**3
    with torch.inference_mode():
        match name:
            case "fp32":
                runs = (_packed_linear(size, torch.float32), _product(size, threads, int8=False))
                return operations / min(_best(run, calls) for run in runs)
            case "bf16":
                return operations / _best(_packed_linear(size, torch.bfloat16), calls)
            case "int8":
                return operations / _best(_product(size, threads, int8=True), calls)
            case _:
                data = torch.ones((1 << 26) if quick else (1 << 28))
                return data.nbytes / _best(data.sum, calls)


def _best(run: Callable[[], object], calls: int) -> float:
    """Shortest of several calls in seconds, after one that packs and allocates."""
    run()
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _packed_linear(size: int, dtype: Any) -> Callable[[], object]:
    """Calls torch's linear layer with weights and activations already in its blocked layout."""
    import torch
    from torch.utils import mkldnn

    layer = mkldnn.to_mkldnn(torch.nn.Linear(size, size).eval(), dtype)
    x = torch.randn(size, size, dtype=dtype).to_mkldnn()
    return lambda: layer(x)


def _product(size: int, threads: int | None, *, int8: bool) -> Callable[[], object]:
    """Calls an ONNX Runtime session of one product with a constant, in float or quantized."""
    import onnx
    import onnxruntime as ort
    from onnx import helper, numpy_helper

    rng = np.random.default_rng(0)
    shape = (size, size)
    if int8:
        node = helper.make_node(
            "DynamicQuantizeMatMul", ["x", "w", "scale"], ["y"], domain="com.microsoft"
        )
        constants = {
            "w": rng.integers(-127, 128, shape, np.int8),
            "scale": np.ones(size, np.float32),
        }
    else:
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
        constants = {"w": rng.random(shape, np.float32)}
    values = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in ("x", "y")
    ]
    weights = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph([node], "product", values[:1], values[1:], weights)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options)
    feed = {"x": rng.random(shape, np.float32)}
    return lambda: session.run(None, feed)


if __name__ == "__main__":
    sys.exit(serve(perform))
