"""Opens engine graphs: the interface between the runtime and the backends.

A backend returns an `Engine`. `Session` checks inputs and outputs against the graph's spec, so that
no backend sees a wrong shape and no caller sees a NaN. State, such as a decoder's keys and values,
is updated in place, in memory of the host or, if the backend has a `block_maker`, of a device.
"""

import html
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, Protocol, Self, SupportsIndex, cast

import numpy as np

from perception_rt.errors import BackendError, InputError, PackageError
from perception_rt.package.contract import GraphSpec, TensorSpec, is_cache, updated
from perception_rt.package.manifest import Content, Manifest
from perception_rt.package.plm_graphs import CacheShape
from perception_rt.package.reader import Package
from perception_rt.runtime.cache.kv_block import NO_STATES, CacheBlock, States
from perception_rt.runtime.cuda import DeviceArray
from perception_rt.runtime.native_calls import check_process, keep_from_children, native_call
from perception_rt.targets import Target, get_target

Array = np.ndarray[Any, Any]
State = Array | DeviceArray
AUTO = "auto"  # backend argument: each graph runs on the backend that it was exported for
MakeBlock = Callable[[CacheShape, int, int], CacheBlock]  # shape, rows, slots


class Engine(Protocol):
    """Interface of an opened graph. `run` must allow calls from several threads at once."""

    def run(
        self, inputs: Mapping[str, Array], outputs: Sequence[str], state: Mapping[str, State]
    ) -> list[Array]:
        """Computes the named outputs and updates the arrays of `state` in place.

        Raises:
            BackendError: the backend failed; the state is undefined afterwards.
        """

    def close(self) -> None:
        """Frees the memory; called once."""


class BackendModule(Protocol):
    """Functions of the module that `Target.session` names.

    A module whose caches must be in a device's memory also has `block_maker(device)`.
    """

    def check_device(self, device: str) -> None:
        """BackendError unless the device is available; InputError for an unknown name."""

    def open_session(
        self,
        package: Package,
        graph: str,
        *,
        device: str,
        threads: int | None,
        cache_dir: Path | None,
    ) -> Engine:
        """Opens a graph; BackendError if it cannot run here.

        The backend may keep what it compiles below `cache_dir`, a private directory.
        """


class Session:
    """An open graph that checks its inputs and outputs. Safe to call from several threads."""

    def __init__(self, engine: Engine, spec: GraphSpec, name: str) -> None:
        self.spec = spec
        self._name = name
        self._engine: Engine | None = engine
        self._process = os.getpid()
        # The states that were checked last, and the inputs that are not states.
        self._checked: tuple[Callable[[], object], list[TensorSpec]] = (lambda: None, [])
        keep_from_children(self)

    def run(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str],
        state: Mapping[str, State] | None = None,
    ) -> list[Array]:
        """Runs the graph.

        Args:
            inputs: an array for each input of the spec, of its dtype and shape.
            outputs: names of the wanted outputs.
            state: arrays for the other inputs, updated in place: after the call each holds the
                output `updated(name)`. They are not copied and not checked for finite values.

        Returns:
            An array for each of `outputs`, with finite values.

        Raises:
            InputError: an input or a state does not match the spec, or a state cannot be written.
            BackendError: the backend failed, an output is not finite, or this is a forked child of
                the process that opened the graph.
        """
        check_process(self._process)
        engine = self._engine
        if engine is None:
            raise BackendError(f"graph {self._name!r} is closed")
        state = NO_STATES if state is None else state
        for spec in self._others(state):
            if spec.name not in inputs:
                raise InputError(f"input {spec.name!r} is missing")
            _check_array(spec, inputs[spec.name])
        for output in outputs:
            self.spec.output(output)
        with native_call:
            arrays = engine.run(inputs, outputs, state)
        for output, array in zip(outputs, arrays, strict=True):
            if not np.isfinite(array).all():
                raise BackendError(f"output {output!r} of graph {self._name!r} is not finite")
        return arrays

    def _others(self, state: Mapping[str, State]) -> list[TensorSpec]:
        """Checks the states, once for the same `States`; returns the other inputs."""
        same, others = self._checked
        if same() is not state:
            others = [spec for spec in self.spec.inputs if spec.name not in state]
            for spec in self.spec.inputs:
                if spec.name in state:
                    _check_state(spec, state[spec.name])
                    self.spec.output(updated(spec.name))
            if isinstance(state, States):
                self._checked = weakref.ref(state), others
        return others

    def close(self) -> None:
        """Frees the engine; a second call does nothing. BackendError in a forked child."""
        check_process(self._process)
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()


class Sessions:
    """The graphs of a package, each opened with its backend when it is first needed.

    Safe to use from several threads.
    """

    def __init__(
        self,
        package: Package,
        *,
        backend: str,
        device: str,
        threads: int | None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self._package = package
        self._backend = backend
        self._device = device
        self._threads = threads
        self._cache_dir = None if cache_dir is None else Path(cache_dir)
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._opened: dict[str, Session] | None = {}

    def __getitem__(self, graph: str) -> Session:
        """The session of a graph, which is opened at the first call.

        Raises:
            BackendError: `close` was called, the graph cannot run here, or this is a forked child
                of the process that loaded the package.
            PackageError: the package has no such graph, or its backend does not open it.
        """
        check_process(self._process)  # another thread may have held the lock during the fork
        with native_call, self._lock:
            if self._opened is None:
                raise BackendError(f"package {self._package.name!r} is closed")
            if graph not in self._opened:
                self._opened[graph] = open_session(
                    self._package,
                    graph,
                    backend=self._backend,
                    device=self._device,
                    threads=self._threads,
                    cache_dir=self._cache_dir,
                )
            return self._opened[graph]

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._opened is None

    def close(self) -> None:
        """Frees every engine and closes the package; a second call does nothing.

        BackendError in a forked child, which cannot free them.
        """
        check_process(self._process)
        with self._lock:
            opened, self._opened = self._opened, None
            self._package.close()
        for session in (opened or {}).values():
            session.close()


class NotCopiedError(BackendError, TypeError):
    """A TypeError too, as Python raises for other objects that cannot be pickled."""


class LoadedModel:
    """A loaded package, common to `Embedder` and `Generator`.

    Attributes:
        manifest: the package's manifest.
        backend: name of the backend that runs it, or of several, separated by commas.
        device: name of the device that the backend runs on.
    """

    def __init__(self, manifest: Manifest, *, backend: str, device: str) -> None:
        content = manifest.content
        names = {choose_backend(content, graph, backend) for graph in content.graphs}
        self.manifest = manifest
        self.backend = ", ".join(sorted(names))
        self.device = device
        self._process = os.getpid()

    def close(self) -> None:
        """Frees the engines and closes the package; a second call does nothing.

        BackendError in a forked child, which cannot free them.
        """
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if os.getpid() == self._process:  # a forked child may leave the block too
            self.close()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Refuses to be pickled or copied, with a BackendError that is a TypeError too."""
        name = type(self).__name__
        article = "an" if name[0] in "AEIOU" else "a"
        raise NotCopiedError(
            f"{article} {name} cannot be pickled or copied. Threads can share this one; to use the "
            "model in another process, pass the package's path and call perception_rt.load there; "
            "for a second engine in this process, load the package again"
        )

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self._summary().items())
        return f"{type(self).__name__}({shown})"

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        rows = "".join(
            f"<tr><th>{name}</th><td>{html.escape(value)}</td></tr>"
            for name, value in self._summary().items()
        )
        return f"<table><caption>{type(self).__name__}</caption>{rows}</table>"

    def _summary(self) -> dict[str, str]:
        content = self.manifest.content
        return {
            "model": content.name,
            "precision": content.target.precision,
            "backend": self.backend,
            "device": self.device,
            "size": _size(sum(entry.size_bytes for entry in content.files.values())),
        }


def open_session(
    package: Package,
    graph: str,
    *,
    backend: str,
    device: str,
    threads: int | None,
    cache_dir: Path | None = None,
) -> Session:
    """Opens a graph of a package.

    Args:
        package: an open package.
        graph: name of the graph.
        backend: as in `choose_backend`.
        device: name of a device of the backend.
        threads: threads of one engine call; None for one per physical core.
        cache_dir: private directory for what the backend compiles; None to keep nothing.

    Raises:
        PackageError: there is no such graph, or the backend does not open it.
        BackendError: the backend is not installed, or the graph cannot run here.
    """
    spec = package.graph(graph)
    name = choose_backend(package.manifest.content, graph, backend)
    engine = _module(name).open_session(
        package, graph, device=device, threads=threads, cache_dir=cache_dir
    )
    return Session(engine, spec, graph)


def choose_backend(content: Content, graph: str, backend: str) -> str:
    """Name of the backend that runs a graph.

    Args:
        content: content of the package's manifest.
        graph: name of the graph.
        backend: AUTO for the backend that the graph was exported for, or the name of one that can
            run it too.

    Raises:
        InputError: no backend has this name.
        PackageError: the backend does not run this graph, or does not open files of its kind.
    """
    exported_for = get_target(content.backend_of(graph))
    target = exported_for if backend == AUTO else get_target(backend)
    is_stand_in = target.kinds is None
    if not is_stand_in and target.name not in (exported_for.name, exported_for.graph_backend):
        is_mixed = any(spec.backend is not None for spec in content.graphs.values())
        what = f"graph {graph!r} of this package" if is_mixed else "this package"
        raise PackageError(
            f"{what} was exported for backend {exported_for.name}, not {target.name}"
        )
    kind = content.graphs[graph].kind
    if not target.opens(kind):
        raise PackageError(
            f"graph {graph!r} is of kind {kind!r}, which backend {target.name} does not open"
        )
    return target.name


def shared_backend(content: Content, graphs: Iterable[str], backend: str) -> str:
    """Name of the one backend that runs all of `graphs`; PackageError if they have several."""
    names = sorted({choose_backend(content, graph, backend) for graph in graphs})
    if len(names) != 1:
        raise PackageError(
            f"the decoder's graphs share key-value caches, but are for {len(names)} backends: "
            f"{', '.join(names)}"
        )
    return names[0]


def is_replaced(content: Content, backend: str) -> bool:
    """Whether a graph runs on another backend than it was exported for."""
    return any(
        choose_backend(content, graph, backend) != content.backend_of(graph)
        for graph in content.graphs
    )


def is_batch_dependent(content: Content) -> bool:
    """Whether a result of the package's graphs depends on the rest of its batch."""
    precision = content.target.precision
    backends = {content.backend_of(graph) for graph in content.graphs}
    return any(precision in get_target(name).batch_dependent for name in backends)


def block_maker(backend: str, device: str) -> MakeBlock | None:
    """The function that makes cache blocks in a device's memory; None if they are on the host."""
    maker = getattr(_module(backend), "block_maker", None)
    found: MakeBlock | None = None if maker is None else maker(device)
    return found


def check_backends(content: Content, *, backend: str, device: str) -> list[Target]:
    """Checks that every graph of a package can run here; returns the backends that run them.

    Args:
        content: content of the package's manifest.
        backend: as in `choose_backend`.
        device: name of the device that every backend must run on.

    Raises:
        InputError: no backend, or no device of a backend, has this name.
        PackageError: a backend cannot run a graph.
        BackendError: a backend is not installed, or does not run its graphs on the device.
    """
    graphs: dict[str, list[GraphSpec]] = {}
    for name, spec in content.graphs.items():
        graphs.setdefault(choose_backend(content, name, backend), []).append(spec)
    precision, targets = content.target.precision, []
    for name, specs in graphs.items():
        _module(name).check_device(device)
        target = get_target(name)
        decodes = any(is_cache(tensor.name) for spec in specs for tensor in spec.inputs)
        devices = target.devices(precision, decodes=decodes)
        if devices is not None and device not in devices:
            raise BackendError(
                f"a {precision} package for {name} does not run on {device}; "
                f"it runs on {', '.join(devices)}"
            )
        targets.append(target)
    return targets


def _module(backend: str) -> BackendModule:
    target = get_target(backend)
    try:
        module: Any = import_module(target.session)
    except ImportError:
        raise BackendError(
            f"backend {backend} is not installed here: pip install {target.install!r}"
        ) from None
    return cast(BackendModule, module)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _check_array(spec: TensorSpec, array: State) -> None:
    if array.dtype != np.dtype(spec.dtype):
        raise InputError(f"input {spec.name!r} must be {spec.dtype}, not {array.dtype}")
    fits = len(array.shape) == len(spec.shape) and all(
        size >= 1 if isinstance(want, str) else size == want
        for size, want in zip(array.shape, spec.shape, strict=True)
    )
    if not fits:
        wanted = "(" + ", ".join(str(s) for s in spec.shape) + ")"
        raise InputError(f"input {spec.name!r} must have shape {wanted}, not {array.shape}")


def _check_state(spec: TensorSpec, array: State) -> None:
    _check_array(spec, array)
    if isinstance(array, np.ndarray) and not (array.flags.c_contiguous and array.flags.writeable):
        raise InputError(f"input {spec.name!r} must be C-contiguous and writeable to be updated")
