"""The ways to store a model, as tables between their keys and our names.

Of a Perception Encoder, `reference` is what Meta publishes, `timm` and `open_clip` are the two
libraries that have ported it. Of a Perception Language Model, `original` is what Meta publishes
and `hf` is transformers' port. Our names are the parameter names of `models.pe.PerceptionEncoder`
and `models.plm.PerceptionLM`. One table serves both directions. This module knows tensors, not
files.
"""

from collections.abc import Collection, Mapping
from typing import Literal

from torch import Tensor

from perception_rt.checkpoint.plm_names import HF_STEMS, ORIGINAL_STEMS, hf_entry, original_entry
from perception_rt.checkpoint.stored import Shape, Stored
from perception_rt.checkpoint.timm_names import timm_entry
from perception_rt.config import PeConfig
from perception_rt.errors import CheckpointError
from perception_rt.plm_config import PlmConfig

Layout = Literal["reference", "timm", "open_clip", "original", "hf"]

_TRUNK = "visual.trunk."

# A buffer that some open_clip versions save with the weights; the causal mask is no weight.
IGNORED_KEYS: Mapping[Layout, frozenset[str]] = {"open_clip": frozenset({"text.attn_mask"})}


def without_module_prefix(keys: Collection[str]) -> dict[str, str]:
    """Maps each key, freed of the `module` that data-parallel wrappers add, to the key itself.

    Raises:
        CheckpointError: two keys differ only by that prefix.
    """
    mapping = {".".join(p for p in key.split(".") if p != "module"): key for key in keys}
    if len(mapping) != len(keys):
        raise CheckpointError("two tensors differ only by 'module.' in their names")
    return mapping


def detect_layout(names: Collection[str], config: PeConfig | PlmConfig) -> Layout:
    """Which layout a set of keys is in, `module.` already stripped.

    Raises:
        CheckpointError: no layout has such keys, or the layout cannot hold this architecture.
    """

    def has(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in names)

    if isinstance(config, PlmConfig):
        if has(*HF_STEMS):
            return "hf"
        if has(*ORIGINAL_STEMS):
            return "original"
        raise _unknown(names, "Perception Language Model in the original or hf layout")
    if has(_TRUNK):
        return "open_clip"
    if has("blocks.", "patch_embed."):
        if config.text is not None:
            raise CheckpointError(
                "a timm checkpoint is a vision tower alone, and this architecture has a text tower"
            )
        return "timm"
    if has("visual.", "transformer.resblocks.", "conv1."):
        return "reference"
    raise _unknown(names, "Perception Encoder in the reference, timm or open_clip layout")


def _unknown(names: Collection[str], what: str) -> CheckpointError:
    example = f"such as {min(names)!a:.80}" if names else "because there are none"
    return CheckpointError(f"not a {what}: its {len(names)} keys fit none of them, {example}")


def stored_tensors(
    layout: Layout, shapes: Mapping[str, Shape], head_dim: int | None = None
) -> tuple[Stored, ...]:
    """The table of a layout for the tensors of one architecture.

    Args:
        layout: one of the five layouts.
        shapes: our names and shapes. In the reference layout a vision tower alone has keys
            without `visual.`, as in the reference's own module.
        head_dim: channels per head of the decoder; only `hf` asks for it.

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
    """A Perception Encoder's tensor; `bare` keys have no tower in front."""
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
    """Keys that a layout has and we have not, whose values must all be zero, with their shapes.

    The ports project by a linear layer, whose bias the reference does not have.
    """
    projection = shapes.get("visual.proj")
    if layout == "reference" or projection is None:
        return {}
    prefix = _TRUNK if layout == "open_clip" else ""
    return {f"{prefix}head.bias": (projection[1],)}


def to_layout(
    state: Mapping[str, Tensor], layout: Layout, head_dim: int | None = None
) -> dict[str, Tensor]:
    """All our tensors under a layout's keys: the inverse of reading a checkpoint.

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
