"""CPU cores that this process may use: its affinity, and the quota of its control group."""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

_ROOT = Path("/")


def available_cores(root: Path = _ROOT) -> int:
    """Number of CPU cores that this process may use, at least 1.

    A container's limit is a quota of its control group, a fraction of which counts as a core.

    Args:
        root: directory that holds `proc` and `sys`.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # Linux has it
    cores = (os.cpu_count() or 1) if affinity is None else len(affinity(0))
    return max(1, min([cores, *(math.ceil(quota) for quota in _quotas(root))]))


def physical_cores(root: Path = _ROOT) -> int:
    """Number of physical cores that this process may use, at least 1.

    Two threads of one core share its arithmetic units. Without the topology, every core counts.

    Args:
        root: directory that holds `proc` and `sys`.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    ids = range(os.cpu_count() or 1) if affinity is None else affinity(0)
    shared = set()
    for index in ids:
        with suppress(OSError):
            file = root / f"sys/devices/system/cpu/cpu{index}/topology/thread_siblings_list"
            shared.add(file.read_text())
    cores = available_cores(root)
    return min(cores, len(shared)) if shared else cores


def _quotas(root: Path) -> Iterator[float]:
    """Cores that each control group of this process may use, as far as they are limited."""
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                top, read = root / "sys/fs/cgroup", _quota
            elif "cpu" in controllers.split(","):
                top, read = root / "sys/fs/cgroup/cpu", _quota_v1
            else:
                continue
            inside = PurePosixPath(path.lstrip("/"))
            # A container sees its own group as the top, whatever its path is outside.
            for folder in {PurePosixPath(), inside, *inside.parents}:
                if ".." not in folder.parts:
                    with suppress(OSError, ValueError, ZeroDivisionError):
                        yield read(top / folder)


def _quota(folder: Path) -> float:
    """Cores of a version 2 group; ValueError without a limit."""
    quota, period = (folder / "cpu.max").read_text().split()
    return int(quota) / int(period)


def _quota_v1(folder: Path) -> float:
    """Cores of a version 1 group; ValueError without a limit."""
    quota = int((folder / "cpu.cfs_quota_us").read_text())
    if quota < 0:
        raise ValueError
    return quota / int((folder / "cpu.cfs_period_us").read_text())
