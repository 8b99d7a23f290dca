"""PerceptionLM folders of transformers: what their JSON files say, and how they may differ."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_folder import copy_folder, drop, edit, make_old, put
from safetensors.torch import load_file, save_file

from perception_rt.archs import PLM_MODELS
from perception_rt.checkpoint.locate import (
    check_config,
    find_chat_template,
    find_config,
    find_end_ids,
    find_tiles,
)
from perception_rt.checkpoint.source import expected_tensors, open_checkpoint
from perception_rt.config import VisionConfig
from perception_rt.errors import CheckpointError, InputError
from perception_rt.plm_config import DecoderConfig, PlmConfig
from perception_rt.processing.tiles import TileSpec

CONFIG, PROCESSOR, GENERATION = "config.json", "processor_config.json", "generation_config.json"
TOWER = VisionConfig(
    patch_size=14, width=64, layers=3, heads=4, mlp_ratio=4.0, image_size=56, use_cls_token=True,
    pool_type="none", ls_init_value=0.1, use_ln_post=False,
)  # fmt: skip
MODEL = PlmConfig(
    decoder=DecoderConfig(
        dim=128, n_layers=3, n_heads=8, n_kv_heads=2, vocab_size=1256, multiple_of=512,
        rope_theta=500000.0, rope_scale_factor=32.0, high_freq_factor=4.0, max_seqlen=11520,
        weight_tying=True,
    ),
    vision=TOWER,
    pooling_ratio=2,
    image_token_id=1002,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_folder(tmp_path / "model", weights=False)


def read(folder: Path) -> PlmConfig:
    config = find_config(folder)
    assert isinstance(config, PlmConfig)
    return config


def test_architecture_tiles_and_end_tokens(folder: Path) -> None:
    assert read(folder) == MODEL
    assert read(folder).decoder.ffn_dim == 512
    assert find_tiles(folder, 56) == TileSpec(tile_size=56, max_tiles=36, mode="thumb+tile")
    assert find_end_ids(folder) == (1001, 1009)


def test_files_of_older_releases(folder: Path) -> None:
    put(make_old(folder), "preprocessor_config.json", "max_num_tiles", 9)
    assert read(folder) == MODEL
    assert find_tiles(folder, 56) == TileSpec(tile_size=56, max_tiles=9)
    scaling = json.loads((folder / CONFIG).read_text())["text_config"]["rope_scaling"]
    scaling["type"] = scaling.pop("rope_type")
    put(folder, CONFIG, "text_config.rope_scaling", scaling)
    assert read(folder) == MODEL
    put(folder, CONFIG, "text_config.rope_scaling", None)
    unscaled = DecoderConfig(**(MODEL.decoder.to_dict() | {"rope_scale_factor": 1.0}))
    assert read(folder).decoder == replace(unscaled, high_freq_factor=32.0)


def test_processors_of_two_releases_must_agree(folder: Path) -> None:
    file = "preprocessor_config.json"
    settings = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    for content in (settings, {"max_num_tiles": None, "image_processor_type": "Other"}):
        (folder / file).write_text(json.dumps(content))
        assert find_tiles(folder, 56).max_tiles == 36
    (folder / file).write_text(json.dumps(settings | {"max_num_tiles": 9}))
    message = r"image_processor\.max_num_tiles is 36, and 9 in preprocessor_config\.json; they must"
    with pytest.raises(InputError, match=message):
        find_tiles(folder, 56)


def test_rope_under_names_of_two_releases(folder: Path) -> None:
    """transformers takes one of them silently, and not always the newer one."""
    put(folder, CONFIG, "text_config.rope_theta", 500000.0)
    put(folder, CONFIG, "text_config.rope_scaling", {"type": "llama3", "factor": 32.0})
    assert read(folder) == MODEL
    put(folder, CONFIG, "text_config.rope_scaling", {"rope_type": "llama3", "factor": 8.0})
    with pytest.raises(InputError, match=r"rope_parameters\.factor is 32\.0, and 8\.0 in .*remove"):
        read(folder)
    put(folder, CONFIG, "text_config.rope_scaling", None)
    put(folder, CONFIG, "text_config.rope_theta", 1e4)
    with pytest.raises(InputError, match=r"rope_theta is 500000\.0, and 10000\.0 in text_config"):
        read(folder)


ARGS = "vision_config.model_args"


@pytest.mark.parametrize(
    ("fields", "part", "wanted"),
    [
        ({"text_config.num_key_value_heads": None}, "decoder", {"n_kv_heads": 8}),
        ({"text_config.num_attention_heads": 4, "text_config.head_dim": 32}, "decoder",
         {"n_heads": 4}),
        ({"text_config.head_dim": None}, "decoder", {}),
        ({"text_config.head_dim": 32}, "decoder", {"head_size": 32}),
        ({"text_config.num_attention_heads": 6, "text_config.head_dim": 32}, "decoder",
         {"n_heads": 6, "head_size": 32}),
        ({"tie_word_embeddings": False}, "decoder", {"weight_tying": False}),
        ({"tie_word_embeddings": None, "text_config.tie_word_embeddings": False}, "decoder",
         {"weight_tying": False}),
        ({"text_config.intermediate_size": 1000}, "decoder", {"multiple_of": 1000}),
        ({"text_config.rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "decoder",
         {"rope_theta": 1e4, "rope_scale_factor": 1.0, "high_freq_factor": 32.0}),
        ({f"{ARGS}.init_values": None}, "vision", {"ls_init_value": None}),
        ({f"{ARGS}.use_post_transformer_norm": True}, "vision", {"use_ln_post": True}),
        ({f"{ARGS}.use_post_transformer_norm": None}, "vision", {"use_ln_post": True}),
        ({f"{ARGS}.mlp_ratio": 2}, "vision", {"mlp_ratio": 2.0}),
        ({f"{ARGS}.patch_size": 28, f"{ARGS}.ref_feat_shape": 2}, "vision", {"patch_size": 28}),
        ({f"{ARGS}.ref_feat_shape": [8, 8]}, "vision", {"timm_grid": 8}),
        ({f"{ARGS}.global_pool": "avg", f"{ARGS}.use_post_transformer_norm": None}, "vision", {}),
        ({f"{ARGS}.img_size": 84, f"{ARGS}.ref_feat_shape": [6, 6]}, "vision",
         {"image_size": 84}),
        ({f"{ARGS}.class_token": False, "vision_use_cls_token": False}, "vision",
         {"use_cls_token": False}),
        ({"vision_config.architecture": "vit_pe_lang_large_patch14_448.fb_tiling"}, "vision", {}),
    ],
)  # fmt: skip
def test_fields_that_vary(
    folder: Path, fields: dict[str, Any], part: str, wanted: dict[str, Any]
) -> None:
    for name, value in fields.items():
        put(folder, CONFIG, name, value)
    (folder / PROCESSOR).unlink()  # it names the patch size too
    assert getattr(read(folder), part) == replace(getattr(MODEL, part), **wanted)


@pytest.mark.parametrize("size", [1, 100, 341, 342, 343, 513, 2048])
def test_any_feed_forward_size(folder: Path, size: int) -> None:
    put(folder, CONFIG, "text_config.intermediate_size", size)
    assert read(folder).decoder.ffn_dim == size


def test_a_released_tower_needs_no_arguments(folder: Path) -> None:
    put(folder, CONFIG, "vision_config.model_args", None)
    put(folder, CONFIG, "vision_config.architecture", "vit_pe_core_gigantic_patch14_448")
    put(folder, CONFIG, "vision_use_cls_token", False)
    tower = read(folder).vision
    assert (tower.width, tower.layers, tower.heads, tower.grid) == (1536, 50, 16, 32)
    assert tower.mlp_dim == 8960 and tower.use_ln_post and not tower.use_cls_token


RELEASED = {
    "PLM-1B": (2048, 8192, 16, 32, 32.0, "large_patch14_336", 1024, 23),
    "PLM-3B": (3072, 8192, 28, 24, 32.0, "large_patch14_336", 1024, 23),
    "PLM-8B": (4096, 14336, 32, 32, None, "gigantic_patch14_448", 1536, 47),
}


@pytest.mark.parametrize("name", RELEASED)
def test_the_sizes_of_the_released_models(folder: Path, name: str) -> None:
    """Sizes as published; their folders can be used with `--model`."""
    dim, ffn, layers, heads, scale, tower, width, depth = RELEASED[name]
    text = {
        "hidden_size": dim, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": dim // heads,
        "vocab_size": 128256,
    }  # fmt: skip
    for field, value in text.items():
        put(folder, CONFIG, f"text_config.{field}", value)
    if scale is None:
        rope = {"rope_type": "default", "rope_theta": 500000.0}
        put(folder, CONFIG, "text_config.rope_parameters", rope)
    put(folder, CONFIG, "tie_word_embeddings", scale is not None)
    args = {
        "depth": depth, "embed_dim": width, "global_pool": "", "img_size": [448, 448],
        "init_values": 0.1, "ref_feat_shape": [32, 32], "use_post_transformer_norm": False,
    }  # fmt: skip
    put(folder, CONFIG, "vision_config.architecture", f"vit_pe_core_{tower}")
    put(folder, CONFIG, ARGS, args)
    put(folder, CONFIG, "vision_use_cls_token", width == 1024)
    put(folder, CONFIG, "image_token_id", 128002)
    check_config(PLM_MODELS[name], f"--model {name}", folder)
    config = read(folder)
    assert config.decoder.ffn_dim == PLM_MODELS[name].decoder.ffn_dim
    assert expected_tensors(config) == expected_tensors(PLM_MODELS[name])


@pytest.mark.parametrize(
    "field",
    [
        "text_config",
        "vision_config",
        "vision_use_cls_token",
        "projector_pooling_ratio",
        "image_token_id",
        "vision_config.architecture",
        *(
            f"text_config.{name}"
            for name in (
                "hidden_size", "intermediate_size", "max_position_embeddings",
                "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps",
                "vocab_size", "rope_parameters.rope_theta", "rope_parameters.rope_type",
                "rope_parameters.factor", "rope_parameters.low_freq_factor",
                "rope_parameters.original_max_position_embeddings",
            )
        ),
    ],
)  # fmt: skip
def test_a_missing_field_is_named(folder: Path, field: str) -> None:
    drop(folder, CONFIG, field)
    with pytest.raises(InputError, match=rf"^config\.json: {field} is missing"):
        find_config(folder)


@pytest.mark.parametrize("field", ["rope_theta", "rope_scaling", "rope_scaling.rope_type"])
def test_a_missing_field_of_an_older_release_is_named(folder: Path, field: str) -> None:
    drop(make_old(folder), CONFIG, f"text_config.{field}")
    with pytest.raises(InputError, match=rf"^config\.json: text_config\.{field} is missing"):
        find_config(folder)


def test_all_missing_fields_are_named_and_another_file_may_have_them(folder: Path) -> None:
    drop(folder, CONFIG, "text_config.rope_parameters.rope_theta")
    drop(folder, CONFIG, "text_config.vocab_size")
    message = r"text_config\.vocab_size, text_config\.rope_parameters\.rope_theta are missing"
    with pytest.raises(InputError, match=message):
        find_config(folder)
    (folder / "params.json").write_text(json.dumps({"model": MODEL.to_dict()}))
    assert find_config(folder) == MODEL


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("text_config.head_dim", 15, "config.json: rotary needs an even head size, not 15"),
        ("text_config.hidden_act", "gelu", "hidden_act is 'gelu'; only 'silu' is supported"),
        ("text_config.attention_bias", True, "attention_bias is True; only False is supported"),
        ("text_config.model_type", "qwen2", "text_config.model_type is 'qwen2'; only 'llama'"),
        ("text_config.hidden_size", "128", "config.json: text_config.hidden_size must be int"),
        ("text_config.num_key_value_heads", 3, "config.json: .* 8 is not divisible by n_kv_heads"),
        ("text_config.rope_parameters.rope_type", "yarn", "rope_type is 'yarn'; only 'default'"),
        ("text_config.rope_parameters.partial_rotary_factor", 0.5, "only 1.0 is supported"),
        ("text_config", [], "config.json: text_config must be an object, not list"),
        ("projector_pooling_ratio", 3, "pooling_ratio 3 does not divide the grid of 4"),
        ("image_token_id", 5000, "image_token_id 5000 is not in 0 to 1255"),
        ("vision_use_cls_token", False, "vision_use_cls_token is False, and class_token of"),
        ("vision_config.model_type", "clip", "model_type is 'clip'; only 'timm_wrapper'"),
        ("vision_config.architecture", "resnet50", "config.json: architecture 'resnet50' is not"),
        (f"{ARGS}.swiglu_mlp", True, "vision_config.model_args.swiglu_mlp must be False"),
        (f"{ARGS}.new_thing", 1, "unknown fields vision_config.model_args.new_thing"),
        (f"{ARGS}.img_size", [56, 70], "img_size must be a square, not 56x70"),
        (f"{ARGS}.rope_grid_offset", 0, "rope_grid_offset must be 1, not 0"),
    ],
)
def test_what_is_not_supported_is_named(folder: Path, field: str, value: Any, message: str) -> None:
    put(folder, CONFIG, field, value)
    (folder / PROCESSOR).unlink()  # it would contradict first
    with pytest.raises(InputError, match=message):
        find_config(folder)


def params(folder: Path, model: dict[str, Any], data: dict[str, Any] | None = None) -> None:
    content = {"model": MODEL.to_dict() | model} | ({} if data is None else {"data": data})
    (folder / "params.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"n_heads": 4, "n_kv_heads": 1},
         r"n_heads is 4 in params.json and 8 in config.json \(text_config.num_attention_heads\); "
         r"n_kv_heads is 1 in params.json and 2 in config.json"),
        ({"rope_theta": 1e4}, r"rope_theta is 10000.0 in params.json and 500000.0 in config.json"),
        ({"rope_scale_factor": 1.0}, "rope_scale_factor is 1.0 in params.json and 32.0 in"),
        ({"high_freq_factor": 8.0}, "high_freq_factor is 8.0 in params.json and 4.0 in"),
        ({"max_seqlen": 4096}, "max_seqlen is 4096 in params.json and 11520 in config.json"),
        ({"pooling_ratio": 1}, "pooling_ratio is 1 in params.json and 2 in config.json"),
        ({"weight_tying": False}, "weight_tying is False in params.json and True in config.json"),
        ({"head_size": 32}, r"head_dim is 32 in params.json and 16 in config.json \(text_config"),
        ({"norm_eps": 1e-6}, "norm_eps is 1e-06 in params.json and 1e-05 in config.json"),
        ({"vision_model": TOWER.to_dict() | {"heads": 2}},
         r"vision_model.heads is 2 in params.json and 4 in config.json \(vision_config"),
    ],
)  # fmt: skip
def test_params_must_agree(folder: Path, model: dict[str, Any], message: str) -> None:
    params(folder, model)
    with pytest.raises(InputError, match=message):
        find_config(folder)


def test_params_that_say_the_same_otherwise(folder: Path) -> None:
    """The factors of the feed-forward size may differ, and so may settings of the training."""
    plain = {"ffn_dim_multiplier": 1.5, "multiple_of": 64, "attn_impl": "fmha"}
    params(folder, {**plain, "vision_model": TOWER.to_dict() | {"drop_path": 0.1}})
    assert read(folder).decoder.multiple_of == 64
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 1.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    put(folder, CONFIG, "text_config.rope_parameters", rope)
    params(folder, {"rope_scale_factor": 1.0, "high_freq_factor": 32.0, "old_context_len": 64})
    read(folder)
    shorter = replace(MODEL, decoder=replace(read(folder).decoder, max_seqlen=64))
    check_config(shorter, "mine", folder, except_length=True)
    with pytest.raises(InputError, match="max_seqlen is 64 in mine and 11520 in config"):
        check_config(shorter, "mine", folder)


@pytest.mark.parametrize("field", ["max_num_tiles", "vision_input_type"])
def test_tiles_have_no_default(folder: Path, field: str) -> None:
    drop(folder, PROCESSOR, f"image_processor.{field}")
    message = rf"^processor_config\.json: image_processor\.{field} is missing: copy the proc"
    with pytest.raises(InputError, match=message):
        find_tiles(folder, 56)
    (folder / PROCESSOR).unlink()
    with pytest.raises(InputError, match=r"processor_config\.json: vision_input_type is missing"):
        find_tiles(folder, 56)
    params(folder, {}, {"max_num_tiles": 4, "vision_input_type": "vanilla"})
    assert find_tiles(folder, 56) == TileSpec(tile_size=56, max_tiles=4, mode="vanilla")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("image_processor.tile_size", 448,
         "tile_size is 448, and the image size of the vision tower is 56; they must be equal"),
        ("image_processor.vision_input_type", "square",
         r"^processor_config\.json \(vision_input_type\): image\.mode must be one of"),
        ("image_processor.max_num_tiles", 0,
         r"^processor_config\.json \(max_num_tiles\): .*max_tiles must be an integer from 1"),
        ("image_processor.resample", 5, r"image_processor\.resample is 5, which is no filter"),
        ("image_processor.rescale_factor", 1.0, "rescale_factor is 1.0; only 1/255 is supported"),
        ("image_processor.do_normalize", False, "do_normalize is False; only True is supported"),
        ("image_processor.image_mean", [0.5], r"image_mean must be a list of 3 numbers"),
        ("video_processor.image_std", [1.0, 1.0, 1.0], "frames and tiles must be preprocessed al"),
        ("image_processor", 3, r"processor_config\.json: image_processor must be an object"),
    ],
)  # fmt: skip
def test_a_processor_that_does_not_fit(folder: Path, field: str, value: Any, message: str) -> None:
    put(folder, PROCESSOR, field, value)
    with pytest.raises(InputError, match=message):
        find_tiles(folder, 56)


def test_settings_of_the_processor(folder: Path) -> None:
    fields = {"max_num_tiles": 9, "vision_input_type": "vanilla", "resample": 2,
              "image_mean": [0.4, 0.5, 0.6]}  # fmt: skip
    for part in ("image_processor", "video_processor"):
        for name, value in fields.items():
            put(folder, PROCESSOR, f"{part}.{name}", value)
    put(folder, PROCESSOR, "video_processor.num_frames", 8)
    put(folder, PROCESSOR, "video_processor.size", {"height": 448, "width": 448})  # has no effect
    assert find_tiles(folder, 56) == TileSpec(
        tile_size=56, max_tiles=9, mode="vanilla", max_frames=8, interpolation="bilinear",
        mean=(0.4, 0.5, 0.6),
    )  # fmt: skip


def test_tiles_of_params_and_processor_must_agree(folder: Path) -> None:
    params(folder, {}, {"max_num_tiles": 9, "vision_input_type": "thumb+tile"})
    message = (
        r"data\.max_num_tiles is 9 in params\.json, and image_processor\.max_num_tiles is 36 in "
        r"processor_config\.json; they must agree"
    )
    with pytest.raises(InputError, match=message):
        find_tiles(folder, 56)


@pytest.mark.parametrize(("field", "value"), [("patch_size", 16), ("pooling_ratio", 1)])
def test_the_processor_counts_the_model_s_tokens(folder: Path, field: str, value: int) -> None:
    put(folder, PROCESSOR, field, value)
    message = rf"processor_config\.json: {field} is {value}, and \d+ in config\.json; they must"
    with pytest.raises(InputError, match=message):
        find_config(folder)


def test_end_tokens(folder: Path) -> None:
    put(folder, GENERATION, "eos_token_id", 7)
    assert find_end_ids(folder) == (7,)
    put(folder, GENERATION, "eos_token_id", None)
    assert find_end_ids(folder) == (1001, 1009)
    (folder / GENERATION).unlink()
    put(folder, CONFIG, "text_config.eos_token_id", "2")
    with pytest.raises(InputError, match=r"config\.json: text_config\.eos_token_id must be a tok"):
        find_end_ids(folder)
    drop(folder, CONFIG, "text_config.eos_token_id")
    with pytest.raises(InputError, match=r"config\.json: eos_token_id is missing, also in gener"):
        find_end_ids(folder)
    params(folder, {})
    assert find_end_ids(folder) is None  # the tokenizer's own


def test_a_pointer_of_git_lfs(folder: Path) -> None:
    (folder / CONFIG).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(CheckpointError, match=r"config\.json is a Git LFS pointer, .* lfs pull"):
        find_config(folder)


def test_a_chat_template_is_found(folder: Path) -> None:
    assert find_chat_template(folder) is None
    put(folder, PROCESSOR, "chat_template", "{{ x }}")
    assert find_chat_template(folder) == PROCESSOR
    (folder / "chat_template.jinja").write_text("{{ x }}")
    assert find_chat_template(folder) == "chat_template.jinja"


def old_name(key: str) -> str:
    if key.startswith("lm_head."):
        return f"language_model.{key}"
    key = key.removeprefix("model.")
    return key.replace("language_model.", "language_model.model.", 1)


NAMES = {
    "old": old_name,
    "wrapped": lambda key: f"model.{old_name(key)}",
    "base": lambda key: key.removeprefix("model."),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("names", NAMES)
def test_old_names_and_base_models(tmp_path: Path, names: str, suffix: str) -> None:
    model = copy_folder(tmp_path / "model")
    stored = load_file(model / "model.safetensors")
    renamed = {NAMES[names](key): tensor for key, tensor in stored.items()}
    other = copy_folder(tmp_path / "other", weights=False)
    if suffix == ".bin":
        torch.save(renamed, other / "pytorch_model.bin")
    else:
        save_file(renamed, other / "model.safetensors")
    mine, theirs = open_checkpoint(model, MODEL), open_checkpoint(other, MODEL)
    for name in expected_tensors(MODEL):
        assert torch.equal(mine.load(name), theirs.load(name)), name


@pytest.mark.parametrize("names", ["new", *NAMES])
def test_a_head_that_is_missing_or_there(tmp_path: Path, names: str) -> None:
    model = copy_folder(tmp_path / "model")
    rename = NAMES.get(names, lambda key: key)
    stored = {rename(k): t for k, t in load_file(model / "model.safetensors").items()}
    save_file(stored, model / "model.safetensors")
    edit(model, CONFIG, lambda content: content.update(tie_word_embeddings=False))
    message = (
        r"head of its own, since neither tie_word_embeddings .*: 1 missing \(lm_head\.weight\)$"
    )
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(model, read(model))
    if names == "base":
        return
    stored[rename("lm_head.weight")] = torch.ones(1256, 128)
    save_file(stored, model / "model.safetensors")
    assert torch.equal(
        open_checkpoint(model, read(model)).load("output.weight"), torch.ones(1256, 128)
    )


def test_shards_of_torch(tmp_path: Path) -> None:
    model = copy_folder(tmp_path / "model")
    stored = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    table = {key: names[i % 2] for i, key in enumerate(sorted(stored))}
    for name in names:
        torch.save({k: t for k, t in stored.items() if table[k] == name}, model / name)
    index = model / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    for path in (model, index):
        source = open_checkpoint(path, MODEL)
        assert source.provenance["format"] == "pt"
        key = "model.language_model.norm.weight"
        assert torch.equal(source.load("norm.weight"), stored[key])
    (model / names[1]).unlink()
    with pytest.raises(CheckpointError, match=rf"cannot read {names[1]}: it is missing from the 2"):
        open_checkpoint(model, MODEL)
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"names a shard .*: it must be a \.bin"):
        open_checkpoint(model, MODEL)


def test_the_pooling_of_a_tower_is_left_out(tmp_path: Path) -> None:
    model = copy_folder(tmp_path / "model")
    stored = load_file(model / "model.safetensors")
    stored["model.vision_tower.timm_model.attn_pool.latent"] = torch.zeros(1, 1, 64)
    save_file(stored, model / "model.safetensors")
    source = open_checkpoint(model, MODEL)
    assert source.provenance["note"] == "dropped 1 tensors of the tower's pooling"


def test_a_name_twice(tmp_path: Path) -> None:
    model = copy_folder(tmp_path / "model")
    stored = load_file(model / "model.safetensors")
    stored["language_model.norm.weight"] = torch.ones(128)
    save_file(stored, model / "model.safetensors")
    with pytest.raises(CheckpointError, match="occur under an old and a new name"):
        open_checkpoint(model, MODEL)
