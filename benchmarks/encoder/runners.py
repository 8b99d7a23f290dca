"""Ways to run a vision tower, one per row of the table.

Every row reads the files that `prepare` wrote. Only the rows that run in torch import it, so the
memory of the other rows is that of an installation without torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

import perception_rt as prt
from perception_rt.config import VisionConfig

Array = np.ndarray[Any, Any]
Kind = Literal["eager", "autocast", "bf16", "plain", "pixels", "images"]

WEIGHTS_FILE = {
    "float32": "weights-float32.safetensors",
    "bfloat16": "weights-bfloat16.safetensors",
}
IMAGES_FILE = "images.npy"  # uint8 (N, H, W, 3), larger than the model's input
PIXELS_FILE = "pixels.npy"  # float32 (N, 3, H, W), the same images, resized and normalised
REFERENCE_FILE = "reference.npy"  # eager fp32 output for each image
PLAIN_FILE = "plain.onnx"
PLAIN_INPUT = "pixels"

# On a CPU, fp16 engines compute in fp32.
_LIMIT_OF = {"fp32": "fp32", "fp16": "fp32", "int8": "int8"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to run the tower.

    Attributes:
        name: name in the table.
        kind: selects how the row is opened.
        limit: name of the measured peak that its rate is compared with.
        precision: precision of our engine; empty for a row that runs none.
    """

    name: str
    kind: Kind
    limit: str
    precision: str = ""


BASELINE = Row(name="PyTorch fp32", kind="eager", limit="fp32")
PLAIN = Row(name="plain ONNX export, fp32", kind="plain", limit="fp32")


def rows_for(config: VisionConfig, precisions: list[str]) -> list[Row]:
    """All rows of a model, the baseline first."""
    rows = [
        BASELINE,
        Row(name="PyTorch bf16 autocast", kind="autocast", limit="bf16"),
        Row(name="PyTorch bf16", kind="bf16", limit="bf16"),
        PLAIN,
    ]
    # A tower without pooling has no image embedding.
    kinds: list[Kind] = ["pixels"] if config.pool_type == "none" else ["pixels", "images"]
    what = {"pixels": "engine", "images": "embed_images,"}
    for precision in precisions:
        limit = _LIMIT_OF[precision]
        rows += [
            Row(name=f"{what[kind]} {precision}", kind=kind, limit=limit, precision=precision)
            for kind in kinds
        ]
    return rows


def engine_directory(precision: str) -> str:
    """Folder name of the package in a precision."""
    return f"engine-{precision}"


def open_row(
    row: Row, config: VisionConfig, work: Path, threads: int | None
) -> Callable[[Array], Array]:
    """Opens a row; the result maps a batch of inputs to float32 (batch, ..., D)."""
    match row.kind:
        case "eager" | "autocast" | "bf16":
            return _open_torch(row.kind, config, work, threads)
        case "plain":
            return _open_plain(work / PLAIN_FILE, threads)
        case _:
            engine = prt.Embedder.load(work / engine_directory(row.precision), threads=threads)
            if row.kind == "pixels":
                return lambda pixels: engine.encode_pixels(pixels, batch_size=len(pixels))
            return lambda images: engine.embed_images(list(images), batch_size=len(images))


def load_tower(config: VisionConfig, path: Path) -> Any:
    """Loads an eager tower with the weights of a file, in their dtype."""
    import torch
    from safetensors.torch import load_file

    from perception_rt.models.vision import VisionTower

    with torch.device("meta"):
        tower = VisionTower(config)
    tower.load_state_dict(load_file(path), assign=True)
    return tower.eval().requires_grad_(False)


def _open_torch(
    kind: str, config: VisionConfig, work: Path, threads: int | None
) -> Callable[[Array], Array]:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    tower = load_tower(config, work / WEIGHTS_FILE[str(dtype).removeprefix("torch.")])

    def run(pixels: Array) -> Array:
        cast = torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast")
        with torch.inference_mode(), cast:
            output: Array = tower(torch.from_numpy(pixels).to(dtype)).float().numpy()
        return output

    return run


def _open_plain(path: Path, threads: int | None) -> Callable[[Array], Array]:
    """Opens ONNX Runtime with its defaults, except for the number of threads if one is given."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(pixels: Array) -> Array:
        (output,) = session.run(None, {PLAIN_INPUT: pixels})
        return output

    return run
