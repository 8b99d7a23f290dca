"""Floating point operations of a step of language training, counted product by product.

A product of an (out, in) matrix with a row is 2 * out * in operations. A matrix costs that once in
the forward pass, once more where a gradient goes on to what came before it, and once more if it is
trained itself. Attention has two products of its own, whose gradients are four. Whatever is no
product is left out. What checkpointing computes again is counted apart: it is work, but not the
model's.

Legend: T tokens of a tile in the tower, L tokens of a document, C width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from perception_rt.models.plm import PerceptionLM

# In the order of the forward pass: a gradient goes on to a part if one before it is trained.
_PARTS = ("vision_model.", "vision_projector.", "tok_embeddings.", "layers.", "norm.", "output.")
_TABLES = ("positional_embedding", "class_embedding")
_EMBEDDING = "tok_embeddings.weight"
# What has the inputs of the matrix before it.
_SIBLINGS = (".attention.wk.", ".attention.wv.", ".lora_a", ".lora_b")
# The last matrix of an attention, whose own products come just before.
_ATTENTION_ENDS = ("attn.out_proj.weight", "attention.wo.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a step has to compute.

    Attributes:
        tokens: of the decoder.
        pairs: of a token and one that it sees; L * (L + 1) / 2 in a document.
        tiles: of the vision tower.
        labelled: tokens whose logits are computed.
    """

    tokens: int
    pairs: int
    tiles: int
    labelled: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Flops:
    """Operations: the model's own, and what checkpointing adds."""

    model: int
    recomputed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Product:
    """A matrix product: operations forward, and whether gradients of input and matrix follow."""

    block: str
    forward: int
    gradients: int


def step_flops(model: PerceptionLM, work: Work, checkpointing: str = "none") -> Flops:
    """Operations of some work.

    Args:
        model: on any device; what requires a gradient is trained.
        work: the work.
        checkpointing: as in the recipe; `selective` computes nothing again that counts here.
    """
    products = list(_products(model, work))
    recomputed = 0
    if checkpointing == "full":
        backward = {product.block for product in products if product.block and product.gradients}
        recomputed = sum(product.forward for product in products if product.block in backward)
    return Flops(
        model=sum(product.forward * (1 + product.gradients) for product in products),
        recomputed=recomputed,
    )


def _products(model: PerceptionLM, work: Work) -> Iterator[_Product]:
    """All products of a step, in order."""
    named = dict(model.named_parameters())
    reached = inputs = False  # whether anything before, and before the inputs at hand, is trained
    for part in _PARTS:
        for name, parameter in named.items():
            if not name.startswith(part):
                continue
            block = _block(name)
            if name.endswith(_ATTENTION_ENDS):
                pairs, width = _pairs(model, name, work), parameter.shape[1]
                yield _Product(block=block, forward=4 * width * pairs, gradients=2 * reached)
            if not any(sibling in name for sibling in _SIBLINGS):
                inputs = reached
            trained = parameter.requires_grad
            if rows := _rows(model, name, parameter, work):
                forward = 2 * parameter.numel() * rows
                passed = inputs or name.endswith(".lora_b")  # which comes after its `lora_a`
                yield _Product(block=block, forward=forward, gradients=passed + trained)
            reached = reached or (trained and not name.endswith(_TABLES))
    if model.decoder_config.weight_tying:
        table = named[_EMBEDDING]
        forward = 2 * table.numel() * work.labelled
        yield _Product(block="", forward=forward, gradients=reached + table.requires_grad)


def _block(name: str) -> str:
    """The block that a parameter is in; empty outside of blocks."""
    head, separator, rest = name.partition("resblocks." if "resblocks." in name else "layers.")
    return f"{head}{separator}{rest.partition('.')[0]}" if separator else ""


def _pairs(model: PerceptionLM, name: str, work: Work) -> int:
    tower = model.vision_model
    tokens = tower.config.grid**2 + tower.num_prefix
    return work.tiles * tokens**2 if name.startswith(_PARTS[0]) else work.pairs


def _rows(model: PerceptionLM, name: str, parameter: nn.Parameter, work: Work) -> int:
    """How many rows a parameter is multiplied with; 0 for what is no matrix of a product."""
    tower = model.vision_model
    patches = work.tiles * tower.config.grid**2
    if parameter.ndim < 2 or name == _EMBEDDING or name.endswith(_TABLES):
        return 0
    if name.startswith("vision_model.transformer."):
        return patches + work.tiles * tower.num_prefix
    if name.startswith("vision_projector.projector.2."):
        return work.tiles * model.config.tokens_per_tile
    if name.startswith(("vision_model.", "vision_projector.")):
        return patches
    return work.labelled if name.startswith("output.") else work.tokens
