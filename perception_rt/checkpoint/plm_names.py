"""A Perception Language Model's tensors as Meta and as Hugging Face's transformers store them.

`original` has our names, which are those of Meta's `consolidated.pth`. `hf` is what transformers
calls `perception_lm`: a Llama of its own, and timm's vision tower.
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
# Stems of our names, and what transformers calls them: in a layer, and outside of layers.
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
# What transformers turns in halves of a head, and Meta in adjacent pairs.
_TURNED = ("attention.wq.", "attention.wk.")
# The copy of the embedding that a checkpoint with a tied head may hold.
_TIED_COPY = {"original": "output.tied_module.weight", "hf": "lm_head.weight"}

ORIGINAL_STEMS = ("tok_embeddings.", _LAYERS, "norm.", "output.", _TOWER, "vision_projector.")
HF_STEMS = (_LANGUAGE, "model.multi_modal_projector.", "model.vision_tower.", "lm_head.")


def original_entry(name: str, shape: Shape) -> Stored:
    """How `original` stores a tensor: as we do. CheckpointError for a name that is none."""
    if not name.startswith(ORIGINAL_STEMS):
        raise CheckpointError(f"the original layout has no place for {name!a:.80}")
    return Stored(name=name, shape=shape, keys=(name,), shapes=(shape,))


def hf_entry(name: str, shape: Shape, head_dim: int | None) -> Stored:
    """How `hf` stores a tensor.

    Raises:
        CheckpointError: the layout has no such tensor, or needs a head size that fits its rows.
    """
    if name.startswith(_TOWER):
        return timm_entry(name, shape, _HF_TOWER)
    turned = name.startswith(_LAYERS) and any(f".{stem}" in name for stem in _TURNED)
    if turned and (head_dim is None or head_dim % 2 or shape[0] % head_dim):
        raise CheckpointError(
            f"the hf layout needs the head size that the {shape[0]} rows of {name} are made of, "
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
    """The key that may hold the embedding once more, and our name of the embedding.

    Empty for a model whose head is a parameter of its own.
    """
    if layout not in _TIED_COPY or _HEAD in names or _EMBEDDING not in names:
        return {}
    return {_TIED_COPY[layout]: _EMBEDDING}
