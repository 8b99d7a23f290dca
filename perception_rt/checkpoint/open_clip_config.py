"""The encoder that open_clip's `open_clip_config.json` describes: both towers and preprocessing.

Its vision tower is one of timm's. Fields that are absent have open_clip's defaults, as they do when
open_clip loads the folder: images are scaled by the shorter side, for example.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from perception_rt.checkpoint.json_fields import (
    as_object,
    check_fixed,
    refuse_unknown,
    shown,
    square_side,
)
from perception_rt.checkpoint.timm_encoder import Encoder, timm_tower
from perception_rt.config import PeConfig, TextConfig, VisionConfig
from perception_rt.errors import InputError
from perception_rt.processing.clip_bpe import EOT
from perception_rt.processing.image import ImageSpec, Resize
from perception_rt.records import check_integer, check_value

# Fields of the file and of `model_cfg`; None means that any value is accepted.
_MODEL_FIXED = {"quick_gelu": False, "init_logit_bias": None}
_MODEL_KNOWN = (
    "embed_dim", "vision_cfg", "text_cfg", "custom_text", "init_logit_scale",
    "nonscalar_logit_scale", "output_dict", "cast_dtype", *_MODEL_FIXED,
)  # fmt: skip
_VISION_KNOWN = (
    "image_size", "timm_model_name", "timm_pool", "timm_proj", "timm_proj_bias",
    "timm_model_kwargs",
    # Without an effect on inference.
    "timm_model_pretrained", "timm_drop", "timm_drop_path", "patch_dropout",
    # Replaced by the named model.
    "layers", "width", "head_width", "mlp_ratio", "patch_size",
)  # fmt: skip
# Fields of the blocks of both towers that we support one value of.
_BLOCK_FIXED: Mapping[str, Any] = {
    "act_kwargs": None,
    "norm_kwargs": None,
    "block_type": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
}
# open_clip's own towers have these, and a named one ignores them.
_VISION_FIXED: Mapping[str, Any] = {
    "image_seq_len": None,
    "ls_init_value": None,
    "attentional_pool": False,
    "attn_pooler_queries": 256,
    "attn_pooler_heads": 8,
    "no_ln_pre": False,
    "pos_embed_type": "learnable",
    "final_ln_after_pool": False,
    "pool_type": "tok",
    "output_tokens": False,
    **_BLOCK_FIXED,
}
# Fields of `text_cfg` that we support one value of.
_TEXT_FIXED: Mapping[str, Any] = {
    "text_arch": "clip",
    "hf_model_name": None,
    "hf_tokenizer_name": None,
    "tokenizer_kwargs": None,
    "tokenizer_mode": None,
    "tokenizer_type": "",
    "ls_init_value": None,
    "embed_cls": False,
    "pad_id": 0,
    "no_causal_mask": False,
    "proj_type": "linear",
    "norm_type": None,
    **_BLOCK_FIXED,
}
_TEXT_DEFAULTS: Mapping[str, Any] = {
    "context_length": 77,
    "vocab_size": 49408,
    "width": 512,
    "heads": 8,
    "layers": 12,
    "mlp_ratio": 4.0,
}
_TEXT_IGNORED = (
    "variable_text", "output_tokens", "final_ln_after_pool", "proj_bias", "hf_model_pretrained",
    "hf_proj_type", "hf_pooler_type", "hf_model_config",
)  # fmt: skip
_POOLING = ("pool_type", "eos_id")

_IMAGE_DEFAULTS: Mapping[str, Any] = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}
_RESIZE: Mapping[str, Resize] = {
    "shortest": "center_crop",
    "squash": "squash",
    "longest": "letterbox",
}


def open_clip_encoder(data: Mapping[str, Any], *, with_text: bool) -> Encoder:
    """Reads the content of `open_clip_config.json`.

    Args:
        data: the file's object.
        with_text: whether the text tower is wanted; without it, `text_cfg` is not looked at.

    Raises:
        InputError: names a field that is unknown, missing, contradicts another one, or has a value
            that is not supported.
    """
    refuse_unknown(data, ("model_cfg", "preprocess_cfg"))
    model = as_object(data.get("model_cfg"), "model_cfg")
    refuse_unknown(model, _MODEL_KNOWN, "model_cfg.")
    required = ("embed_dim", "vision_cfg", *(("text_cfg",) if with_text else ()))
    missing = [key for key in required if key not in model]
    if missing:
        raise InputError(f"missing fields {', '.join(f'model_cfg.{key}' for key in missing)}")
    check_integer("model_cfg.embed_dim", model["embed_dim"], 1)
    given = as_object(model["vision_cfg"], "model_cfg.vision_cfg")
    vision, size = _vision(given, model["embed_dim"])
    text = None
    if with_text:
        check_fixed(model, _MODEL_FIXED, "model_cfg.")
        text = _text(as_object(model["text_cfg"], "model_cfg.text_cfg"), model["embed_dim"])
    preprocessing = as_object(data.get("preprocess_cfg") or {}, "preprocess_cfg")
    return Encoder(config=PeConfig(vision=vision, text=text), image=_image(preprocessing, size))


def _vision(given: Mapping[str, Any], embed_dim: int) -> tuple[VisionConfig, int]:
    """The vision tower, and the side of its images in pixels."""
    where = "model_cfg.vision_cfg"
    refuse_unknown(given, (*_VISION_KNOWN, *_VISION_FIXED), f"{where}.")
    check_fixed(given, _VISION_FIXED, f"{where}.")
    name = given.get("timm_model_name")
    if name is None:
        raise InputError(f"{where}.timm_model_name is missing: this is no Perception Encoder")
    arguments = dict(as_object(given.get("timm_model_kwargs") or {}, f"{where}.timm_model_kwargs"))
    for key in ("num_classes", "global_pool"):
        if key in arguments:
            raise InputError(f"{where}.timm_model_kwargs.{key} contradicts embed_dim and timm_pool")
    size = None
    if given.get("image_size") is not None:
        size = square_side(given["image_size"], f"{where}.image_size")
        if not arguments.get("dynamic_img_size", False):
            own = square_side(arguments.setdefault("img_size", size), f"{where} img_size")
            if own != size:
                raise InputError(
                    f"{where}.image_size {size} contradicts timm_model_kwargs.img_size {own}"
                )
    vision = _tower(name, arguments, given, embed_dim)
    return vision, vision.image_size if size is None else size


def _tower(
    name: object, arguments: Mapping[str, Any], given: Mapping[str, Any], embed_dim: int
) -> VisionConfig:
    """The tower with its projection, which is the trunk's own or a layer after it."""
    where = "model_cfg.vision_cfg"
    pool, projection = given.get("timm_pool", "avg"), given.get("timm_proj", "linear")
    whole = f"{where}.timm_model_kwargs"
    if projection in (None, "", "none"):
        classes = 0 if projection == "none" else embed_dim
        return timm_tower(name, {**arguments, "num_classes": classes, "global_pool": pool}, whole)
    if projection != "linear":
        raise InputError(f"{where}.timm_proj must be null, '' or 'linear', not {shown(projection)}")
    trunk = timm_tower(name, {**arguments, "num_classes": 0}, whole)
    # timm's attention pooling stays when open_clip sets another pooling.
    if trunk.pool_type != "attn" and pool:
        if pool == "map":
            raise InputError(f"{where}.timm_pool 'map' is not for {shown(name)}")
        trunk = timm_tower(name, {**arguments, "num_classes": 0, "global_pool": pool}, whole)
    return replace(trunk, output_dim=embed_dim)


def _text(given: Mapping[str, Any], embed_dim: int) -> TextConfig:
    where = "model_cfg.text_cfg"
    known = (*_TEXT_DEFAULTS, *_TEXT_FIXED, *_TEXT_IGNORED, *_POOLING)
    refuse_unknown(given, known, f"{where}.")
    check_fixed(given, _TEXT_FIXED, f"{where}.")
    # Both read the state of the end-of-text token, the highest id.
    pool, end = given.get("pool_type", "argmax"), given.get("eos_id")
    if pool not in ("argmax", "eos") or (pool == "eos" and end != EOT):
        raise InputError(
            f"{where}.pool_type must be 'argmax', or 'eos' with eos_id {EOT}, not {shown(pool)} "
            f"with eos_id {shown(end)}"
        )
    fields = {key: given.get(key, default) for key, default in _TEXT_DEFAULTS.items()}
    return TextConfig.from_dict({**fields, "output_dim": embed_dim}, where)


def _image(given: Mapping[str, Any], size: int) -> ImageSpec:
    """open_clip's preprocessing for inference, at the image size of the model."""
    where = "preprocess_cfg"
    refuse_unknown(given, (*_IMAGE_DEFAULTS, "size", "mode"), f"{where}.")
    check_fixed(given, {"mode": "RGB"}, f"{where}.")
    if given.get("size") is not None and square_side(given["size"], f"{where}.size") != size:
        raise InputError(
            f"{where}.size {shown(given['size'])} contradicts vision_cfg.image_size {size}"
        )
    values = {**_IMAGE_DEFAULTS, **{k: v for k, v in given.items() if v is not None}}
    mode, fill = values["resize_mode"], values["fill_color"]
    if mode not in _RESIZE:
        raise InputError(f"{where}.resize_mode must be one of {list(_RESIZE)}, not {shown(mode)}")
    check_integer(f"{where}.fill_color", fill, 0, 255)
    rows = tuple[float, float, float]
    return ImageSpec(
        height=size,
        width=size,
        resize=_RESIZE[mode],
        interpolation=values["interpolation"],
        rgb_conversion="after_resize",
        fill=(fill, fill, fill) if mode == "longest" else (0, 0, 0),
        mean=check_value(f"{where}.mean", _triple(values["mean"]), rows),
        std=check_value(f"{where}.std", _triple(values["std"]), rows),
    )


def _triple(value: object) -> object:
    """One number stands for all three channels."""
    return (value,) * 3 if type(value) in (int, float) else value
