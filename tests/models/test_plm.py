"""The torch language model equals the reference, and its decoder equals transformers' Llama."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from golden_data import PLM_FILES, plm_golden

from perception_rt.archs import PLM_MODELS
from perception_rt.checkpoint.names import to_layout
from perception_rt.checkpoint.source import expected_tensors
from perception_rt.errors import InputError
from perception_rt.models.decoder import Decoder
from perception_rt.models.plm import PerceptionLM
from perception_rt.plm_config import DecoderConfig, PlmConfig, is_plm

MAX_ABS = 5e-5  # the bar is 1e-3; measured 4.4e-6


@pytest.fixture(scope="module", params=PLM_FILES)
def reference(request):
    data = plm_golden(request.param)
    model = PerceptionLM(data.config).eval()
    model.load_state_dict(data.weights)
    return data, model


def check(output: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(output.numpy(), expected, rtol=0, atol=MAX_ABS)


@torch.no_grad()
def test_image_tokens_equal_the_reference(reference):
    """PAR-01; our projector takes the mean before its second layer, the reference after it."""
    data, model = reference
    tiles = torch.from_numpy(data.inputs["tiles"])
    features = model.vision_model.forward_features(tiles, norm=True, strip_class_token=True)
    check(features, data.outputs["vision_features"])
    check(model.encode_tiles(tiles), data.outputs["projected"])
    assert data.outputs["projected"].shape[1] == data.config.tokens_per_tile


@torch.no_grad()
def test_logits_equal_the_reference(reference):
    """PAR-01."""
    data, model = reference
    tokens, tiles = (torch.from_numpy(data.inputs[name]) for name in ("tokens", "tiles"))
    check(model(tokens, tiles), data.outputs["logits"])
    text = torch.from_numpy(data.inputs["text_only_tokens"])
    check(model(text), data.outputs["text_only_logits"])


@torch.no_grad()
def test_greedy_tokens_equal_the_reference(reference):
    """PAR-03; the image token is masked, as in the golden run."""
    data, model = reference
    tokens, tiles = (torch.from_numpy(data.inputs[name]) for name in ("tokens", "tiles"))
    expected = data.outputs["greedy_tokens"].tolist()
    for _ in expected:
        logits = model(tokens, tiles)[0, -1]
        logits[data.config.image_token_id] = -torch.inf
        tokens = torch.cat([tokens, logits.argmax().reshape(1, 1)], dim=1)
    assert tokens[0, -len(expected) :].tolist() == expected
    assert len(set(expected)) > 1


@torch.no_grad()
def test_a_later_token_changes_no_earlier_logit(reference):
    data, model = reference
    tokens = torch.from_numpy(data.inputs["text_only_tokens"])
    changed = tokens.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % data.config.image_token_id
    first, second = model(tokens), model(changed)
    assert torch.equal(first[:, :20], second[:, :20])
    assert not torch.allclose(first[:, 20:], second[:, 20:])


def test_tiles_and_image_tokens_must_agree(reference):
    data, model = reference
    tokens, tiles = (torch.from_numpy(data.inputs[name]) for name in ("tokens", "tiles"))
    places = len(tiles) * data.config.tokens_per_tile
    with pytest.raises(InputError, match=f"have {places} image tokens and the tiles make 4"):
        model(tokens, tiles[:1])


def test_parameters_are_the_checkpoints_keys(reference):
    data, _ = reference
    shapes = {name: tensor.shape for name, tensor in data.weights.items()}
    assert expected_tensors(data.config) == shapes
    assert ("output.weight" in shapes) != data.config.decoder.weight_tying


@pytest.mark.parametrize("name", PLM_FILES)
def test_golden_configurations_survive_a_round_trip(name):
    data = plm_golden(name)
    plain = json.loads(json.dumps(data.config.to_dict()))
    assert PlmConfig.from_dict(plain) == data.config
    assert PlmConfig.from_dict({"model": data.config_dict(), "data": {"batch": 3}}) == data.config
    assert is_plm(plain)
    assert is_plm({"model": plain})
    assert not is_plm(plain["vision_model"])


@pytest.mark.parametrize("name", PLM_MODELS)
def test_released_configurations_survive_a_round_trip(name):
    config = PLM_MODELS[name]
    assert PlmConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.tokens_per_tile == 256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 2}, "unknown keys \\['n_layer'\\]"),
        ({"head_dim": 5}, "head_dim must be dim / n_heads = 32"),
        ({"sliding_window": 8}, "sliding_window must be None"),
        ({"image_token_id": 320}, "not in 0 to 319"),
        ({"image_token_id": "x"}, "image_token_id must be int, not str"),
        ({"pooling_ratio": 3}, "does not divide the grid of 4"),
        ({"n_kv_heads": 3}, "not divisible by n_kv_heads 3"),
        ({"vision_model": None}, "vision_model must be an object"),
    ],
)
def test_configurations_that_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        PlmConfig.from_dict(plm_golden(PLM_FILES[0]).config_dict() | change)


LLAMA = DecoderConfig(
    dim=64, n_layers=3, n_heads=4, vocab_size=97, multiple_of=16, max_seqlen=64, rope_theta=1000.0
)
SCALED = {"old_context_len": 32, "rope_scale_factor": 8.0, "high_freq_factor": 4.0}
LLAMAS = {
    "plain": LLAMA,
    "tied": replace(LLAMA, weight_tying=True),
    "grouped": replace(LLAMA, n_kv_heads=2, ffn_dim_multiplier=1.3, norm_eps=1e-3),
    "wide heads": replace(LLAMA, n_kv_heads=2, head_size=32),
    "scaled": replace(LLAMA, **SCALED),
    "tied, grouped, scaled": replace(
        LLAMA, n_kv_heads=1, weight_tying=True, rope_theta=300.0, low_freq_factor=2.0, **SCALED
    ),
}


def transformers_llama(config: DecoderConfig, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Returns transformers' model of the same architecture, with the same weights."""
    transformers = pytest.importorskip("transformers")
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scale_factor != 1:
        rope |= {
            "rope_type": "llama3",
            "factor": config.rope_scale_factor,
            "low_freq_factor": config.low_freq_factor,
            "high_freq_factor": config.high_freq_factor,
            "original_max_position_embeddings": config.old_context_len,
        }
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=config.dim,
            intermediate_size=config.ffn_dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            rms_norm_eps=config.norm_eps,
            max_position_embeddings=config.max_seqlen,
            tie_word_embeddings=config.weight_tying,
            rope_parameters=rope,
        )
    )
    keys = {
        key.replace("model.language_model.", "model."): tensor
        for key, tensor in to_layout(state, "hf", config.head_dim).items()
    }
    missing, unexpected = llama.load_state_dict(keys, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] if config.weight_tying else [], [])
    return llama.eval()


@pytest.mark.parametrize("name", LLAMAS)
@torch.no_grad()
def test_the_decoder_equals_transformers_llama(name):
    """PAR-04; `scaled` exceeds the old context, where scaled frequencies make a difference."""
    config = LLAMAS[name]
    torch.manual_seed(5)
    decoder = Decoder(config).eval()
    for parameter in decoder.parameters():
        parameter.copy_(torch.randn(parameter.shape) * (1 if parameter.ndim == 1 else 0.15))
    llama = transformers_llama(config, dict(decoder.state_dict()))
    tokens = torch.randint(config.vocab_size, (2, 48))
    ours = decoder.decode(decoder.tok_embeddings(tokens))
    theirs = llama(tokens).logits
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)  # measured 1.1e-5
