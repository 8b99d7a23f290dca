"""Checkpoints of language models: two layouts, several kinds of shards, files beside them."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from golden_data import PLM_FILES, TIED_COPY, plm_golden
from safetensors.torch import save_file

from perception_rt.archs import PLM_MODELS
from perception_rt.checkpoint import readers, source
from perception_rt.checkpoint.locate import find_config, find_tokenizer
from perception_rt.checkpoint.names import detect_layout, stored_tensors, to_layout
from perception_rt.checkpoint.source import expected_tensors, open_checkpoint, state_dict
from perception_rt.checkpoint.write import save_checkpoint
from perception_rt.config import VisionConfig
from perception_rt.errors import CheckpointError, InputError
from perception_rt.models.plm import PerceptionLM
from perception_rt.plm_config import DecoderConfig, PlmConfig

TIED, UNTIED = PLM_FILES
LAYOUTS = ("original", "hf")
TINY = PlmConfig(
    decoder=DecoderConfig(dim=8, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=12, multiple_of=4),
    vision=VisionConfig(
        patch_size=2, width=8, layers=1, heads=2, mlp_ratio=2.0, image_size=4, use_cls_token=True,
        pool_type="none", ls_init_value=0.1, use_ln_post=False,
    ),
    image_token_id=3,
)  # fmt: skip
TINY_TIED = replace(TINY, decoder=replace(TINY.decoder, weight_tying=True))
HF_LAYER = (
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj input_layernorm "
    "mlp.gate_proj mlp.up_proj mlp.down_proj post_attention_layernorm"
)
HF_TOWER = (
    "patch_embed.proj.weight cls_token pos_embed norm_pre.weight norm_pre.bias "
    "blocks.0.norm1.weight blocks.0.norm1.bias blocks.0.attn.qkv.weight blocks.0.attn.qkv.bias "
    "blocks.0.attn.proj.weight blocks.0.attn.proj.bias blocks.0.gamma_1 blocks.0.norm2.weight "
    "blocks.0.norm2.bias blocks.0.mlp.fc1.weight blocks.0.mlp.fc1.bias blocks.0.mlp.fc2.weight "
    "blocks.0.mlp.fc2.bias blocks.0.gamma_2"
)


def tiny_state(config=TINY):
    generator = torch.Generator().manual_seed(3)
    return {n: torch.randn(s, generator=generator) for n, s in expected_tensors(config).items()}


def stored_tiny(layout, config=TINY):
    return to_layout(tiny_state(config), layout, config.decoder.head_dim)


def assert_holds(path, config, expected):
    weights = open_checkpoint(path, config)
    for name, tensor in expected.items():
        loaded = weights.load(name)
        assert loaded.is_contiguous()
        assert loaded.dtype == tensor.dtype
        assert torch.equal(loaded, tensor), name
    return weights


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PLM_FILES)
def test_golden_weights_survive_every_layout(tmp_path, name, layout, suffix):
    data = plm_golden(name)
    head_dim = data.config.decoder.head_dim
    path = tmp_path / f"model{suffix}"
    if suffix == ".pth":
        torch.save(to_layout(data.weights, layout, head_dim), path)
    else:
        save_checkpoint(data.weights, path, layout, head_dim=head_dim)
    weights = assert_holds(path, data.config, data.weights)
    assert weights.provenance["layout"] == layout
    assert weights.provenance["format"] == ("pt" if suffix == ".pth" else "safetensors")


def test_the_model_loads_what_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({k: v.bfloat16() for k, v in stored_tiny("hf").items()}, path)
    weights = open_checkpoint(path, TINY, license_note="theirs")
    assert weights.load("output.weight").dtype == torch.bfloat16
    model = PerceptionLM(TINY)
    model.load_state_dict(state_dict(weights, expected_tensors(TINY)), strict=True)
    assert model.norm.weight.dtype == torch.float32
    assert weights.provenance["license"] == "theirs"


def test_original_names_are_ours():
    state = tiny_state()
    stored = to_layout(state, "original")
    assert stored.keys() == state.keys()
    assert all(stored[key] is state[key] or torch.equal(stored[key], state[key]) for key in state)


def test_hf_names():
    layer = "model.language_model.layers.0."
    language = {f"{layer}{name}.weight" for name in HF_LAYER.split()}
    language |= {f"model.language_model.{n}.weight" for n in ("embed_tokens", "norm")}
    projector = {
        f"model.multi_modal_projector.linear_{i}.{kind}"
        for i in (1, 2)
        for kind in ("weight", "bias")
    }
    tower = {f"model.vision_tower.timm_model.{name}" for name in HF_TOWER.split()}
    tied = language | projector | tower
    assert stored_tiny("hf", TINY_TIED).keys() == tied
    stored = stored_tiny("hf")
    assert stored.keys() == tied | {"lm_head.weight"}
    state = tiny_state()
    assert torch.equal(stored["lm_head.weight"], state["output.weight"])
    assert torch.equal(
        stored[f"{layer}mlp.up_proj.weight"], state["layers.0.feed_forward.w3.weight"]
    )
    assert stored["model.vision_tower.timm_model.pos_embed"].shape == (1, 5, 8)


@pytest.mark.parametrize(("ours", "theirs"), [("wq", "q_proj"), ("wk", "k_proj"), ("wv", "v_proj")])
def test_rows_of_queries_and_keys_are_pairs_here_and_halves_in_hf(ours, theirs):
    data = plm_golden(TIED)
    size = data.config.decoder.head_dim
    weight = data.weights[f"layers.1.attention.{ours}.weight"]
    stored = to_layout(data.weights, "hf", size)
    found = stored[f"model.language_model.layers.1.self_attn.{theirs}.weight"]
    for row in range(len(weight)):
        head, channel = divmod(row, size)
        pair, odd = divmod(channel, 2)
        there = row if ours == "wv" else head * size + odd * size // 2 + pair
        assert torch.equal(found[there], weight[row])


@pytest.mark.parametrize("model", PLM_MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_architecture_has_one_key_per_tensor(model, layout):
    config = PLM_MODELS[model]
    shapes = {name: tuple(shape) for name, shape in expected_tensors(config).items()}
    table = stored_tensors(layout, shapes, config.decoder.head_dim)
    keys = [key for entry in table for key in entry.keys]
    assert [entry.name for entry in table] == list(shapes)
    assert len(keys) == len(set(keys)) == len(shapes)
    assert detect_layout(keys, config) == layout
    billions = sum(math.prod(shape) for shape in shapes.values()) / 1e9
    assert billions == pytest.approx({"1": 1.5335, "3": 3.5168, "8": 9.7943}[model[4]], abs=1e-4)


def write_shards(directory, stored):
    keys = sorted(stored)
    parts = {"a-1.safetensors": keys[::2], "a-2.safetensors": keys[1::2]}
    for name, part in parts.items():
        save_file({key: stored[key] for key in part}, directory / name)
    table = {key: name for name, part in parts.items() for key in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))


def test_hf_shards(tmp_path):
    write_shards(tmp_path, stored_tiny("hf"))
    assert_holds(tmp_path, TINY, tiny_state())
    (tmp_path / "a-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read a-1\.safetensors: it is missing from"):
        open_checkpoint(tmp_path, TINY)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_consolidated_file(tmp_path, wrapped):
    stored = stored_tiny("original")
    torch.save({"model": stored} if wrapped else stored, tmp_path / "consolidated.pth")
    weights = assert_holds(tmp_path, TINY, tiny_state())
    assert weights.provenance["file"] == "consolidated.pth"
    # safetensors take precedence, as in a hub snapshot with both formats.
    save_checkpoint({n: t + 1 for n, t in tiny_state().items()}, tmp_path / "m.safetensors", "hf",
                    head_dim=TINY.decoder.head_dim)  # fmt: skip
    assert_holds(tmp_path, TINY, {n: t + 1 for n, t in tiny_state().items()})


def write_consolidated(directory, parts=3):
    stored = stored_tiny("original")
    for part in range(parts):
        keys = sorted(stored)[part::parts]
        torch.save({key: stored[key] for key in keys}, directory / f"consolidated.{part:02d}.pth")


def test_consolidated_parts(tmp_path):
    write_consolidated(tmp_path)
    weights = assert_holds(tmp_path, TINY, tiny_state())
    assert weights.provenance["file"] == "consolidated.*.pth"
    assert weights.provenance["bytes"] == sum(p.stat().st_size for p in tmp_path.iterdir())
    (tmp_path / "consolidated.01.pth").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read consolidated\.01\.pth: it is missing"):
        open_checkpoint(tmp_path, TINY)


def test_a_missing_last_part_and_parts_that_overlap(tmp_path):
    write_consolidated(tmp_path)
    (tmp_path / "consolidated.02.pth").unlink()
    with pytest.raises(CheckpointError, match=r"consolidated\.\*\.pth: .* \d+ missing"):
        open_checkpoint(tmp_path, TINY)
    # Model-parallel shards have each key in every file, with a part of the tensor.
    torch.save({"norm.weight": torch.zeros(4)}, tmp_path / "consolidated.01.pth")
    torch.save({"norm.weight": torch.zeros(4)}, tmp_path / "consolidated.00.pth")
    message = r"two shards hold 'norm\.weight'; a tensor must be in one shard"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path, TINY)


COPIES = [
    ("original", TIED_COPY, "tok_embeddings.weight"),
    ("hf", "lm_head.weight", "model.language_model.embed_tokens.weight"),
]


@pytest.mark.parametrize(("layout", "copy", "embedding"), COPIES)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_tied_head_may_be_stored_if_it_is_the_embedding(
    tmp_path, monkeypatch, layout, copy, embedding, suffix
):
    monkeypatch.setattr(source, "PIECE_ELEMENTS", 24)  # three rows at a time
    stored = stored_tiny(layout, TINY_TIED)
    path = tmp_path / f"a{suffix}"

    def write():
        torch.save(stored, path) if suffix == ".pth" else save_file(stored, path)

    stored[copy] = stored[embedding] if suffix == ".pth" else stored[embedding].clone()
    write()
    assert_holds(path, TINY_TIED, tiny_state(TINY_TIED))
    stored[copy] = stored[embedding].clone()
    stored[copy][11, 7] += 1e-6
    write()
    with pytest.raises(CheckpointError, match=rf"{re.escape(copy)} must equal .* the head is tied"):
        open_checkpoint(path, TINY_TIED)
    stored[copy] = stored[embedding].half()
    write()
    with pytest.raises(CheckpointError, match="must equal"):
        open_checkpoint(path, TINY_TIED)
    stored[copy] = torch.zeros(2, 8)
    write()
    with pytest.raises(CheckpointError, match=r"1 misshapen \(.* is \(2, 8\), not \(12, 8\)\)"):
        open_checkpoint(path, TINY_TIED)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_key_is_required_and_no_other_is_taken(tmp_path, layout):
    stored = stored_tiny(layout)
    path = tmp_path / "a.safetensors"
    for key in stored:
        save_file({k: v for k, v in stored.items() if k != key}, path)
        with pytest.raises(CheckpointError, match=rf"1 missing \({re.escape(key)}\)$"):
            open_checkpoint(path, TINY)
    save_file(stored | {"extra": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r": 1 unexpected \('extra'\)$"):
        open_checkpoint(path, TINY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder": {"dim": 12}}, "Its decoder is 8 wide, not 12"),
        ({"vision": {"width": 16}}, "Its vision tower is 8 wide, not 16"),
        ({"decoder": {"n_layers": 2}}, r"9 missing \(([^,]+, ){5}\.\.\.\)$"),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_architecture_is_named(tmp_path, layout, change, message):
    path = tmp_path / "a.safetensors"
    save_file(stored_tiny(layout), path)
    fields = {name: replace(getattr(TINY, name), **values) for name, values in change.items()}
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path, replace(TINY, **fields))


def test_foreign_keys_are_refused():
    with pytest.raises(CheckpointError, match=r"a language model .*: its 1 keys fit none"):
        detect_layout(["visual.conv1.weight"], TINY)
    with pytest.raises(CheckpointError, match="because there are none"):
        detect_layout([], TINY)
    for layout in LAYOUTS:
        with pytest.raises(CheckpointError, match=f"the {layout} layout has no place for 'extra'"):
            to_layout({"extra": torch.zeros(1)}, layout, 4)
    for name in ("layers.0", "layers.0.attention.wx.weight", "vision_projector.projector.1.bias"):
        with pytest.raises(CheckpointError, match="the hf layout has no place for"):
            to_layout({name: torch.zeros(1)}, "hf", 4)


@pytest.mark.parametrize("head_dim", [None, 3, 7, 16])
def test_hf_needs_a_head_size_that_fits(tmp_path, head_dim):
    with pytest.raises(CheckpointError, match=rf"hf layout needs an even head size .* {head_dim}$"):
        save_checkpoint(tiny_state(), tmp_path / "a.safetensors", "hf", head_dim=head_dim)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_those_of_the_whole(tmp_path, layout):
    path = tmp_path / "a.safetensors"
    save_file(stored_tiny(layout), path)
    weights = open_checkpoint(path, TINY)
    for name, tensor in tiny_state().items():
        rows = weights.load_rows(name, 1, 3)
        assert rows.is_contiguous()
        assert torch.equal(rows, tensor[1:3]), name
        assert torch.equal(weights.load_rows(name, 0, len(tensor)), tensor)


@pytest.mark.parametrize("piece", [1, 24, 1 << 22])
def test_numbers_that_are_not_finite_in_any_piece(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(source, "PIECE_ELEMENTS", piece)
    stored = stored_tiny("hf")
    stored["lm_head.weight"][11, 7] = float("nan")
    save_file(stored, tmp_path / "a.safetensors")
    weights = open_checkpoint(tmp_path / "a.safetensors", TINY)
    weights.load_rows("output.weight", 0, 11)
    for load in (weights.load, lambda name: weights.load_rows(name, 10, 12)):
        with pytest.raises(CheckpointError, match=r"lm_head\.weight has elements that are not fin"):
            load("output.weight")


@pytest.mark.parametrize("parts", ["consolidated", "shards"])
def test_files_are_mapped_anew_and_tensors_outlive_it(tmp_path, monkeypatch, parts):
    monkeypatch.setattr(readers, "MAPPED_BYTES", 1)
    if parts == "shards":
        write_shards(tmp_path, stored_tiny("original"))
    else:
        write_consolidated(tmp_path)
    weights = open_checkpoint(tmp_path, TINY)
    loaded = {name: weights.load(name) for name in tiny_state()}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tiny_state().items())
    file = sorted(tmp_path.glob("*0*" if parts == "consolidated" else "*.safetensors"))[1]
    other = tmp_path / "other"
    other.write_bytes(file.read_bytes())
    other.replace(file)
    with pytest.raises(CheckpointError, match=f"{file.name} changed while it was being read"):
        for name in tiny_state():
            weights.load(name)


MEASURE = """
import json, sys
from perception_rt.checkpoint import readers
from perception_rt.checkpoint.source import expected_tensors, open_checkpoint
from perception_rt.plm_config import PlmConfig

def peak_mib():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024

config = PlmConfig.from_dict(json.loads(sys.argv[1]))
sources = [open_checkpoint(path, config) for path in sys.argv[2:]]
sources[0].load("layers.0.attention.wq.weight")  # torch's own code is mapped when first used
before = peak_mib()
for limit in (16, 4096):
    readers.MAPPED_BYTES = limit << 20
    for source in sources:
        for name in expected_tensors(config):
            source.load(name)
        print(peak_mib() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_reading_a_model_does_not_keep_it_in_memory(tmp_path):
    """Mapped pages that were read count as memory of this process until they are unmapped."""
    decoder = replace(TINY.decoder, dim=1024, n_layers=2, multiple_of=4096, vocab_size=4000)
    config = replace(TINY, decoder=decoder)
    state = {name: torch.zeros(shape) for name, shape in expected_tensors(config).items()}
    size = sum(tensor.nbytes for tensor in state.values()) / 2**20
    assert size > 140
    folders = [tmp_path / "shards", tmp_path / "consolidated"]
    for folder in folders:
        folder.mkdir()
    write_shards(folders[0], state)
    torch.save(state, folders[1] / "consolidated.00.pth")
    command = [sys.executable, "-c", MEASURE, json.dumps(config.to_dict()), *map(str, folders)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    shards, both, shards_kept, both_kept = map(float, result.stdout.split())
    assert shards < 0.5 * size, f"{shards:.0f} of {size:.0f} MiB"
    assert both < 0.5 * size, f"{both:.0f} of {size:.0f} MiB"
    # The measurement sees mapped pages.
    assert shards_kept > 0.8 * size
    assert both_kept > 1.6 * size


def write_beside(directory, *, config=True, tokenizer=True):
    directory.mkdir(parents=True, exist_ok=True)
    if config:
        params = {"model": TINY.to_dict(), "distributed": {"tp_size": 1}}
        (directory / "params.json").write_text(json.dumps(params))
    if tokenizer:
        (directory / "tokenizer.model").write_text("x")


def test_configuration_and_tokenizer_beside_the_weights(tmp_path):
    assert find_config(tmp_path) is None
    assert find_tokenizer(tmp_path / "model.safetensors") is None
    write_beside(tmp_path / "original")
    for path in (tmp_path, tmp_path / "model.safetensors.index.json", str(tmp_path / "a.pth")):
        assert find_config(path) == TINY
        assert find_tokenizer(path) == tmp_path / "original" / "tokenizer.model"
    assert find_config(tmp_path / "original" / "consolidated.pth") == TINY
    write_beside(tmp_path, config=False)
    assert find_tokenizer(tmp_path) == tmp_path / "tokenizer.model"
    assert find_config(tmp_path) == TINY


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"params\.json is not a readable JSON file"),
        ("[" * 100_000, "is not a readable JSON file"),
        ("[]", r"params\.json: config must be an object, not list"),
        ('{"dim": 8}', r"params\.json: config: missing keys \['vision_model'\]"),
        (" " * (1 << 20) + "{}", "is larger than the limit of 1048576 bytes"),
    ],
)
def test_a_configuration_that_is_none(tmp_path, text, message):
    (tmp_path / "params.json").write_text(text)
    with pytest.raises((CheckpointError, InputError), match=message):
        find_config(tmp_path)
