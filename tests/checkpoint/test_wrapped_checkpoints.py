"""Checkpoints as training code leaves them: containers, prefixes, averaged copies, folders."""

import argparse
import re
import shlex
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from perception_rt.checkpoint.locate import find_tokenizer
from perception_rt.checkpoint.names import to_layout
from perception_rt.checkpoint.source import expected_tensors, open_checkpoint
from perception_rt.checkpoint.wrappers import without_wrappers
from perception_rt.config import PeConfig, TextConfig, VisionConfig
from perception_rt.errors import CheckpointError
from perception_rt.models.pe import PerceptionEncoder
from perception_rt.plm_config import DecoderConfig, PlmConfig

CLIP = PeConfig(
    vision=VisionConfig(
        patch_size=2, width=8, layers=1, heads=2, mlp_ratio=2.0, output_dim=4, image_size=4,
        use_cls_token=True, attn_pooler_heads=2, ls_init_value=0.1,
    ),
    text=TextConfig(context_length=4, width=4, heads=1, layers=1, output_dim=4, vocab_size=8),
)  # fmt: skip
TOWER = PeConfig(vision=CLIP.vision)
PLM = PlmConfig(
    decoder=DecoderConfig(dim=8, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=12, multiple_of=4),
    vision=VisionConfig(
        patch_size=2, width=8, layers=1, heads=2, mlp_ratio=2.0, image_size=4, use_cls_token=True,
        pool_type="none", ls_init_value=0.1, use_ln_post=False,
    ),
    image_token_id=3,
)  # fmt: skip
LAYOUTS = [
    (CLIP, "reference"), (CLIP, "open_clip"), (TOWER, "timm"), (TOWER, "reference"),
    (PLM, "original"), (PLM, "hf"),
]  # fmt: skip


def state(config=CLIP, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator) for n, s in expected_tensors(config).items()}


def stored(config=CLIP, layout="reference", seed=1, prefix=""):
    head_dim = config.decoder.head_dim if config is PLM else None
    tensors = to_layout(state(config, seed), layout, head_dim)
    return {prefix + key: tensor for key, tensor in tensors.items()}


def assert_holds(path, config=CLIP, seed=1, **options):
    source = open_checkpoint(path, config, **options)
    for name, tensor in state(config, seed).items():
        assert torch.equal(source.load(name), tensor), name
    return source


PREFIXES = [
    "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "net.", "clip.",
    "model._orig_mod.", "model.module.", "_orig_mod.model.", "model.backbone.", "student.encoder.",
]  # fmt: skip


@pytest.mark.parametrize(("config", "layout"), LAYOUTS)
def test_every_prefix_in_every_layout(tmp_path, config, layout):
    for number, prefix in enumerate(PREFIXES if layout == "reference" else PREFIXES[7:9]):
        path = tmp_path / f"{number}.safetensors"
        save_file(stored(config, layout, prefix=prefix), path)
        assert_holds(path, config)


def test_a_wrapper_in_the_middle_of_a_key(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {key.replace("visual.", "visual._orig_mod."): t for key, t in stored().items()}
    save_file({f"module.{key}": tensor for key, tensor in tensors.items()}, path)
    assert_holds(path)


CONTAINERS = [
    ("state_dict",), ("model",), ("model_state_dict",), ("module",), ("net",), ("weights",),
    ("model", "state_dict"), ("clip_model",), ("checkpoint", "model"),
]  # fmt: skip


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".pth.tar", ".bin"])
def test_every_container_in_every_file(tmp_path, suffix):
    for names in CONTAINERS if suffix == ".ckpt" else CONTAINERS[:1]:
        content = stored(prefix="module.")
        for name in reversed(names):
            content = {name: content, "epoch": 3, "best_acc1": torch.tensor(0.5)}
        optimizer = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}
        content |= {"optimizer": optimizer, "arch": "clip"}
        path = tmp_path / f"{'-'.join(names)}{suffix}"
        torch.save(content, path)
        source = assert_holds(path)
        assert source.notes == []
        assert source.provenance["format"] == "pt"


def lightning(**more):
    """A checkpoint as Lightning's Trainer saves it."""
    moments = {"exp_avg": torch.zeros(2, 2), "exp_avg_sq": torch.zeros(2, 2), "step": 3}
    return {
        "epoch": 1, "global_step": 10, "pytorch-lightning_version": "2.5.0",
        "state_dict": stored(prefix="model."),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"ready": 2}}}},
        "callbacks": {
            "EMAModelCheckpoint{'monitor': 'loss'}": {
                "best_model_score": torch.tensor(0.5),
                "best_k_models": {"/x/epoch=1.ckpt": torch.tensor(0.5)},
            }
        },
        "optimizer_states": [{"state": {0: moments}, "param_groups": [{"params": [0]}]}],
        "lr_schedulers": [{"last_epoch": 1}],
        "hparams_name": "kwargs", "hyper_parameters": {"lr": 1e-3, "betas": (0.9, 0.95)},
        **more,
    }  # fmt: skip


def test_lightning(tmp_path):
    torch.save(lightning(), tmp_path / "last.ckpt")
    assert assert_holds(tmp_path / "last.ckpt").notes == []


def test_files_of_torch_before_version_1_6(tmp_path):
    path = tmp_path / "old.pth.tar"
    torch.save({"state_dict": stored()}, path, _use_new_zipfile_serialization=False)
    assert_holds(path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"old\.pth\.tar is damaged"):
        open_checkpoint(path, CLIP)


@pytest.mark.parametrize(
    ("name", "inner"),
    [
        ("state_dict_ema", ()), ("model_ema", ("module",)), ("ema", ("state_dict",)),
        ("ema_state_dict", ()), ("ema_model", ("model", "module")), ("EMAWeights", ()),
    ],
)  # fmt: skip
def test_averaged_weights_are_taken_on_request(tmp_path, name, inner):
    averaged = stored(seed=2, prefix="module.")
    for key in inner:
        averaged = {key: averaged, "updates": 10, "decay": 0.99}
    path = tmp_path / "a.pth.tar"
    torch.save({"state_dict": stored(), name: averaged, "epoch": 1}, path)
    source = assert_holds(path)
    (note,) = source.notes
    assert note.startswith("left out EMA weights, which --ema selects: ") and name in note
    assert source.provenance["note"] == note
    assert assert_holds(path, seed=2, ema=True).notes == ["averaged weights (EMA)"]


@pytest.mark.parametrize("prefix", ["ema_model.", "model_ema.module.", "ema.model.", "ema."])
@pytest.mark.parametrize(
    ("config", "layout", "model"),
    [
        (CLIP, "reference", ""),
        (CLIP, "open_clip", "model."),
        (PLM, "original", "model."),
        (PLM, "hf", ""),
    ],
)
def test_averaged_weights_beside_the_others(tmp_path, prefix, model, config, layout):
    both = stored(config, layout, prefix=model)
    both |= stored(config, layout, seed=2, prefix=prefix)
    count = {f"{prefix}num_updates": torch.tensor(3)}
    torch.save(lightning(state_dict=both | count), tmp_path / "a.ckpt")
    assert "--ema selects" in assert_holds(tmp_path / "a.ckpt", config).notes[0]
    assert_holds(tmp_path / "a.ckpt", config, seed=2, ema=True)


def test_averaged_weights_whose_names_lost_their_dots(tmp_path):
    joined = {f"model_ema.{key.replace('.', '')}": t for key, t in stored(seed=2).items()}
    counters = {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(3)}
    tensors = stored(prefix="model.") | joined | counters
    torch.save(lightning(state_dict=tensors), tmp_path / "a.ckpt")
    assert "--ema selects: model_ema" in assert_holds(tmp_path / "a.ckpt").notes[0]
    assert_holds(tmp_path / "a.ckpt", seed=2, ema=True)


def test_averaged_weights_of_a_callback(tmp_path):
    more = {"EMACallback": {"ema_state_dict": stored(seed=2, prefix="model.")}}
    torch.save(lightning(callbacks=more), tmp_path / "a.ckpt")
    assert "EMACallback" in assert_holds(tmp_path / "a.ckpt").notes[0]
    assert_holds(tmp_path / "a.ckpt", seed=2, ema=True)


def test_an_averaged_model_of_torch(tmp_path):
    model = PerceptionEncoder(CLIP)
    model.load_state_dict(state())
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    tensors = {
        key.replace("module.text.", "module."): tensor
        for key, tensor in averaged.state_dict().items()
    }
    assert "n_averaged" in tensors
    torch.save(tensors, tmp_path / "alone.pt")
    assert assert_holds(tmp_path / "alone.pt").notes == ["averaged weights (EMA)"]
    assert_holds(tmp_path / "alone.pt", ema=True)
    torch.save({"model": stored(seed=2), "model_ema": tensors}, tmp_path / "both.pt")
    assert_holds(tmp_path / "both.pt", seed=2)
    assert_holds(tmp_path / "both.pt", ema=True)


def test_averaged_weights_without_names(tmp_path):
    """Those of torch_ema and diffusers: a list in the order of the parameters."""
    shadow = {"decay": 0.9, "num_updates": 3, "shadow_params": list(stored(seed=2).values())}
    torch.save({"model": stored(), "ema": shadow}, tmp_path / "a.pt")
    assert assert_holds(tmp_path / "a.pt").notes == [
        "left out EMA weights, which --ema selects: ema.shadow_params"
    ]
    with pytest.raises(CheckpointError, match=r"a\.pt: .* ema\.shadow_params are a list without"):
        open_checkpoint(tmp_path / "a.pt", CLIP, ema=True)


def test_weights_that_are_averaged_only_and_not_at_all(tmp_path):
    torch.save({"ema": stored(), "epoch": 1}, tmp_path / "only.pt")
    assert assert_holds(tmp_path / "only.pt").notes == ["averaged weights (EMA)"]
    torch.save({"model": stored()}, tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match=r"none\.pt: it has no EMA weights; leave --ema away"):
        open_checkpoint(tmp_path / "none.pt", CLIP, ema=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            lambda: {"student": stored(), "teacher": stored(seed=2)},
            r"holds 2 sets of weights, student, teacher: save the one to export",
        ),
        (
            lambda: stored(prefix="student.") | stored(seed=2, prefix="teacher."),
            r"its keys hold 2 models, student\., teacher\.: save the one",
        ),
        (lambda: {"state_dict": stored(), "model": stored(seed=2)}, "2 sets of weights"),
        (
            lambda: {"ema": stored(), "model_ema": stored(seed=2)},
            "2 sets of weights, ema, model_ema",
        ),
        (
            lambda: stored(prefix="module.") | {"logit_scale": torch.zeros(())},
            r"'module\.logit_scale' and 'logit_scale', differ only by the prefix of a wrapper",
        ),
        (
            lambda: stored(prefix="model.") | {"logit_scale": torch.zeros(())},
            "differ only by a prefix",
        ),
        (lambda: stored(prefix="model.") | {"loss.w": torch.zeros(2)}, r"1 unexpected \('loss.w'"),
        (
            lambda: {k: t for k, t in stored(prefix="model.").items() if "ln_pre.bias" not in k},
            r"1 missing \(visual\.ln_pre\.bias\)",
        ),
        (lambda: {"encoder.0.weight": torch.zeros(2)}, r"fit none of them, such as 'encoder\.0"),
    ],
)
def test_loading_stays_strict(tmp_path, content, message):
    torch.save(content(), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path / "a.pt", CLIP)
    assert str(caught.value).startswith("a.pt") and "\n" not in str(caught.value)


def test_names_are_shown_without_control_characters(tmp_path):
    torch.save({"model": stored(), "ema\x1b[2J\n": stored()}, tmp_path / "a.pt")
    assert assert_holds(tmp_path / "a.pt").notes[0].endswith("'ema\\x1b[2J\\n'")
    torch.save({"a\n": stored(), "b": stored()}, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match=r"2 sets of weights, 'a\\n', b: save the one"):
        open_checkpoint(tmp_path / "b.pt", CLIP)


def test_a_loss_with_weights_of_its_own_is_not_the_model(tmp_path):
    criterion = {"proxies.weight": torch.zeros(2, 2)}
    torch.save({"model": stored(), "criterion": criterion}, tmp_path / "a.pt")
    assert_holds(tmp_path / "a.pt")


def converted(path, name):
    """Runs the command of a refusal, and returns the file that it makes."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path, CLIP)
    message = str(caught.value)
    assert message.startswith(f"{path.name} holds {name} besides tensors") and "\n" not in message
    assert "If you trust the file" in message
    command = re.search(r'python -c ".+" .+$', message)[0]
    arguments = shlex.split(command)
    subprocess.run([sys.executable, *arguments[1:]], check=True, capture_output=True)
    return path.with_name(arguments[-1].rpartition("/")[2])


def test_a_refused_object_comes_with_the_command_that_leaves_it_out(tmp_path):
    folder = tmp_path / "my runs"
    folder.mkdir()
    path = folder / "model_best.pth.tar"
    content = {
        "args": argparse.Namespace(lr=0.1), "state_dict": stored(prefix="module."),
        "state_dict_ema": stored(seed=2), "optimizer": {"state": {0: argparse.Namespace()}},
    }  # fmt: skip
    torch.save(content, path)
    made = converted(path, "argparse.Namespace")
    assert made.name == "model_best-tensors.pt"
    assert_holds(made)
    assert_holds(made, seed=2, ema=True)
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"old\.pt holds argparse\.Namespace besides tensors"):
        open_checkpoint(tmp_path / "old.pt", CLIP)


def test_a_whole_module_is_refused_with_the_same_command(tmp_path):
    model = nn.Module()
    model.visual = nn.Linear(2, 2)
    torch.save(model, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt holds torch\.nn\.modules\.module\.Module"):
        open_checkpoint(tmp_path / "a.pt", CLIP)


def test_a_torchscript_program_is_named(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "a.pt"))
    with pytest.raises(CheckpointError, match=r"a\.pt is a TorchScript program, not weights"):
        open_checkpoint(tmp_path / "a.pt", CLIP)


def test_a_folder_with_one_file_and_with_several(tmp_path):
    torch.save(stored(), tmp_path / "model_best.pth.tar")
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state_0.pth"):
        torch.save({}, tmp_path / name)
    assert_holds(tmp_path)
    torch.save(stored(), tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"has 2 weight files .* pass one of last\.ckpt, m"):
        open_checkpoint(tmp_path, CLIP)
    save_file(stored(), tmp_path / "a.safetensors")
    assert_holds(tmp_path)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_without_their_index(tmp_path, suffix):
    for number in (1, 2):
        (tmp_path / f"model-{number:05d}-of-00002{suffix}").write_bytes(b"x")
    message = r"has 2 shards of one model, .* put \w+\.\w+\.index\.json beside them"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path, PLM)
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=r"is one shard of a model: pass .*\.index\.json, or"):
        open_checkpoint(tmp_path / f"model-00001-of-00002{suffix}", PLM)


def test_a_distributed_checkpoint_comes_with_the_command_that_converts_it(tmp_path):
    (tmp_path / ".metadata").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"dcp_to_torch .* model\.pt makes a file"):
        open_checkpoint(tmp_path, CLIP)


def test_pointers_of_git_lfs(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 1\n"
    for name in ("a.safetensors", "b.pt", "tokenizer.model"):
        (tmp_path / name).write_text(pointer)
    for path in (tmp_path / "a.safetensors", tmp_path / "b.pt", tmp_path):
        with pytest.raises(CheckpointError, match=r"is a Git LFS pointer.* run 'git lfs pull'"):
            open_checkpoint(path, CLIP)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is a Git LFS pointer"):
        find_tokenizer(tmp_path)


def test_wrappers_are_whole_parts_of_a_key():
    keys = ["module.a", "b", "visual._orig_mod.module.c", "modules.d"]
    mapping = {"a": keys[0], "b": "b", "visual.c": keys[2], "modules.d": keys[3]}
    assert without_wrappers(keys) == mapping
