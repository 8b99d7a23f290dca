"""Initial weights, each a function of the seed and its name: any rank can draw any of them."""

import zlib

import torch
from torch import Tensor

# Words must outweigh their positions, or a caption's content drowns in its length.
_TEXT_STD = {"text.token_embedding.weight": 0.05, "text.positional_embedding": 0.01}
_ROW_MAJOR = ("proj", "text_projection")  # (in, out); every other matrix is (out, in)
_BRANCH_ENDS = (
    "attn.out_proj.weight",
    "mlp.c_proj.weight",
    "attention.wo.weight",
    "feed_forward.w2.weight",
)
_ONES = ("weight", "gamma")  # of norms and gains, which are vectors


def draw(name: str, shape: torch.Size, *, seed: int, layers: int, gain: float | None) -> Tensor:
    """A parameter's first value, float32 on the CPU.

    Matrices are normal, of unit output variance for unit inputs; the last one of a residual branch
    is scaled down by the number of branches, so that depth does not widen the stream. Norms start
    at one, biases at zero.

    Args:
        name: under our names.
        shape: of the parameter.
        seed: of the run.
        layers: blocks of the tower that the parameter belongs to.
        gain: start of the layer scale, if the tower has one.
    """
    generator = torch.Generator().manual_seed((seed << 32) ^ zlib.crc32(name.encode()))
    leaf = name.rpartition(".")[2]
    if len(shape) == 0:
        raise AssertionError(f"{name} has a start of its own")
    if leaf in ("bias", "in_proj_bias", "lora_b"):  # an update starts at nothing
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
    if leaf in _ROW_MAJOR or leaf == "class_embedding":
        return float(shape[0]) ** -0.5
    return float(torch.Size(shape[1:]).numel()) ** -0.5
