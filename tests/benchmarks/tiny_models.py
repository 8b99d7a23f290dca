"""Architectures of the benchmarks' tests: a tower that embeds, and a language model."""

from perception_rt.config import PeConfig, VisionConfig
from perception_rt.plm_config import DecoderConfig, PlmConfig

PE_TINY = PeConfig(
    vision=VisionConfig(
        patch_size=8,
        width=64,
        layers=1,
        heads=2,
        mlp_ratio=4.0,
        output_dim=32,
        image_size=32,
        use_cls_token=True,
    )
)
PLM_TINY = PlmConfig(
    decoder=DecoderConfig(
        dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=2048, max_seqlen=512
    ),
    vision=VisionConfig(
        patch_size=14,
        width=64,
        layers=1,
        heads=2,
        mlp_ratio=2.0,
        image_size=28,
        pool_type="none",
        ls_init_value=0.1,
    ),
    image_token_id=2000,
)
