"""The encoder that timm's `config.json` describes: architecture and preprocessing.

timm names a model and stores the arguments that differ from it. Both are read: the table below has
timm's defaults, and an argument that changes the model in a way that we do not support is an error.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from perception_rt.archs import PE_MODELS
from perception_rt.checkpoint.json_fields import (
    as_object,
    check_fixed,
    refuse_unknown,
    shown,
    square_side,
)
from perception_rt.config import PeConfig, PoolType, VisionConfig
from perception_rt.errors import InputError
from perception_rt.processing.image import ImageSpec
from perception_rt.records import check_value

# timm's names of the released models.
MODELS: Mapping[str, str] = {
    "vit_pe_core_tiny_patch16_384": "PE-Core-T16-384",
    "vit_pe_core_small_patch16_384": "PE-Core-S16-384",
    "vit_pe_core_base_patch16_224": "PE-Core-B16-224",
    "vit_pe_core_large_patch14_336": "PE-Core-L14-336",
    "vit_pe_core_gigantic_patch14_448": "PE-Core-G14-448",
    "vit_pe_lang_large_patch14_448": "PE-Lang-L14-448",
    "vit_pe_lang_gigantic_patch14_448": "PE-Lang-G14-448",
    "vit_pe_spatial_tiny_patch16_512": "PE-Spatial-T16-512",
    "vit_pe_spatial_small_patch16_512": "PE-Spatial-S16-512",
    "vit_pe_spatial_base_patch16_512": "PE-Spatial-B16-512",
    "vit_pe_spatial_large_patch14_448": "PE-Spatial-L14-448",
    "vit_pe_spatial_gigantic_patch14_448": "PE-Spatial-G14-448",
}

# Arguments of timm's models that set a field of ours, with the field's name.
_FIELDS = {
    "patch_size": "patch_size",
    "embed_dim": "width",
    "depth": "layers",
    "num_heads": "heads",
    "mlp_ratio": "mlp_ratio",
    "init_values": "ls_init_value",
    "class_token": "use_cls_token",
    "use_abs_pos_emb": "use_abs_posemb",
    "use_rot_pos_emb": "use_rope2d",
}
# Arguments that we support one value of, timm's default for these models.
_FIXED: Mapping[str, Any] = {
    "in_chans": 3,
    "qkv_bias": True,
    "qkv_fused": True,
    "swiglu_mlp": False,
    "swiglu_align_to": 0,
    "scale_mlp": False,
    "scale_attn_inner": False,
    "attn_type": "rope",
    "num_reg_tokens": 0,
    "no_embed_class": False,
    "rope_type": "cat",
    "rope_grid_indexing": "xy",
    "rope_temperature": 10000,
    "rope_rotate_half": False,
    "use_post_norm": False,
    "use_pre_transformer_norm": True,
    "use_naflex": False,
    "num_kv_heads": None,
    "qk_norm": False,
    "attn_only_layer_scale": False,
    "rope_mrope_section": None,
    "features_only": False,
}
# Arguments without an effect on inference.
_IGNORED = frozenset(
    {
        "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate",
        "drop_path_rate", "head_init_scale", "dynamic_img_size", "dynamic_img_pad", "out_indices",
        "rope_shift_coords", "rope_jitter_coords", "rope_rescale_coords",
    }
)  # fmt: skip
_POOLS: Mapping[str, PoolType] = MappingProxyType(
    {"map": "attn", "token": "tok", "avg": "patch_avg", "": "none"}
)
_POOL_MLP_RATIO = 4.0

# Known fields of the file and, in old files in their place, of `pretrained_cfg`.
_ROOT_KNOWN = (
    "architecture", "num_classes", "num_features", "global_pool", "labels", "label_names",
    "label_descriptions", "model_args", "pretrained_cfg",
)  # fmt: skip
_IMAGE_KNOWN = (
    "url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "architecture", "tag",
    "custom_load", "input_size", "test_input_size", "min_input_size", "fixed_input_size",
    "interpolation", "crop_pct", "test_crop_pct", "crop_mode", "mean", "std", "num_classes",
    "label_offset", "label_names", "label_descriptions", "pool_size", "test_pool_size",
    "first_conv", "classifier", "license", "description", "origin_url", "paper_name", "paper_ids",
    "notes",
)  # fmt: skip
# transformers' model around one of timm, and the fields that it adds to the file.
WRAPPER = "timm_wrapper"
_WRAPPER_FIELDS = frozenset(
    {
        "model_type", "architectures", "do_pooling", "dtype", "torch_dtype", "initializer_range",
        "transformers_version", "problem_type",
    }
)  # fmt: skip
_WRAPPER_BASE = "TimmWrapperModel"  # has no classes, whatever the file says
# What timm uses where `pretrained_cfg` lacks a field.
_DEFAULT_IMAGE: Mapping[str, Any] = {
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "crop_mode": "center",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}
_CROP_MODES = {"center": "center_crop", "squash": "squash", "border": "letterbox"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """An encoder as a folder describes it.

    Attributes:
        config: the architecture, without biases of projections, which only the weights tell.
        image: image preprocessing.
    """

    config: PeConfig
    image: ImageSpec


def timm_encoder(data: Mapping[str, Any]) -> Encoder:
    """Reads the content of timm's `config.json`.

    Raises:
        InputError: names a field that is unknown, contradicts another one, or has a value that is
            not supported.
    """
    if data.get("model_type") == WRAPPER:
        data = _unwrapped(data)
    nested = "pretrained_cfg" in data
    refuse_unknown(data, _ROOT_KNOWN if nested else (*_ROOT_KNOWN, *_IMAGE_KNOWN))
    pretrained = as_object(data["pretrained_cfg"] if nested else data, "pretrained_cfg")
    if nested:
        refuse_unknown(pretrained, _IMAGE_KNOWN, "pretrained_cfg.")
    arguments = dict(as_object(data.get("model_args") or {}, "model_args"))
    classes = data.get("num_classes", pretrained.get("num_classes"))
    _agree(arguments, "num_classes", classes, "num_classes")
    if classes is not None:
        arguments["num_classes"] = classes
    size = pretrained.get("input_size")
    if size is not None:
        size = _sides(size, "pretrained_cfg.input_size")
        arguments.setdefault("img_size", size)
    vision = timm_tower(data["architecture"], arguments, "model_args")
    _check_notes(data, vision)
    side = vision.image_size
    if arguments.get("dynamic_img_size") and size is not None:
        side = square_side(size, "pretrained_cfg.input_size")
    return Encoder(config=PeConfig(vision=vision), image=_image(pretrained, side))


def _unwrapped(data: Mapping[str, Any]) -> dict[str, Any]:
    """The content without what transformers adds when it saves a model of timm."""
    if data.get("pretrained_cfg") is None:
        raise InputError(
            "pretrained_cfg is missing, which has the preprocessing: copy it from the config.json "
            "of the timm model that this one was made from"
        )
    inner = {key: value for key, value in data.items() if key not in _WRAPPER_FIELDS}
    return inner | ({"num_classes": 0} if data.get("architectures") == [_WRAPPER_BASE] else {})


def timm_tower(architecture: object, arguments: Mapping[str, Any], where: str) -> VisionConfig:
    """The vision tower that timm's `create_model` makes.

    Args:
        architecture: timm's name of the model, with or without a tag.
        arguments: arguments that differ from the named model's.
        where: name of the arguments, for errors.

    Raises:
        InputError: the model is not a Perception Encoder, or names an argument that is unknown or
            not supported.
    """
    name = architecture.partition(".")[0] if isinstance(architecture, str) else ""
    if name not in MODELS:
        raise InputError(
            f"architecture {shown(architecture)} is not one of timm's Perception Encoders, "
            f"{', '.join(MODELS)}"
        )
    named = PE_MODELS[MODELS[name]].vision
    values = _defaults(named)
    known = {*values, *_FIXED, *_IGNORED}
    refuse_unknown(arguments, sorted(known), f"{where}.")
    check_fixed(arguments, _FIXED, f"{where}.")
    values |= {key: value for key, value in arguments.items() if key in values}
    fields = {ours: values[theirs] for theirs, ours in _FIELDS.items()}
    return VisionConfig.from_dict(
        {
            **fields,
            **_head(values, where),
            **_positions(values, where),
            "image_size": square_side(values["img_size"], f"{where}.img_size"),
        },
        where,
    )


def _defaults(named: VisionConfig) -> dict[str, Any]:
    """timm's arguments for a released model."""
    pooled = named.pool_type == "attn"
    return {
        **{theirs: getattr(named, ours) for theirs, ours in _FIELDS.items()},
        "img_size": named.image_size,
        "num_classes": named.output_dim or 0,
        # timm pools the towers too that have no pooling in the reference.
        "global_pool": "map" if pooled else "avg",
        "use_post_transformer_norm": None if pooled else False,
        "use_fc_norm": None if pooled else False,
        "attn_pool_num_heads": named.attn_pooler_heads if pooled else None,
        "attn_pool_mlp_ratio": _POOL_MLP_RATIO if pooled else None,
        "ref_feat_shape": named.grid,
        "rope_grid_offset": 1.0 if named.use_cls_token else 0.0,
    }


def _head(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Final norm, pooling and projection, as our fields."""
    pool, classes = values["global_pool"], values["num_classes"]
    if not isinstance(pool, str) or pool not in _POOLS:
        raise InputError(f"{where}.global_pool must be one of {list(_POOLS)}, not {shown(pool)}")
    if type(classes) is not int or classes < 0:
        raise InputError(f"num_classes must be an integer of at least 0, not {shown(classes)}")
    fc_norm = values["use_fc_norm"]
    if fc_norm is None:
        fc_norm = pool == "avg"
    post_norm = values["use_post_transformer_norm"]
    if post_norm is None:
        post_norm = not fc_norm
    if fc_norm and post_norm:
        raise InputError(
            f"{where}: norms before and after the pooling are not supported together: "
            "use_post_transformer_norm and use_fc_norm are both True"
        )
    heads = values["attn_pool_num_heads"] or values["num_heads"]
    ratio = values["attn_pool_mlp_ratio"] or values["mlp_ratio"]
    if pool == "map" and ratio != _POOL_MLP_RATIO:
        raise InputError(
            f"{where}.attn_pool_mlp_ratio must be {_POOL_MLP_RATIO:g}, not {shown(ratio)}"
        )
    return {
        "use_ln_post": fc_norm or post_norm,
        "norm_after_pool": fc_norm,
        "pool_type": _POOLS[pool],
        "output_dim": classes or None,
        **({"attn_pooler_heads": heads} if pool == "map" else {}),
    }


def _positions(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Scaling of positions; without a class token, an offset of all positions changes nothing."""
    offset = values["rope_grid_offset"]
    if values["class_token"] and offset != 1:
        raise InputError(f"{where}.rope_grid_offset must be 1, not {shown(offset)}")
    shape = values["ref_feat_shape"]
    return {"timm_grid": None if shape is None else square_side(shape, f"{where}.ref_feat_shape")}


def _check_notes(data: Mapping[str, Any], vision: VisionConfig) -> None:
    """InputError if fields that timm stores as notes contradict the model."""
    pool = next(name for name, ours in _POOLS.items() if ours == vision.pool_type)
    for key, actual in (("num_features", vision.width), ("global_pool", pool)):
        noted = data.get(key)
        if noted is not None and noted != actual:
            raise InputError(
                f"{key} {shown(noted)} contradicts {shown(actual)}, which architecture and "
                "model_args give"
            )


def _agree(arguments: Mapping[str, Any], key: str, value: object, name: str) -> None:
    if value is not None and arguments.get(key, value) != value:
        raise InputError(
            f"{name} {shown(value)} contradicts model_args.{key} {shown(arguments[key])}"
        )


def _image(pretrained: Mapping[str, Any], size: int) -> ImageSpec:
    """timm's preprocessing for inference, at the image size of the model."""
    given = {k: pretrained[k] for k in _DEFAULT_IMAGE if pretrained.get(k) not in (None, 0, "", [])}
    values = {**_DEFAULT_IMAGE, **given}
    mode, crop = values["crop_mode"], values["crop_pct"]
    if mode not in _CROP_MODES:
        raise InputError(
            f"pretrained_cfg.crop_mode must be one of {list(_CROP_MODES)}, not {shown(mode)}"
        )
    check_value("pretrained_cfg.crop_pct", crop, float)
    mean = check_value("pretrained_cfg.mean", values["mean"], tuple[float, float, float])
    border = mode == "border"
    return ImageSpec.from_dict(
        {
            "height": size,
            "width": size,
            "resize": _CROP_MODES[mode],
            "crop_pct": crop,
            "interpolation": values["interpolation"],
            "mean": mean,
            "std": values["std"],
            **({"fill": [round(255 * value) for value in mean]} if border else {}),
        },
        "pretrained_cfg",
    )


def _sides(size: object, name: str) -> list[int]:
    """Height and width of timm's (channels, height, width)."""
    if not isinstance(size, list | tuple) or len(size) != 3:
        raise InputError(f"{name} must be [3, height, width], not {shown(size)}")
    if size[0] != 3:
        raise InputError(f"{name} must have 3 channels, not {shown(size[0])}")
    return list(size[1:])
