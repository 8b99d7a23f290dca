"""Random initial weights. Each depends on the seed and its name alone, so any rank can draw any."""

import zlib

import torch
from torch import Tensor

# Words must outweigh positions, or a caption's length dominates its content.
_TEXT_STD = {"text.token_embedding.weight": 0.05, "text.positional_embedding": 0.01}
_IN_OUT = ("proj", "text_projection")  # stored as (in, out); other matrices are (out, in)
_BRANCH_ENDS = (
    "attn.out_proj.weight",
    "mlp.c_proj.weight",
    "attention.wo.weight",
    "feed_forward.w2.weight",
)
_ONES = ("weight", "gamma")  # leaf names of norms and gains, which are vectors


def initial_value(
    name: str, shape: torch.Size, *, seed: int, layers: int, gain: float | None
) -> Tensor:
    """Draws a parameter's initial value, float32 on the CPU.

    Matrices are normal with unit output variance for unit inputs. The last matrix of a residual
    branch is scaled down by the number of branches, so that the residual stream keeps its variance
    at any depth. Norms start at one, biases and LoRA's B at zero.

    Args:
        name: parameter name.
        shape: parameter shape.
        seed: RNG seed.
        layers: number of blocks of the parameter's tower.
        gain: initial layer scale; None if the tower has none.
    """
    generator = torch.Generator().manual_seed((seed << 32) ^ zlib.crc32(name.encode()))
    leaf = name.rpartition(".")[2]
    if len(shape) == 0:
        raise AssertionError(f"scalar {name} needs an initial value from its task")
    if leaf.endswith("bias") or leaf == "lora_b":
        return torch.zeros(shape)
    if leaf == "gamma":
        return torch.full(shape, 1.0 if gain is None else gain)
    if len(shape) == 1 and leaf in _ONES:
        return torch.ones(shape)
    std = _std(name, leaf, shape)
    if name.endswith(_BRANCH_ENDS):
        std *= (2 * layers) ** -0.5
    return torch.randn(shape, generator=generator) * std


def _std(name: str, leaf: str, shape: torch.Size) -> float:
    if name in _TEXT_STD:
        return _TEXT_STD[name]
    if name == "tok_embeddings.weight":
        return float(shape[1]) ** -0.5
    if leaf in _IN_OUT or leaf == "class_embedding":
        return float(shape[0]) ** -0.5
    return float(torch.Size(shape[1:]).numel()) ** -0.5
