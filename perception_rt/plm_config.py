"""Architectures of Perception Language Models: Llama decoder, vision tower and projector.

Field names are those of the reference's `params.json`, from `apps/plm/transformer.py` and
`core/transformer.py` at 3e352cc.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from perception_rt.config import VisionConfig
from perception_rt.errors import InputError
from perception_rt.records import Record, require

_MAX_DECODER_LAYERS = 256
IMAGE_TOKEN_ID = 128002  # `<|image|>` of the released models' tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig(Record):
    """A Llama decoder.

    Attributes:
        dim: channels of the residual stream.
        n_layers: number of blocks.
        n_heads: query heads.
        n_kv_heads: key and value heads; None for `n_heads`.
        vocab_size: rows of the embedding and of the head.
        ffn_dim_multiplier: factor on 8/3 dim, before rounding up; None for 1.
        multiple_of: the hidden size of the feed-forward layer is rounded up to a multiple of this.
        norm_eps: epsilon of every RMSNorm.
        rope_theta: base of the rotary frequencies.
        old_context_len: context in tokens that the frequencies were first trained for.
        rope_scale_factor: divisor of the low frequencies in llama3 scaling; 1 for no scaling.
        low_freq_factor: wavelengths above old_context_len / this are scaled in full.
        high_freq_factor: wavelengths below old_context_len / this are not scaled.
        max_seqlen: longest sequence in tokens.
        weight_tying: whether the head uses the embedding's weight.
        head_size: channels per head; None for dim / n_heads.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int | None = None
    vocab_size: int
    ffn_dim_multiplier: float | None = None
    multiple_of: int = 256
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    old_context_len: int = 8192
    rope_scale_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 32.0
    max_seqlen: int = 1024
    weight_tying: bool = False
    head_size: int | None = None

    later_fields: ClassVar[frozenset[str]] = frozenset({"head_size"})

    def __post_init__(self) -> None:
        for name in ("dim", "n_layers", "n_heads", "vocab_size", "multiple_of", "max_seqlen"):
            value = getattr(self, name)
            require(value >= 1, f"decoder.{name} must be at least 1, not {value}")
        require(
            self.n_layers <= _MAX_DECODER_LAYERS,
            f"decoder.n_layers must be at most {_MAX_DECODER_LAYERS}, not {self.n_layers}",
        )
        require(
            self.head_size is None or self.head_size >= 1,
            f"decoder.head_size must be at least 1, not {self.head_size}",
        )
        require(
            self.head_size is not None or self.dim % self.n_heads == 0,
            f"decoder.dim {self.dim} is not divisible by n_heads {self.n_heads}",
        )
        require(self.head_dim % 2 == 0, f"rotary needs an even head size, not {self.head_dim}")
        require(
            self.kv_heads >= 1 and self.n_heads % self.kv_heads == 0,
            f"decoder.n_heads {self.n_heads} is not divisible by n_kv_heads {self.n_kv_heads}",
        )
        multiplier = self.ffn_dim_multiplier
        require(
            multiplier is None or multiplier > 0,
            f"decoder.ffn_dim_multiplier must be positive, not {multiplier}",
        )
        require(0 < self.norm_eps < 1, f"decoder.norm_eps must be in (0, 1), not {self.norm_eps}")
        for name in ("rope_theta", "old_context_len", "rope_scale_factor", "low_freq_factor"):
            value = getattr(self, name)
            require(value > 0, f"decoder.{name} must be positive, not {value}")
        require(
            self.rope_scale_factor == 1 or self.high_freq_factor > self.low_freq_factor,
            f"decoder.high_freq_factor {self.high_freq_factor} must be above low_freq_factor "
            f"{self.low_freq_factor}",
        )

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self.dim // self.n_heads if self.head_size is None else self.head_size

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def ffn_dim(self) -> int:
        """Hidden channels of the feed-forward layer, rounded as in the reference."""
        hidden = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return -(-hidden // self.multiple_of) * self.multiple_of


# Fields of `params.json` about training and kernels, not about the architecture.
_IGNORED = frozenset(
    {
        "attn_impl",
        "freeze_language_model",
        "freeze_vision_model",
        "init_base_std",
        "init_std_factor",
        "mlp_init",
        "seed",
    }
)
# Fields with the only value that this library supports.
_FIXED: Mapping[str, Any] = {"sliding_window": None, "remove_vision_class_token": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlmConfig:
    """A Perception Language Model.

    Attributes:
        decoder: the language model.
        vision: the vision tower, without pooling and head; its class token is dropped.
        pooling_ratio: side of the square of patches that becomes one image token.
        image_token_id: token id at which image tokens are inserted.
    """

    decoder: DecoderConfig
    vision: VisionConfig
    pooling_ratio: int = 1
    image_token_id: int

    def __post_init__(self) -> None:
        require(
            self.vision.pool_type == "none" and self.vision.output_dim is None,
            "a language model's vision tower has pool_type 'none' and no output_dim",
        )
        require(
            self.pooling_ratio >= 1 and self.vision.grid % self.pooling_ratio == 0,
            f"pooling_ratio {self.pooling_ratio} does not divide the grid of {self.vision.grid}",
        )
        require(
            0 <= self.image_token_id < self.decoder.vocab_size,
            f"image_token_id {self.image_token_id} is not in 0 to {self.decoder.vocab_size - 1}",
        )

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens per tile."""
        return (self.vision.grid // self.pooling_ratio) ** 2

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Builds the record from flat fields, or from a `params.json` with them under `model`.

        A `params.json` records a training run: fields beyond the architecture are ignored.

        Raises:
            InputError: names missing and mistyped keys, and unknown keys of flat fields.
        """
        if not isinstance(data, Mapping):
            raise InputError(f"config must be an object, not {type(data).__name__}")
        if isinstance(data.get("model"), Mapping):
            data = {key: value for key, value in data["model"].items() if key in _KNOWN}
        values = {key: value for key, value in data.items() if key not in _IGNORED}
        if "vision_model" not in values:
            raise InputError("config: missing keys ['vision_model']")
        vision = VisionConfig.from_dict(values.pop("vision_model"), "vision_model")
        pooling_ratio = _integer(values, "pooling_ratio", 1)
        image_token_id = _integer(values, "image_token_id", IMAGE_TOKEN_ID)
        for name, only in _FIXED.items():
            if values.pop(name, only) != only:
                raise InputError(f"config.{name} must be {only}; no other value is supported")
        head_dim = values.pop("head_dim", None)
        decoder = DecoderConfig.from_dict(values)
        if head_dim not in (None, decoder.head_dim):
            raise InputError(f"config.head_dim must be dim / n_heads = {decoder.head_dim}")
        return cls(
            decoder=decoder,
            vision=vision,
            pooling_ratio=pooling_ratio,
            image_token_id=image_token_id,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, flat as in the reference."""
        return {
            **self.decoder.to_dict(),
            "vision_model": self.vision.to_dict(),
            "pooling_ratio": self.pooling_ratio,
            "image_token_id": self.image_token_id,
        }


def is_plm(data: Any) -> bool:
    """Whether an architecture in JSON values is a language model."""
    if not isinstance(data, Mapping):
        return False
    model = data.get("model")
    return "vision_model" in (model if isinstance(model, Mapping) else data)


_KNOWN = frozenset({"vision_model", "pooling_ratio", "image_token_id", "head_dim", *_FIXED}) | {
    field.name for field in fields(DecoderConfig)
}


def _integer(values: dict[str, Any], name: str, default: int) -> int:
    value = values.pop(name, default)
    if type(value) is not int:
        raise InputError(f"config.{name} must be int, not {type(value).__name__}")
    return value
