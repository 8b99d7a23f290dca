"""Calls on the packages in `packages/`, shared by the script that made them and the test."""

from pathlib import Path

import numpy as np

import perception_rt as prt

VOCABULARY = 288
IMAGE_TOKEN = VOCABULARY - 1
QUESTION = "What is it?"
NEW_TOKENS = 12


def picture() -> np.ndarray:
    """Stripes, uint8 (40, 30, 3)."""
    y, x, channel = np.mgrid[:40, :30, :3]
    return ((7 * x + 13 * y + 101 * channel) % 256).astype(np.uint8)


def prompt() -> tuple[list[int], np.ndarray]:
    """Token ids with one image token, and the pixels of its tile: float32 (1, 3, 28, 28)."""
    pixels = np.linspace(-1, 1, 3 * 28 * 28, dtype=np.float32).reshape(1, 3, 28, 28)
    return [72, 105, IMAGE_TOKEN, 63, 10], pixels


def results(folder: Path) -> dict[str, object]:
    """Runs the packages in a folder; returns their ids, numbers, tokens and text."""
    found: dict[str, object] = {}
    with prt.load(folder / "pe") as embedder:
        found["pe_id"] = embedder.manifest.id
        found["embedding"] = embedder.embed_images([picture()])[0].tolist()
        found["features"] = embedder.features([picture()], 0)[0].sum(axis=-1).tolist()
    with prt.load(folder / "plm") as generator:
        found["plm_id"] = generator.manifest.id
        result = generator.generate(QUESTION, images=[picture()], max_new_tokens=NEW_TOKENS)
        found["text"], found["tokens"] = result.text, list(result.tokens)
        ids, pixels = prompt()
        found["logits"] = generator.prefill_logits(ids, pixels).tolist()
        found["greedy"] = generator.generate_tokens(ids, pixels, max_new_tokens=NEW_TOKENS)
    return found
