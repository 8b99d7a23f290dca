"""Fixtures: a language model as files, its exported package, an image and a video."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from golden_data import plm_golden
from PIL import Image

from perception_rt.checkpoint.write import save_checkpoint
from perception_rt.cli import export_main
from perception_rt.processing.byte_symbols import byte_symbols
from perception_rt.processing.llm_vocabulary import CONTROLS, IMAGE


@dataclass(frozen=True, kw_only=True)
class PlmFiles:
    """A checkpoint in the reference's names, its configuration and a tokenizer for it."""

    weights: Path
    config: Path
    tokenizer: Path

    @property
    def arguments(self) -> list[str]:
        """Arguments of `perception-export`, without tokenizer and destination."""
        return ["--checkpoint", str(self.weights), "--config", str(self.config)]


@pytest.fixture(scope="session")
def plm_files(tmp_path_factory: pytest.TempPathFactory) -> PlmFiles:
    """The golden model with tied embeddings and a context long enough for a conversation."""
    data, folder = plm_golden("plm_tied_ropescaled"), tmp_path_factory.mktemp("plm")
    files = PlmFiles(
        weights=folder / "tiny.safetensors",
        config=folder / "config.json",
        tokenizer=folder / "tokenizer.json",
    )
    save_checkpoint(data.weights, files.weights, "original")
    files.config.write_text(json.dumps(data.config_dict() | {"max_seqlen": 8192}))
    files.tokenizer.write_text(json.dumps(byte_tokenizer(data.config.image_token_id)))
    return files


def byte_tokenizer(image_token_id: int) -> dict:
    """A `tokenizer.json` with one token per byte and control tokens up to the image's."""
    names = [name for name in CONTROLS if name != IMAGE] + [IMAGE]
    first = image_token_id + 1 - len(names)
    return {
        "added_tokens": [{"id": first + i, "content": name} for i, name in enumerate(names)],
        "pre_tokenizer": {
            "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
            "use_regex": False,
        },
        "model": {
            "type": "BPE", "vocab": {symbol: i for i, symbol in byte_symbols().items()},
            "merges": [],
        },
    }  # fmt: skip


@pytest.fixture(scope="session")
def plm_package(plm_files: PlmFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package in fp32, with a tokenizer; tests share it."""
    out = tmp_path_factory.mktemp("packages") / "plm"
    tokenizer = ["--tokenizer", str(plm_files.tokenizer)]
    assert export_main([*plm_files.arguments, *tokenizer, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PNG image of noise, 80 x 60 pixels."""
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An MP4 video of 6 frames, one per second."""
    av = pytest.importorskip("av")
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(6):
            pixels = np.full((48, 64, 3), 40 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return str(path)
