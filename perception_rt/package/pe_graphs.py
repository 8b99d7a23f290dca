"""Inputs and outputs of every graph of a Perception Encoder package.

The exporter builds its graphs to these signatures, and the runtime compares a package with them.

Legend: N images or texts, H W pixels, T tokens, D embedding channels, C width.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from perception_rt.config import DetectionConfig, PeConfig, TextConfig, VisionConfig
from perception_rt.errors import InputError, PackageError
from perception_rt.package import contract
from perception_rt.package.contract import (
    GraphSignature,
    GraphSpec,
    batched,
    check_signatures,
)

# Indices of the blocks that each graph of the chain `contract.features_part` returns, ascending.
Segments = Sequence[Sequence[int]]

# More would cost less for the blocks in front, but each graph has threads of its own.
_MAX_SEGMENTS = 8


def cut_taps(taps: Sequence[int]) -> Segments:
    """Spreads the ascending indices of tapped blocks over at most 8 graphs."""
    count = min(len(taps), _MAX_SEGMENTS)
    edges = [len(taps) * i // count for i in range(count + 1)] if count else []
    return [taps[start:stop] for start, stop in pairwise(edges)]


def vision_signatures(
    config: PeConfig, height: int, width: int, segments: Segments
) -> dict[str, GraphSignature]:
    """Signatures of `vision`, `pixels`, the graphs of the tapped blocks, and `attention`.

    `attention` needs the last block and a tower that pools by attention. A detection backbone has
    the graph `pyramid` alone.

    Args:
        config: the architecture.
        height: image height in pixels.
        width: image width in pixels.
        segments: the tapped blocks of each graph.

    Raises:
        InputError: the patch size does not divide the image size, or the image is too small.
    """
    vision = config.vision
    if config.detection is not None:
        return {contract.PYRAMID: _pyramid_signature(vision, config.detection, height, width)}
    rows, columns = vision.grid_of(height, width)
    tokens = rows * columns + int(vision.use_cls_token)
    middle = (tokens,) if vision.pool_type == "none" else ()
    images = batched(contract.IMAGES_U8, "uint8", height, width, 3)
    pixels = batched(contract.PIXELS_F32, "float32", 3, height, width)
    embedding = batched(contract.EMBEDDING, "float32", *middle, vision.embed_dim)
    signatures = {
        contract.VISION: GraphSignature(inputs=(images,), outputs=(embedding,)),
        contract.PIXELS: GraphSignature(inputs=(pixels,), outputs=(embedding,)),
    }
    source = images
    for index, taps in enumerate(segments):
        blocks = [batched(contract.tap_name(i), "float32", tokens, vision.width) for i in taps]
        signatures[contract.features_part(index)] = GraphSignature(
            inputs=(source,), outputs=tuple(blocks)
        )
        source = blocks[-1]
    if source.name == contract.tap_name(vision.layers - 1) and vision.pool_type == "attn":
        maps = batched(contract.ATTENTION_MAPS, "float32", vision.attn_pooler_heads, tokens)
        signatures[contract.ATTENTION] = GraphSignature(inputs=(source,), outputs=(maps,))
    return signatures


def _pyramid_signature(
    vision: VisionConfig, detection: DetectionConfig, height: int, width: int
) -> GraphSignature:
    """Signature of `pyramid`: images to the levels p2 to p6; errors as `vision_signatures`."""
    rows, columns = vision.grid_of(height, width)
    least = 2 * vision.patch_size
    if min(rows, columns) < 2:
        raise InputError(
            f"image size {height}x{width} is too small: a pyramid needs {least} pixels a side"
        )
    grids = [(4 * rows, 4 * columns), (2 * rows, 2 * columns), (rows, columns)]
    grids.append((rows // 2, columns // 2))
    grids.append(((grids[-1][0] + 1) // 2, (grids[-1][1] + 1) // 2))
    return GraphSignature(
        inputs=(batched(contract.IMAGES_U8, "uint8", height, width, 3),),
        outputs=tuple(
            batched(name, "float32", detection.channels, *grid)
            for name, grid in zip(contract.LEVELS, grids, strict=True)
        ),
    )


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
    segments = read_segments(graphs, config)
    further = further_sizes(graphs)
    if (height, width) in further:
        raise PackageError(f"image size {height}x{width} occurs twice")
    signatures = vision_signatures(config, height, width, segments)
    for size in further:
        signatures |= {
            contract.sized(name, size): signature
            for name, signature in vision_signatures(config, *size, segments).items()
        }
    if contract.ATTENTION not in graphs:  # earlier exporters made none
        signatures.pop(contract.ATTENTION, None)
    if config.text is not None:
        signatures[contract.TEXT] = text_signature(config.text)
    check_signatures(graphs, signatures)


def further_sizes(graphs: Iterable[str]) -> list[tuple[int, int]]:
    """Image sizes (height, width) of a package's graphs besides its own, ascending."""
    return sorted({size for size in map(contract.size_of, graphs) if size is not None})


def read_segments(graphs: Mapping[str, GraphSpec], config: PeConfig) -> Segments:
    """The tapped blocks of each graph in a package's chain; () for a package without taps.

    Raises:
        PackageError: a graph returns no block, or one that the graphs before it have passed.
    """
    segments: list[list[int]] = []
    first = 0
    while (name := contract.features_part(len(segments))) in graphs:
        names = {spec.name for spec in graphs[name].outputs}
        taps = [i for i in range(first, config.vision.layers) if contract.tap_name(i) in names]
        if not taps:
            raise PackageError(f"graph {name!r} returns no block from {first} on")
        segments.append(taps)
        first = taps[-1] + 1
    return segments
