"""Packages load and run without what only POSIX has, as on Windows. Simulated: no Windows was used.

Third-party libraries are imported before anything is taken away, since they are not the subject.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from perception_rt.runtime.backends import onnxruntime as backend

PLM = Path(__file__).parents[1] / "compatibility" / "packages" / "plm"

WITHOUT_POSIX = """
import ctypes, functools, mmap, os, pathlib, sys
import numpy, onnxruntime, PIL.Image, PIL.JpegImagePlugin, PIL.PngImagePlugin, PIL.WebPImagePlugin
import ftfy, regex

for name in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "readline", "syslog"):
    sys.modules[name] = None  # an import raises ImportError
posix = (
    "O_NOFOLLOW O_DIRECTORY O_NONBLOCK O_CLOEXEC O_SYNC pread pwrite preadv pwritev posix_fadvise "
    "fork forkpty register_at_fork geteuid getuid getegid getgid getgroups setuid fchmod fchown "
    "chown lchown sched_getaffinity sched_setaffinity uname sysconf getpgid killpg mkfifo statvfs "
)
for name in posix.split():
    if hasattr(os, name):
        delattr(os, name)
for name in dir(mmap):
    if name.startswith(("MAP_", "MADV_", "PROT_")):
        delattr(mmap, name)
for name in ("supports_dir_fd", "supports_fd", "supports_follow_symlinks"):
    setattr(os, name, set())

def refuse_descriptors(function):
    @functools.wraps(function)
    def call(path=".", *arguments, dir_fd=None, **keywords):
        assert dir_fd is None, "a descriptor of a folder"
        if function is real_open and os.path.isdir(path):
            raise PermissionError(13, "Permission denied")
        assert not (function is real_scandir and isinstance(path, int)), "a descriptor of a folder"
        return function(path, *arguments, **keywords)
    return call

real_open, real_scandir = os.open, os.scandir
for name in ("open", "scandir", "unlink", "remove", "rmdir"):
    setattr(os, name, refuse_descriptors(getattr(os, name)))
"""

RUN = """
import numpy as np
import perception_rt as prt
from perception_rt.errors import PackageError

package, kind = sys.argv[1:]
image = np.full((40, 30, 3), 100, np.uint8)
for backend in ("auto", "reference"):
    with prt.load(package, backend=backend) as model:
        if kind == "pe":
            assert model.embed_images([image]).shape == (1, 32)
            assert model.features([image], 0).shape == (1, 4, 4, 64)
            assert model.embed_texts(["a cat"]).shape == (1, 32)
        else:
            answer = model.generate("Why?", images=[image], max_new_tokens=2, ignore_eos=True)
            assert len(answer.tokens) == 2
manifest = pathlib.Path(package, "manifest.json")
other = manifest.with_name("more")
other.write_bytes(b"")
for what, act in (
    ("does not belong", lambda: None),
    ("cannot open manifest.json", lambda: (other.unlink(), manifest.rename(other))),
    ("manifest.json is not a regular file", lambda: manifest.symlink_to(other)),
):
    act()
    try:
        prt.load(package)
    except PackageError as error:
        assert what in str(error), error
    else:
        raise AssertionError(what)
for missing in (package + "-not", str(other)):
    try:
        prt.load(missing)
    except PackageError as error:
        assert "no engine package" in str(error)
    else:
        raise AssertionError(missing)
import perception_rt.cli, perception_rt.package.store, perception_rt.memory
print("done")
"""


@pytest.mark.parametrize("kind", ["pe", "plm"])
def test_packages_run_without_posix(kind: str, tiny_package: Path, tmp_path: Path) -> None:
    source = tiny_package if kind == "pe" else PLM
    package = shutil.copytree(source, tmp_path / kind, copy_function=shutil.copyfile)
    command = [sys.executable, "-c", WITHOUT_POSIX + RUN, str(package), kind]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.stdout == "done\n", result.stderr[-3000:]


def test_products_are_exact_on_a_processor_that_is_not_known(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    assert backend.saturates("AMD64", info) and backend.saturates("", info)
    info.write_text("flags : fpu avx2 avx512_vnni\n")
    assert not backend.saturates("x86_64", info)
    other = tmp_path / "other"
    other.write_text("flags : fpu avx2\n")
    assert backend.saturates("x86_64", other) and backend.saturates("i686", other)
    assert not backend.saturates("aarch64", other) and not backend.saturates("arm64", info)
