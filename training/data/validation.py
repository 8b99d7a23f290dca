"""Image-text pairs that are kept for evaluation, read without augmentation."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from perception_rt.config import PeConfig
from perception_rt.errors import InputError, SampleError
from training.data.pair_batch import Captions, Pair
from training.data.pairs import make_pair
from training.data.shards import Index, divide, expand, open_format
from training.data.unusable import Unusable, all_unusable
from training.recipe.pairs import PairDataConfig

MOST = 5000  # pairs; more make the figures steadier, and the evaluation slower
CHUNK = 64  # pairs in memory at once


class ValidationPairs:
    """The first pairs of `data.validation_path`, or those kept by `data.validation_fraction`.

    Args:
        config: the recipe's section `data`.
        model: architecture that images and captions are prepared for.
        workers: number of threads that read.

    Raises:
        InputError: a file is missing or damaged, or none has a pair.
    """

    def __init__(self, config: PairDataConfig, model: PeConfig, *, workers: int) -> None:
        self._config = config
        self._size = model.vision.image_size
        self._captions = Captions(model)
        self._workers = workers
        self._format = open_format(config)
        if config.validation_path:
            self._shards = expand(config.validation_path, "data.validation_path")
        else:
            self._shards = expand(config.path)
        self._rows = list(islice(self._all_rows(), MOST))
        if not self._rows:
            raise InputError(
                f"{str(self._shards[0])!r:.200} leaves no pair for validation; "
                "set data.validation_path or raise data.validation_fraction"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def chunks(self) -> Iterator[list[Pair]]:
        """Yields all usable pairs, in the order of the files, `CHUNK` rows at a time.

        Raises:
            PerceptionError: no pair is usable.
        """
        failed: list[Unusable] = []
        usable = False
        with ThreadPoolExecutor(self._workers, thread_name_prefix="validation") as pool:
            for start in range(0, len(self._rows), CHUNK):
                read = list(pool.map(self._read, self._rows[start : start + CHUNK]))
                failed += [found for found in read if isinstance(found, Unusable)]
                if pairs := [found for found in read if isinstance(found, Pair)]:
                    usable = True
                    yield pairs
        if not usable:
            raise all_unusable(failed)

    def _all_rows(self) -> Iterator[tuple[Path, Index]]:
        for shard in self._shards:
            if self._config.validation_path:
                index = self._format.index(shard)
            else:
                _, index = divide(self._format, shard, self._config.validation_fraction)
            yield from ((shard, entry) for entry in index)

    def _read(self, row: tuple[Path, Index]) -> Pair | Unusable:
        shard, entry = row
        name = self._format.name(shard, entry)
        try:
            raw = self._format.load(shard, entry)
            return make_pair(raw, self._captions, self._config.frames, (self._size,), name)
        except SampleError as error:
            return Unusable(name, str(error), error.detail)
