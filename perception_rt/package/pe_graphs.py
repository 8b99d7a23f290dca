"""Inputs and outputs of every graph of a Perception Encoder package.

The exporter builds its graphs to these signatures, and the runtime compares a package with them.

Legend: N images or texts, H W pixels, T tokens, D embedding channels, C width.
"""

from collections.abc import Iterable, Mapping

from perception_rt.config import PeConfig, TextConfig
from perception_rt.errors import PackageError
from perception_rt.package import contract
from perception_rt.package.contract import (
    GraphSignature,
    GraphSpec,
    batched,
    check_signatures,
)


def vision_signatures(
    config: PeConfig, height: int, width: int, taps: Iterable[int]
) -> dict[str, GraphSignature]:
    """Signatures of `vision`, `pixels` and, if there are taps, `features`.

    Args:
        config: the architecture.
        height: image height in pixels.
        width: image width in pixels.
        taps: indices of the blocks that `features` returns.

    Raises:
        InputError: the patch size does not divide the image size.
    """
    vision = config.vision
    rows, columns = vision.grid_of(height, width)
    tokens = rows * columns + int(vision.use_cls_token)
    middle = (tokens,) if vision.pool_type == "none" else ()
    images = batched(contract.IMAGES_U8, "uint8", height, width, 3)
    pixels = batched(contract.PIXELS_F32, "float32", 3, height, width)
    embedding = batched(contract.EMBEDDING, "float32", *middle, vision.embed_dim)
    blocks = [batched(contract.tap_name(i), "float32", tokens, vision.width) for i in taps]
    signatures = {
        contract.VISION: GraphSignature(inputs=(images,), outputs=(embedding,)),
        contract.PIXELS: GraphSignature(inputs=(pixels,), outputs=(embedding,)),
    }
    if blocks:
        signatures[contract.FEATURES] = GraphSignature(inputs=(images,), outputs=tuple(blocks))
    return signatures


def text_signature(config: TextConfig) -> GraphSignature:
    """Signature of `text`: token ids (N, T) to features (N, D)."""
    tokens = batched(contract.TOKENS, "int64", config.context_length)
    features = batched(contract.TEXT_EMBEDDING, "float32", config.output_dim)
    return GraphSignature(inputs=(tokens,), outputs=(features,))


def check_graphs(
    graphs: Mapping[str, GraphSpec], config: PeConfig, height: int, width: int
) -> None:
    """Compares a package's graphs with the architecture and the image size.

    Raises:
        PackageError: a graph is missing, or its inputs or outputs differ from the signature.
        InputError: the patch size does not divide the image size.
    """
    signatures = vision_signatures(config, height, width, _read_taps(graphs, config))
    if config.text is not None:
        signatures[contract.TEXT] = text_signature(config.text)
    check_signatures(graphs, signatures)


def _read_taps(graphs: Mapping[str, GraphSpec], config: PeConfig) -> list[int]:
    """Indices of the blocks that `features` returns; an export may leave some or all out."""
    if contract.FEATURES not in graphs:
        return []
    names = {spec.name for spec in graphs[contract.FEATURES].outputs}
    taps = [i for i in range(config.vision.layers) if contract.tap_name(i) in names]
    if not taps:
        raise PackageError(f"graph {contract.FEATURES!r} returns no block of the architecture")
    return taps
