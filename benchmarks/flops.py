"""How much arithmetic a vision tower is, from its architecture alone.

Counts the products of matrices, as published GMACs of these models do; norms, softmax, GELU and
rotations are left out.
"""

from perception_rt.config import VisionConfig

_RGB = 3
_POOL_MLP_RATIO = 4


def vision_macs(config: VisionConfig) -> int:
    """Multiply-accumulates of one image at the native size, pooling and projection included."""
    patches = config.grid**2
    tokens = patches + int(config.use_cls_token)
    width = config.width
    linear = 4 * width * width + 2 * width * config.mlp_dim  # qkv and output, both MLP layers
    attention = 2 * tokens * width  # per token: scores, then the weighted sum
    blocks = config.layers * tokens * (linear + attention)
    embed = patches * width * _RGB * config.patch_size**2
    pool = _pooling(tokens, width) if config.pool_type == "attn" else 0
    rows = tokens if config.pool_type == "none" else 1
    return embed + blocks + pool + rows * width * (config.output_dim or 0)


def vision_flops(config: VisionConfig) -> int:
    """Floating point operations of one image: a multiply-accumulate is two."""
    return 2 * vision_macs(config)


def _pooling(tokens: int, width: int) -> int:
    """One probe over all tokens: keys and values of each, the rest of one row only."""
    one_row = 2 * width * width + 2 * _POOL_MLP_RATIO * width * width
    return tokens * 2 * width * width + 2 * tokens * width + one_row
