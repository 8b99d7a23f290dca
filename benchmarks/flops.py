"""Counts the arithmetic of vision towers and decoders, from their architecture alone.

Counts matrix products, as published GMACs of these models do; norms, softmax, activations and
rotations are left out.
"""

from perception_rt.config import VisionConfig
from perception_rt.package.contract import DECODER
from perception_rt.package.manifest import Content
from perception_rt.plm_config import DecoderConfig

_RGB = 3
_POOL_MLP_RATIO = 4


def vision_macs(config: VisionConfig) -> int:
    """Multiply-accumulates for one image at the native size, pooling and projection included."""
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
    """Floating point operations for one image, two per multiply-accumulate."""
    return 2 * vision_macs(config)


def decoder_weights(config: DecoderConfig) -> int:
    """Number of weights that one token is multiplied with: all linear layers and the head."""
    return config.n_layers * _layer_weights(config) + config.dim * config.vocab_size


def decoder_bytes(content: Content) -> int:
    """Bytes of weights that one token reads: the weight files of all parts of the decoder."""
    decoders = [graph for name, graph in content.graphs.items() if name.startswith(DECODER)]
    return sum(content.files[file].size_bytes for file in {f for d in decoders for f in d.data})


def prefill_macs(config: DecoderConfig, tokens: int) -> int:
    """Multiply-accumulates of a prompt, in which each token attends to itself and those before it.

    The head counts once, because only the logits of the last token are computed.
    """
    seen = tokens * (tokens + 1) // 2
    attention = 2 * seen * config.n_heads * config.head_dim  # scores, then the weighted sum
    layers = config.n_layers * (tokens * _layer_weights(config) + attention)
    return layers + config.dim * config.vocab_size


def _pooling(tokens: int, width: int) -> int:
    """One probe attends to all tokens: every token has a key and a value, the rest is one row."""
    one_row = 2 * width * width + 2 * _POOL_MLP_RATIO * width * width
    return tokens * 2 * width * width + 2 * tokens * width + one_row


def _layer_weights(config: DecoderConfig) -> int:
    queries = config.n_heads * config.head_dim
    keys = config.kv_heads * config.head_dim
    return config.dim * (2 * queries + 2 * keys + 3 * config.ffn_dim)
