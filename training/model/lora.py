"""Low-rank updates (LoRA): W + scale * B @ A for chosen matrices, where only A and B are trained.

A matrix keeps its name and its update is stored beside it as `lora_a` and `lora_b`, so a checkpoint
with updates is the plain model's checkpoint plus extra tensors.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from perception_rt.errors import InputError
from perception_rt.models.layers import PackedAttention, Rope, SelfAttention
from perception_rt.models.vision import CrossAttention
from training.recipe.schema import LoraConfig

_A, _B = "lora_a", "lora_b"
_PACKED = "in_proj"  # target name of an attention's packed input projection


class LoraLinear(nn.Linear):
    """A frozen linear layer with a low-rank update.

    The update is applied separately and never added to the matrix. So it is not rounded away in low
    precision, and its gradient costs only rank / width as much as the matrix's.
    """

    lora_a: Tensor
    lora_b: Tensor

    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        bias = linear.bias is not None
        super().__init__(linear.in_features, linear.out_features, bias=bias, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = scale
        _add_update(self, linear.weight, rank)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in) to (..., out)."""
        update = F.linear(F.linear(x, self.lora_a), self.lora_b)
        return super().forward(x) + self.scale * update


class LoraSelfAttention(SelfAttention):
    """An attention whose packed input projection is frozen and has an update like `LoraLinear`."""

    def __init__(self, attention: SelfAttention, rank: int, scale: float) -> None:
        nn.Module.__init__(self)
        _adopt(self, attention, rank, scale)

    def forward(self, x: Tensor, *, rope: Rope | None = None, causal: bool = False) -> Tensor:
        """Maps (N, T, C) to (N, T, C)."""
        # (N, T, 3 * C) -> three of (N, T, C)
        q, k, v = _project(self, x, slice(None)).chunk(3, dim=-1)
        return self.out_proj(self.attention(q, k, v, heads=self.heads, rope=rope, causal=causal))


class LoraCrossAttention(CrossAttention):
    """A pooling attention whose packed input projection has an update like `LoraLinear`."""

    def __init__(self, attention: CrossAttention, rank: int, scale: float) -> None:
        nn.Module.__init__(self)
        _adopt(self, attention, rank, scale)

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        """Queries (1, Q, C) over tokens (N, T, C) -> (N, Q, C)."""
        width = query.shape[-1]
        # (1, Q, C) -> (N, Q, C)
        q = _project(self, query, slice(width)).expand(tokens.shape[0], -1, -1)
        # (N, T, 2 * C) -> two of (N, T, C)
        k, v = _project(self, tokens, slice(width, None)).chunk(2, dim=-1)
        return self.out_proj(self.attention(q, k, v, heads=self.heads))


def _adopt(module: Any, attention: PackedAttention, rank: int, scale: float) -> None:
    """Moves an attention's parameters into its counterpart with an update."""
    module.heads, module.attention = attention.heads, attention.attention
    module.in_proj_weight, module.in_proj_bias = attention.in_proj_weight, attention.in_proj_bias
    module.out_proj = attention.out_proj
    module.scale = scale
    _add_update(module, attention.in_proj_weight, rank)


def _project(module: Any, x: Tensor, rows: slice) -> Tensor:
    """Some rows of the packed projection with their update: (N, T, C) -> (N, T, rows)."""
    update: Tensor = F.linear(F.linear(x, module.lora_a), module.lora_b[rows])
    frozen = F.linear(x, module.in_proj_weight[rows], module.in_proj_bias[rows])
    return frozen + module.scale * update


def _add_update(module: nn.Module, weight: Tensor, rank: int) -> None:
    rows, columns = weight.shape
    module.register_parameter(_A, nn.Parameter(weight.new_empty(rank, columns)))
    module.register_parameter(_B, nn.Parameter(weight.new_empty(rows, rank)))


def add_updates(model: nn.Module, config: LoraConfig) -> None:
    """Adds an uninitialised update to every matrix that the recipe names, in place.

    Raises:
        InputError: the recipe names a layer that the model does not have.
    """
    scale = config.alpha / config.rank
    used: set[str] = set()
    for name, module in list(model.named_modules()):
        layer = f"{name}.{_PACKED}" if isinstance(module, PackedAttention) else name
        fitting = {target for target in config.targets if fnmatchcase(f".{layer}", f"*.{target}")}
        if not fitting:
            continue
        updated: nn.Module
        if isinstance(module, SelfAttention):
            updated = LoraSelfAttention(module, config.rank, scale)
        elif isinstance(module, CrossAttention):
            updated = LoraCrossAttention(module, config.rank, scale)
        elif isinstance(module, nn.Linear):
            updated = LoraLinear(module, config.rank, scale)
        else:
            continue
        used |= fitting
        model.set_submodule(name, updated)
    for target in config.targets:
        if target not in used:
            raise InputError(f"lora.targets: no layer's name ends with {target!r:.60}")


def is_update(name: str) -> bool:
    """Whether a parameter belongs to an update."""
    return name.rpartition(".")[2] in (_A, _B)


def merged(weights: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """Merges updates into the plain model's weights, computed in float64."""
    plain = {name: tensor for name, tensor in weights.items() if not is_update(name)}
    for name, (a, b) in split_updates(weights).items():
        total = plain[name].double() + config.alpha / config.rank * (b.double() @ a.double())
        plain[name] = total.to(plain[name].dtype)
    return plain


def split_updates(weights: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns A and B of each updated matrix, by the name of the matrix."""
    layers = [name.removesuffix(f".{_A}") for name in weights if name.endswith(f".{_A}")]
    return {
        _matrix(layer, weights): (weights[f"{layer}.{_A}"], weights[f"{layer}.{_B}"])
        for layer in layers
    }


def _matrix(layer: str, weights: Mapping[str, Tensor]) -> str:
    name = f"{layer}.weight"
    return name if name in weights else f"{layer}.{_PACKED}_weight"
