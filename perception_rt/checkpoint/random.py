"""Random weights for an architecture, determined by the seed, for benchmarks and tests.

Activations keep their scale at any depth, and logits are about one. Memory holds one tensor, or
some of its rows: only the rows drawn last are kept, for callers that read row by row.
"""

import hashlib
import sys
from math import prod, sqrt

import torch
from torch import Tensor

from perception_rt.checkpoint.source import expected_tensors
from perception_rt.config import PeConfig
from perception_rt.errors import CheckpointError
from perception_rt.families import family_of
from perception_rt.models.pe import INIT_LOGIT_SCALE
from perception_rt.plm_config import PlmConfig

_EMBEDDING_STD = 0.1
_BIAS_STD = 0.02
_EMBEDDINGS = ("class_embedding", "positional_embedding", "token_embedding.weight", "probe")
_NORMS = ("ln_1", "ln_2", "ln_pre", "ln_post", "ln_final", "norm", "simfp_2.1")
# Stored as (input, output), unlike a linear layer's weight.
_PROJECTIONS = ("visual.proj", "text.text_projection")
# This gain makes a decoder's attention prefer some tokens, so that generated text varies. A larger
# gain would amplify rounding errors from block to block.
_SHARPENED = (".attention.wq.weight", ".attention.wk.weight")
_SHARPNESS = sqrt(2.0)
# Rows of a language model's tensors that are drawn together; each block has its own seed.
BLOCK_ROWS = 4096


class RandomWeights:
    """A `WeightSource` that makes each tensor from the seed and the tensor's name.

    Args:
        config: the architecture.
        seed: any integer.
    """

    def __init__(self, config: PeConfig | PlmConfig, seed: int) -> None:
        self._shapes = expected_tensors(config)
        self._layer_scale = config.vision.ls_init_value
        self._seed = seed
        self._block_rows = BLOCK_ROWS if family_of(config).generates else sys.maxsize
        self._drawn: tuple[str, int, int, Tensor] | None = None

    @property
    def provenance(self) -> dict[str, str | int]:
        """Source and seed of the weights, for the manifest."""
        return {"source": "random", "seed": self._seed}

    def load(self, name: str) -> Tensor:
        """Returns a parameter in float32; CheckpointError if there is no such parameter."""
        shape = self._shape(name)
        constant = self._constant(name)
        if constant is not None:
            return torch.full(shape, constant)
        return self._draw(name, 0, shape[0])

    def load_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Returns `load(name)[start:stop]`; for a language model, draws only the blocks needed."""
        rows, size = self._shape(name)[0], self._block_rows
        if self._constant(name) is not None:
            return self.load(name)[start:stop]
        first = start // size * size
        last = min(-(-stop // size) * size, rows)
        if self._drawn is None or self._drawn[:3] != (name, first, last):
            self._drawn = None  # frees the old rows before drawing new ones
            self._drawn = (name, first, last, self._draw(name, first, last))
        return self._drawn[3][start - first : stop - first].clone()

    def _shape(self, name: str) -> torch.Size:
        if name not in self._shapes:
            raise CheckpointError(f"the architecture has no parameter {name!a:.80}")
        return self._shapes[name]

    def _constant(self, name: str) -> float | None:
        """The value of a parameter that is not random; None for a random one."""
        owner, _, kind = name.rpartition(".")
        if kind == "gamma":
            assert self._layer_scale is not None
            return self._layer_scale
        if name == "logit_scale":
            return INIT_LOGIT_SCALE
        if owner.endswith(_NORMS):
            return 1.0 if kind == "weight" else 0.0
        return None

    def _draw(self, name: str, start: int, stop: int) -> Tensor:
        """Draws rows from the start of a block to the end of one, in place."""
        shape, size = self._shapes[name], self._block_rows
        # Uniform, since scaled integers are equal on every processor; normal draws are not.
        bound = sqrt(3.0) * _std(name, shape)
        tensor = torch.empty(stop - start, *shape[1:])
        for block, part in enumerate(tensor.split(size), start // size):
            part.uniform_(-bound, bound, generator=self._generator(name, block))
        return tensor

    def _generator(self, name: str, block: int) -> torch.Generator:
        text = f"{self._seed}:{name}" if block == 0 else f"{self._seed}:{name}:{block}"
        digest = hashlib.sha256(text.encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def _std(name: str, shape: torch.Size) -> float:
    if name.endswith(_EMBEDDINGS):
        return _EMBEDDING_STD
    if name.endswith("bias"):
        return _BIAS_STD
    fan_in = shape[0] if name in _PROJECTIONS else prod(shape[1:])
    gain = _SHARPNESS if name.endswith(_SHARPENED) else 1.0
    return gain / sqrt(fan_in)
