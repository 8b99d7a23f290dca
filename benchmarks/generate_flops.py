"""How much a language model's decoder computes and reads, from its architecture alone.

Counts products of matrices, as `flops.py` does; norms, softmax, SiLU and rotations are left out.
"""

from perception_rt.plm_config import DecoderConfig


def decoder_weights(config: DecoderConfig) -> int:
    """Weights that one token is multiplied with: all linear layers and the head."""
    return config.n_layers * _layer_weights(config) + config.dim * config.vocab_size


def prefill_macs(config: DecoderConfig, tokens: int) -> int:
    """Multiply-accumulates of a prompt: each token attends to itself and those before it.

    The head counts once, since only what follows the last token is asked for.
    """
    seen = tokens * (tokens + 1) // 2
    attention = 2 * seen * config.n_heads * config.head_dim  # scores, then the weighted sum
    layers = config.n_layers * (tokens * _layer_weights(config) + attention)
    return layers + config.dim * config.vocab_size


def _layer_weights(config: DecoderConfig) -> int:
    queries = config.n_heads * config.head_dim
    keys = config.kv_heads * config.head_dim
    return config.dim * (2 * queries + 2 * keys + 3 * config.ffn_dim)
