"""Every instruction set of this processor gives the bits of the plain C++ kernels."""

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from perception_rt.errors import BackendError
from perception_rt.export.backends.native import pack_panels
from perception_rt.native import build, layout, library
from perception_rt.native.build import BuildError

if not library.is_compiled():
    pytest.skip("the native decoder is not compiled", allow_module_level=True)

SETS = list(library.instruction_sets())


@pytest.mark.parametrize("name", SETS)
def test_random_shapes_and_values_have_the_bits_of_the_reference(name: str) -> None:
    assert library.load_library().prt_self_test(name.encode(), 7, 400) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_ten_thousand_shapes_have_the_bits_of_the_reference(name: str) -> None:
    assert library.load_library().prt_self_test(name.encode(), 11, 10_000) == 0


def test_an_unknown_instruction_set_is_refused() -> None:
    assert library.load_library().prt_self_test(b"sse9", 1, 1) != 0
    assert "scalar" in SETS


def test_a_set_that_fails_its_test_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        @staticmethod
        def prt_instruction_sets() -> bytes:
            return b"avx9,scalar"

        @staticmethod
        def prt_self_test(name: bytes, seed: int, rounds: int) -> int:
            return 2

    library.instruction_sets.cache_clear()
    monkeypatch.setattr(library, "load_library", Failing)
    try:
        assert library.instruction_sets() == {"avx9": False, "scalar": True}
        assert library.best_instruction_set() == "scalar"
    finally:
        library.instruction_sets.cache_clear()


@pytest.mark.parametrize("stored", layout.FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (35, 96), (1, 5), (50, 300)])
def test_rows_are_read_as_they_were_packed(stored: str, rows: int, columns: int) -> None:
    weight = np.random.default_rng(0).standard_normal((rows, columns), np.float32)
    packed = pack_panels(weight, stored)
    assert packed.nbytes == layout.matrix_bytes(stored, rows, columns)
    memory = np.empty(packed.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    memory[start : start + packed.nbytes] = packed
    matrix = library.Matrix(memory.ctypes.data + start, layout.FORMATS[stored], rows, columns)
    ids = np.arange(rows)
    found = np.empty((rows, columns), np.float32)
    failed = library.load_library().prt_rows(
        ctypes.byref(matrix), ids.ctypes.data, rows, found.ctypes.data
    )
    assert not failed
    # Half a step of each block, or a little more where the largest value is cut.
    error = np.abs(found - weight).max()
    assert error <= {"float32": 0, "int8": 0.02, "int4": 0.7}[stored]
    relative = np.linalg.norm(found - weight) / np.linalg.norm(weight)
    assert relative <= {"float32": 0, "int8": 0.008, "int4": 0.11}[stored]


def test_extreme_weights_are_packed() -> None:
    weight = np.zeros((16, 64), np.float32)
    weight[0], weight[1, 0], weight[2] = 1e30, -5e-9, np.linspace(-1, 1, 64)
    for stored in ("int8", "int4"):
        assert np.isfinite(pack_panels(weight, stored)[:64].view(np.float16)).all()


def test_without_a_compiler_nothing_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match=r"install g\+\+ or clang\+\+"):
        build.build(tmp_path / "library.so")
    assert list(tmp_path.iterdir()) == []


def test_a_failing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "mycc"
    compiler.write_text("#!/bin/sh\necho 'x.cpp:1: error: no' >&2; exit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(BuildError, match=r"mycc failed: x\.cpp:1: error: no"):
        build.build(tmp_path / "library.so")
    assert not (tmp_path / "library.so").exists()


def test_a_missing_library_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "library_path", lambda: tmp_path / "none.so")
    library.load_library.cache_clear()
    try:
        with pytest.raises(BackendError, match=r"python -m perception_rt\.native\.build"):
            library.load_library()
        assert not library.is_compiled()
        (tmp_path / "none.so").write_bytes(b"no library")
        with pytest.raises(BackendError, match="cannot be loaded"):
            library.load_library()
    finally:
        library.load_library.cache_clear()


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")
    out = build.build(tmp_path / "sanitized.so", flags)
    runtime = subprocess.run(
        [build.find_compiler(), "-print-file-name=libasan.so"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    code = (
        "import ctypes, sys\n"
        "library = ctypes.CDLL(sys.argv[1])\n"
        "library.prt_instruction_sets.restype = ctypes.c_char_p\n"
        "library.prt_self_test.argtypes = [ctypes.c_char_p, ctypes.c_uint64, ctypes.c_int32]\n"
        "for name in library.prt_instruction_sets().split(b','):\n"
        "    assert library.prt_self_test(name, 3, 500) == 0, name\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)],
        env={"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
