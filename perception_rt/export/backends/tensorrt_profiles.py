"""Optimization profiles of TensorRT engines: which sizes a graph is built for."""

from collections.abc import Mapping, Sequence

from perception_rt.package import contract

# By the name of a dynamic size: its least, usual and largest.
Profile = Mapping[str, tuple[int, int, int]]

# Images of one call. The largest is a photograph of PLM: 36 tiles and the thumbnail.
_IMAGES = ((1, 1, 1), (2, 2, 2), (3, 4, 4), (5, 8, 8), (9, 16, 16), (17, 37, 37))
_SIZES = {
    contract.VISION: _IMAGES,
    contract.FEATURES: ((1, 1, 1), (2, 8, 37)),
    contract.TEXT: ((1, 1, 1), (2, 16, 64)),
}


def has_engine(graph: str) -> bool:
    """Whether engines are built of a graph: `pixels` is there to be compared, on the CPU."""
    return graph != contract.PIXELS


def whole_range(graph: str) -> tuple[int, int, int]:
    """The least, usual and largest batch of an encoder's graph, as one profile."""
    sizes = _SIZES[graph]
    return sizes[0][0], sizes[-1][1], sizes[-1][2]


def usual_sizes(graph: str) -> Sequence[int]:
    """The usual batch of each profile of an encoder's graph; () for another one."""
    return tuple(usual for _, usual, _ in _SIZES.get(graph, ()))


def profiles(graph: str, max_length: int) -> Sequence[Profile]:
    """Those of a graph, by its name.

    Args:
        graph: of a package.
        max_length: tokens of a decoder's longest sequence.
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
    if graph == contract.EMBED:  # the sequences of a step are one row of it
        one, steps = (1, 1, 1), min(contract.ENGINE_SEQUENCES, max_length)
        lengths = (1, min(contract.CHUNK_TOKENS, max_length), max_length)
        return (
            {contract.BATCH: one, contract.LENGTH: (1, 1, steps)},
            {contract.BATCH: one, contract.LENGTH: lengths},
        )
    sizes = _SIZES[graph]
    return tuple({contract.BATCH: size} for size in sizes)
