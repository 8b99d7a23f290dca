"""The bulk job on a cluster: one Ray task makes one shard, and the driver writes it.

A shard is a function of the job and its number, so Ray may run a task again on another machine, and
the result equals that of `perception_rt.bulk.run.embed_sources` byte for byte.
"""

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from perception_rt.bulk.contents import Contents
from perception_rt.bulk.listing import Item, Listing
from perception_rt.bulk.output import Job, Totals
from perception_rt.bulk.run import (
    BatchProgress,
    BulkOptions,
    BulkProgress,
    embed_shard,
    write_shards,
)
from perception_rt.bulk.shards import Shard
from perception_rt.bulk.sources import Sources
from perception_rt.errors import BackendError, InputError, PackageError, PerceptionError, describe
from perception_rt.package.manifest import Manifest
from perception_rt.ray.arguments import check_names, keywords
from perception_rt.ray.cluster import connected, ray_library
from perception_rt.records import check_integer
from perception_rt.runtime.embedder import Embedder

_RETRIES = 3  # of a task whose worker died
_AHEAD = 2  # tasks in flight per free place, so that no worker waits for the driver


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """Facts about the encoder; the driver loads none."""

    manifest: Manifest
    batch_size: int
    dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Settings of every task. `load` is serialised, to be the key of a cached engine."""

    package: str
    load: bytes
    folder: str
    column: str | None


def embed_sources(
    package: str,
    sources: Sources,
    out: str | os.PathLike[str],
    options: BulkOptions | None = None,
    *,
    address: str = "auto",
    load: Mapping[str, Any] | None = None,
    on_progress: BulkProgress | None = None,
) -> Totals:
    """Embeds many items into a result on disk, by the workers of a Ray cluster.

    Every machine must have the package and the items under the same paths; relative ones are
    relative to the working folder of this process. Only this process writes the result. A task
    takes as many CPUs as its engine has threads, and a GPU unless the device is "cpu".

    Args:
        package: path or name of an encoder package.
        sources: the items.
        out: as for `perception_rt.bulk.run.embed_sources`.
        options: how the job runs.
        address: as for `connected`: "auto", "local" or the address of a cluster.
        load: arguments of `perception_rt.Embedder.load`; `threads` is 1 by default.
        on_progress: called after each shard with the items done, all items, and the errors.

    Returns:
        Counts of the items.

    Raises:
        InputError: as for the local job, or `load` has an unknown or unusable argument. Completed
            shards stay.
        PackageError: a machine has no such package, or another one.
        BackendError: Ray is not installed or has no cluster there, no machine is large enough, an
            engine failed, or workers died four times at the same shard. Completed shards stay.
    """
    given = _arguments(load)
    threads = given["threads"]
    options = BulkOptions() if options is None else options
    if options.workers is None:
        options = replace(options, workers=threads)
    needs = {"num_cpus": threads, "num_gpus": 0 if given.get("device", "cpu") == "cpu" else 1}
    with connected(address) as ray:
        _check_size(ray, needs)
        place = _Place(
            package=package, load=_serialised(given), folder=str(Path.cwd()), column=sources.column
        )  # fmt: skip
        model = _result(ray, ray.remote(max_retries=_RETRIES, **needs)(_describe).remote(place))
        # Every worker must run the package that the job records.
        place = replace(place, load=_serialised({**given, "expect": model.manifest.id}))

        def make_shards(
            job: Job, listing: Listing, missing: Sequence[int], on_batch: BatchProgress
        ) -> Iterator[tuple[int, Shard]]:
            task = ray.remote(max_retries=_RETRIES, **needs)(_make_shard)
            shared = ray.put((place, job, options))
            pending: dict[Any, int] = {}
            try:
                for number in missing:
                    while len(pending) >= _most_pending(ray, needs):
                        yield _next(ray, pending)
                        on_batch(0, 0)  # the shard is written
                    start, stop = job.items_of(number)
                    pending[task.remote(shared, listing.read(start, stop), start)] = number
                while pending:
                    yield _next(ray, pending)
                    on_batch(0, 0)
            finally:
                for left in pending:
                    ray.cancel(left)

        return write_shards(model, make_shards, sources, out, options, on_progress=on_progress)


def _arguments(load: object) -> dict[str, Any]:
    """Arguments of `Embedder.load`, with a number of threads; workers check the other values."""
    load = {} if load is None else load
    if not isinstance(load, Mapping):
        raise InputError(f"load must be a dict of arguments, not {describe(load)}")
    check_names("load", load, keywords(Embedder.load))
    threads = load.get("threads")
    return {**load, "threads": 1 if threads is None else check_integer("threads", threads, 1)}


def _serialised(load: Mapping[str, Any]) -> bytes:
    try:
        data: bytes = ray_library().cloudpickle.dumps(load)
    except Exception as error:  # of any class: the values choose it
        raise InputError(f"load cannot be sent to workers: {error!s:.200}") from None
    return data


def _check_size(ray: Any, needs: Mapping[str, int]) -> None:
    """BackendError unless a machine is large enough; Ray would wait for one for ever."""
    machines = [machine["Resources"] for machine in ray.nodes() if machine["Alive"]]
    for name, key, way_out in (
        ("CPU", "num_cpus", "use fewer threads, or add a larger machine"),
        ("GPU", "num_gpus", 'use device="cpu", or add a machine with one'),
    ):
        most = int(max((machine.get(name, 0) for machine in machines), default=0))
        if needs[key] > most:
            raise BackendError(
                f"a task needs {needs[key]} {name}s, and no machine of the cluster has more than "
                f"{most}: {way_out}"
            )


def _describe(place: _Place) -> _Model:
    """Runs in a worker: loads the package, and returns facts about it."""
    with _load(place) as engine:
        return _Model(manifest=engine.manifest, batch_size=engine.batch_size, dim=engine.dim)


def _make_shard(
    shared: tuple[_Place, Job, BulkOptions], items: Sequence[Item], start: int
) -> Shard:
    """Runs in a worker: embeds the items of one shard."""
    place, job, options = shared
    engine = _engine(place)
    with Contents(place.column) as contents:
        return embed_shard(engine, contents, items, start, job, options)


def _load(place: _Place) -> Any:
    host = socket.gethostname()
    try:
        os.chdir(place.folder)
    except OSError as error:
        raise InputError(
            f"worker on {host}: no folder {place.folder!r:.200} ({error.strerror}): share it with "
            "all machines"
        ) from None
    try:
        return Embedder.load(place.package, **ray_library().cloudpickle.loads(place.load))
    except (PackageError, BackendError) as error:
        raise type(error)(f"worker on {host}: {error}") from None


_engine = lru_cache(maxsize=1)(_load)  # Ray keeps the processes of its workers


def _most_pending(ray: Any, needs: Mapping[str, int]) -> int:
    """Bound on tasks in flight for the machines that the cluster has now."""
    resources = ray.cluster_resources()
    places = int(resources.get("CPU", 0)) // needs["num_cpus"]
    if needs["num_gpus"]:
        places = min(places, int(resources.get("GPU", 0)))
    return _AHEAD * max(1, places)


def _next(ray: Any, pending: dict[Any, int]) -> tuple[int, Shard]:
    """The next shard that is done, and its number."""
    done, _ = ray.wait(list(pending), num_returns=1)
    number = pending.pop(done[0])
    return number, _result(ray, done[0])


def _result(ray: Any, task: Any) -> Any:
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, PerceptionError):
            raise error.cause from None
        if isinstance(error.cause, ImportError):
            raise BackendError(
                f"a worker cannot import what it needs ({error.cause!s:.200}): install "
                'the same "perception_rt[ray]" on all machines'
            ) from None
        raise
    except ray.exceptions.RayError as error:
        line = str(error).strip().partition("\n")[0]
        raise BackendError(
            f"a task of the cluster failed: {line:.300}; resume completes the result"
        ) from None
