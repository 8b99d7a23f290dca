"""Embeds items shard by shard: the bulk job.

Batches are cut by item number: they start anew with each shard, and with each change of kind within
a shard. So a row depends on the job, not on the run that made it.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from perception_rt.bulk.contents import Contents
from perception_rt.bulk.listing import Item, Listing
from perception_rt.bulk.output import SHARD_ITEMS, Job, Output, Totals
from perception_rt.bulk.shards import DTYPES, ItemError, Shard
from perception_rt.bulk.sources import Sources
from perception_rt.errors import InputError
from perception_rt.records import check_choice, check_integer

Float32 = NDArray[np.float32]
# Items done, items in all, errors so far.
BulkProgress: TypeAlias = Callable[[int, int, int], None]
# Items done and errors so far, of one shard.
BatchProgress: TypeAlias = Callable[[int, int], None]
# Yields the shards of some numbers, in any order; may report the progress of the next one.
ShardMaker: TypeAlias = Callable[
    [Job, Listing, Sequence[int], BatchProgress], Iterator[tuple[int, Shard]]
]

MAX_SHARD_ITEMS = 2**20
MAX_PARTS = 2**20
_VIDEO_WORKERS = 2  # each holds the frames of a video


class Model(Protocol):
    """The properties of an embedder that planning a job needs."""

    @property
    def manifest(self) -> Any:
        """Manifest of the package."""

    @property
    def batch_size(self) -> int:
        """Items per engine call, by default."""

    @property
    def dim(self) -> int:
        """Channels of a row."""


class Engine(Model, Protocol):
    """The part of `perception_rt.Embedder` that a job uses."""

    def embed_images(self, images: Iterable[Any], **options: Any) -> Float32:
        """Embeds images."""

    def embed_texts(self, texts: Iterable[str], **options: Any) -> Float32:
        """Embeds texts."""

    def embed_videos(self, videos: Iterable[Any], **options: Any) -> Float32:
        """Embeds videos."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkOptions:
    """How a job runs.

    Attributes:
        dtype: "float32" or "float16", of the rows on disk.
        skip_errors: whether unusable items are recorded instead of ending the job.
        resume: whether to complete an output that exists.
        part: part i of n of the items, from 1; several processes may write one folder. None for
            all.
        shard_items: items per shard, rounded up to whole batches; None for those of the output
            that exists, or for 1024, or fewer if there are more parts than such shards.
        batch_size: items per engine call; None for those of the output that exists, or for the
            engine's.
        workers: threads that decode images; None for one per CPU core, at most 8.
        num_frames: frames per video.
        preprocessing: settings with which the engine was loaded; a resumed job must have the same.
    """

    dtype: str = "float32"
    skip_errors: bool = False
    resume: bool = False
    part: tuple[int, int] | None = None
    shard_items: int | None = None
    batch_size: int | None = None
    workers: int | None = None
    num_frames: int = 8
    preprocessing: str = ""

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)
        check_integer("num_frames", self.num_frames, 1)
        if self.shard_items is not None:
            check_integer("shard_items", self.shard_items, 1, MAX_SHARD_ITEMS)
        if self.part is not None:
            check_integer("the number of parts", self.part[1], 1, MAX_PARTS)
            check_integer("part", self.part[0], 1, self.part[1])


def embed_sources(
    engine: Engine,
    sources: Sources,
    out: str | os.PathLike[str],
    options: BulkOptions | None = None,
    *,
    on_progress: BulkProgress | None = None,
) -> Totals:
    """Embeds many items into a result on disk.

    Memory does not grow with the number of items, except for the names of one folder and for the
    counts of the shards.

    Args:
        engine: a loaded encoder.
        sources: the items.
        out: a folder of Parquet shards, or a file that ends in `.npy`, `.jsonl` or `.parquet`.
        options: how the job runs.
        on_progress: called after each batch with the items done, all items, and the errors.

    Returns:
        Counts of the items of this part, done by this run or before.

    Raises:
        InputError: a source or the output is unusable, the output belongs to another job, or an
            item is unusable and `skip_errors` is false. Completed shards stay.
        BackendError: the engine failed, or pyarrow is needed and not installed.
    """
    options = BulkOptions() if options is None else options
    with Contents(sources.column) as contents:

        def make_shards(
            job: Job, listing: Listing, missing: Sequence[int], on_batch: BatchProgress
        ) -> Iterator[tuple[int, Shard]]:
            for number in missing:
                start, stop = job.items_of(number)
                items = listing.read(start, stop)
                yield (
                    number,
                    embed_shard(engine, contents, items, start, job, options, on_batch=on_batch),
                )

        return write_shards(engine, make_shards, sources, out, options, on_progress=on_progress)


def write_shards(
    model: Model,
    make_shards: ShardMaker,
    sources: Sources,
    out: str | os.PathLike[str],
    options: BulkOptions,
    *,
    on_progress: BulkProgress | None = None,
) -> Totals:
    """Plans the job of `embed_sources`, and writes shards that a function makes.

    Args:
        model: facts about the encoder.
        make_shards: makes the shards that are missing.
        sources: as for `embed_sources`.
        out: as for `embed_sources`.
        options: as for `embed_sources`.
        on_progress: called when `make_shards` reports a batch.

    Raises:
        PerceptionError: as for `embed_sources`.
    """
    with Output(out) as output:
        if options.part is not None and output.path != output.folder:
            raise InputError("parts need a folder as output: they write its shards together")
        with Listing(sources.items(), _existing_parent(output.path)) as listing:
            if not len(listing):
                raise InputError("nothing to embed: the sources have no items")
            job = make_job(model, listing, options, output.recorded())
            output.begin(job, resume=options.resume, part=options.part)
            _write_missing(make_shards, listing, output, job, options, on_progress)
            return output.finish()


def make_job(
    engine: Model, listing: Listing, options: BulkOptions, recorded: dict[str, Any] | None
) -> Job:
    """The job of an engine and items; sizes that are not given are those recorded."""
    recorded = {} if recorded is None else recorded
    batch = options.batch_size or recorded.get("batch_size") or engine.batch_size
    batch = check_integer("batch_size", batch, 1, 256)
    shard = options.shard_items or recorded.get("shard_items")
    if shard is None:
        shard = SHARD_ITEMS
        if options.part is not None:
            shard = min(shard, -(-len(listing) // options.part[1]))
    shard = -(-check_integer("shard_items", shard, 1) // batch) * batch
    content = engine.manifest.content
    return Job(
        package=engine.manifest.id,
        model=content.name,
        dim=engine.dim,
        dtype=options.dtype,
        items=len(listing),
        sources=listing.digest,
        shard_items=shard,
        batch_size=batch,
        num_frames=options.num_frames,
        preprocessing=options.preprocessing,
    )


def embed_shard(
    engine: Engine,
    contents: Contents,
    items: Sequence[Item],
    start: int,
    job: Job,
    options: BulkOptions,
    *,
    on_batch: BatchProgress | None = None,
) -> Shard:
    """Embeds consecutive items.

    Args:
        engine: a loaded encoder.
        contents: reads the items.
        items: the items of one shard.
        start: number of the first.
        job: sizes and dtype.
        options: `skip_errors` and `workers` count.
        on_batch: called after each batch with the items done and the errors, of this shard.

    Raises:
        InputError: an item is unusable, and `skip_errors` is false.
    """
    rows = np.zeros((len(items), job.dim), job.dtype)
    errors: dict[int, ItemError] = {}

    def fail(index: int, error: InputError) -> None:
        source = items[index].source
        if not options.skip_errors:
            raise InputError(
                f"item {start + index}, {source!r:.200}: {error}; skip_errors leaves it out"
            )
        errors[index] = ItemError(id=start + index, source=source, reason=str(error))

    done = 0
    for _, group in groupby(items, key=lambda item: item.kind):
        part = list(group)
        call = _Call(engine, contents, part, done, fail)

        def progress(count: int, _: int, first: int = done) -> None:
            if on_batch is not None:
                on_batch(first + count, len(errors))

        rows[done : done + len(part)] = call.run(job, options, progress)
        done += len(part)
    good = [index for index in range(len(items)) if index not in errors]
    return Shard(
        start=start,
        stop=start + len(items),
        ids=np.array(good, np.int64) + start,
        sources=[items[index].source for index in good],
        rows=rows[good],
        errors=tuple(errors[index] for index in sorted(errors)),
    )


class _Call:
    """One call of the engine for items of one kind."""

    def __init__(
        self,
        engine: Engine,
        contents: Contents,
        items: Sequence[Item],
        first: int,
        fail: Callable[[int, InputError], None],
    ) -> None:
        self._engine = engine
        self._contents = contents
        self._items = items
        self._first = first
        self._fail = fail
        self._reasons: dict[int, InputError] = {}

    def run(
        self, job: Job, options: BulkOptions, on_progress: Callable[[int, int], None]
    ) -> Float32:
        """Embeds the items; unusable ones have zeros."""
        more: dict[str, Any] = {
            "batch_size": job.batch_size,
            "on_progress": on_progress,
            "on_error": self._on_error,
        }
        kind = self._items[0].kind
        if kind == "image":
            images = self._each(self._contents.image)
            return self._engine.embed_images(images, workers=options.workers, **more)
        if kind == "text":
            return self._engine.embed_texts(list(self._each(self._contents.text)), **more)
        return self._engine.embed_videos(
            self._each(self._contents.video),
            num_frames=job.num_frames,
            workers=_VIDEO_WORKERS,
            **more,
        )

    def _each(self, read: Callable[[Item], Any]) -> Iterator[Any]:
        """Contents of the items; an unusable value, and its reason, for one that is unreadable."""
        for index, item in enumerate(self._items):
            try:
                content = read(item)
            except InputError as error:
                self._reasons[index] = error
                content = b""
            yield content

    def _on_error(self, index: int, error: InputError) -> None:
        self._fail(self._first + index, self._reasons.pop(index, error))


def _write_missing(
    make_shards: ShardMaker,
    listing: Listing,
    output: Output,
    job: Job,
    options: BulkOptions,
    on_progress: BulkProgress | None,
) -> None:
    missing = output.missing()
    shards = range(job.shards) if options.part is None else job.part(options.part)
    sizes = {number: stop - start for number in shards for start, stop in [job.items_of(number)]}
    total = sum(sizes.values())
    done = total - sum(sizes[number] for number in missing)
    errors = 0

    def report(count: int, failed: int) -> None:
        if on_progress is not None:
            on_progress(done + count, total, errors + failed)

    for number, shard in make_shards(job, listing, missing, report):
        output.write(number, shard)
        done, errors = done + sizes[number], errors + len(shard.errors)


def _existing_parent(out: Path) -> Path | None:
    return out.parent if os.access(out.parent, os.W_OK) else None
