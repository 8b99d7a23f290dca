import hashlib
import json
import re
from dataclasses import replace

import pytest
import torch
from golden_weights import FILES, VISION_FILES, our_names, read_golden
from safetensors.torch import save_file

from perception_rt.checkpoint.names import to_layout
from perception_rt.checkpoint.source import expected_tensors, open_checkpoint, state_dict
from perception_rt.checkpoint.write import save_checkpoint
from perception_rt.config import PeConfig, TextConfig, VisionConfig
from perception_rt.errors import CheckpointError
from perception_rt.models.pe import PerceptionEncoder

TINY = PeConfig(
    vision=VisionConfig(
        patch_size=2, width=8, layers=1, heads=2, mlp_ratio=2.0, output_dim=4, image_size=4,
        use_cls_token=True, attn_pooler_heads=2, ls_init_value=0.1,
    ),
    text=TextConfig(context_length=4, width=4, heads=1, layers=1, output_dim=4, vocab_size=8),
)  # fmt: skip
TINY_VISION = PeConfig(vision=TINY.vision)


def tiny_state(config=TINY):
    generator = torch.Generator().manual_seed(3)
    return {n: torch.randn(s, generator=generator) for n, s in expected_tensors(config).items()}


def assert_holds(path, config, expected):
    source = open_checkpoint(path, config)
    for name, tensor in expected.items():
        loaded = source.load(name)
        assert loaded.is_contiguous()
        assert loaded.dtype == tensor.dtype
        assert torch.equal(loaded, tensor), name
    return source


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("name", "layout"),
    [(n, "timm") for n in VISION_FILES]
    + [(n, "reference") for n in FILES]
    + [("clip_core", "open_clip")],
)
def test_golden_weights_survive_every_layout(tmp_path, name, layout, suffix):
    config, weights = read_golden(name)
    ours = our_names(weights)
    path = tmp_path / f"model{suffix}"
    if suffix == ".pt":
        torch.save(to_layout(ours, layout), path)
    else:
        save_checkpoint(ours, path, layout)
    source = assert_holds(path, config, ours)
    assert source.provenance == {
        "source": "file",
        "format": "safetensors" if suffix == ".safetensors" else "pt",
        "layout": layout,
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "bytes": path.stat().st_size,
        "license": "not stated",
    }


def test_the_model_loads_what_is_read(tmp_path):
    config, weights = read_golden("clip_core")
    path = tmp_path / "clip.safetensors"
    save_file({key: tensor.half() for key, tensor in weights.items()}, path)
    model = PerceptionEncoder(config)
    source = open_checkpoint(path, config, license_note="Apache-2.0")
    model.load_state_dict(state_dict(source, expected_tensors(config)), strict=True)
    assert model.logit_scale.dtype == torch.float32
    assert source.provenance["license"] == "Apache-2.0"


@pytest.mark.parametrize("wrapper", ["state_dict", "weights", "model"])
def test_wrapped_and_prefixed_pt(tmp_path, wrapper):
    stored = to_layout(tiny_state(), "reference")
    path = tmp_path / "wrapped.pth"
    inner = {f"module.{key}": torch.nn.Parameter(tensor) for key, tensor in stored.items()}
    torch.save({"epoch": 3, wrapper: inner}, path)
    assert_holds(path, TINY, tiny_state())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_stored_dtypes_are_kept(tmp_path, dtype, suffix):
    state = {name: tensor.to(dtype) for name, tensor in tiny_state().items()}
    stored = to_layout(state, "open_clip")
    path = tmp_path / f"model{suffix}"
    torch.save(stored, path) if suffix == ".bin" else save_file(stored, path)
    assert_holds(path, TINY, state)


def test_pt_tensors_that_are_not_contiguous(tmp_path):
    stored = to_layout(tiny_state(), "reference")
    stored["visual.proj"] = stored["visual.proj"].T.contiguous().T
    torch.save(stored, tmp_path / "a.pt")
    assert_holds(tmp_path / "a.pt", TINY, tiny_state())


def test_logit_scale_as_a_vector_and_a_saved_mask(tmp_path):
    stored = to_layout(tiny_state(), "open_clip")
    stored["logit_scale"] = stored["logit_scale"].reshape(1)
    stored["text.attn_mask"] = torch.full((4, 4), float("-inf")).triu(1)
    save_file(stored, tmp_path / "a.safetensors")
    assert_holds(tmp_path / "a.safetensors", TINY, tiny_state())


def test_whole_clip_for_a_vision_architecture(tmp_path):
    path = tmp_path / "clip.safetensors"
    save_checkpoint(tiny_state(), path)
    vision = {k: v for k, v in tiny_state().items() if k.startswith("visual.")}
    source = assert_holds(path, TINY_VISION, vision)
    dropped = len(tiny_state()) - len(vision)
    assert source.provenance["note"] == f"dropped {dropped} non-visual tensors"
    save_checkpoint(tiny_state(), path, "open_clip")
    source = assert_holds(path, TINY_VISION, vision)
    assert source.provenance["note"] == f"dropped {dropped} non-visual tensors"


def write_shards(directory, stored):
    keys = sorted(stored)
    parts = {"a-1.safetensors": keys[::2], "a-2.safetensors": keys[1::2]}
    for name, part in parts.items():
        save_file({key: stored[key] for key in part}, directory / name)
    table = {key: name for name, part in parts.items() for key in part}
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return index


def test_shards(tmp_path):
    index = write_shards(tmp_path, to_layout(tiny_state(), "reference"))
    source = assert_holds(tmp_path, TINY, tiny_state())
    lines = "".join(
        f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n"
        for p in sorted(tmp_path.glob("*.safetensors"))
    )
    assert source.provenance["sha256"] == hashlib.sha256(lines.encode()).hexdigest()
    assert source.provenance["file"] == index.name
    assert_holds(index, TINY, tiny_state())
    (tmp_path / "a-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read a-2\.safetensors"):
        open_checkpoint(index, TINY)


def test_a_tensor_in_two_shards(tmp_path):
    stored = to_layout(tiny_state(), "reference")
    write_shards(tmp_path, stored)
    save_file(stored, tmp_path / "a-1.safetensors")
    with pytest.raises(CheckpointError, match="two shards hold"):
        open_checkpoint(tmp_path, TINY)


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "x\\a.safetensors", "..", 3])
def test_shards_must_be_plain_names(tmp_path, name):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match=r"must be a \.safetensors file name without a"):
        open_checkpoint(index, TINY)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', "[" * 100_000])
def test_damaged_index(tmp_path, text):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        open_checkpoint(index, TINY)


def test_a_directory_with_one_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no weights: neither model\.safetensors\.index"):
        open_checkpoint(tmp_path, TINY)
    save_checkpoint(tiny_state(), tmp_path / "open_clip_model.safetensors", "open_clip")
    assert_holds(tmp_path, TINY, tiny_state())


@pytest.mark.parametrize("layout", ["reference", "timm", "open_clip"])
def test_each_key_is_required(tmp_path, layout):
    config = TINY_VISION if layout == "timm" else TINY
    stored = to_layout(tiny_state(config), layout)
    path = tmp_path / "a.safetensors"
    for key in stored.keys() - {"head.bias", "visual.trunk.head.bias"}:
        save_file({k: v for k, v in stored.items() if k != key}, path)
        with pytest.raises(CheckpointError, match=rf"1 missing \({re.escape(key)}\)$"):
            open_checkpoint(path, config)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_extra_and_misshapen_tensors(tmp_path, suffix):
    stored = to_layout(tiny_state(), "reference")
    stored["visual.positional_embedding"] = torch.zeros(10, 8)  # of a 3x3 grid, not 2x2
    stored["visual.head.weight"] = torch.zeros(2)
    path = tmp_path / f"a{suffix}"
    torch.save(stored, path) if suffix == ".pt" else save_file(stored, path)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path, TINY)
    assert str(caught.value) == (
        f"{path.name}: does not fit the architecture: 1 unexpected ('visual.head.weight'); "
        "1 misshapen (visual.positional_embedding is (10, 8), not (5, 8))"
    )


def test_another_architecture_is_named_and_lists_are_short(tmp_path):
    _, weights = read_golden("pe_lang")
    save_file(weights, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "a.safetensors", TINY_VISION)
    message = str(caught.value)
    assert message.endswith("Other architecture? Its vision tower is 96 wide, not 8")
    assert "28 unexpected (" in message
    assert re.search(r" 14 missing \(([^,]+, ){5}\.\.\.\)", message)
    assert "\n" not in message


BIASED = PeConfig(
    vision=replace(TINY.vision, proj_bias=True), text=replace(TINY.text, proj_bias=True)
)


@pytest.mark.parametrize("layout", ["reference", "timm", "open_clip"])
def test_biases_of_projections_are_found(tmp_path, layout):
    config = PeConfig(vision=BIASED.vision) if layout == "timm" else BIASED
    plain = TINY_VISION if layout == "timm" else TINY
    state = tiny_state(config)
    save_checkpoint(state, tmp_path / "a.safetensors", layout)
    assert_holds(tmp_path / "a.safetensors", config, state)
    source = open_checkpoint(tmp_path / "a.safetensors", plain, find_biases=True)
    assert source.config == config
    assert torch.equal(source.load("visual.proj_bias"), state["visual.proj_bias"])
    assert torch.equal(source.load_rows("visual.proj_bias", 1, 3), state["visual.proj_bias"][1:3])
    message = r"bias is not zero, but the architecture has no bias there: set vision\.proj_bias"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "a.safetensors", plain)


@pytest.mark.parametrize("layout", ["reference", "timm", "open_clip"])
def test_a_missing_bias_of_a_projection_is_zero(tmp_path, layout):
    plain = TINY_VISION if layout == "timm" else TINY
    stored = to_layout(tiny_state(plain), layout)
    for name in ("kept", "left out"):
        path = tmp_path / f"{name}.safetensors"
        save_file(stored, path)
        assert open_checkpoint(path, plain, find_biases=True).config == plain
        vision = PeConfig(vision=BIASED.vision, text=plain.text)
        source = open_checkpoint(path, vision)
        assert torch.equal(source.load("visual.proj_bias"), torch.zeros(4))
        stored = {key: tensor for key, tensor in stored.items() if not key.endswith("head.bias")}


def test_a_misshapen_bias_is_refused(tmp_path):
    stored = to_layout(tiny_state(TINY_VISION), "timm")
    stored["head.bias"] = torch.ones(3)
    save_file(stored, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"head\.bias is \(3,\), not \(4,\)"):
        open_checkpoint(tmp_path / "a.safetensors", TINY_VISION, find_biases=True)


def test_other_forms_of_open_clip(tmp_path):
    """A projection of open_clip's own, and a text tower without `text.` in the keys."""
    state = tiny_state(BIASED)
    stored = {
        key.removeprefix("text.").replace("trunk.head.", "head.proj."): tensor
        for key, tensor in to_layout(state, "open_clip").items()
    }
    assert "visual.head.proj.bias" in stored
    assert "text_projection.bias" in stored
    save_file(stored, tmp_path / "a.safetensors")
    assert_holds(tmp_path / "a.safetensors", BIASED, state)


@pytest.mark.parametrize("layout", ["reference", "timm"])
def test_a_vision_tower_without_the_text_tower(tmp_path, layout):
    save_checkpoint(tiny_state(TINY_VISION), tmp_path / "a.safetensors", layout)
    with pytest.raises(CheckpointError, match=r"holds only a vision tower.*--towers vision"):
        open_checkpoint(tmp_path / "a.safetensors", TINY)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_numbers_that_are_not_finite(tmp_path, value, suffix):
    stored = to_layout(tiny_state(), "reference")
    stored["visual.ln_pre.weight"][3] = value
    path = tmp_path / f"a{suffix}"
    torch.save(stored, path) if suffix == ".pt" else save_file(stored, path)
    source = open_checkpoint(path, TINY)
    source.load("visual.ln_pre.bias")
    with pytest.raises(CheckpointError, match=r"visual\.ln_pre\.weight has elements"):
        source.load("visual.ln_pre.weight")


def test_unknown_parameter(tmp_path):
    save_checkpoint(tiny_state(), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"no parameter 'visual\.nothing'"):
        open_checkpoint(tmp_path / "a.safetensors", TINY).load("visual.nothing")


def test_a_file_replaced_after_opening_has_no_digest(tmp_path):
    path = tmp_path / "a.safetensors"
    save_checkpoint(tiny_state(), path)
    source = open_checkpoint(path, TINY)
    state = tiny_state()
    state["visual.proj"] += 1
    save_checkpoint(state, path)
    with pytest.raises(CheckpointError, match=r"a\.safetensors changed while it was being read"):
        _ = source.provenance
    assert torch.equal(source.load("visual.proj"), tiny_state()["visual.proj"])


def test_another_image_size_in_a_layout_of_timm_is_named(tmp_path):
    stored = to_layout(tiny_state(TINY_VISION), "timm")
    stored["pos_embed"] = torch.zeros(1, 10, 8)  # of a 3x3 grid, not 2x2
    save_file(stored, tmp_path / "a.safetensors")
    message = "Its positions are for images of 6 pixels, not 4: give the configuration this size"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "a.safetensors", TINY_VISION)
