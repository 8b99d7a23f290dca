"""The layouts of Perception Language Models: Meta's `original` and transformers' `hf`.

`original` has our names, which are those of Meta's `consolidated.pth`. `hf` is the model
`perception_lm` of transformers, with its own Llama and timm's vision tower.
"""

from collections.abc import Collection, Mapping

from perception_rt.checkpoint.stored import Shape, Stored
from perception_rt.checkpoint.timm_names import timm_entry
from perception_rt.errors import CheckpointError

_EMBEDDING = "tok_embeddings.weight"
_HEAD = "output.weight"
_TOWER = "vision_model."
_LAYERS = "layers."
_LANGUAGE = "model.language_model."
# Stems of our names and of transformers' names, in a layer and outside the layers.
_HF_LAYER = {
    "attention.wq.": "self_attn.q_proj.",
    "attention.wk.": "self_attn.k_proj.",
    "attention.wv.": "self_attn.v_proj.",
    "attention.wo.": "self_attn.o_proj.",
    "attention_norm.": "input_layernorm.",
    "feed_forward.w1.": "mlp.gate_proj.",
    "feed_forward.w2.": "mlp.down_proj.",
    "feed_forward.w3.": "mlp.up_proj.",
    "ffn_norm.": "post_attention_layernorm.",
}
_HF = {
    "tok_embeddings.": f"{_LANGUAGE}embed_tokens.",
    "norm.": f"{_LANGUAGE}norm.",
    "output.": "lm_head.",
    "vision_projector.projector.0.": "model.multi_modal_projector.linear_1.",
    "vision_projector.projector.2.": "model.multi_modal_projector.linear_2.",
}
_HF_TOWER = "model.vision_tower.timm_model."
# Rows that transformers rotates in halves of a head, and Meta in adjacent pairs.
_TURNED = ("attention.wq.", "attention.wk.")
# Key of the embedding's copy that a checkpoint with a tied head may hold.
_TIED_COPY = {"original": "output.tied_module.weight", "hf": "lm_head.weight"}

ORIGINAL_STEMS = ("tok_embeddings.", _LAYERS, "norm.", "output.", _TOWER, "vision_projector.")
HF_STEMS = (
    _LANGUAGE,
    "model.multi_modal_projector.",
    "model.vision_tower.",
    "lm_head.",
    "language_model.",
    "multi_modal_projector.",
    "vision_tower.",
)
# Starts of keys in older releases and in saves of the base model, with those of today. The first
# one that fits counts.
_RENAMED = (
    ("language_model.model.", _LANGUAGE),
    (f"{_LANGUAGE}model.", _LANGUAGE),  # the first one within a wrapper's `model`
    (f"{_LANGUAGE}lm_head.", "lm_head."),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.", _LANGUAGE),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("vision_tower.", "model.vision_tower."),
)
# A pooled tower has these, and a language model does not use them.
HF_UNUSED = (f"{_HF_TOWER}attn_pool.", f"{_HF_TOWER}fc_norm.")


def current_hf_keys(keys: Mapping[str, str]) -> dict[str, str]:
    """Renames the keys of a mapping as transformers names them today.

    Raises:
        CheckpointError: two keys become one.
    """
    renamed = {_current(key): value for key, value in keys.items()}
    if len(renamed) != len(keys):
        raise CheckpointError("some tensors occur under an old and a new name of transformers")
    return renamed


def _current(key: str) -> str:
    for old, new in _RENAMED:
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


def original_entry(name: str, shape: Shape) -> Stored:
    """Returns the entry of the `original` layout; CheckpointError if it has no such tensor."""
    if not name.startswith(ORIGINAL_STEMS):
        raise CheckpointError(f"the original layout has no place for {name!a:.80}")
    return Stored(name=name, shape=shape, keys=(name,), shapes=(shape,))


def hf_entry(name: str, shape: Shape, head_dim: int | None) -> Stored:
    """Returns the entry of the `hf` layout.

    Args:
        name: our name.
        shape: our shape.
        head_dim: channels per head; needed for query and key weights.

    Raises:
        CheckpointError: the layout has no such tensor, or `head_dim` does not fit its rows.
    """
    if name.startswith(_TOWER):
        return timm_entry(name, shape, _HF_TOWER)
    turned = name.startswith(_LAYERS) and any(f".{stem}" in name for stem in _TURNED)
    if turned and (head_dim is None or head_dim % 2 or shape[0] % head_dim):
        raise CheckpointError(
            f"the hf layout needs an even head size that divides the {shape[0]} rows of {name}, "
            f"not {head_dim}"
        )
    return Stored(
        name=name,
        shape=shape,
        keys=(_hf_key(name),),
        shapes=(shape,),
        head_dim=head_dim if turned else None,
    )


def _hf_key(name: str) -> str:
    head, rest, stems = "", name, _HF
    if name.startswith(_LAYERS):
        index, _, rest = name.removeprefix(_LAYERS).partition(".")
        head, stems = f"{_LANGUAGE}{_LAYERS}{index}.", _HF_LAYER
    for stem, theirs in stems.items():
        if rest.startswith(stem):
            return head + theirs + rest.removeprefix(stem)
    raise CheckpointError(f"the hf layout has no place for {name!a:.80}")


def tied_copy(layout: str, names: Collection[str]) -> Mapping[str, str]:
    """Returns the key that may hold a copy of the embedding, with our name of the embedding.

    Empty for a model whose head has its own parameter.
    """
    if layout not in _TIED_COPY or _HEAD in names or _EMBEDDING not in names:
        return {}
    return {_TIED_COPY[layout]: _EMBEDDING}
