"""Runs images through a chain of graphs, to an embedding or to the output of a block.

Legend: N images.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np

from perception_rt.config import PeConfig
from perception_rt.limits import Limits
from perception_rt.package import contract
from perception_rt.package.contract import GraphSpec, TensorSpec
from perception_rt.package.pe_graphs import Segments, further_sizes, read_segments
from perception_rt.processing.image import ImageSource, ImageSpec
from perception_rt.processing.image_loader import OnError, default_workers, load_images, next_batch
from perception_rt.processing.image_options import ImageOptions
from perception_rt.records import check_integer
from perception_rt.runtime.embedding.items import Array, Float32, check_items, stacked
from perception_rt.runtime.session import Sessions

Progress = Callable[[int, int], None]

MAX_WORKERS = 64
_IMAGE_NDIM = 3  # dimensions of an array that is one image


@dataclass(frozen=True, slots=True)
class Step:
    """One graph of a chain, with the names of its input and of the wanted output."""

    graph: str
    source: str
    output: str


TEXT = [Step(contract.TEXT, contract.TOKENS, contract.TEXT_EMBEDDING)]


class ImageChains:
    """The chains of a package's graphs for one image size.

    Attributes:
        spec: how images become pixels.
        embedding: the chain from images to the tower's output.
        pixels: the chain from normalised pixels to the tower's output.
        taps: indices of the blocks that the package returns.
    """

    def __init__(self, spec: ImageSpec, segments: Segments, *, is_further: bool) -> None:
        self.spec = spec
        self.taps = frozenset(tap for taps in segments for tap in taps)
        self._segments = segments
        self._size = (spec.height, spec.width) if is_further else None
        self.embedding = [self._step(contract.VISION, contract.IMAGES_U8, contract.EMBEDDING)]
        self.pixels = [self._step(contract.PIXELS, contract.PIXELS_F32, contract.EMBEDDING)]

    def block(self, index: int) -> list[Step]:
        """The chain from images to a tapped block, without the graphs behind it."""
        steps: list[Step] = []
        source = contract.IMAGES_U8
        for part, taps in enumerate(self._segments):
            output = contract.tap_name(min(index, taps[-1]))
            steps.append(self._step(contract.features_part(part), source, output))
            if index <= taps[-1]:
                break
            source = output
        return steps

    def attention(self) -> list[Step]:
        """The chain from images to the attention of the pooling probe."""
        last = self._segments[-1][-1]
        maps = contract.ATTENTION_MAPS
        return [*self.block(last), self._step(contract.ATTENTION, contract.tap_name(last), maps)]

    @property
    def pyramid(self) -> str:
        """Name of the graph of a detection backbone."""
        return self._name(contract.PYRAMID)

    def _step(self, graph: str, source: str, output: str) -> Step:
        return Step(self._name(graph), source, output)

    def _name(self, graph: str) -> str:
        return graph if self._size is None else contract.sized(graph, self._size)


def image_chains(
    graphs: Mapping[str, GraphSpec], config: PeConfig, spec: ImageSpec
) -> dict[tuple[int, int], ImageChains]:
    """The chains of a checked package by image size (height, width), its own size first."""
    segments = read_segments(graphs, config)
    chains = {(spec.height, spec.width): ImageChains(spec, segments, is_further=False)}
    for height, width in further_sizes(graphs):
        further = replace(spec, height=height, width=width)
        chains[height, width] = ImageChains(further, segments, is_further=True)
    return chains


def run_chain(sessions: Sessions, steps: Sequence[Step], array: Array) -> Float32:
    """Runs the graphs one after the other, each on the output of the one before."""
    for step in steps:
        (array,) = sessions[step.graph].run({step.source: array}, [step.output])
    return array


class ImageRunner:
    """Decodes images ahead and runs them through a chain of graphs, batch by batch.

    Args:
        sessions: opens the package's graphs.
        graphs: their specs.
        limits: bounds on the images.
        options: formats to accept, and the background.
    """

    def __init__(
        self,
        sessions: Sessions,
        graphs: Mapping[str, GraphSpec],
        limits: Limits,
        options: ImageOptions,
    ) -> None:
        self._sessions = sessions
        self._graphs = graphs
        self._limits = limits
        self._options = options

    def rows(
        self,
        images: Iterable[ImageSource],
        steps: Sequence[Step],
        spec: ImageSpec,
        *,
        batch_size: int,
        workers: int | None,
        on_progress: Progress | None,
        on_error: OnError | None = None,
    ) -> Float32:
        """The last output of a chain for all images; zeros for unusable ones.

        Args:
            images: as for `Embedder.embed_images`; so are `workers` and the callbacks.
            steps: the chain.
            spec: how images become pixels.
            batch_size: images per engine call.
            workers: threads that decode; None for the default.
            on_progress: called after each batch.
            on_error: called for each unusable image.
        """

        def run(pixels: Array) -> list[Float32]:
            return [run_chain(self._sessions, steps, pixels)]

        (rows,) = self._results(
            images,
            run,
            [self._graphs[steps[-1].graph].output(steps[-1].output)],
            spec,
            batch_size=batch_size,
            workers=workers,
            on_progress=on_progress,
            on_error=on_error,
        )
        return rows

    def levels(
        self,
        images: Iterable[ImageSource],
        graph: str,
        spec: ImageSpec,
        *,
        batch_size: int,
        workers: int | None,
        on_progress: Progress | None,
        on_error: OnError | None = None,
    ) -> dict[str, Float32]:
        """The levels of the pyramid for all images, by name; `graph` computes them.

        Other arguments as for `rows`.
        """
        names = contract.LEVELS

        def run(pixels: Array) -> Sequence[Float32]:
            return self._sessions[graph].run({contract.IMAGES_U8: pixels}, names)

        results = self._results(
            images,
            run,
            [self._graphs[graph].output(name) for name in names],
            spec,
            batch_size=batch_size,
            workers=workers,
            on_progress=on_progress,
            on_error=on_error,
        )
        return dict(zip(names, results, strict=True))

    def _results(
        self,
        images: Iterable[ImageSource],
        run: Callable[[Array], Sequence[Float32]],
        outputs: Sequence[TensorSpec],
        spec: ImageSpec,
        *,
        batch_size: int,
        workers: int | None,
        on_progress: Progress | None,
        on_error: OnError | None,
    ) -> list[Float32]:
        """The results of `run` on batches of pixels, which have the specs `outputs`."""
        check_items(images, "images", _IMAGE_NDIM)
        if workers is None:
            workers = default_workers()
        workers = check_integer("workers", workers, 1, MAX_WORKERS)
        loading = load_images(
            images,
            spec,
            workers=workers,
            ahead=batch_size + workers,
            limits=self._limits,
            options=self._options,
        )
        shapes = [tuple(size for size in o.shape if isinstance(size, int)) for o in outputs]
        total = len(images) if isinstance(images, Sized) else None
        rows: list[list[Float32]] = [[] for _ in outputs]
        done = 0
        with closing(loading):
            while batch := next_batch(loading, batch_size, done, on_error):
                usable = [index for index, pixels in enumerate(batch) if pixels is not None]
                parts = [np.zeros((len(batch), *shape), np.float32) for shape in shapes]
                if usable:
                    results = run(np.stack([pixels for pixels in batch if pixels is not None]))
                    for part, result in zip(parts, results, strict=True):
                        part[usable] = result
                for finished, part in zip(rows, parts, strict=True):
                    finished.append(part)
                done += len(batch)
                if on_progress is not None:
                    on_progress(done, done if total is None else total)
        return [stacked(parts, shape) for parts, shape in zip(rows, shapes, strict=True)]
