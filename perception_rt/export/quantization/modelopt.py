"""Ranges of activations by NVIDIA ModelOpt, where it is installed: `--calibrator modelopt`.

Its histograms give the magnitude that all but one in 10,000 values are below. What is above is
clipped, so whether a layer takes this range is measured (`measure.py`). Of its other methods, mean
square error and entropy do not know E4M3 yet (0.47).
"""

from importlib import import_module
from typing import Any

from torch import Tensor

from perception_rt.errors import BackendError

_PERCENTILE = 99.99
_E4M3 = (4, 3)  # bits of exponent and mantissa, as ModelOpt has it


class ModelOptRanges:
    """Histograms of the inputs of layers, by name."""

    def __init__(self) -> None:
        """BackendError unless ModelOpt is installed."""
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
        """Takes note of an input."""
        if name not in self._layers:
            layer = self._quantizer(self._attributes)
            layer.disable_quant()
            layer.enable_calib()
            self._layers[name] = layer
        self._layers[name](x)

    def ranges(self) -> dict[str, float]:
        """The largest magnitude that is not clipped, by name."""
        found = {}
        for name, layer in self._layers.items():
            layer.load_calib_amax("percentile", percentile=_PERCENTILE, strict=False)
            found[name] = float(layer.amax)
        return found
