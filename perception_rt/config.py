"""Architectures of Perception Encoders as frozen records, with the reference's field names.

`from_dict` is strict: a typo in a configuration file is an error that names the key, and never a
silently different model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal, Self

from perception_rt.errors import InputError
from perception_rt.records import Record, plain_number, require

# "avg" is the mean of all tokens, as in the reference; "patch_avg" leaves out the class token.
PoolType = Literal["attn", "tok", "avg", "patch_avg", "none"]

DETECTION_PATCH = 16  # pixels: the strides of the pyramid's levels follow from it

_MAX_LAYERS = 1024
_MAX_WINDOW = 512  # patches; the largest image has 8192 pixels a side


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig(Record):
    """A PE vision tower; `image_size` and `patch_size` are in pixels.

    Source: facebookresearch/perception_models `core/vision_encoder/config.py` at 3e352cc, for the
    fields up to `use_ln_post`.

    Attributes:
        proj_bias: whether the projection to `output_dim` has a bias, which fine-tuning may train.
        timm_grid: patches per side at which timm calls positions native. At another image size,
            rotary positions are scaled to it and the position table is resampled as timm does.
            None follows the reference, which scales nothing.
        norm_after_pool: whether the final norm follows the pooling, as in timm's fine-tuned heads.
    """

    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_ratio: float
    output_dim: int | None = None
    ls_init_value: float | None = None
    drop_path: float = 0.0
    image_size: int = 224
    use_abs_posemb: bool = True
    use_cls_token: bool = False
    use_rope2d: bool = True
    pool_type: PoolType = "attn"
    attn_pooler_heads: int = 8
    use_ln_pre: bool = True
    use_ln_post: bool = True
    proj_bias: bool = False
    timm_grid: int | None = None
    norm_after_pool: bool = False

    later_fields: ClassVar[frozenset[str]] = frozenset(
        {"proj_bias", "timm_grid", "norm_after_pool"}
    )

    def __post_init__(self) -> None:
        for name in ("patch_size", "width", "layers", "heads", "image_size", "attn_pooler_heads"):
            value = getattr(self, name)
            require(value >= 1, f"vision.{name} must be at least 1, not {value}")
        require(
            self.width % self.heads == 0,
            f"vision.width {self.width} is not divisible by vision.heads {self.heads}",
        )
        require(
            not self.use_rope2d or self.head_dim % 4 == 0,
            f"2-D RoPE needs a head size divisible by 4, not {self.head_dim}",
        )
        require(
            self.image_size % self.patch_size == 0,
            f"vision.image_size {self.image_size} is not divisible by patch_size {self.patch_size}",
        )
        require(self.mlp_dim >= 1, f"vision.mlp_ratio must be positive, not {self.mlp_ratio}")
        require(0 <= self.drop_path < 1, f"vision.drop_path must be below 1, not {self.drop_path}")
        require(
            self.layers <= _MAX_LAYERS,
            f"vision.layers must be at most {_MAX_LAYERS}, not {self.layers}",
        )
        require(
            self.pool_type != "attn" or self.width % self.attn_pooler_heads == 0,
            f"vision.width {self.width} is not divisible by attn_pooler_heads "
            f"{self.attn_pooler_heads}",
        )
        require(
            self.pool_type != "tok" or self.use_cls_token,
            "vision.pool_type 'tok' needs use_cls_token",
        )
        require(
            self.output_dim is None or self.output_dim >= 1,
            f"vision.output_dim must be at least 1, not {self.output_dim}",
        )
        require(
            self.output_dim is not None or not self.proj_bias,
            "vision.proj_bias needs an output_dim",
        )
        require(
            self.timm_grid is None or self.timm_grid >= 1,
            f"vision.timm_grid must be at least 1, not {self.timm_grid}",
        )
        require(
            self.use_ln_post or not self.norm_after_pool,
            "vision.norm_after_pool needs use_ln_post",
        )

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.width // self.heads

    @property
    def mlp_dim(self) -> int:
        """Hidden channels of the MLP, rounded down as in the reference."""
        return int(self.width * self.mlp_ratio)

    @property
    def grid(self) -> int:
        """Patches per side at the native image size."""
        return self.image_size // self.patch_size

    def block_index(self, layer: int) -> int:
        """Returns the index of a block from the front; a negative `layer` counts from the end.

        Raises:
            InputError: there is no such block.
        """
        number = plain_number(layer)
        if type(number) is not int or not -self.layers <= number < self.layers:
            raise InputError(f"layer {number!r:.40} is out of range for {self.layers} blocks")
        return number % self.layers

    @property
    def embed_dim(self) -> int:
        """Output channels."""
        return self.output_dim or self.width

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Returns patch rows and columns of an image of this size in pixels.

        Raises:
            InputError: the patch size does not divide height and width.
        """
        p = self.patch_size
        if height < p or width < p or height % p or width % p:
            raise InputError(f"image size {height}x{width} is not a multiple of the patch size {p}")
        return height // p, width // p


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig(Record):
    """A PE text tower. Source: `core/vision_encoder/config.py` of the reference at 3e352cc.

    Attributes:
        proj_bias: whether the projection has a bias; open_clip can train one.
    """

    context_length: int
    width: int
    heads: int
    layers: int
    output_dim: int
    mlp_ratio: float = 4.0
    vocab_size: int = 49408
    proj_bias: bool = False

    later_fields: ClassVar[frozenset[str]] = frozenset({"proj_bias"})

    def __post_init__(self) -> None:
        for name in ("context_length", "width", "heads", "layers", "output_dim", "vocab_size"):
            value = getattr(self, name)
            require(value >= 1, f"text.{name} must be at least 1, not {value}")
        require(
            self.width % self.heads == 0,
            f"text.width {self.width} is not divisible by text.heads {self.heads}",
        )
        require(self.mlp_dim >= 1, f"text.mlp_ratio must be positive, not {self.mlp_ratio}")
        require(
            self.layers <= _MAX_LAYERS,
            f"text.layers must be at most {_MAX_LAYERS}, not {self.layers}",
        )

    @property
    def mlp_dim(self) -> int:
        """Hidden channels of the MLP."""
        return int(self.width * self.mlp_ratio)


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionConfig(Record):
    """The part of a detection backbone that its vision tower does not describe.

    Source: facebookresearch/perception_models `apps/detection` at 3e352cc, and the feature pyramid
    of detectron2.

    Attributes:
        window: side of the attention windows, in patches.
        global_blocks: indices of the blocks that attend to the whole image, ascending.
        channels: channels of each level of the feature pyramid.
    """

    window: int
    global_blocks: tuple[int, ...]
    channels: int = 256

    def __post_init__(self) -> None:
        require(
            1 <= self.window <= _MAX_WINDOW,
            f"detection.window must be from 1 to {_MAX_WINDOW} patches, not {self.window}",
        )
        require(self.channels >= 1, f"detection.channels must be at least 1, not {self.channels}")
        blocks = self.global_blocks
        require(
            all(a < b for a, b in pairwise(blocks)),
            f"detection.global_blocks must be ascending, not {list(blocks)}",
        )

    def check(self, vision: VisionConfig) -> None:
        """InputError unless a tower can be the backbone's."""
        for index in self.global_blocks:
            require(
                0 <= index < vision.layers,
                f"global block {index} is out of range: the tower has blocks 0 to "
                f"{vision.layers - 1}",
            )
        require(
            vision.patch_size == DETECTION_PATCH,
            f"a detection backbone has patches of {DETECTION_PATCH} pixels, not "
            f"{vision.patch_size}",
        )
        require(
            vision.width % 4 == 0,
            f"a feature pyramid needs a vision.width divisible by 4, not {vision.width}",
        )
        require(
            not vision.use_cls_token and vision.pool_type == "none",
            "a detection backbone has no class token and no pooling",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PeConfig:
    """A Perception Encoder: a vision tower and, for the core family, a text tower.

    With `detection`, the tower is that of a detection backbone, which returns a feature pyramid.
    """

    vision: VisionConfig
    text: TextConfig | None = None
    detection: DetectionConfig | None = None

    def __post_init__(self) -> None:
        if self.detection is not None:
            require(self.text is None, "a detection backbone has no text tower")
            self.detection.check(self.vision)
        if self.text is None:
            return
        require(
            self.vision.pool_type != "none",
            "a text tower needs a pooled vision tower; vision.pool_type is 'none'",
        )
        require(
            self.vision.embed_dim == self.text.output_dim,
            f"vision and text must share an output dimension, not {self.vision.embed_dim} "
            f"and {self.text.output_dim}",
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Builds the record from `{"vision": ..., "text": ...}`, or from a vision tower's fields.

        Raises:
            InputError: names unknown, missing and mistyped keys.
        """
        if not isinstance(data, Mapping):
            raise InputError(f"config must be an object, not {type(data).__name__}")
        if "vision" not in data:
            return cls(vision=VisionConfig.from_dict(data))
        known = ["detection", "text", "vision"]
        unknown = sorted(set(data) - set(known))
        if unknown:
            raise InputError(f"config: unknown keys {unknown}; known are {known}")
        text, detection = data.get("text"), data.get("detection")
        return cls(
            vision=VisionConfig.from_dict(data["vision"], "vision"),
            text=None if text is None else TextConfig.from_dict(text, "text"),
            detection=(
                None if detection is None else DetectionConfig.from_dict(detection, "detection")
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `text` is None for a vision tower alone.

        Only a detection backbone has `detection`, so other records keep their old form.
        """
        values: dict[str, Any] = {
            "vision": self.vision.to_dict(),
            "text": None if self.text is None else self.text.to_dict(),
        }
        if self.detection is not None:
            values["detection"] = self.detection.to_dict()
        return values
