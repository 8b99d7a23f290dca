"""PEFT's `adapter_config.json`: how updates are scaled, and what is more than plain LoRA."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from perception_rt.checkpoint.json_files import read_json
from perception_rt.errors import CheckpointError

# PEFT up to 0.21 adds the update of a packed attention's output layer twice, in training and when
# it merges; a later version may add it once.
_TWICE = ".base_layer.out_proj"
_TWICE_UNTIL = (0, 21)
# Settings of other methods than plain LoRA, which change more than B @ A.
_UNSUPPORTED = (
    "use_dora", "modules_to_save", "bias", "lora_bias", "layer_replication", "use_qalora",
    "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "arrow_config",
)  # fmt: skip
_UNSET: tuple[object, ...] = (None, False, "none", [], {})
# Other initial values are taken out of the base weights, which are then not the published ones.
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """The part of `adapter_config.json` that decides the scale of each layer's update.

    Attributes:
        rank: rank r of layers that no pattern names.
        alpha: updates are scaled by alpha / r.
        rank_stabilized: divide by the square root of r instead.
        ranks: ranks by regular expression for the ends of paths.
        alphas: values of alpha by regular expression for the ends of paths.
        version: version of PEFT; (0, 0) if it is not recorded.
    """

    rank: int
    alpha: float
    rank_stabilized: bool = False
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    version: tuple[int, ...] = (0, 0)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads the file; CheckpointError if it is not one of plain LoRA."""
        content = read_json(path)
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} must hold an object")
        kind = content.get("peft_type", "LORA")
        if kind != "LORA":
            raise CheckpointError(f"{path}: peft_type is {kind!a:.40}; only LORA can be merged")
        for name in _UNSUPPORTED:
            if content.get(name) not in _UNSET:
                raise CheckpointError(
                    f"{path}: {name} is {content[name]!a:.60}, which cannot be merged; merge the "
                    "adapter with peft's merge_and_unload() and export the result"
                )
        if content.get("init_lora_weights") not in _INITS:
            raise CheckpointError(
                f"{path}: init_lora_weights is {content['init_lora_weights']!a:.40}, so it is for "
                "changed base weights; save it for the original ones with peft's "
                "path_initial_model_for_weight_conversion"
            )
        return cls(
            rank=_number(path, "r", content.get("r"), int),
            alpha=_number(path, "lora_alpha", content.get("lora_alpha"), float),
            rank_stabilized=bool(content.get("use_rslora")),
            ranks=_patterns(path, content, "rank_pattern", int),
            alphas=_patterns(path, content, "alpha_pattern", float),
            version=tuple(map(int, re.findall(r"\d+", str(content.get("peft_version")))[:2])),
        )

    def rank_of(self, path: str) -> int:
        """Rank of a layer's update."""
        return _first(self.ranks, path, self.rank)

    def scale_of(self, path: str) -> float:
        """Factor on B @ A of a layer; CheckpointError if it is unknown."""
        rank = self.rank_of(path)
        divisor = math.sqrt(rank) if self.rank_stabilized else rank
        scale = _first(self.alphas, path, self.alpha) / divisor
        if not path.endswith(_TWICE):
            return scale
        if self.version > _TWICE_UNTIL:
            raise CheckpointError(
                f"{path!a:.100} is part of a packed attention, which this version of PEFT may "
                "scale in another way: merge the adapter with merge_and_unload() and export the "
                "result"
            )
        return 2 * scale


def _number(path: Path, name: str, value: Any, kind: type) -> Any:
    kinds = (int,) if kind is int else (int, float)
    if type(value) not in kinds or not 0 < value < math.inf:
        raise CheckpointError(f"{path}: {name} must be a number above 0, not {value!a:.40}")
    return value


def _patterns(path: Path, content: Mapping[str, Any], name: str, kind: type) -> dict[str, Any]:
    table = content.get(name) or {}
    if not isinstance(table, dict):
        raise CheckpointError(f"{path}: {name} must be an object, not {table!a:.40}")
    for key in table:
        try:
            re.compile(key)
        except re.error:
            raise CheckpointError(f"{path}: {name} has a bad expression {key!a:.40}") from None
    return {key: _number(path, name, value, kind) for key, value in table.items()}


def _first(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that the end of a path matches, as PEFT chooses it."""
    fitting = (v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", path))
    return next(fitting, default)
