"""The PE text tower: causal blocks, the state of the end-of-text token, a linear projection.

Legend: N batch, T tokens, C width, D output.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception_rt.config import TextConfig
from perception_rt.models.layers import LN_EPS, Attention, Block, Transformer, sdpa_attention


class TextTower(nn.Module):
    """A Perception Encoder text tower. As in the reference, padding is not masked.

    Args:
        config: the architecture.
        attention: attention kernel of all blocks.
    """

    def __init__(self, config: TextConfig, *, attention: Attention = sdpa_attention) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, width))
        self.transformer = Transformer(
            [Block(width, config.heads, config.mlp_dim, attention) for _ in range(config.layers)]
        )
        self.ln_final = nn.LayerNorm(width, eps=LN_EPS)
        self.text_projection = nn.Parameter(torch.empty(width, config.output_dim))
        if config.proj_bias:
            self.text_projection_bias = nn.Parameter(torch.zeros(config.output_dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 token ids (N, T), T <= context_length -> features (N, D), not normalised.

        Reads the state of the end-of-text token, which has the highest id.
        """
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        for block in self.transformer.resblocks:
            x = block(x, causal=True)
        end = tokens.argmax(dim=-1)[:, None, None].expand(-1, 1, x.shape[-1])  # (N, 1, C)
        x = self.ln_final(x.gather(1, end).squeeze(1))  # (N, 1, C) -> (N, C)
        bias = self.text_projection_bias if self.config.proj_bias else None
        return F.linear(x, self.text_projection.T, bias)
