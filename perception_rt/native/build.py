"""`python -m perception_rt.native.build`: compiles the native decoder into the package's folder.

A wheel is built with it if a C++ compiler is there (`wheel_hook`).
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from perception_rt.native.library import library_path

SOURCES = Path(__file__).with_name("src")
# Sums must not depend on the compiler: it may not fuse a product and a sum by itself.
FLAGS = (
    "-O3", "-std=c++17", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden",
)  # fmt: skip
_COMPILERS = ("c++", "g++", "clang++")
_COMMON = ("kernels_scalar", "decoder", "dispatch", "thread_pool", "self_test")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni")


class BuildError(Exception):
    """The library cannot be compiled here."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A source file, the flags of its instruction set, and the name of its object file."""

    source: str
    flags: tuple[str, ...] = ()
    name: str = ""


def units(machine: str) -> list[Unit]:
    """The files to compile for a machine, as `platform.machine` calls it."""
    found = [Unit(name) for name in _COMMON]
    match machine.lower():
        case "x86_64" | "amd64":
            found += [
                Unit("kernels_avx2", _AVX2),
                Unit("kernels_avx2", (*_AVX2, "-mavxvnni", "-DPRT_AVX_VNNI"), "kernels_avx_vnni"),
                Unit("kernels_avx512", (*_AVX2, *_AVX512)),
            ]
        case "aarch64" | "arm64":
            found.append(Unit("kernels_neon", ("-march=armv8.2-a+dotprod",)))
    return found


def find_compiler() -> str:
    """The C++ compiler in CXX, or the first of the usual ones; BuildError if there is none."""
    for name in filter(None, (os.environ.get("CXX"), *_COMPILERS)):
        if shutil.which(name):
            return name
    raise BuildError("there is no C++ compiler: install g++ or clang++, or name one in CXX")


def build(out: Path | None = None, extra: tuple[str, ...] = ()) -> Path:
    """Compiles the library; returns its path.

    Args:
        out: the library to write; None for the one that is loaded.
        extra: more flags for the compiler, such as `-fsanitize=address`.

    Raises:
        BuildError: there is no compiler, or it fails; then the library is as it was before.
    """
    compiler, out = find_compiler(), out or library_path()
    with tempfile.TemporaryDirectory() as folder:
        objects = Path(folder)

        def compile_unit(unit: Unit) -> str:
            target = objects / f"{unit.name or unit.source}.o"
            source = SOURCES / f"{unit.source}.cpp"
            _run([compiler, *FLAGS, *extra, *unit.flags, "-c", str(source), "-o", str(target)])
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = list(pool.map(compile_unit, units(platform.machine())))
        made = objects / out.name
        _run([compiler, "-shared", *extra, *compiled, "-o", str(made), "-pthread"])
        beside = out.with_name(f"{out.name}.new")  # a rename replaces a library that is in use
        shutil.copyfile(made, beside)
        beside.replace(out)
    return out


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        first = next((line for line in lines if "error" in line), lines[-1])
        raise BuildError(f"{command[0]} failed: {first[:400]}")


def main() -> int:
    """Compiles the library; returns the exit status."""
    try:
        print(build())
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
