"""The vision tower of a Perception Encoder in timm's names and shapes."""

from collections.abc import Collection

from perception_rt.checkpoint.stored import Shape, Stored
from perception_rt.errors import CheckpointError

# Stems of our names in a vision tower, and timm's names.
_BLOCK = {
    "ln_1.": "norm1.",
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj.": "attn.proj.",
    "ls_1.gamma": "gamma_1",
    "ln_2.": "norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
    "ls_2.gamma": "gamma_2",
}
_TOWER = {
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
_FINAL_NORM, _NORM_AFTER_POOL = "ln_post.", "fc_norm."


def timm_entry(name: str, shape: Shape, prefix: str, keys: Collection[str] = ()) -> Stored:
    """Returns the entry of one tensor of a vision tower in timm's layout.

    Args:
        name: our name; the part after its first dot is the name within the tower.
        shape: our shape.
        prefix: prefix of timm's keys.
        keys: keys of the file to read, which tell whether the final norm follows the pooling.

    Raises:
        CheckpointError: timm's towers have no such tensor.
    """
    leaf = name.partition(".")[2]
    if leaf == "proj":
        stored, shapes = ["head.weight"], [shape[::-1]]
    elif leaf == "proj_bias":
        stored, shapes = ["head.bias"], [shape]
    elif leaf.startswith(_POOL_INPUT):
        kind = leaf.removeprefix(_POOL_INPUT)
        width = shape[0] // 3
        stored = [f"attn_pool.q.{kind}", f"attn_pool.kv.{kind}"]
        shapes = [(width, *shape[1:]), (2 * width, *shape[1:])]
    elif leaf.startswith(_FINAL_NORM) and f"{prefix}{_NORM_AFTER_POOL}weight" in keys:
        stored, shapes = [leaf.replace(_FINAL_NORM, _NORM_AFTER_POOL)], [shape]
    else:
        stored, shapes = [_key(name, leaf)], [_shape(leaf, shape)]
    return Stored(
        name=name,
        shape=shape,
        keys=tuple(prefix + key for key in stored),
        shapes=tuple(shapes),
        transposed=leaf == "proj",
    )


def _key(name: str, leaf: str) -> str:
    head, stems = "", _TOWER
    rest = leaf
    if leaf.startswith(_BLOCKS):
        index, _, rest = leaf.removeprefix(_BLOCKS).partition(".")
        head, stems = f"blocks.{index}.", _BLOCK
    for stem, theirs in stems.items():
        if rest.startswith(stem):
            return head + theirs + rest.removeprefix(stem)
    raise CheckpointError(f"the timm layout has no place for {name!a:.80}")


def _shape(leaf: str, shape: Shape) -> Shape:
    """The shape in the ports, whose token tables have a batch axis."""
    match leaf:
        case "class_embedding":
            return (1, 1, *shape)
        case "positional_embedding":
            return (1, *shape)
        case _:
            return shape
