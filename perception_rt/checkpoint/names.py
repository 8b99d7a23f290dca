"""The layouts of checkpoints: tables between their keys and our parameter names.

Perception Encoders: `reference` is Meta's layout, `timm` and `open_clip` are those of the libraries
that ported the model, and `detectron2` is that of detectors whose backbone is an encoder's tower.
Perception Language Models: `original` is Meta's layout, `hf` that of transformers. Our names are
the parameter names of `models.pe.PerceptionEncoder` and `models.plm.PerceptionLM`. One table serves
reading and writing.
"""

from collections.abc import Collection, Mapping
from typing import Literal

from torch import Tensor

from perception_rt.checkpoint.plm_names import HF_STEMS, ORIGINAL_STEMS, hf_entry, original_entry
from perception_rt.checkpoint.stored import Shape, Stored
from perception_rt.checkpoint.timm_names import timm_entry
from perception_rt.config import PeConfig
from perception_rt.errors import CheckpointError
from perception_rt.families import PE, PLM, family_of
from perception_rt.plm_config import PlmConfig

Layout = Literal["reference", "timm", "open_clip", "detectron2", "original", "hf"]

_TRUNK = "visual.trunk."
_HEAD = "visual.head.proj."  # open_clip's own projection, if the trunk has none
_TEXT_LINEAR = "text_projection.weight"  # a linear layer, if it has a bias
_ROOT_TEXT = "token_embedding.weight"  # open_clip's text tower without `text.`

# A detector's tower and its feature pyramid.
_BACKBONE, _PYRAMID = "backbone.net.", "backbone.simfp_"

VISION_ONLY = (
    "holds only a vision tower, but this architecture has a text tower; --towers vision exports "
    "the vision tower alone"
)

# Parameters that a checkpoint may lack: a missing bias means zero.
VISION_BIAS, TEXT_BIAS = "visual.proj_bias", "text.text_projection_bias"

# By family, the starts of keys that tell a layout; the first layout that fits is the one.
_PREFIXES: Mapping[str, Mapping[Layout, tuple[str, ...]]] = {
    PE.name: {
        "open_clip": (_TRUNK,),
        "timm": ("blocks.", "patch_embed."),
        "reference": ("visual.", "transformer.resblocks.", "conv1."),
    },
    PLM.name: {"hf": HF_STEMS, "original": ORIGINAL_STEMS},
}
_BACKBONE_PREFIXES: Mapping[Layout, tuple[str, ...]] = {"detectron2": (_BACKBONE, _PYRAMID)}

# The causal mask, a buffer that some open_clip versions save with the weights.
IGNORED_KEYS: Mapping[Layout, frozenset[str]] = {
    "open_clip": frozenset({"text.attn_mask", "attn_mask"})
}


def _prefixes(config: PeConfig | PlmConfig) -> Mapping[Layout, tuple[str, ...]]:
    if isinstance(config, PeConfig) and config.detection is not None:
        return _BACKBONE_PREFIXES
    return _PREFIXES[family_of(config).name]


def layout_starts(config: PeConfig | PlmConfig) -> tuple[str, ...]:
    """Returns how keys of the layouts of an architecture start."""
    return tuple(start for starts in _prefixes(config).values() for start in starts)


def layouts_of(config: PeConfig | PlmConfig) -> tuple[Layout, ...]:
    """Returns the layouts that can hold an architecture."""
    return tuple(_prefixes(config))


def detect_layout(names: Collection[str], config: PeConfig | PlmConfig) -> Layout:
    """Detects the layout of a set of keys, without prefixes of wrappers.

    Args:
        names: the keys.
        config: the architecture that the checkpoint must hold.

    Raises:
        CheckpointError: no layout has such keys, or the layout cannot hold this architecture.
    """
    family, prefixes = family_of(config), _prefixes(config)
    if is_detector(names) and prefixes is not _BACKBONE_PREFIXES:
        raise CheckpointError("it holds a detector: --detection exports its backbone")
    fitting = (
        layout
        for layout, starts in prefixes.items()
        if any(name.startswith(starts) for name in names)
    )
    layout = next(fitting, None)
    if layout is None:
        example = f"such as {min(names)!a:.80}" if names else "because there are none"
        raise CheckpointError(
            f"not {family.label} in one of the layouts {', '.join(prefixes)}: its {len(names)} "
            f"keys fit none of them, {example}"
        )
    if layout == "timm" and isinstance(config, PeConfig) and config.text is not None:
        raise CheckpointError(f"a timm checkpoint {VISION_ONLY}")
    return layout


def is_detector(keys: Collection[str]) -> bool:
    """Returns whether keys, which may have prefixes of wrappers, are those of a detector."""
    return any(_PYRAMID in key for key in keys)


def backbone_keys(file_keys: Mapping[str, str]) -> dict[str, str]:
    """Returns the keys of a detector's backbone, without its heads and tables of RoPE."""
    tables = (f"{_BACKBONE}rope_win.", f"{_BACKBONE}rope_glb.")
    return {
        key: file
        for key, file in file_keys.items()
        if key.startswith((_BACKBONE, _PYRAMID)) and not key.startswith(tables)
    }


def stored_tensors(
    layout: Layout,
    shapes: Mapping[str, Shape],
    head_dim: int | None = None,
    keys: Collection[str] = (),
) -> tuple[Stored, ...]:
    """Returns the table of a layout for the tensors of an architecture.

    Args:
        layout: one of the layouts.
        shapes: our names and shapes. A lone vision tower in the reference layout has keys without
            `visual.`, as in the reference's own module.
        head_dim: channels per head of the decoder; only `hf` needs it.
        keys: keys of the file to read, which tell variants apart: a final norm after the pooling
            and, in `open_clip`, a projection of its own, or a text tower without `text.`. Without
            keys, the form that we write.

    Raises:
        CheckpointError: a name is not a parameter of such a model, or has no place in the layout.
    """
    if layout == "original":
        return tuple(original_entry(name, shape) for name, shape in shapes.items())
    if layout == "hf":
        return tuple(hf_entry(name, shape, head_dim) for name, shape in shapes.items())
    if layout == "detectron2":
        return tuple(_detectron2_entry(name, shape) for name, shape in shapes.items())
    bare = layout == "reference" and all(name.startswith("visual.") for name in shapes)
    if layout == "open_clip":
        linear = any(key.endswith(_TEXT_LINEAR) for key in keys) if keys else TEXT_BIAS in shapes
        return tuple(_open_clip_entry(n, shape, keys, linear) for n, shape in shapes.items())
    if layout == "timm":
        return tuple(_timm_entry(name, shape, keys) for name, shape in shapes.items())
    return tuple(_reference_entry(name, shape, bare) for name, shape in shapes.items())


def _reference_entry(name: str, shape: Shape, bare: bool) -> Stored:
    """A tensor in the reference's layout; `bare` keys have no `visual.` prefix."""
    tower, _, leaf = name.partition(".")
    if tower not in ("visual", "text", "logit_scale"):
        raise CheckpointError(f"the reference layout has no place for {name!a:.80}")
    key = leaf if tower == "text" or (tower == "visual" and bare) else name
    return Stored(name=name, shape=shape, keys=(key,), shapes=(shape,))


def _detectron2_entry(name: str, shape: Shape) -> Stored:
    """A tensor of a detector's backbone; its position table has an axis for the batch."""
    tower, _, leaf = name.partition(".")
    if tower not in ("visual", "pyramid"):
        raise CheckpointError(f"the detectron2 layout has no place for {name!a:.80}")
    key = f"{_BACKBONE}{leaf}" if tower == "visual" else f"backbone.{leaf}"
    stored = (1, *shape) if leaf == "positional_embedding" else shape
    return Stored(name=name, shape=shape, keys=(key,), shapes=(stored,))


def _timm_entry(name: str, shape: Shape, keys: Collection[str]) -> Stored:
    """A vision tower's tensor in timm's layout."""
    if not name.startswith("visual."):
        raise CheckpointError(f"the timm layout has no place for {name!a:.80}")
    return timm_entry(name, shape, "", keys)


def _open_clip_entry(name: str, shape: Shape, keys: Collection[str], linear: bool) -> Stored:
    """A tensor in open_clip's layout; with `linear`, the text's projection is a linear layer."""
    if name in ("visual.proj", VISION_BIAS) and f"{_HEAD}weight" in keys:
        return _linear_entry(name, shape, _HEAD)
    if name.startswith("visual."):
        return timm_entry(name, shape, _TRUNK, keys)
    key = name.removeprefix("text.") if _ROOT_TEXT in keys else name
    if name in ("text.text_projection", TEXT_BIAS) and linear:
        return _linear_entry(name, shape, f"{key.removesuffix('_bias')}.")
    if not name.startswith("text.") and name != "logit_scale":
        raise CheckpointError(f"the open_clip layout has no place for {name!a:.80}")
    return Stored(name=name, shape=shape, keys=(key,), shapes=(shape,))


def _linear_entry(name: str, shape: Shape, prefix: str) -> Stored:
    """A projection (C, D) or its bias (D,), stored as a linear layer."""
    key = prefix + ("bias" if len(shape) == 1 else "weight")
    return Stored(
        name=name, shape=shape, keys=(key,), shapes=(shape[::-1],), transposed=len(shape) == 2
    )


def zero_tensors(layout: Layout, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Returns keys and shapes of tensors that a layout has besides ours; all are zeros.

    The ports project with a linear layer, which always has a bias.
    """
    projection = shapes.get("visual.proj")
    if layout == "reference" or projection is None or VISION_BIAS in shapes:
        return {}
    prefix = _TRUNK if layout == "open_clip" else ""
    return {f"{prefix}head.bias": (projection[1],)}


def to_layout(
    state: Mapping[str, Tensor], layout: Layout, head_dim: int | None = None
) -> dict[str, Tensor]:
    """Converts our tensors to the keys and shapes of a layout; the inverse of reading.

    Raises:
        CheckpointError: a name has no place in the layout.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    stored: dict[str, Tensor] = {}
    for entry in stored_tensors(layout, shapes, head_dim):
        stored |= entry.pack(state[entry.name])
    for key, shape in zero_tensors(layout, shapes).items():
        stored[key] = state["visual.proj"].new_zeros(shape)
    return stored
