"""Shared by all export components: their interface, calibration inputs and measurement.

A component is a part of a model that is run in eager, traced and written as one unit: a vision
tower, a text tower, an embedding, a run of decoder layers.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from perception_rt.checkpoint.source import WeightSource
from perception_rt.export.fidelity import MIN_COSINE
from perception_rt.export.graph import trace
from perception_rt.export.graph.lazy_weights import Weight
from perception_rt.export.graph.lowering import Recipe
from perception_rt.export.graph.trace import Traced
from perception_rt.export.options import ExportOptions
from perception_rt.export.plan import BuildSettings, Plan
from perception_rt.export.quantization import calibration
from perception_rt.export.quantization.formats import Format, Scheme
from perception_rt.export.quantization.modelopt import ModelOptRanges
from perception_rt.export.quantization.sensitivity import (
    Measured,
    Ranges,
    back_off,
    exclude_layers,
    least_cosine,
    measure_layers,
    simulate,
)
from perception_rt.families import Config
from perception_rt.package import contract
from perception_rt.package.reader import Package
from perception_rt.processing.image import ImageSpec, normalize

Array = np.ndarray[Any, Any]

# The simulation rounds linear layers only, the engine everything: its limit is stricter by this.
_MARGIN = 0.0008
# Cosine that a tower in int8 should have with float32 in the simulation. The target is 0.999: on
# hundreds of other inputs, the least is lower than on the few that are simulated.
INT8_COSINE = 0.9995
# Inputs on which int8 is judged, besides those on which its layers are measured.
JUDGED_IMAGES, JUDGED_TILES = 6, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedComponent:
    """A traced component and the graphs that it becomes.

    Attributes:
        traced: the traced module.
        parameters: a weight for each parameter of the module.
        recipes: the graphs to lower, by name.
    """

    traced: Traced
    parameters: Mapping[str, Weight]
    recipes: Mapping[str, Recipe]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Eager float32 results of a component.

    Attributes:
        inputs: input arrays by graph and input name.
        outputs: expected arrays by graph and output name.
        measured: measured linear layers; empty without a scheme.
        carry: tensor that the next component starts from; None if it needs none.
    """

    inputs: Mapping[str, Mapping[str, Array]]
    outputs: Mapping[str, Mapping[str, Array]]
    measured: Measured = field(default_factory=Measured)
    carry: Tensor | None = None


P = TypeVar("P", bound=Plan)


class Component(ABC, Generic[P]):
    """A part of a model that is run in eager, traced and written as one unit.

    Attributes:
        name: unique in the model; the weights go into the file `<name>.data`.
        plan: plan of the export.
        source: weights of the model.
    """

    name: str

    def __init__(self, plan: P, source: WeightSource) -> None:
        self.plan = plan
        self.source = source

    @abstractmethod
    def reference(self, carry: Tensor | None = None) -> Reference:
        """Runs the component in eager on calibration inputs, and measures layers for the scheme.

        Args:
            carry: `Reference.carry` of the component before this one.
        """

    @property
    def backend(self) -> str:
        """Name of the backend of the component's graphs: the plan's, unless it has no towers."""
        return self.plan.backend

    @abstractmethod
    def traced(self) -> Sequence[TracedComponent]:
        """Traces the component, once for each shape of its inputs, without reading weights."""

    def formats(self, measured: Measured) -> dict[str, Format]:
        """Quantisation formats by weight name: the plan's scheme, except for excluded layers."""
        scheme = self.plan.scheme
        if scheme is None:
            return {}
        return dict.fromkeys(measured.errors.keys() - measured.excluded(), scheme)


C = TypeVar("C", bound=Config)
Locate = Callable[[], Path | None]


class ModelExport(ABC, Generic[C, P]):
    """Plans one model family and says what its packages contain; its record names the subclass.

    Attributes:
        plan: plan of the export.
        source: weights of the model.
    """

    def __init__(self, plan: P, source: WeightSource) -> None:
        self.plan = plan
        self.source = source

    @classmethod
    @abstractmethod
    def make_plan(
        cls, options: ExportOptions, config: C, settings: BuildSettings, locate: Locate
    ) -> P:
        """The plan of an export.

        Args:
            options: what the user asked for.
            config: architecture of the model.
            settings: checked settings, from the options.
            locate: returns the checkpoint, beside which further files may lie, or None for random
                weights. It may download, so whatever can be refused is refused before.

        Raises:
            InputError: options do not fit the architecture.
            CheckpointError: the download failed.
        """

    @classmethod
    @abstractmethod
    def plan_of(cls, package: Package, settings: BuildSettings) -> P:
        """The plan that a package was exported by, without `settings.calibration`.

        Raises:
            InputError, KeyError, TypeError: no export makes such a package.
        """

    @abstractmethod
    def components(self) -> Sequence[Component[P]]:
        """The model's components, in the order in which `Reference.carry` is passed on."""

    def files(self) -> dict[str, bytes]:
        """Files besides graphs and weights, by name."""
        return {}

    @abstractmethod
    def image(self) -> dict[str, Any]:
        """The manifest's `processing.image`."""

    @abstractmethod
    def text(self) -> dict[str, Any] | None:
        """The manifest's `processing.text`; None if the package takes no texts."""

    @abstractmethod
    def options(self, excluded: Mapping[str, Format | None]) -> dict[str, Any]:
        """The manifest's `target.options`.

        Args:
            excluded: layers that do not take the plan's scheme, and their format instead; None
                for float.
        """

    def notes(self) -> list[str]:
        """Notes for the user, shown before the package is made."""
        return []

    def torch_module(self, graph: str) -> nn.Module:
        """The float16 module of a graph, for `--route torch-tensorrt`."""
        raise NotImplementedError("plans refuse this route for the family")


def trace_batch(
    graph: nn.Module, name: str, example: Tensor, output_names: Sequence[str]
) -> Traced:
    """Traces a graph with one input, whose first dimension is dynamic."""
    dynamic = {name: {0: contract.BATCH}}
    return trace.trace(graph, {name: example}, dynamic=dynamic, output_names=output_names)


def gate_images(plan: Plan, spec: ImageSpec, count: int) -> Array:
    """Images that engines are compared on, uint8 (N, H, W, 3), then those for calibration."""
    if plan.calibrated:
        return calibration.calibration_images(plan.calibration, spec)
    return calibration.images(count, spec.height, spec.width)


def judged_images(count: int, spec: ImageSpec) -> Tensor:
    """Normalised synthetic images (count, 3, H, W), others than those of `gate_images`."""
    images = calibration.images(count, spec.height, spec.width, seed=1)
    return torch.from_numpy(normalize(images, spec))


def calibration_batches(images: Array, spec: ImageSpec, size: int) -> list[Tensor]:
    """Normalised batches (N, 3, H, W) of at most `size` of the uint8 images (n, H, W, 3)."""
    return [
        torch.from_numpy(normalize(images[start : start + size], spec))
        for start in range(0, len(images), size)
    ]


def ranges_of(settings: BuildSettings) -> Ranges | None:
    """A new range finder for one module's inputs; None to use the largest magnitudes.

    Raises:
        BackendError: ModelOpt is asked for and not installed.
    """
    return ModelOptRanges() if settings.calibrator == "modelopt" else None


def measure_faithful(
    module: nn.Module,
    call: Callable[[Tensor], Tensor],
    batches: Sequence[Tensor],
    scheme: Scheme,
    ranges: Ranges | None = None,
    judged: Tensor | None = None,
) -> Measured:
    """Measures a component's linear layers; excludes and smooths until all of it is faithful.

    Args:
        module: in float32, each parameter in a storage of its own.
        call: runs the component on a batch.
        batches: calibration inputs; faithfulness in fp8 is judged on the first.
        scheme: quantisation of the layers.
        ranges: range finder for fp8; None uses the largest magnitudes.
        judged: inputs on which faithfulness in int8 is judged.
    """

    def calibrate() -> list[Tensor]:
        return [call(x) for x in batches]

    exact, measured = measure_layers(module, calibrate, scheme, ranges)
    if scheme == "fp8":
        least = MIN_COSINE[scheme] + _MARGIN
        exclude_layers(module, partial(call, batches[0]), exact[0], measured, least)
    elif judged is not None:
        back_off(module, calibrate, partial(call, judged), measured, INT8_COSINE)
    return measured


class PiecewiseRun:
    """Runs a component piece by piece, measures each, and simulates all of it beside the exact run.

    Attributes:
        measured: the layers of the pieces so far, measured on the first row.
        exact: result of the last piece in float32, for all rows of the inputs.
        rounded: result of the last piece under the scheme, from a result of this kind.
    """

    def __init__(self, scheme: Scheme | None, inputs: Tensor) -> None:
        self._scheme = scheme
        self.measured = Measured()
        self.exact = inputs
        self.rounded = inputs

    def run(self, module: nn.Module, call: Callable[[Tensor], Tensor], prefix: str = "") -> None:
        """Runs the next piece, whose weight names have a prefix in the component."""
        if self._scheme is None:
            with torch.inference_mode():
                self.exact = self.rounded = call(self.exact)
            return
        first, found = measure_layers(module, partial(call, self.exact[:1]), self._scheme)
        self.rounded = simulate(module, partial(call, self.rounded), found, self._scheme)
        with torch.inference_mode():
            self.exact = torch.cat([first, call(self.exact[1:])])
        self.measured.add(found, prefix)

    @property
    def cosine(self) -> float:
        """Least cosine of any row of the two results."""
        return least_cosine(self.rounded, self.exact)


def run_measured(
    module: nn.Module,
    run: Callable[[], Tensor],
    scheme: Scheme | None,
    measured: Measured,
    prefix: str,
    ranges: Ranges | None = None,
) -> Tensor:
    """Returns the result of `run`; adds the module's layers to `measured` if there is a scheme."""
    if scheme is None:
        with torch.inference_mode():
            return run()
    result, found = measure_layers(module, run, scheme, ranges)
    measured.add(found, prefix)
    return result


def load_module(module: nn.Module, source: WeightSource, prefix: str) -> Any:
    """Loads a module that was made on the meta device: float32, on the CPU, without gradients."""
    tensors = {name: _own_storage(source.load(prefix + name)) for name in module.state_dict()}
    module.load_state_dict(tensors, assign=True)
    return module.eval().requires_grad_(False)


def _own_storage(tensor: Tensor) -> Tensor:
    """The tensor in float32; `measure_layers` tells weights apart by their storage."""
    tensor = tensor.to(torch.float32)
    shared = tensor.untyped_storage().nbytes() > tensor.nbytes
    return tensor.clone() if shared else tensor


def layer_notes(component: str, measured: Measured, formats: Mapping[str, Format]) -> Iterator[str]:
    """Lines about the linear layers that are not quantised like the others."""
    floats = [name for name in measured.excluded() if name not in formats]
    smoothed = sorted(measured.smoothed & formats.keys())
    total = len(measured.errors)
    for names, what in ((floats, "stay in float"), (smoothed, "have their channels smoothed")):
        if names:
            yield f"{component}: {len(names)} of {total} linear layers {what}: {', '.join(names)}"
