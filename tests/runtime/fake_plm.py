"""A tiny "plm" package for the reference backend: a manifest and placeholder files."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from perception_rt.config import VisionConfig
from perception_rt.package.contract import GraphSpec
from perception_rt.package.manifest import Content, Manifest, Target
from perception_rt.package.plm_graphs import DecoderLayout, plm_signatures
from perception_rt.package.store import Stage
from perception_rt.plm_config import DecoderConfig, PlmConfig
from perception_rt.processing.llm_tokenizer import TokenizerSpec
from perception_rt.processing.tiles import TileSpec

CONFIG = PlmConfig(
    decoder=DecoderConfig(
        dim=16, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=320, max_seqlen=512
    ),
    vision=VisionConfig(
        patch_size=14,
        width=16,
        layers=1,
        heads=2,
        mlp_ratio=2.0,
        image_size=28,
        pool_type="none",
    ),
    pooling_ratio=2,
    image_token_id=319,
)


# Prompts of many tiles, each of four tokens, fit.
LONG_PLM = replace(CONFIG, decoder=replace(CONFIG.decoder, max_seqlen=2048), pooling_ratio=1)


def picture(seed: int, height: int = 40, width: int = 30) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def graph_specs(
    config: PlmConfig = CONFIG, *, parts: int = 2, cache_dtype: str = "float32"
) -> dict[str, GraphSpec]:
    """Specs of every graph of a package, with placeholder files."""
    per_part = -(-config.decoder.n_layers // parts)
    layers = range(config.decoder.n_layers)
    layout = DecoderLayout(
        parts=tuple(layers[i * per_part : (i + 1) * per_part] for i in range(parts)),
        cache_dtype=cache_dtype,
    )
    return {
        name: GraphSpec(
            file=f"{name}.txt",
            data=(),
            inputs=signature.inputs,
            outputs=signature.outputs,
            kind="placeholder",
        )
        for name, signature in plm_signatures(config, layout).items()
    }


def write_plm(
    dest: Path,
    *,
    config: PlmConfig = CONFIG,
    graphs: Mapping[str, GraphSpec] | None = None,
    files: Mapping[str, bytes] | None = None,
    **changes: Any,
) -> Path:
    """Publishes a package; returns its directory.

    Args:
        dest: directory to create.
        config: the architecture.
        graphs: graphs by name; None for `graph_specs(config)`.
        files: contents by file name; any other file contains its own name.
        changes: fields of the manifest's `Content`, which also change the package id.
    """
    graphs = graph_specs(config) if graphs is None else graphs
    files = {} if files is None else files
    image = TileSpec(tile_size=config.vision.image_size, max_tiles=4, max_frames=4)
    text = TokenizerSpec(
        kind="bytes",
        vocab_size=config.decoder.vocab_size,
        image_token_id=config.image_token_id,
    )
    with Stage.create(dest) as stage:
        for name in sorted({n for spec in graphs.values() for n in (spec.file, *spec.data)}):
            stage.write(name, [files.get(name, name.encode())])
        fields: dict[str, Any] = {
            "name": "PLM-Fake",
            "family": "plm",
            "architecture": config.to_dict(),
            "target": Target(backend="reference", precision="fp32", options={}),
            "image": image.to_dict(),
            "text": text.to_dict(),
            "graphs": graphs,
            "files": dict(stage.entries),
            "weights": {"source": "none"},
            "versions": {},
        }
        stage.seal(Manifest.create(Content(**(fields | changes)), record={}))
        stage.publish()
    return dest
