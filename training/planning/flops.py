"""FLOPs of a language training step, counted per matrix product.

Multiplying a row by an (out, in) matrix takes 2 * out * in FLOPs. A matrix is multiplied once in
the forward pass, once more if its input needs a gradient, and once more if it is trained. Attention
has two products of its own with four gradient products. Other operations are ignored. Products that
checkpointing recomputes are counted separately, since they are not the model's own work.

Legend: T tokens of a tile in the tower, L tokens of a document, C width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from perception_rt.models.plm import PerceptionLM

# In forward order: a part's input needs a gradient if an earlier part is trained.
_PARTS = ("vision_model.", "vision_projector.", "tok_embeddings.", "layers.", "norm.", "output.")
_TABLES = ("positional_embedding", "class_embedding")
_EMBEDDING = "tok_embeddings.weight"
# Matrices that share their input with the preceding matrix.
_SIBLINGS = (".attention.wk.", ".attention.wv.", ".lora_a", ".lora_b")
# Last matrix of an attention; the attention's own products come just before it.
_ATTENTION_ENDS = ("attn.out_proj.weight", "attention.wo.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Amount of work of a step.

    Attributes:
        tokens: decoder tokens.
        pairs: pairs of a token and a token that it attends to; L * (L + 1) / 2 per document.
        tiles: tiles through the vision tower.
        labelled: tokens whose logits are computed.
    """

    tokens: int
    pairs: int
    tiles: int
    labelled: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Flops:
    """FLOPs of the model itself, and those that checkpointing adds."""

    model: int
    recomputed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Product:
    """One matrix product.

    Attributes:
        block: block that it belongs to; empty outside blocks.
        forward: FLOPs of the forward pass.
        gradients: number of gradient products of the same cost.
    """

    block: str
    forward: int
    gradients: int


def step_flops(model: PerceptionLM, work: Work, checkpointing: str = "none") -> Flops:
    """Counts the FLOPs of a step.

    Args:
        model: model on any device; parameters that require a gradient are trained.
        work: amount of work.
        checkpointing: the recipe's setting; `selective` recomputes no product that is counted here.
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
    reached = inputs = False  # anything trained before this point; before the current inputs
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
                passed = inputs or name.endswith(".lora_b")  # its input is the output of `lora_a`
                yield _Product(block=block, forward=forward, gradients=passed + trained)
            reached = reached or (trained and not name.endswith(_TABLES))
    if model.decoder_config.weight_tying:
        table = named[_EMBEDDING]
        forward = 2 * table.numel() * work.labelled
        yield _Product(block="", forward=forward, gradients=reached + table.requires_grad)


def _block(name: str) -> str:
    """Name of a parameter's block; empty outside blocks."""
    head, separator, rest = name.partition("resblocks." if "resblocks." in name else "layers.")
    return f"{head}{separator}{rest.partition('.')[0]}" if separator else ""


def _pairs(model: PerceptionLM, name: str, work: Work) -> int:
    tower = model.vision_model
    tokens = tower.config.grid**2 + tower.num_prefix
    return work.tiles * tokens**2 if name.startswith(_PARTS[0]) else work.pairs


def _rows(model: PerceptionLM, name: str, parameter: nn.Parameter, work: Work) -> int:
    """Number of rows that a parameter is multiplied by; 0 if it is not the matrix of a product."""
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
