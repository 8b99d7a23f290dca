"""The layouts of checkpoints: tables between their keys and our parameter names.

Perception Encoders: `reference` is Meta's layout, `timm` and `open_clip` are those of the libraries
that ported the model. Perception Language Models: `original` is Meta's layout, `hf` that of
transformers. Our names are the parameter names of `models.pe.PerceptionEncoder` and
`models.plm.PerceptionLM`. One table serves reading and writing.
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

Layout = Literal["reference", "timm", "open_clip", "original", "hf"]

_TRUNK = "visual.trunk."

# By family, the starts of keys that tell a layout; the first layout that fits is the one.
_PREFIXES: Mapping[str, Mapping[Layout, tuple[str, ...]]] = {
    PE.name: {
        "open_clip": (_TRUNK,),
        "timm": ("blocks.", "patch_embed."),
        "reference": ("visual.", "transformer.resblocks.", "conv1."),
    },
    PLM.name: {"hf": HF_STEMS, "original": ORIGINAL_STEMS},
}

# The causal mask, a buffer that some open_clip versions save with the weights.
IGNORED_KEYS: Mapping[Layout, frozenset[str]] = {"open_clip": frozenset({"text.attn_mask"})}


def layout_starts(config: PeConfig | PlmConfig) -> tuple[str, ...]:
    """Returns how keys of the layouts of an architecture's family start."""
    return tuple(start for starts in _PREFIXES[family_of(config).name].values() for start in starts)


def layouts_of(config: PeConfig | PlmConfig) -> tuple[Layout, ...]:
    """Returns the layouts of an architecture's family."""
    return tuple(_PREFIXES[family_of(config).name])


def detect_layout(names: Collection[str], config: PeConfig | PlmConfig) -> Layout:
    """Detects the layout of a set of keys, without prefixes of wrappers.

    Args:
        names: the keys.
        config: the architecture that the checkpoint must hold.

    Raises:
        CheckpointError: no layout has such keys, or the layout cannot hold this architecture.
    """
    family = family_of(config)
    prefixes = _PREFIXES[family.name]
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
        raise CheckpointError(
            "a timm checkpoint holds only a vision tower, but this architecture has a text tower"
        )
    return layout


def stored_tensors(
    layout: Layout, shapes: Mapping[str, Shape], head_dim: int | None = None
) -> tuple[Stored, ...]:
    """Returns the table of a layout for the tensors of an architecture.

    Args:
        layout: one of the five layouts.
        shapes: our names and shapes. A lone vision tower in the reference layout has keys without
            `visual.`, as in the reference's own module.
        head_dim: channels per head of the decoder; only `hf` needs it.

    Raises:
        CheckpointError: a name is not a parameter of such a model, or has no place in the layout.
    """
    if layout == "original":
        return tuple(original_entry(name, shape) for name, shape in shapes.items())
    if layout == "hf":
        return tuple(hf_entry(name, shape, head_dim) for name, shape in shapes.items())
    bare = layout == "reference" and all(name.startswith("visual.") for name in shapes)
    return tuple(_pe_entry(layout, name, shape, bare) for name, shape in shapes.items())


def _pe_entry(layout: Layout, name: str, shape: Shape, bare: bool) -> Stored:
    """A Perception Encoder's tensor; `bare` keys have no `visual.` prefix."""
    tower, _, leaf = name.partition(".")
    if tower == "visual" and layout != "reference":
        return timm_entry(name, shape, _TRUNK if layout == "open_clip" else "")
    if tower == "visual":
        key = leaf if bare else name
    elif layout != "timm" and (tower == "text" or name == "logit_scale"):
        key = name.removeprefix("text.") if layout == "reference" else name
    else:
        raise CheckpointError(f"the {layout} layout has no place for {name!a:.80}")
    return Stored(name=name, shape=shape, keys=(key,), shapes=(shape,))


def zero_tensors(layout: Layout, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Returns keys and shapes of a layout's additional tensors, which must be all zeros.

    The ports project with a linear layer, whose bias the reference does not have.
    """
    projection = shapes.get("visual.proj")
    if layout == "reference" or projection is None:
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
