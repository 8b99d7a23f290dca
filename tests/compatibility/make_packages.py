"""Made the packages in `packages/` and the numbers that they returned, in `packages/expected.json`.

It ran once, with perception_rt at commit 41f3a48: `python make_packages.py FOLDER`. The packages
are not made again, because the test checks that later code reads packages of earlier code.
"""

import json
import sys
from pathlib import Path

from package_results import IMAGE_TOKEN, VOCABULARY, results

from perception_rt.checkpoint.random import RandomWeights
from perception_rt.config import PeConfig, VisionConfig
from perception_rt.export.build import export_package
from perception_rt.export.plan import ExportPlan, PlmPlan
from perception_rt.plm_config import DecoderConfig, PlmConfig
from perception_rt.processing.image import ImageSpec
from perception_rt.processing.llm_tokenizer import TokenizerSpec
from perception_rt.processing.tiles import TileSpec


def vision_package(folder: Path) -> None:
    """A PE without text tower."""
    config = PeConfig(
        vision=VisionConfig(
            patch_size=8, width=16, layers=2, heads=2, mlp_ratio=2.0, output_dim=16, image_size=32,
            use_cls_token=True, attn_pooler_heads=2,
        ),
        text=None,
    )  # fmt: skip
    plan = ExportPlan(
        name="tiny-vision", config=config, backend="onnxruntime", precision="fp32",
        image=ImageSpec(height=32, width=32),
    )  # fmt: skip
    export_package(plan, RandomWeights(config, 0), folder)


def language_package(folder: Path) -> None:
    """A PLM with grouped queries, an untied head and bytes for tokens."""
    config = PlmConfig(
        decoder=DecoderConfig(
            dim=32, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=VOCABULARY, max_seqlen=256,
            multiple_of=16, ffn_dim_multiplier=0.25,
        ),
        vision=VisionConfig(
            patch_size=7, width=8, layers=1, heads=1, mlp_ratio=2.0, image_size=28,
            pool_type="none",
        ),
        pooling_ratio=4,
        image_token_id=IMAGE_TOKEN,
    )  # fmt: skip
    spec = TokenizerSpec(kind="bytes", vocab_size=VOCABULARY, image_token_id=IMAGE_TOKEN)
    plan = PlmPlan(
        name="tiny-plm", config=config, backend="onnxruntime", precision="fp32",
        tiles=TileSpec(tile_size=28, max_tiles=4, max_frames=4), tokenizer=(spec, None),
    )  # fmt: skip
    export_package(plan, RandomWeights(config, 0), folder)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    vision_package(out / "pe")
    language_package(out / "plm")
    (out / "expected.json").write_text(f"{json.dumps(results(out))}\n", "utf-8")
