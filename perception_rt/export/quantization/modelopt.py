"""Activation ranges by NVIDIA ModelOpt, for `--calibrator modelopt`.

The range is the 99.99th percentile of magnitudes in ModelOpt's histograms. Larger values are
clipped, so `sensitivity.py` measures which layers profit from it. ModelOpt's other methods, mean
square error and entropy, do not support E4M3 (as of 0.47).
"""

from importlib import import_module
from typing import Any

from torch import Tensor

from perception_rt.errors import BackendError

_PERCENTILE = 99.99
_E4M3 = (4, 3)  # bits of exponent and mantissa


class ModelOptRanges:
    """Finds ranges of layers' inputs by histograms.

    Raises:
        BackendError: ModelOpt is not installed.
    """

    def __init__(self) -> None:
        try:
            config: Any = import_module("modelopt.torch.quantization.config")
            modules: Any = import_module("modelopt.torch.quantization.nn")
        except ImportError as error:
            raise BackendError(
                f"--calibrator modelopt needs {error.name}: pip install nvidia-modelopt"
            ) from None
        self._attributes = config.QuantizerAttributeConfig(num_bits=_E4M3, calibrator="histogram")
        self._quantizer = modules.TensorQuantizer
        self._layers: dict[str, Any] = {}

    def add(self, name: str, x: Tensor) -> None:
        """Records an input of a layer."""
        if name not in self._layers:
            layer = self._quantizer(self._attributes)
            layer.disable_quant()
            layer.enable_calib()
            self._layers[name] = layer
        self._layers[name](x)

    def ranges(self) -> dict[str, float]:
        """Largest magnitude that is not clipped, by layer."""
        found = {}
        for name, layer in self._layers.items():
            layer.load_calib_amax("percentile", percentile=_PERCENTILE, strict=False)
            found[name] = float(layer.amax)
        return found
