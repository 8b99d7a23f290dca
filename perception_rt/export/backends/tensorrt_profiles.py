"""Optimization profiles of TensorRT engines: the sizes that a graph is built for."""

from collections.abc import Mapping, Sequence

from perception_rt.package import contract

# Least, usual and largest value of each dynamic size, by its name.
Profile = Mapping[str, tuple[int, int, int]]

# Images per call. The largest is a photograph of PLM: 36 tiles and a thumbnail.
_IMAGES = ((1, 1, 1), (2, 2, 2), (3, 4, 4), (5, 8, 8), (9, 16, 16), (17, 37, 37))
_SIZES = {
    contract.VISION: _IMAGES,
    contract.FEATURES: ((1, 1, 1), (2, 8, 37)),
    contract.ATTENTION: ((1, 1, 1), (2, 8, 37)),
    contract.PYRAMID: ((1, 1, 1), (2, 4, 8)),
    contract.TEXT: ((1, 1, 1), (2, 16, 64)),
}


def has_engine(graph: str) -> bool:
    """Whether a graph gets engines: `pixels` does not, since it only serves comparisons."""
    return contract.graph_kind(graph) != contract.PIXELS


def whole_range(graph: str) -> tuple[int, int, int]:
    """Least, usual and largest batch of an encoder's graph, for a single profile."""
    sizes = _SIZES[contract.graph_kind(graph)]
    return sizes[0][0], sizes[-1][1], sizes[-1][2]


def usual_sizes(graph: str) -> Sequence[int]:
    """Usual batch of each profile of an encoder's graph; () for other graphs."""
    return tuple(usual for _, usual, _ in _SIZES.get(contract.graph_kind(graph), ()))


def profiles(graph: str, max_length: int) -> Sequence[Profile]:
    """Profiles of a graph.

    Args:
        graph: name of the graph in its package.
        max_length: longest sequence of a decoder, in tokens.
    """
    if graph.startswith(contract.DECODER):
        tokens = min(contract.CHUNK_TOKENS, max_length)
        step = {
            contract.BATCH: (1, 1, contract.ENGINE_SEQUENCES),
            contract.LENGTH: (1, 1, 1),
            contract.POSITIONS: (1, 1, 1),
        }
        prompt = {
            contract.BATCH: (1, 1, 1),
            contract.LENGTH: (1, tokens, tokens),
            contract.POSITIONS: (1, 1, min(contract.ENGINE_POSITIONS, tokens)),
        }
        return (step, prompt)
    if graph == contract.EMBED:  # a step embeds one token per sequence, as one row
        one, steps = (1, 1, 1), min(contract.ENGINE_SEQUENCES, max_length)
        lengths = (1, min(contract.CHUNK_TOKENS, max_length), max_length)
        return (
            {contract.BATCH: one, contract.LENGTH: (1, 1, steps)},
            {contract.BATCH: one, contract.LENGTH: lengths},
        )
    sizes = _SIZES[contract.graph_kind(graph)]
    return tuple({contract.BATCH: size} for size in sizes)
