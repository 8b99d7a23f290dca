"""Three ways to store a Perception Encoder, as tables between their keys and our names.

`reference` is what Meta publishes, `timm` and `open_clip` are the two libraries that have ported
it. Our names are the parameter names of `models.pe.PerceptionEncoder`. One table serves both
directions. This module knows tensors, not files.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from perception_rt.config import PeConfig
from perception_rt.errors import CheckpointError

Layout = Literal["reference", "timm", "open_clip"]
Shape = tuple[int, ...]

# Stems of our names inside a vision tower, and what timm calls them.
_TIMM_BLOCK = {
    "ln_1.": "norm1.",
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj.": "attn.proj.",
    "ls_1.gamma": "gamma_1",
    "ln_2.": "norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
    "ls_2.gamma": "gamma_2",
}
_TIMM_TOWER = {
    "conv1.": "patch_embed.proj.",
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "ln_pre.": "norm_pre.",
    "ln_post.": "norm.",
    "attn_pool.probe": "attn_pool.latent",
    "attn_pool.attn.out_proj.": "attn_pool.proj.",
    "attn_pool.layernorm.": "attn_pool.norm.",
    "attn_pool.mlp.c_fc.": "attn_pool.mlp.fc1.",
    "attn_pool.mlp.c_proj.": "attn_pool.mlp.fc2.",
}
_BLOCKS = "transformer.resblocks."
_POOL_INPUT = "attn_pool.attn.in_proj_"
_TRUNK = "visual.trunk."

# A buffer that some open_clip versions save with the weights; the causal mask is no weight.
IGNORED_KEYS: Mapping[Layout, frozenset[str]] = {
    "reference": frozenset(),
    "timm": frozenset(),
    "open_clip": frozenset({"text.attn_mask"}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """How a layout stores one of our tensors.

    Attributes:
        name: our name.
        shape: our shape.
        keys: the layout's keys; several are parts along the first axis.
        shapes: the shape under each key.
        transposed: the layout stores the transpose of our matrix.
    """

    name: str
    shape: Shape
    keys: tuple[str, ...]
    shapes: tuple[Shape, ...]
    transposed: bool = False

    def unpack(self, parts: Sequence[Tensor]) -> Tensor:
        """The tensors under `keys` -> ours, contiguous; a view where that is possible."""
        tensor = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        return (tensor.T if self.transposed else tensor).reshape(self.shape).contiguous()

    def pack(self, tensor: Tensor) -> dict[str, Tensor]:
        """Our tensor -> the tensors under `keys`; copies only what the layout cuts or turns."""
        if len(self.keys) == 1 and not self.transposed:
            return {self.keys[0]: tensor.reshape(self.shapes[0])}
        turned = tensor.T if self.transposed else tensor
        parts = torch.split(turned, [shape[0] for shape in self.shapes])
        return {
            key: part.clone(memory_format=torch.contiguous_format)
            for key, part in zip(self.keys, parts, strict=True)
        }


def without_module_prefix(keys: Collection[str]) -> dict[str, str]:
    """Maps each key, freed of the `module` that data-parallel wrappers add, to the key itself.

    Raises:
        CheckpointError: two keys differ only by that prefix.
    """
    mapping = {".".join(p for p in key.split(".") if p != "module"): key for key in keys}
    if len(mapping) != len(keys):
        raise CheckpointError("two tensors differ only by 'module.' in their names")
    return mapping


def detect_layout(names: Collection[str], config: PeConfig) -> Layout:
    """Which layout a set of keys is in, `module.` already stripped.

    Raises:
        CheckpointError: no layout has such keys, or the layout cannot hold this architecture.
    """

    def has(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in names)

    if has(_TRUNK):
        return "open_clip"
    if has("blocks.", "patch_embed."):
        if config.text is not None:
            raise CheckpointError(
                "a timm checkpoint is a vision tower alone, and this architecture has a text tower"
            )
        return "timm"
    if has("visual.", _BLOCKS, "conv1."):
        return "reference"
    example = f"such as {min(names)!a:.80}" if names else "because there are none"
    raise CheckpointError(
        f"not a Perception Encoder in the reference, timm or open_clip layout: its {len(names)} "
        f"keys fit none of them, {example}"
    )


def stored_tensors(layout: Layout, shapes: Mapping[str, Shape]) -> tuple[Stored, ...]:
    """The table of a layout for the tensors of one architecture.

    Args:
        layout: one of the three layouts.
        shapes: our names and shapes. In the reference layout a vision tower alone has keys
            without `visual.`, as in the reference's own module.

    Raises:
        CheckpointError: a name is not a parameter of a Perception Encoder, or has no place in
            the layout.
    """
    bare = layout == "reference" and all(name.startswith("visual.") for name in shapes)
    entries = []
    for name, shape in shapes.items():
        tower, _, leaf = name.partition(".")
        if tower == "visual":
            entry = (
                _reference_entry(name, leaf if bare else name, shape)
                if layout == "reference"
                else _timm_entry(name, leaf, shape, _TRUNK if layout == "open_clip" else "")
            )
        elif layout != "timm" and (tower == "text" or name == "logit_scale"):
            key = name.removeprefix("text.") if layout == "reference" else name
            entry = _reference_entry(name, key, shape)
        else:
            raise CheckpointError(f"the {layout} layout has no place for {name!a:.80}")
        entries.append(entry)
    return tuple(entries)


def zero_tensors(layout: Layout, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Keys that a layout has and we have not, whose values must all be zero, with their shapes.

    The ports project by a linear layer, whose bias the reference does not have.
    """
    projection = shapes.get("visual.proj")
    if layout == "reference" or projection is None:
        return {}
    prefix = _TRUNK if layout == "open_clip" else ""
    return {f"{prefix}head.bias": (projection[1],)}


def to_layout(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """All our tensors under a layout's keys: the inverse of reading a checkpoint.

    Raises:
        CheckpointError: a name has no place in the layout.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    stored: dict[str, Tensor] = {}
    for entry in stored_tensors(layout, shapes):
        stored |= entry.pack(state[entry.name])
    for key, shape in zero_tensors(layout, shapes).items():
        stored[key] = state["visual.proj"].new_zeros(shape)
    return stored


def _reference_entry(name: str, key: str, shape: Shape) -> Stored:
    return Stored(name=name, shape=shape, keys=(key,), shapes=(shape,))


def _timm_entry(name: str, leaf: str, shape: Shape, prefix: str) -> Stored:
    """One vision tensor in timm's terms; `leaf` is its name without `visual.`."""
    if leaf == "proj":
        keys, shapes = ["head.weight"], [shape[::-1]]
    elif leaf.startswith(_POOL_INPUT):
        kind = leaf.removeprefix(_POOL_INPUT)
        width = shape[0] // 3
        keys = [f"attn_pool.q.{kind}", f"attn_pool.kv.{kind}"]
        shapes = [(width, *shape[1:]), (2 * width, *shape[1:])]
    else:
        keys, shapes = [_timm_key(leaf)], [_timm_shape(leaf, shape)]
    return Stored(
        name=name,
        shape=shape,
        keys=tuple(prefix + key for key in keys),
        shapes=tuple(shapes),
        transposed=leaf == "proj",
    )


def _timm_key(leaf: str) -> str:
    head, stems = "", _TIMM_TOWER
    rest = leaf
    if leaf.startswith(_BLOCKS):
        index, _, rest = leaf.removeprefix(_BLOCKS).partition(".")
        head, stems = f"blocks.{index}.", _TIMM_BLOCK
    for stem, theirs in stems.items():
        if rest.startswith(stem):
            return head + theirs + rest.removeprefix(stem)
    raise CheckpointError(f"the timm layout has no place for 'visual.{leaf:.80}'")


def _timm_shape(leaf: str, shape: Shape) -> Shape:
    """The ports keep a batch axis on its token tables."""
    match leaf:
        case "class_embedding":
            return (1, 1, *shape)
        case "positional_embedding":
            return (1, *shape)
        case _:
            return shape
