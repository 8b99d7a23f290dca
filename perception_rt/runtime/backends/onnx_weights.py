"""The weights of an ONNX graph in a package, as its backends take them."""

from typing import Any

import numpy as np

from perception_rt.errors import PackageError
from perception_rt.package.onnx_scan import scan_graph
from perception_rt.package.reader import Package

Array = np.ndarray[Any, Any]

# By the values of TensorProto.DataType, for those that our graphs keep outside. NumPy has no fp8:
# its bytes stand for it.
FP8 = 17
FP8_BYTES = np.dtype([("e4m3", np.uint8)])
_DTYPES = {
    kind: np.dtype(name)
    for kind, name in ((1, "float32"), (2, "uint8"), (3, "int8"), (7, "int64"), (10, "float16"))
} | {FP8: FP8_BYTES}


def external_tensors(package: Package, model: bytes) -> dict[str, Array]:
    """The graph's external tensors as views of verified, mapped files: no copy is made."""
    weights: dict[str, Array] = {}
    for tensor in scan_graph(model).externals:
        dtype = _DTYPES.get(tensor.kind)
        if dtype is None:
            raise PackageError(f"tensor {tensor.name!a:.80} is of a type that is not used here")
        data = package.map(tensor.entries["location"])
        offset = int(tensor.entries.get("offset", "0"))
        count = tensor.size_bytes // dtype.itemsize
        array = np.frombuffer(data, dtype, count, offset)
        weights[tensor.name] = array.reshape(tensor.shape)
    return weights
