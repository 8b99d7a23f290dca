"""A language model starts from the tower of an encoder, the decoder of a Llama, or a checkpoint."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from perception_rt.checkpoint.names import to_layout
from perception_rt.checkpoint.source import expected_tensors
from perception_rt.checkpoint.write import save_checkpoint
from perception_rt.config import PeConfig, TextConfig, VisionConfig
from perception_rt.errors import CheckpointError
from perception_rt.models.decoder import Decoder
from perception_rt.models.pe import PerceptionEncoder
from perception_rt.models.plm import PerceptionLM
from perception_rt.models.vision import resize_positions
from perception_rt.plm_config import DecoderConfig, PlmConfig
from training.model.pretrained import PretrainedWeights
from training.recipe.schema import InitConfig

ENCODER = PeConfig(
    vision=VisionConfig(
        patch_size=8, width=16, layers=3, heads=2, mlp_ratio=2.0, image_size=16, use_cls_token=True,
        attn_pooler_heads=2, output_dim=8,
    ),
    text=TextConfig(context_length=7, width=16, heads=2, layers=1, output_dim=8),
)  # fmt: skip
# A language model's tower: one block less, a finer grid, no head.
TOWER = replace(
    ENCODER.vision, image_size=32, layers=2, pool_type="none", use_ln_post=False, output_dim=None
)
MODEL = PlmConfig(
    decoder=DecoderConfig(
        dim=16, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=20, multiple_of=8, max_seqlen=32
    ),
    vision=TOWER,
    pooling_ratio=2,
    image_token_id=19,
)


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(p.shape, generator=generator) for n, p in module.named_parameters()}


def test_a_tower_comes_out_of_a_deeper_encoder_of_another_grid(tmp_path: Path) -> None:
    state = weights(PerceptionEncoder(ENCODER))
    towers = {name: t for name, t in state.items() if name.startswith("visual.")}
    native = state["visual.positional_embedding"]
    for layout, stored in (("reference", state), ("open_clip", state), ("timm", towers)):
        file = tmp_path / f"{layout}.safetensors"
        save_checkpoint(stored, file, layout)  # type: ignore[arg-type]
        pretrained = PretrainedWeights(InitConfig(vision=str(file)), MODEL)
        for name in expected_tensors(MODEL):
            found = pretrained.load(name)
            if not name.startswith("vision_model."):
                assert found is None, name
            elif name == "vision_model.positional_embedding":
                assert found is not None
                assert torch.equal(found, resize_positions(native, 2, (4, 4), 1))
            else:
                assert found is not None
                assert torch.equal(found, state[f"visual.{name.removeprefix('vision_model.')}"])


def test_a_tower_alone_has_bare_names(tmp_path: Path) -> None:
    state = {
        n: t for n, t in weights(PerceptionEncoder(ENCODER)).items() if n.startswith("visual.")
    }
    save_checkpoint(state, tmp_path / "tower.safetensors")
    pretrained = PretrainedWeights(InitConfig(vision=str(tmp_path / "tower.safetensors")), MODEL)
    found = pretrained.load("vision_model.conv1.weight")
    assert found is not None
    assert torch.equal(found, state["visual.conv1.weight"])


def filled(model: PerceptionLM, pretrained: PretrainedWeights) -> PerceptionLM:
    state = {n: t for n in expected_tensors(MODEL) if (t := pretrained.load(n)) is not None}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert all(name.startswith("vision_") for name in missing)
    assert unexpected == []
    return model


def test_a_decoder_comes_out_of_a_llama_of_transformers(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    decoder = MODEL.decoder
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20,
            hidden_size=16,
            intermediate_size=decoder.ffn_dim,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=decoder.norm_eps,
            rope_theta=decoder.rope_theta,
            initializer_range=0.5,
        )
    )
    llama.save_pretrained(tmp_path)
    tokens = torch.arange(12)[None]
    model = filled(PerceptionLM(MODEL), PretrainedWeights(InitConfig(decoder=str(tmp_path)), MODEL))
    with torch.no_grad():
        difference = llama(tokens).logits - model.decode(model.tok_embeddings(tokens))
    assert difference.abs().max() < 1e-4


def test_a_decoder_comes_out_of_metas_folder(tmp_path: Path) -> None:
    """Extra tensors, such as frequencies, are ignored; half precision is converted."""
    state = {n: t.bfloat16() for n, t in weights(Decoder(MODEL.decoder)).items()}
    extra = {"rope.freqs": torch.ones(2)}
    torch.save({**state, **extra}, tmp_path / "consolidated.00.pth")
    pretrained = PretrainedWeights(InitConfig(decoder=str(tmp_path)), MODEL)
    for name, tensor in state.items():
        found = pretrained.load(name)
        assert found is not None
        assert torch.equal(found, tensor.float())
    assert pretrained.load("vision_projector.projector.0.weight") is None


def test_a_stage_goes_on_where_the_one_before_ended(tmp_path: Path) -> None:
    """Layer scale that a stage adds is missing in the previous stage's checkpoint."""
    state = weights(PerceptionLM(MODEL))
    save_checkpoint(state, tmp_path / "model.safetensors", "original")
    (tmp_path / "params.json").write_text(json.dumps({"model": MODEL.to_dict()}))
    later = replace(MODEL, vision=replace(TOWER, ls_init_value=0.1, drop_path=0.1))
    pretrained = PretrainedWeights(InitConfig(checkpoint=str(tmp_path)), later)
    new = set(expected_tensors(later)) - set(state)
    assert len(new) == 2 * TOWER.layers
    assert all(pretrained.load(name) is None for name in new)
    for name, tensor in state.items():
        found = pretrained.load(name)
        assert found is not None
        assert torch.equal(found, tensor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision": {"width": 32}}, r"class_embedding is \(16,\), not \(32,\)"),
        ({"vision": {"layers": 4}}, r"resblocks\.3\.ln_1\.weight is missing"),
        ({"vision": {"ls_init_value": 0.1}}, r"ls_1\.gamma is missing"),
    ],
)
def test_a_tower_that_does_not_fit_is_named(
    tmp_path: Path, change: dict[str, dict[str, int]], message: str
) -> None:
    file = tmp_path / "pe.safetensors"
    save_checkpoint(weights(PerceptionEncoder(ENCODER)), file)
    model = replace(MODEL, vision=replace(TOWER, **change["vision"]))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=rf"pe\.safetensors: .*{message}"):
        PretrainedWeights(InitConfig(vision=str(file)), model)


def test_a_decoder_of_another_kind_is_named(tmp_path: Path) -> None:
    file = tmp_path / "llama.safetensors"
    save_checkpoint(weights(Decoder(MODEL.decoder)), file, "original")
    wider = replace(MODEL, decoder=replace(MODEL.decoder, vocab_size=30))
    with pytest.raises(CheckpointError, match=r"tok_embeddings\.weight is \(20, 16\), not \(30, "):
        PretrainedWeights(InitConfig(decoder=str(file)), wider)
    with pytest.raises(CheckpointError, match="no weights file"):
        PretrainedWeights(InitConfig(decoder=str(tmp_path / "nothing.pth")), MODEL)


def test_a_number_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    state = weights(Decoder(MODEL.decoder))
    state["norm.weight"][0] = torch.nan
    save_checkpoint(state, tmp_path / "a.safetensors", "original")
    pretrained = PretrainedWeights(InitConfig(decoder=str(tmp_path / "a.safetensors")), MODEL)
    with pytest.raises(CheckpointError, match=r"norm\.weight has elements that are not finite"):
        pretrained.load("norm.weight")


def test_a_decoder_comes_out_of_a_base_model_of_transformers(tmp_path: Path) -> None:
    state = weights(PerceptionLM(MODEL))
    stored = to_layout(state, "hf", MODEL.decoder.head_dim)
    file = tmp_path / "model.safetensors"
    save_file({key.removeprefix("model."): tensor for key, tensor in stored.items()}, file)
    pretrained = PretrainedWeights(InitConfig(decoder=str(tmp_path)), MODEL)
    name = "layers.0.attention.wq.weight"
    found = pretrained.load(name)
    assert found is not None and torch.equal(found, state[name])
