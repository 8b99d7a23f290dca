"""Dense outputs of an encoder package: blocks, attention maps and feature pyramids.

Legend: N images, h w patch grid, C width.
"""

from collections.abc import Iterable

from perception_rt.config import PeConfig
from perception_rt.errors import InputError
from perception_rt.package import contract
from perception_rt.processing.image import ImageSource
from perception_rt.processing.image_loader import OnError
from perception_rt.records import check_integer
from perception_rt.runtime.embedding.image_graphs import ImageChains, ImageRunner, Progress
from perception_rt.runtime.embedding.items import Float32
from perception_rt.runtime.native_calls import check_process
from perception_rt.runtime.session import LoadedModel

MAX_BATCH = 256


class DenseOutputs(LoadedModel):
    """The methods of `Embedder` that return a value for each part of an image.

    Attributes:
        batch_size: default number of items per engine call.
    """

    batch_size: int
    _config: PeConfig
    _chains: dict[tuple[int, int], ImageChains]
    _images: ImageRunner

    @property
    def image_sizes(self) -> tuple[tuple[int, int], ...]:
        """Image sizes (height, width) in pixels that the package has, the default first."""
        return tuple(self._chains)

    def features(
        self,
        images: Iterable[ImageSource],
        layer: int = -1,
        *,
        size: tuple[int, int] | None = None,
        batch_size: int | None = None,
        workers: int | None = None,
        on_progress: Progress | None = None,
        on_error: OnError | None = None,
    ) -> Float32:
        """Dense features of a block, without class token and final norm.

        Only the blocks up to about the layer run, so one in front costs less. `layer` is a block
        index, from the front or, if negative, from the end. Other arguments as for `embed_images`.

        Returns:
            float32 (N, h, w, C).

        Raises:
            InputError: an image or an argument is unusable, there is no such block, or the package
                was exported without its output.
            BackendError: the engine failed, or the embedder is closed.
        """
        check_process(self._process)
        chains, vision = self._at(size), self._config.vision
        self._require_encoder()
        block = vision.block_index(layer)
        if block not in chains.taps:
            raise InputError(f"this package was exported without the output of layer {layer}")
        tokens = self._images.rows(
            images,
            chains.block(block),
            chains.spec,
            batch_size=self._batch_size(batch_size),
            workers=workers,
            on_progress=on_progress,
            on_error=on_error,
        )
        grid = vision.grid_of(chains.spec.height, chains.spec.width)
        return tokens[:, int(vision.use_cls_token) :].reshape(-1, *grid, vision.width)

    def attention_maps(
        self,
        images: Iterable[ImageSource],
        *,
        size: tuple[int, int] | None = None,
        batch_size: int | None = None,
        workers: int | None = None,
        on_progress: Progress | None = None,
        on_error: OnError | None = None,
    ) -> Float32:
        """Attention of the pooling probe to each patch: which patches make up the embedding.

        Arguments as for `features`.

        Returns:
            float32 (N, heads, h, w). A head's weights sum to 1 together with the class token's,
            which is left out.

        Raises:
            InputError: as `features`, or the package has no attention maps.
            BackendError: the engine failed, or the embedder is closed.
        """
        check_process(self._process)
        chains, vision = self._at(size), self._config.vision
        self._require_encoder()
        if contract.ATTENTION not in self.manifest.content.graphs:
            raise InputError(
                "this package has no attention maps: they need a model that pools by attention, "
                "and an export of the last block (--taps)"
            )
        maps = self._images.rows(
            images,
            chains.attention(),
            chains.spec,
            batch_size=self._batch_size(batch_size),
            workers=workers,
            on_progress=on_progress,
            on_error=on_error,
        )
        grid = vision.grid_of(chains.spec.height, chains.spec.width)
        return maps[..., int(vision.use_cls_token) :].reshape(len(maps), -1, *grid)

    def pyramid(
        self,
        images: Iterable[ImageSource],
        *,
        size: tuple[int, int] | None = None,
        batch_size: int = 1,
        workers: int | None = None,
        on_progress: Progress | None = None,
        on_error: OnError | None = None,
    ) -> dict[str, Float32]:
        """The feature pyramid of a detection backbone, for a detector's heads.

        Arguments as for `features`. At 1024 x 1024 pixels, the levels of one image take 85 MiB, so
        the default is one image per engine call, and long lists are better given in parts.

        Returns:
            "p2" to "p6", each float32 (N, channels, rows, columns). A cell of "p2" covers 4 x 4
            pixels of the resized image, and each level halves the one before it.

        Raises:
            InputError: as `features`, or the package is no detection backbone.
            BackendError: the engine failed, or the embedder is closed.
        """
        check_process(self._process)
        if self._config.detection is None:
            raise InputError(
                "this package is no detection backbone: perception-export --detection makes one"
            )
        chains = self._at(size)
        return self._images.levels(
            images,
            chains.pyramid,
            chains.spec,
            batch_size=self._batch_size(batch_size),
            workers=workers,
            on_progress=on_progress,
            on_error=on_error,
        )

    def _at(self, size: tuple[int, int] | None) -> ImageChains:
        """The chains for an image size; InputError unless the package has it."""
        if size is None:
            return self._chains[self.image_sizes[0]]
        if size not in self.image_sizes:
            known = ", ".join(f"{height}x{width}" for height, width in self.image_sizes)
            raise InputError(f"size must be one of this package, {known}, not {size!r:.40}")
        return self._chains[size]

    def _batch_size(self, batch_size: int | None) -> int:
        if batch_size is None:
            return self.batch_size
        return check_integer("batch_size", batch_size, 1, MAX_BATCH)

    def _require_encoder(self) -> None:
        if self._config.detection is not None:
            name = self.manifest.content.name
            raise InputError(f"{name} is exported as a detection backbone; use pyramid()")
