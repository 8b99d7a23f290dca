"""Prepares the files that the rows of a model read: weights, images, reference and exports.

Weights are random, since no kernel here depends on their values. The text tower is left out.
"""

import logging
import warnings
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.encoder.runners import (
    IMAGES_FILE,
    PIXELS_FILE,
    PLAIN_FILE,
    PLAIN_INPUT,
    REFERENCE_FILE,
    WEIGHTS_FILE,
    engine_directory,
    load_tower,
)
from perception_rt.checkpoint.random import RandomWeights
from perception_rt.config import PeConfig
from perception_rt.export.build import export_package
from perception_rt.export.plan import ExportPlan
from perception_rt.export.quantization.calibration import images as synthetic_images
from perception_rt.models.vision import VisionTower
from perception_rt.processing.image import ImageSpec, load_image, normalize

_SEED = 0
_PHOTO_SIZE = (480, 640)  # height, width
_PLAIN_OPSET = 20


def prepare(config: PeConfig, work: Path, *, name: str, count: int, precisions: list[str]) -> None:
    """Writes the files of one model to the directory `work`.

    Args:
        config: the architecture; its text tower is ignored.
        work: an existing, empty directory.
        name: the model's name.
        count: number of images.
        precisions: precisions of the engines to export.
    """
    config = PeConfig(vision=config.vision)
    source = RandomWeights(config, _SEED)
    spec = ImageSpec(height=config.vision.image_size, width=config.vision.image_size)
    _write_weights(source, config, work)
    _write_images(spec, count, work)
    tower = load_tower(config.vision, work / WEIGHTS_FILE["float32"])
    _write_reference(tower, work)
    for precision in precisions:
        plan = ExportPlan(
            name=name,
            config=config,
            backend="onnxruntime",
            precision=precision,
            image=spec,
            taps=(),
        )
        export_package(plan, source, work / engine_directory(precision))


def export_plain(config: PeConfig, work: Path) -> None:
    """Exports the tower with torch's own exporter, after `prepare` has written its weights."""
    tower = load_tower(config.vision, work / WEIGHTS_FILE["float32"])
    size = config.vision.image_size
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            tower,
            (torch.zeros(2, 3, size, size),),
            work / PLAIN_FILE,
            dynamo=True,
            opset_version=_PLAIN_OPSET,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=[PLAIN_INPUT],
            external_data=True,
            verbose=False,
        )


def _write_weights(source: RandomWeights, config: PeConfig, work: Path) -> None:
    """Writes the vision tower once per dtype, under names without the `visual.` prefix."""
    with torch.device("meta"):
        names = list(VisionTower(config.vision).state_dict())
    tensors = {name: source.load(f"visual.{name}") for name in names}
    save_file(tensors, work / WEIGHTS_FILE["float32"])
    for tensor_name in names:
        tensors[tensor_name] = tensors[tensor_name].to(torch.bfloat16)
    save_file(tensors, work / WEIGHTS_FILE["bfloat16"])


def _write_images(spec: ImageSpec, count: int, work: Path) -> None:
    photos = synthetic_images(count, *_PHOTO_SIZE)
    prepared = np.stack([load_image(photo, spec) for photo in photos])
    np.save(work / IMAGES_FILE, photos)
    np.save(work / PIXELS_FILE, normalize(prepared, spec))


def _write_reference(tower: VisionTower, work: Path) -> None:
    pixels = torch.from_numpy(np.load(work / PIXELS_FILE))
    with torch.inference_mode():
        rows = [tower(image[None]).numpy() for image in pixels]
    np.save(work / REFERENCE_FILE, np.concatenate(rows))
