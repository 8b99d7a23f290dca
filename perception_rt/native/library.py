"""Loads the compiled library and describes its interface (`src/decoder.h`) to ctypes."""

import ctypes
import sys
from functools import cache
from pathlib import Path

from perception_rt.errors import BackendError

REFERENCE = "scalar"  # the instruction set that all others are compared with
_SUFFIXES = {"darwin": ".dylib", "win32": ".dll"}
_SELF_TESTS = 8  # random shapes when an instruction set is first used: some 10 ms
_SEED = 1


class Matrix(ctypes.Structure):
    """`prt::Matrix`."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("format", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
    )


class Shape(ctypes.Structure):
    """`PrtShape`."""

    _fields_ = (
        ("dim", ctypes.c_int32),
        ("layers", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("ffn_dim", ctypes.c_int32),
        ("vocab_size", ctypes.c_int32),
        ("max_length", ctypes.c_int32),
        ("norm_eps", ctypes.c_float),
        ("half_cache", ctypes.c_int32),
    )


class Layer(ctypes.Structure):
    """`PrtLayer`."""

    _fields_ = (
        ("attention_norm", ctypes.c_void_p),
        ("qkv", Matrix),
        ("out", Matrix),
        ("ffn_norm", ctypes.c_void_p),
        ("gate_up", Matrix),
        ("down", Matrix),
    )


class Model(ctypes.Structure):
    """`PrtModel`."""

    _fields_ = (
        ("shape", Shape),
        ("layers", ctypes.POINTER(Layer)),
        ("norm", ctypes.c_void_p),
        ("head", Matrix),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
    )


class Call(ctypes.Structure):
    """`PrtCall`."""

    _fields_ = (
        ("hidden", ctypes.c_void_p),
        ("past", ctypes.c_void_p),
        ("keys", ctypes.POINTER(ctypes.c_void_p)),
        ("values", ctypes.POINTER(ctypes.c_void_p)),
        ("positions", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("sequences", ctypes.c_int32),
        ("tokens", ctypes.c_int32),
        ("slots", ctypes.c_int32),
        ("count", ctypes.c_int32),
    )


def library_path() -> Path:
    """Path of the compiled library, whether it is there or not."""
    suffix = _SUFFIXES.get(sys.platform, ".so")
    return Path(__file__).with_name(f"libperception_rt{suffix}")


@cache
def load_library() -> ctypes.CDLL:
    """The library, with the types of its functions.

    Raises:
        BackendError: it was not compiled, or cannot be loaded here.
    """
    path = library_path()
    if not path.exists():
        raise BackendError(
            "the native decoder is not compiled here: install a C++ compiler and run "
            "`python -m perception_rt.native.build`, or export with --backend onnxruntime"
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendError(f"the native decoder cannot be loaded: {error}") from None
    library.prt_instruction_sets.restype = ctypes.c_char_p
    library.prt_self_test.argtypes = [ctypes.c_char_p, ctypes.c_uint64, ctypes.c_int32]
    library.prt_open.argtypes = [ctypes.POINTER(Model), ctypes.c_char_p, ctypes.c_int32]
    library.prt_open.restype = ctypes.c_void_p
    library.prt_forward.argtypes = [ctypes.c_void_p, ctypes.POINTER(Call)]
    library.prt_close.argtypes = [ctypes.c_void_p]
    library.prt_close.restype = None
    library.prt_rows.argtypes = [
        ctypes.POINTER(Matrix), ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    return library


def is_compiled() -> bool:
    """Whether the library is there and can be loaded."""
    try:
        load_library()
    except BackendError:
        return False
    return True


@cache
def instruction_sets() -> dict[str, bool]:
    """Instruction sets of this processor, best first, and whether each equals the reference."""
    library = load_library()
    names = library.prt_instruction_sets().decode().split(",")
    return {
        name: name == REFERENCE or library.prt_self_test(name.encode(), _SEED, _SELF_TESTS) == 0
        for name in names
    }


def best_instruction_set() -> str:
    """The first instruction set whose results are right; the reference always is."""
    return next(name for name, is_right in instruction_sets().items() if is_right)
