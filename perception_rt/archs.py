"""The released architectures, as data.

Source: the reference's `core/vision_encoder/config.py` and `apps/plm/configs/` at 3e352cc. A
`-Tiling` checkpoint has the architecture of its base model; PLM-3B starts from the L encoder and
PLM-8B from the G encoder.
"""

from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches

from perception_rt.config import PeConfig, TextConfig, VisionConfig
from perception_rt.errors import InputError
from perception_rt.plm_config import IMAGE_TOKEN_ID, DecoderConfig, PlmConfig

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

_LLAMA_1B = DecoderConfig(
    dim=2048,
    n_layers=16,
    n_heads=32,
    n_kv_heads=8,
    vocab_size=128256,
    ffn_dim_multiplier=1.5,
    multiple_of=256,
    norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scale_factor=32.0,
    high_freq_factor=4.0,
    max_seqlen=11520,
    weight_tying=True,
)
_LLAMA_3B = replace(_LLAMA_1B, dim=3072, n_layers=28, n_heads=24, ffn_dim_multiplier=1.0)
_LLAMA_8B = replace(
    _LLAMA_1B,
    dim=4096,
    n_layers=32,
    ffn_dim_multiplier=1.3,
    multiple_of=1024,
    rope_scale_factor=1.0,
    high_freq_factor=32.0,
    weight_tying=False,
)
# Stochastic depth applies to training only.
_PLM_L, _PLM_G = replace(_LANG_L, drop_path=0.1), replace(_LANG_G, drop_path=0.1)

PLM_MODELS: dict[str, PlmConfig] = {
    "PLM-1B": PlmConfig(
        decoder=_LLAMA_1B, vision=_PLM_L, pooling_ratio=2, image_token_id=IMAGE_TOKEN_ID
    ),
    "PLM-3B": PlmConfig(
        decoder=_LLAMA_3B, vision=_PLM_L, pooling_ratio=2, image_token_id=IMAGE_TOKEN_ID
    ),
    "PLM-8B": PlmConfig(
        decoder=_LLAMA_8B, vision=_PLM_G, pooling_ratio=2, image_token_id=IMAGE_TOKEN_ID
    ),
}

PE_DEMO, PLM_DEMO = "PE-Demo", "PLM-Demo"


def get_config(name: str, *, others: Sequence[str] = ()) -> PeConfig | PlmConfig:
    """Returns the architecture of a released checkpoint.

    Args:
        name: such as "PE-Core-L14-336" or "PLM-1B", with or without the prefix `facebook/`. The
            hub's names of language models, such as "Perception-LM-1B", work too.
        others: further names that the caller knows, for the message.

    Raises:
        InputError: no model has this name; the message suggests the nearest ones.
    """
    short = name.removeprefix("facebook/").replace("Perception-LM-", "PLM-")
    known: dict[str, PeConfig | PlmConfig] = {**PE_MODELS, **PLM_MODELS}
    if short in known:
        return known[short]
    names = {other.lower(): other for other in (*known, *others)}
    near = [names[close] for close in get_close_matches(short[:80].lower(), names)]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise InputError(f"unknown model {name!r:.80}; {hint}known are {', '.join(names.values())}")
