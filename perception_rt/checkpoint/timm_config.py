"""Reads timm's name and arguments of a Perception Encoder tower.

timm builds these towers by its class `Eva`. A name such as `vit_pe_core_large_patch14_336` stands
for a released tower, whose arguments `model_args` may replace.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from perception_rt.archs import PE_MODELS
from perception_rt.checkpoint.json_files import Section
from perception_rt.config import VisionConfig

_NAME = re.compile(
    r"vit_pe_(core|lang|spatial)_(tiny|small|base|large|gigantic)_patch(\d+)_(\d+)(\..*)?"
)
_FIELDS = {
    "embed_dim": "width",
    "depth": "layers",
    "num_heads": "heads",
    "mlp_ratio": "mlp_ratio",
    "class_token": "use_cls_token",
    "use_abs_pos_emb": "use_abs_posemb",
    "use_rot_pos_emb": "use_rope2d",
}
# Arguments with the only value that this library's tower has.
_FIXED: Mapping[str, Any] = {
    "attn_type": "rope",
    "in_chans": 3,
    "no_embed_class": False,
    "num_reg_tokens": 0,
    "qkv_bias": True,
    "qkv_fused": True,
    "rope_grid_indexing": "xy",
    "rope_rotate_half": False,
    "rope_temperature": 10000.0,
    "rope_type": "cat",
    "scale_attn_inner": False,
    "scale_mlp": False,
    "swiglu_mlp": False,
    "use_post_norm": False,
    "use_pre_transformer_norm": True,
}
# Arguments about training, pooling, or other image sizes than the native one.
_UNUSED = frozenset(
    {
        "attn_drop_rate",
        "attn_pool_mlp_ratio",
        "attn_pool_num_heads",
        "drop_path_rate",
        "drop_rate",
        "dynamic_img_pad",
        "dynamic_img_size",
        "head_init_scale",
        "num_classes",
        "patch_drop_rate",
        "pos_drop_rate",
        "proj_drop_rate",
        "swiglu_align_to",
    }
)
_SHAPES = ("img_size", "patch_size", "ref_feat_shape")
_NORMS = ("global_pool", "init_values", "use_fc_norm", "use_post_transformer_norm")
_KNOWN = {*_FIELDS, *_FIXED, *_UNUSED, *_SHAPES, *_NORMS, "rope_grid_offset"}


def timm_tower(config: Section) -> VisionConfig:
    """Reads `architecture` and `model_args`: a vision tower without pooling and head.

    Raises:
        InputError: a field is missing, unknown or mistyped, or the tower is not one that this
            library has.
    """
    base = _released(config)
    args = config.section("model_args", {})
    unknown = sorted(str(key) for key in args.content if key not in _KNOWN)
    if unknown:
        raise args.error(f"{args.name(unknown[0])} is an argument that this library does not know")
    for field, only in _FIXED.items():
        args.require(field, only)
    types = {field.name: field.type for field in VisionConfig.__dataclass_fields__.values()}
    values = {
        ours: args.read(theirs, types[ours]) for theirs, ours in _FIELDS.items() if theirs in args
    }
    if "init_values" in args.content:  # null stands for no layer scale
        values["ls_init_value"] = args.read("init_values", float, None)
    for theirs, ours in (("img_size", "image_size"), ("patch_size", "patch_size")):
        if theirs in args:
            values[ours] = _side(args, theirs)
    values["use_ln_post"] = _has_final_norm(base, args)
    tower = replace(base, **values, pool_type="none", output_dim=None)
    _check_positions(base, tower, args)
    return tower


def _released(config: Section) -> VisionConfig:
    """The released tower that `architecture` names."""
    name = config.read("architecture", str)
    match = _NAME.fullmatch(name)
    if match is not None:
        family, size, patch, side, _ = match.groups()
        model = PE_MODELS.get(f"PE-{family.title()}-{size[0].upper()}{patch}-{side}")
        if model is not None:
            return model.vision
    raise config.error(
        f"{config.name('architecture')} is {name!r:.80}, which is no Perception Encoder of timm, "
        "such as 'vit_pe_core_large_patch14_336'"
    )


def _side(args: Section, field: str) -> int:
    """A size that is an integer, or a list of two equal ones."""
    value = args.content[field]
    if not isinstance(value, list | tuple):
        return int(args.read(field, int))
    rows, columns = args.read(field, tuple[int, int])
    if rows != columns:
        raise args.error(f"{args.name(field)} is {list(value)}; only squares are supported")
    return int(rows)


def _has_final_norm(base: VisionConfig, args: Section) -> bool:
    """Whether the tower ends with a norm; timm leaves it out before a norm of pooled tokens."""
    released_core = base.pool_type == "attn"
    pool = args.read("global_pool", str, "map" if released_core else "avg")
    after_pooling = args.read("use_fc_norm", bool, pool == "avg" if released_core else False)
    default = not after_pooling if released_core else False
    return bool(args.read("use_post_transformer_norm", bool, default))


def _check_positions(base: VisionConfig, tower: VisionConfig, args: Section) -> None:
    """InputError unless patches count from 1 after a class token, one by one."""
    if not tower.use_rope2d:
        return
    offset = args.read("rope_grid_offset", float, float(base.use_cls_token))
    if tower.use_cls_token and offset != 1:
        raise args.error(
            f"{args.name('rope_grid_offset')} is {offset:g}; a tower with a class token needs 1"
        )
    # A relative position does not depend on the offset when no class token is there.
    grid = _side(args, "ref_feat_shape") if "ref_feat_shape" in args else base.grid
    if grid != tower.grid and args.content.get("ref_feat_shape", grid) is not None:
        raise args.error(
            f"{args.name('ref_feat_shape')} is {grid}, which scales the positions of a grid of "
            f"{tower.grid}; only equal sizes are supported"
        )
