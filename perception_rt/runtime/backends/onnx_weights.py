"""Weights of a package's ONNX graphs, as arrays for a backend."""

from typing import Any

import numpy as np

from perception_rt.errors import PackageError
from perception_rt.package.onnx_scan import scan_graph
from perception_rt.package.reader import Package

Array = np.ndarray[Any, Any]

# Values of TensorProto.DataType that exported graphs keep outside. NumPy has no fp8; a dtype of
# one-byte records stands for it.
FP8 = 17
FP8_BYTES = np.dtype([("e4m3", np.uint8)])
_DTYPES = {
    kind: np.dtype(name)
    for kind, name in ((1, "float32"), (2, "uint8"), (3, "int8"), (7, "int64"), (10, "float16"))
} | {FP8: FP8_BYTES}


def external_tensors(package: Package, model: bytes) -> dict[str, Array]:
    """External tensors of an ONNX graph by name, as views of verified, mapped files.

    Args:
        package: the package.
        model: bytes of the graph, from `Package.read_graph`.

    Raises:
        PackageError: a tensor has a type that exports do not write, or a file is damaged.
    """
    weights: dict[str, Array] = {}
    for tensor in scan_graph(model).externals:
        dtype = _DTYPES.get(tensor.kind)
        if dtype is None:
            raise PackageError(
                f"tensor {tensor.name!a:.80} has ONNX data type {tensor.kind}; supported are "
                f"{sorted(_DTYPES)}"
            )
        data = package.map(tensor.entries["location"])
        offset = int(tensor.entries.get("offset", "0"))
        count = tensor.size_bytes // dtype.itemsize
        array = np.frombuffer(data, dtype, count, offset)
        weights[tensor.name] = array.reshape(tensor.shape)
    return weights
