"""What this machine can do at most, measured here, and what it is.

A limit is the best of several calls on operands so large that overheads vanish. The stamp names
the processor and versions, never the host or its user.
"""

import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from perception_rt._version import __version__

_CALLS = 5
_CPUINFO = Path("/proc/cpuinfo")
_MATRIX_FLAGS = ("amx", "avx512", "avx_vnni", "avx2", "fma", "asimd", "sve", "i8mm", "bf16")
_PACKAGES = ("torch", "onnxruntime", "onnx", "onnxscript", "numpy")


def limits(*, threads: int | None, quick: bool) -> dict[str, float]:
    """Measured peaks: `fp32`, `bf16`, `int8` in operations/s, and `read` in bytes/s.

    fp32 is the best of torch and ONNX Runtime, bf16 is torch with packed weights and operands, and
    int8 is ONNX Runtime's product that quantizes its activations, that work included.

    Args:
        threads: of each library; None for its own default.
        quick: smaller operands and fewer calls, for a trial run.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    size, calls = (512, 2) if quick else (4096, _CALLS)
    operations = 2 * size**3
    data = torch.ones((1 << 26) if quick else (1 << 28))
    with torch.inference_mode():
        torch_fp32 = operations / _best(_packed_linear(size, torch.float32), calls)
        return {
            "fp32": max(torch_fp32, operations / _best(_product(size, threads, int8=False), calls)),
            "bf16": operations / _best(_packed_linear(size, torch.bfloat16), calls),
            "int8": operations / _best(_product(size, threads, int8=True), calls),
            "read": data.nbytes / _best(data.sum, calls),
        }


def environment() -> dict[str, Any]:
    """Processor, memory, versions and load."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpuinfo("model name") or platform.machine(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": len(os.sched_getaffinity(0)),
        "flags": [f for f in _cpuinfo("flags", "Features").split() if f.startswith(_MATRIX_FLAGS)],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "perception_rt": __version__,
        **{name: _version(name) for name in _PACKAGES},
    }


def _best(run: Callable[[], object], calls: int) -> float:
    """Least seconds of several calls, after one that packs and allocates."""
    run()
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _packed_linear(size: int, dtype: Any) -> Callable[[], object]:
    """torch's linear layer with weights and activations already in its blocked layout."""
    import torch
    from torch.utils import mkldnn

    layer = mkldnn.to_mkldnn(torch.nn.Linear(size, size).eval(), dtype)
    x = torch.randn(size, size, dtype=dtype).to_mkldnn()
    return lambda: layer(x)


def _product(size: int, threads: int | None, *, int8: bool) -> Callable[[], object]:
    """A session of one product with a constant, in float or dynamically quantized."""
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


def _cpuinfo(*keys: str) -> str:
    """The value of the first of the keys that the first processor has, or an empty string."""
    if not _CPUINFO.is_file():
        return ""
    for line in _CPUINFO.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return ""


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
