"""One engine graph, opened: the seam between the runtime and a backend.

A backend returns an `Engine`; `Session` checks what goes in and what comes out against the
graph's spec, so that no backend sees a wrong shape and no caller sees a NaN. State, such as a
decoder's keys and values, stays in its own memory, where the backend updates it: the host's, or a
device's if the backend wants it there (`block_maker`).
"""

import html
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, Self, cast

import numpy as np

from perception_rt.errors import BackendError, InputError, PackageError
from perception_rt.package.contract import GraphSpec, TensorSpec, updated
from perception_rt.package.manifest import Manifest
from perception_rt.package.plm_graphs import CacheShape
from perception_rt.package.reader import Package
from perception_rt.runtime.cache.kv_block import NO_STATES, CacheBlock, States
from perception_rt.runtime.cuda import DeviceArray
from perception_rt.targets import get_target

Array = np.ndarray[Any, Any]
State = Array | DeviceArray
MakeBlock = Callable[[CacheShape, int, int], CacheBlock]  # of rows and slots


class Engine(Protocol):
    """What a backend implements. Must allow `run` from several threads at once."""

    def run(
        self, inputs: Mapping[str, Array], outputs: Sequence[str], state: Mapping[str, State]
    ) -> list[Array]:
        """Computes the named outputs, and updates each array of `state` in its own memory.

        Raises:
            BackendError: the backend fails; the state is undefined then.
        """

    def close(self) -> None:
        """Frees the backend's memory; called once."""


class BackendModule(Protocol):
    """The functions of the module that `Target.session` names.

    It may also have a `block_maker(device)`, if caches must be in memory of its own.
    """

    def check_device(self, device: str) -> None:
        """BackendError unless the device can be had; InputError if there is none of that name."""

    def open_session(
        self,
        package: Package,
        graph: str,
        *,
        device: str,
        threads: int | None,
        cache_dir: Path | None,
    ) -> Engine:
        """Opens a graph of a package; BackendError if it cannot run here.

        What it compiles first may be kept below `cache_dir`, a private directory.
        """


class Session:
    """A graph of a package on a backend. Safe to call from several threads."""

    def __init__(self, engine: Engine, spec: GraphSpec, name: str) -> None:
        self.spec = spec
        self._name = name
        self._engine: Engine | None = engine
        # The states that were checked last, and the inputs that are not among them.
        self._checked: tuple[Callable[[], object], list[TensorSpec]] = (lambda: None, [])

    def run(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str],
        state: Mapping[str, State] | None = None,
    ) -> list[Array]:
        """Runs the graph.

        Args:
            inputs: an array for each input of the spec; dtype and shape must match.
            outputs: names of the wanted outputs.
            state: arrays that are inputs of the spec, and the outputs `updated(name)` after the
                call: written in place, never copied, not looked at for what is not finite.

        Raises:
            InputError: an input or a state does not match the spec, or a state cannot be written.
            BackendError: the backend failed, or an output is not finite.
        """
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
        arrays = engine.run(inputs, outputs, state)
        for output, array in zip(outputs, arrays, strict=True):
            if not np.isfinite(array).all():
                raise BackendError(f"output {output!r} of graph {self._name!r} is not finite")
        return arrays

    def _others(self, state: Mapping[str, State]) -> list[TensorSpec]:
        """The inputs that are not states; the states are checked, once for the same `States`."""
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
        """Frees the engine; a second call does nothing."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()


class Sessions:
    """The graphs of a package on a backend, each opened when it is first needed.

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
        self._lock = threading.Lock()
        self._opened: dict[str, Session] | None = {}

    def __getitem__(self, graph: str) -> Session:
        """An open graph.

        Raises:
            BackendError: all were closed, or it cannot run here.
            PackageError: the package has no such graph.
        """
        with self._lock:
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
        """Frees every engine and closes the package; a second call does nothing."""
        with self._lock:
            opened, self._opened = self._opened, None
            self._package.close()
        for session in (opened or {}).values():
            session.close()


class LoadedModel:
    """A loaded package, common to `Embedder` and `Generator`.

    Attributes:
        manifest: the package's manifest.
        backend: name of the backend that runs it.
        device: name of the device that the backend runs on.
    """

    def __init__(self, manifest: Manifest, *, backend: str, device: str) -> None:
        self.manifest = manifest
        self.backend = backend
        self.device = device

    def close(self) -> None:
        """Frees the engines and closes the package; a second call does nothing."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
    """Opens a graph of a package; BackendError names what is missing."""
    spec = package.manifest.content.graphs.get(graph)
    if spec is None:
        raise PackageError(f"package {package.name!r} has no graph {graph!r}")
    engine = _module(backend).open_session(
        package, graph, device=device, threads=threads, cache_dir=cache_dir
    )
    return Session(engine, spec, graph)


def block_maker(backend: str, device: str) -> MakeBlock | None:
    """What makes cache blocks in a device's memory; None if they are on the host."""
    maker = getattr(_module(backend), "block_maker", None)
    found: MakeBlock | None = None if maker is None else maker(device)
    return found


def check_backend(package: Package, *, backend: str, device: str) -> None:
    """BackendError unless the backend is installed and runs the package on the device."""
    _module(backend).check_device(device)
    content = package.manifest.content
    precision = content.target.precision
    devices = get_target(backend).devices(precision, content.family)
    if devices is not None and device not in devices:
        raise BackendError(
            f"a {precision} package for {backend} does not run on {device}; "
            f"it runs on {', '.join(devices)}"
        )


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
