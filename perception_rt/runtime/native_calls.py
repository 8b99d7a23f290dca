"""Keeps engines away from interpreter exits and from forked processes.

An engine is native code that has threads of its own.

A daemon thread that returns from native code after the interpreter has ended aborts the process. So
the interpreter's exit waits until no thread is inside an engine, and lets no other thread enter.

A forked child has its parent's engines without their threads. Running or freeing one would wait for
those threads for ever. So a child never frees an engine that it inherited, and may not run it.
"""

import atexit
import ctypes
import os
import threading
import time
import weakref
from collections.abc import Callable

from perception_rt.errors import BackendError

_LOOK_S = 0.001  # between looks at the threads inside, at exit

_inside: set[int] = set()  # ids of threads that are inside an engine
_kept: "weakref.WeakSet[object]" = weakref.WeakSet()
_before_exit: list[Callable[[], None]] = []
_exiting: int | None = None  # id of the thread that ends the interpreter
_shut = False  # whether only that thread may enter


class NativeCall:
    """The context of a call into an engine. Must not be nested."""

    def __enter__(self) -> None:
        _inside.add(threading.get_ident())  # before the look at `_shut`, which is set first at exit
        if _shut and _exiting != threading.get_ident():
            self.__exit__()
            hold_at_exit()

    def __exit__(self, *_: object) -> None:
        _inside.discard(threading.get_ident())


native_call = NativeCall()


def hold_at_exit() -> None:
    """Blocks a daemon thread for ever once the interpreter is ending; else does nothing."""
    if _exiting not in (None, threading.get_ident()):
        gate = threading.Lock()
        gate.acquire()
        gate.acquire()


def before_exit(action: Callable[[], None]) -> None:
    """Calls `action` when the interpreter ends, while threads may still enter engines."""
    _before_exit.append(action)


def keep_from_children(holder: object) -> None:
    """Prevents that forked children free an object, which has an engine."""
    _kept.add(holder)


def check_process(loaded_in: int) -> None:
    """Raises BackendError unless this is the process with this id, which loaded the model."""
    if os.getpid() != loaded_in:
        raise BackendError(
            "this model belongs to another process: it was loaded before a fork, which does not "
            "copy the threads of its engines. Load the package in the child process, or start the "
            "child with multiprocessing's 'spawn' or 'forkserver' method"
        )


@atexit.register
def _leave() -> None:
    global _exiting, _shut
    _exiting = threading.get_ident()
    for action in _before_exit:
        action()
    _shut = True
    while _inside - {_exiting}:
        time.sleep(_LOOK_S)


def _keep_inherited() -> None:
    """Gives each object a reference that is never dropped, so that nothing frees it."""
    for holder in list(_kept):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(holder))
    _kept.clear()
    _inside.clear()  # those threads are not in this process


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_inherited)
