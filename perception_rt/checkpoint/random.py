"""Random weights for an architecture: the same for the same seed, whatever is asked for first.

For benchmarks and tests where a trained model would teach nothing. Activations keep their size
through any depth. Nothing is kept, so that the largest model costs one tensor of memory.
"""

import hashlib
from math import prod, sqrt

import torch
from torch import Tensor

from perception_rt.checkpoint.source import expected_tensors
from perception_rt.config import PeConfig
from perception_rt.errors import CheckpointError
from perception_rt.models.pe import INIT_LOGIT_SCALE

_EMBEDDING_STD = 0.1
_BIAS_STD = 0.02
_EMBEDDINGS = ("class_embedding", "positional_embedding", "token_embedding.weight", "probe")
_NORMS = ("ln_1", "ln_2", "ln_pre", "ln_post", "ln_final", "layernorm")
# Stored as (input, output), unlike a linear layer's weight.
_PROJECTIONS = ("visual.proj", "text.text_projection")


class RandomWeights:
    """A `WeightSource` that makes each tensor from the seed and the tensor's name.

    Args:
        config: the architecture.
        seed: any integer.
    """

    def __init__(self, config: PeConfig, seed: int) -> None:
        self._shapes = expected_tensors(config)
        self._layer_scale = config.vision.ls_init_value
        self._seed = seed

    @property
    def provenance(self) -> dict[str, str | int]:
        """That these weights are random, and their seed."""
        return {"source": "random", "seed": self._seed}

    def load(self, name: str) -> Tensor:
        """The float32 tensor of a parameter; CheckpointError for a name that is none."""
        if name not in self._shapes:
            raise CheckpointError(f"the architecture has no parameter {name!a:.80}")
        shape = self._shapes[name]
        owner, _, kind = name.rpartition(".")
        if kind == "gamma":
            assert self._layer_scale is not None
            return torch.full(shape, self._layer_scale)
        if name == "logit_scale":
            return torch.full(shape, INIT_LOGIT_SCALE)
        if owner.endswith(_NORMS):
            return torch.ones(shape) if kind == "weight" else torch.zeros(shape)
        # Uniform rather than normal: whole numbers scaled, hence equal on every processor.
        bound = sqrt(3.0) * _std(name, shape)
        return torch.empty(shape).uniform_(-bound, bound, generator=self._generator(name))

    def _generator(self, name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def _std(name: str, shape: torch.Size) -> float:
    if name.endswith(_EMBEDDINGS):
        return _EMBEDDING_STD
    if name.endswith("bias"):
        return _BIAS_STD
    fan_in = shape[0] if name in _PROJECTIONS else prod(shape[1:])
    return 1.0 / sqrt(fan_in)
