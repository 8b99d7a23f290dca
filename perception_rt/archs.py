"""The released Perception Encoder architectures, as data and nothing else.

Source: the reference's `core/vision_encoder/config.py` at 3e352cc. The `-Tiling` checkpoints have
the architecture of their base: they are the encoders that PLM-3B (L) and PLM-8B (G) start from.
"""

from dataclasses import replace

from perception_rt.config import PeConfig, TextConfig, VisionConfig
from perception_rt.errors import InputError

_TEXT_SMALL = TextConfig(context_length=32, width=512, heads=8, layers=12, output_dim=512)
_TEXT_LARGE = TextConfig(context_length=32, width=1024, heads=16, layers=24, output_dim=1024)
_TEXT_G = TextConfig(context_length=72, width=1280, heads=20, layers=24, output_dim=1280)

_CORE_T = VisionConfig(
    image_size=384,
    patch_size=16,
    width=192,
    layers=12,
    heads=3,
    mlp_ratio=4.0,
    output_dim=512,
    use_cls_token=True,
)
_CORE_S = replace(_CORE_T, width=384, heads=6)
_CORE_B = replace(_CORE_T, image_size=224, width=768, heads=12, output_dim=1024)
_CORE_L = replace(_CORE_B, image_size=336, patch_size=14, width=1024, layers=24, heads=16)
_CORE_G = VisionConfig(
    image_size=448,
    patch_size=14,
    width=1536,
    layers=50,
    heads=16,
    mlp_ratio=8960 / 1536,
    output_dim=1280,
)

_LANG_L = replace(
    _CORE_L,
    image_size=448,
    layers=23,
    pool_type="none",
    use_ln_post=False,
    output_dim=None,
    ls_init_value=0.1,
)
_LANG_G = replace(
    _CORE_G, layers=47, pool_type="none", use_ln_post=False, output_dim=None, ls_init_value=0.1
)

_SPATIAL_T = replace(_CORE_T, image_size=512, pool_type="none", use_ln_post=False, output_dim=None)
_SPATIAL_S = replace(_SPATIAL_T, width=384, heads=6)
_SPATIAL_B = replace(_SPATIAL_T, width=768, heads=12)
_SPATIAL_L = replace(_CORE_L, image_size=448, pool_type="none", use_ln_post=False, output_dim=None)
_SPATIAL_G = replace(
    _CORE_G, pool_type="none", use_ln_post=False, output_dim=None, ls_init_value=0.1
)

PE_MODELS: dict[str, PeConfig] = {
    "PE-Core-T16-384": PeConfig(vision=_CORE_T, text=_TEXT_SMALL),
    "PE-Core-S16-384": PeConfig(vision=_CORE_S, text=_TEXT_SMALL),
    "PE-Core-B16-224": PeConfig(vision=_CORE_B, text=_TEXT_LARGE),
    "PE-Core-L14-336": PeConfig(vision=_CORE_L, text=_TEXT_LARGE),
    "PE-Core-G14-448": PeConfig(vision=_CORE_G, text=_TEXT_G),
    "PE-Lang-L14-448": PeConfig(vision=_LANG_L),
    "PE-Lang-L14-448-Tiling": PeConfig(vision=_LANG_L),
    "PE-Lang-G14-448": PeConfig(vision=_LANG_G),
    "PE-Lang-G14-448-Tiling": PeConfig(vision=_LANG_G),
    "PE-Spatial-T16-512": PeConfig(vision=_SPATIAL_T),
    "PE-Spatial-S16-512": PeConfig(vision=_SPATIAL_S),
    "PE-Spatial-B16-512": PeConfig(vision=_SPATIAL_B),
    "PE-Spatial-L14-448": PeConfig(vision=_SPATIAL_L),
    "PE-Spatial-G14-448": PeConfig(vision=_SPATIAL_G),
}

DEMO_MODEL = "PE-Demo"


def get_config(name: str) -> PeConfig:
    """The architecture of a released checkpoint, by its name without the `facebook/` prefix."""
    try:
        return PE_MODELS[name.removeprefix("facebook/")]
    except KeyError:
        raise InputError(f"unknown model {name!r:.80}; known are {', '.join(PE_MODELS)}") from None
