"""Folders of timm and open_clip as those libraries leave them: architecture and preprocessing."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from perception_rt.archs import PE_MODELS
from perception_rt.checkpoint.encoder_config import check_agreement, find_encoder
from perception_rt.checkpoint.names import to_layout
from perception_rt.checkpoint.source import expected_tensors, open_checkpoint
from perception_rt.checkpoint.timm_encoder import MODELS, timm_tower
from perception_rt.config import PeConfig, TextConfig
from perception_rt.errors import CheckpointError, InputError
from perception_rt.processing.image import ImageSpec, load_image

GOLDEN = Path(__file__).parents[1] / "golden"
OPENAI: dict[str, Any] = {
    "rgb_conversion": "after_resize", "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}  # fmt: skip
TIMM = {
    "architecture": "vit_pe_core_tiny_patch16_384",
    "num_classes": 512,
    "num_features": 192,
    "global_pool": "map",
    "pretrained_cfg": {
        "tag": "fb", "input_size": [3, 384, 384], "fixed_input_size": True, "crop_pct": 1.0,
        "interpolation": "bicubic", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
        "num_classes": 512, "pool_size": None, "first_conv": "patch_embed.proj",
        "classifier": "head",
    },
}  # fmt: skip
SPATIAL = "vit_pe_spatial_tiny_patch16_512"
OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 512,
        "vision_cfg": {
            "image_size": 384, "timm_model_name": "vit_pe_core_tiny_patch16_384",
            "timm_model_pretrained": False, "timm_pool": "map", "timm_proj": None,
        },
        "text_cfg": {
            "context_length": 32, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12,
        },
        "custom_text": True,
    },
    "preprocess_cfg": {
        "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bilinear",
        "resize_mode": "squash",
    },
}  # fmt: skip


def changed(data: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy with values at dotted paths, with `__` for the dots; `...` removes a field."""
    copy = json.loads(json.dumps(data))
    for path, value in changes.items():
        *parents, leaf = path.split("__")
        place = copy
        for name in parents:
            place = place.setdefault(name, {})
        if value is ...:
            del place[leaf]
        else:
            place[leaf] = value
    return copy


def write(folder: Path, data: object, name: str = "config.json") -> Path:
    (folder / name).write_text(json.dumps(data))
    return folder


def read(folder: Path) -> Any:
    found = find_encoder(folder)
    assert found is not None
    return found


@pytest.mark.parametrize("name", MODELS)
def test_every_model_of_timm_is_the_released_one(name: str) -> None:
    ours = PE_MODELS[MODELS[name]].vision
    theirs = timm_tower(f"{name}.fb", {}, "model_args")
    pool = ours.pool_type if ours.pool_type == "attn" else "patch_avg"
    assert theirs == replace(ours, pool_type=pool, timm_grid=ours.grid)


def test_a_folder_of_timm(tmp_path: Path) -> None:
    found = read(write(tmp_path, TIMM))
    core = PE_MODELS["PE-Core-T16-384"].vision
    assert found.config == PeConfig(vision=replace(core, timm_grid=24))
    image = ImageSpec(height=384, width=384, resize="center_crop", interpolation="bicubic")
    assert found.image == image
    assert read(tmp_path / "model.safetensors") == found


def test_what_a_fine_tuned_folder_changes(tmp_path: Path) -> None:
    arguments = {
        "img_size": [64, 64], "depth": 3, "embed_dim": 96, "num_heads": 2, "init_values": 1e-5,
        "class_token": False, "drop_path_rate": 0.1, "global_pool": "map", "ref_feat_shape": 4,
    }  # fmt: skip
    data = changed(
        TIMM, num_classes=7, num_features=96, model_args=arguments, label_names=["a"] * 7,
        pretrained_cfg__crop_pct=0.9, pretrained_cfg__crop_mode="border",
        pretrained_cfg__mean=[0.1, 0.2, 0.3], pretrained_cfg__interpolation="bilinear",
    )  # fmt: skip
    found = read(write(tmp_path, data))
    vision = found.config.vision
    assert (vision.image_size, vision.layers, vision.width, vision.heads) == (64, 3, 96, 2)
    assert (vision.ls_init_value, vision.use_cls_token, vision.output_dim) == (1e-5, False, 7)
    assert vision.timm_grid == 4
    assert found.image == ImageSpec(
        height=64, width=64, resize="letterbox", crop_pct=0.9, mean=(0.1, 0.2, 0.3),
        fill=(26, 51, 76),
    )  # fmt: skip


def test_absent_preprocessing_is_what_the_libraries_do_without_it(tmp_path: Path) -> None:
    bare = changed(TIMM, pretrained_cfg={"num_classes": 512})
    assert read(write(tmp_path, bare)).image == ImageSpec(
        height=384, width=384, resize="center_crop", interpolation="bicubic", crop_pct=0.875,
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
    )  # fmt: skip
    (tmp_path / "config.json").unlink()
    bare = changed(OPEN_CLIP, preprocess_cfg=...)
    assert read(write(tmp_path, bare, "open_clip_config.json")).image == ImageSpec(
        height=384, width=384, resize="center_crop", interpolation="bicubic", **OPENAI
    )


def test_a_folder_of_open_clip(tmp_path: Path) -> None:
    found = read(write(tmp_path, OPEN_CLIP, "open_clip_config.json"))
    core = PE_MODELS["PE-Core-T16-384"]
    assert found.config == replace(core, vision=replace(core.vision, timm_grid=24))
    assert found.image == ImageSpec(height=384, width=384, rgb_conversion="after_resize")
    data = changed(
        OPEN_CLIP, model_cfg__embed_dim=32, model_cfg__vision_cfg__image_size=[64, 64],
        model_cfg__vision_cfg__timm_proj="linear", model_cfg__text_cfg={"width": 64, "heads": 2},
        preprocess_cfg__resize_mode="longest", preprocess_cfg__fill_color=114,
    )  # fmt: skip
    found = read(write(tmp_path, data, "open_clip_config.json"))
    assert (found.config.vision.output_dim, found.config.vision.image_size) == (32, 64)
    assert found.config.text == TextConfig(
        context_length=77, width=64, heads=2, layers=12, output_dim=32
    )
    assert (found.image.height, found.image.resize) == (64, "letterbox")
    assert found.image.fill == (114, 114, 114)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "resnet50"}, "architecture 'resnet50' is not one of timm's Perception"),
        ({"model_args": {"swiglu_mlp": True}}, "model_args.swiglu_mlp must be False, not True"),
        ({"model_args": {"features_only": True}}, "features_only must be False, not True"),
        ({"model_args": {"depht": 2}}, "unknown fields model_args.depht; known are"),
        ({"model_args": {"num_classes": 5}}, "num_classes 512 contradicts model_args.num_classes"),
        ({"model_args": {"rope_grid_offset": 0}}, "model_args.rope_grid_offset must be 1, not 0"),
        ({"model_args": {"img_size": [64, 32]}}, "model_args.img_size must be a square, not 64x32"),
        ({"model_args": {"img_size": 65}}, "65 is not divisible by patch_size 16"),
        ({"model_args": {"global_pool": "max"}}, "model_args.global_pool must be one of"),
        (
            {"model_args": {"use_fc_norm": True, "use_post_transformer_norm": True}},
            "norms before and after the pooling are not supported together",
        ),
        ({"model_args": {"depth": "2"}}, "must be int, not str"),
        ({"model_args": {"attn_pool_mlp_ratio": 2}}, "attn_pool_mlp_ratio must be 4, not 2"),
        ({"model_args": [1]}, "model_args must be an object"),
        ({"num_features": 193}, "num_features 193 contradicts 192"),
        ({"global_pool": "token"}, "global_pool 'token' contradicts 'map'"),
        ({"img_size": 64}, "unknown fields img_size"),
        ({"pretrained_cfg__croppct": 1}, "unknown fields pretrained_cfg.croppct"),
        ({"pretrained_cfg__crop_mode": "top"}, "pretrained_cfg.crop_mode must be one of"),
        ({"pretrained_cfg__crop_pct": 1.5}, "crop_pct must be from 0.0469 to 1, not 1.5"),
        ({"pretrained_cfg__interpolation": "random"}, "pretrained_cfg.interpolation must be one"),
        ({"pretrained_cfg__input_size": [1, 384, 384]}, "input_size must have 3 channels, not 1"),
        ({"pretrained_cfg__mean": [0.5]}, "pretrained_cfg.mean must be a list of 3 numbers"),
    ],
)
def test_fields_of_timm_that_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path, changed(TIMM, **changes))
    with pytest.raises(InputError, match=message.replace("(", r"\(")) as caught:
        find_encoder(tmp_path)
    assert str(caught.value).startswith("config.json: ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_cfg__embed_dim": ...}, "missing fields model_cfg.embed_dim"),
        ({"model_cfg__text_cfg": ...}, "missing fields model_cfg.text_cfg"),
        ({"model_cfg__quick_gelu": True}, "model_cfg.quick_gelu must be False, not True"),
        ({"model_cfg__init_logit_bias": -10}, "model_cfg.init_logit_bias must be None, not -10"),
        ({"model_cfg__multimodal_cfg": {}}, "unknown fields model_cfg.multimodal_cfg"),
        ({"model_cfg__vision_cfg__timm_model_name": ...}, "timm_model_name is missing"),
        ({"model_cfg__vision_cfg__timm_model_name": "convnext_base"}, "'convnext_base' is not one"),
        ({"model_cfg__vision_cfg__no_ln_pre": True}, "no_ln_pre must be False, not True"),
        ({"model_cfg__vision_cfg__timm_proj": "mlp"}, "timm_proj must be null, '' or 'linear'"),
        ({"model_cfg__vision_cfg__timm_pool": "max"}, "global_pool must be one of"),
        (
            {"model_cfg__vision_cfg__timm_model_kwargs": {"img_size": 64}},
            "image_size 384 contradicts timm_model_kwargs.img_size 64",
        ),
        (
            {"model_cfg__vision_cfg__timm_model_kwargs": {"num_classes": 5}},
            "timm_model_kwargs.num_classes contradicts embed_dim",
        ),
        ({"model_cfg__text_cfg__no_causal_mask": True}, "no_causal_mask must be False, not True"),
        ({"model_cfg__text_cfg__hf_model_name": "bert"}, "hf_model_name must be None, not 'bert'"),
        ({"model_cfg__text_cfg__pool_type": "last"}, "pool_type must be 'argmax', or 'eos'"),
        ({"model_cfg__text_cfg__widht": 3}, "unknown fields model_cfg.text_cfg.widht"),
        ({"model_cfg__text_cfg__heads": 7}, "512 is not divisible by text.heads 7"),
        ({"preprocess_cfg__size": 224}, "size 224 contradicts vision_cfg.image_size 384"),
        ({"preprocess_cfg__resize_mode": "crop"}, "preprocess_cfg.resize_mode must be one of"),
        ({"preprocess_cfg__fill_color": 300}, "fill_color must be an integer from 0 to 255"),
        ({"preprocess_cfg__mode": "L"}, "preprocess_cfg.mode must be 'RGB', not 'L'"),
    ],
)
def test_fields_of_open_clip_that_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path, changed(OPEN_CLIP, **changes), "open_clip_config.json")
    with pytest.raises(InputError, match=message) as caught:
        find_encoder(tmp_path)
    assert str(caught.value).startswith("open_clip_config.json: ")


@pytest.mark.parametrize(
    ("vision", "pool", "output", "native", "side"),
    [
        ({"timm_proj": "linear", "timm_pool": "avg"}, "attn", 512, 384, 384),
        (
            {"timm_proj": "linear", "timm_pool": "", "timm_model_name": SPATIAL},
            "patch_avg",
            512,
            384,
            384,
        ),
        (
            {"timm_proj": "linear", "timm_pool": "token", "timm_model_name": SPATIAL},
            "tok",
            512,
            384,
            384,
        ),
        (
            {"timm_proj": "none", "timm_model_kwargs": {"embed_dim": 512, "num_heads": 8}},
            "attn",
            None,
            384,
            384,
        ),
        ({"timm_pool": "token"}, "tok", 512, 384, 384),
        ({"image_size": 224}, "attn", 512, 224, 224),
        (
            {"image_size": 224, "timm_model_kwargs": {"dynamic_img_size": True}},
            "attn",
            512,
            384,
            224,
        ),
    ],
)
def test_towers_that_open_clip_makes(
    vision: dict[str, Any], pool: str, output: int | None, native: int, side: int, tmp_path: Path
) -> None:
    data = changed(OPEN_CLIP, **{f"model_cfg__vision_cfg__{k}": v for k, v in vision.items()})
    found = read(write(tmp_path, data, "open_clip_config.json"))
    tower = found.config.vision
    assert (tower.pool_type, tower.output_dim, tower.image_size) == (pool, output, native)
    assert (found.image.height, found.image.width) == (side, side)


@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        ({"global_pool": "avg"}, {"pool_type": "patch_avg", "norm_after_pool": True}),
        ({"global_pool": "avg", "use_fc_norm": False}, {"norm_after_pool": False}),
        ({"global_pool": ""}, {"pool_type": "none", "use_ln_post": True}),
        ({"use_post_transformer_norm": False}, {"use_ln_post": False}),
        ({"class_token": False, "rope_grid_offset": 0}, {"use_cls_token": False}),
        ({"init_values": 0.1, "drop_path_rate": 0.2}, {"ls_init_value": 0.1, "drop_path": 0.0}),
        ({"attn_pool_num_heads": None}, {"attn_pooler_heads": 3}),
        ({"ref_feat_shape": None}, {"timm_grid": None}),
    ],
)
def test_towers_that_timm_makes(arguments: dict[str, Any], fields: dict[str, Any]) -> None:
    tower = timm_tower("vit_pe_core_tiny_patch16_384", arguments, "model_args")
    assert {name: getattr(tower, name) for name in fields} == fields


def test_a_text_tower_that_is_not_wanted_may_be_any(tmp_path: Path) -> None:
    for text in ({"hf_model_name": "bert"}, ...):
        data = changed(OPEN_CLIP, model_cfg__text_cfg=text)
        write(tmp_path, data, "open_clip_config.json")
        found = find_encoder(tmp_path, with_text=False)
        assert found is not None
        assert found.config.text is None
    with pytest.raises(InputError, match=r"missing fields model_cfg\.text_cfg"):
        find_encoder(tmp_path)


def test_a_model_of_timm_that_transformers_saved(tmp_path: Path) -> None:
    timm = changed(TIMM, model_args={"depth": 1})
    saved = changed(
        timm, model_type="timm_wrapper", architectures=["TimmWrapperForImageClassification"],
        do_pooling=True, dtype="float32", initializer_range=0.02, transformers_version="5.24.0",
        num_classes=5, label_names=["a", "b", "c", "d", "e"],
    )  # fmt: skip
    found = read(write(tmp_path, saved))
    assert found == read(write(tmp_path, changed(timm, num_classes=5)))
    shapes = {name: tuple(shape) for name, shape in expected_tensors(found.config).items()}
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    keyed = {f"timm_model.{k}": v for k, v in to_layout(tensors, "timm", None).items()}
    save_file(keyed, tmp_path / "model.safetensors")
    open_checkpoint(tmp_path, found.config)
    # The base model has no classes, although transformers notes some.
    bare = read(write(tmp_path, changed(saved, architectures=["TimmWrapperModel"])))
    assert bare == read(write(tmp_path, changed(timm, num_classes=0)))
    write(tmp_path, changed(saved, pretrained_cfg=...))
    with pytest.raises(
        InputError, match=r"^config\.json: pretrained_cfg is missing, .* copy it from"
    ):
        find_encoder(tmp_path)


def test_files_that_describe_no_encoder(tmp_path: Path) -> None:
    assert find_encoder(tmp_path) is None
    assert find_encoder(write(tmp_path, {"model_type": "llama"})) is None
    assert find_encoder(write(tmp_path, [])) is None
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not a readable JSON file"):
        find_encoder(tmp_path)
    write(tmp_path, [], "open_clip_config.json").joinpath("config.json").unlink()
    with pytest.raises(InputError, match=r"open_clip_config\.json: the content must be an object"):
        find_encoder(tmp_path)


def test_two_configurations_in_a_folder(tmp_path: Path) -> None:
    write(tmp_path, changed(TIMM, num_classes=7))
    write(tmp_path, OPEN_CLIP, "open_clip_config.json")
    names = ("model.safetensors", "open_clip_model.safetensors")
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"one of model\.safetensors, open_clip_model\.safetens"):
        find_encoder(tmp_path)
    assert read(tmp_path / names[0]).config.vision.output_dim == 7
    assert read(tmp_path / names[1]).config.text is not None


def test_an_architecture_must_agree_with_the_folder() -> None:
    given = PE_MODELS["PE-Spatial-T16-512"]
    vision = timm_tower(SPATIAL, {}, "model_args")
    check_agreement(given, PeConfig(vision=vision), "--config")
    wrong = PeConfig(vision=replace(vision, heads=1, ls_init_value=0.1))
    with pytest.raises(InputError, match="--config contradicts the configuration") as caught:
        check_agreement(given, wrong, "--config")
    assert "vision.heads is 3, not 1" in str(caught.value)
    assert "vision.ls_init_value is False, not True" in str(caught.value)


def test_pixels_are_those_of_timm_and_open_clip(tmp_path: Path) -> None:
    with np.load(GOLDEN / "port_pixels.npz") as golden:
        cases = json.loads(str(golden["cases"]))
        pictures = [golden[name] for name in golden if name.startswith("picture")]
        for name, fields in cases.items():
            if name.startswith("timm"):
                data = changed(TIMM, model_args={"img_size": 20, "patch_size": 4})
                write(tmp_path, data | {"pretrained_cfg": fields | {"num_classes": 512}})
                (tmp_path / "open_clip_config.json").unlink(missing_ok=True)
            else:
                kwargs = {"img_size": 20, "patch_size": 4}
                data = changed(
                    OPEN_CLIP, model_cfg__vision_cfg__image_size=20,
                    model_cfg__vision_cfg__timm_model_kwargs=kwargs, preprocess_cfg=fields,
                )  # fmt: skip
                write(tmp_path, data, "open_clip_config.json")
                (tmp_path / "config.json").unlink(missing_ok=True)
            spec = read(tmp_path).image
            for picture, expected in zip(pictures, golden[name], strict=True):
                np.testing.assert_array_equal(load_image(picture, spec), expected, err_msg=name)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
def test_borders_of_every_mode_are_those_of_open_clip(mode: str) -> None:
    with np.load(GOLDEN / "port_modes.npz") as golden:
        data, expected = golden[f"{mode}/file"].tobytes(), golden[f"{mode}/letterbox"]
    spec = ImageSpec(
        height=32, width=32, resize="letterbox", fill=(114, 114, 114), interpolation="bicubic",
        rgb_conversion="after_resize",
    )  # fmt: skip
    np.testing.assert_array_equal(load_image(data, spec), expected)


def test_preprocessing_fields_are_stored_only_where_they_differ() -> None:
    plain = ImageSpec(height=32, width=32)
    assert not {"crop_pct", "fill"} & plain.to_dict().keys()
    cropped = replace(plain, crop_pct=0.9, fill=(1, 2, 3))
    assert ImageSpec.from_dict(cropped.to_dict()) == cropped
    for change, message in (
        ({"crop_pct": 1e-320}, "crop_pct must be from 0.00391 to 1"),
        ({"crop_pct": float("nan")}, "crop_pct must be"),
        ({"fill": (0, 0, 256)}, "fill must be an integer from 0 to 255"),
        ({"fill": (0, 0)}, "fill must be a list of 3"),
    ):
        with pytest.raises(InputError, match=message):
            replace(plain, **change)  # type: ignore[arg-type]
