"""Measures times, memory, clocks and peak rates of a GPU."""

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Row = dict[str, Any]

_CALLS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Device and budget of the measurements.

    Attributes:
        device: torch device.
        quick: True for tiny models and few calls.
        deadline: monotonic time in seconds after which no measurement starts.
    """

    device: torch.device
    quick: bool
    deadline: float

    @property
    def dtype(self) -> torch.dtype:
        """float16 on a GPU, float32 on a CPU, which has no fast float16 products."""
        return torch.float16 if self.device.type == "cuda" else torch.float32

    def seconds(self, run: Callable[[], object], calls: int = _CALLS) -> float:
        """Median seconds of several calls, after two uncounted ones."""
        times = []
        for index in range(2 + (2 if self.quick else calls)):
            self.wait()
            started = time.perf_counter()
            run()
            self.wait()
            if index >= 2:
                times.append(time.perf_counter() - started)
        return float(np.median(times))

    def wait(self) -> None:
        """Waits until the device has finished all work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def forget_memory(self) -> None:
        """Starts a new peak for the next call of `memory_gib`."""
        self.memory_gib()

    def used_gib(self) -> float:
        """Memory of the device in use by any process, in GiB."""
        if self.device.type != "cuda":
            return 0.0
        free, total = torch.cuda.mem_get_info()
        return round((total - free) / 2**30, 2)

    def memory_gib(self) -> float:
        """Peak memory that torch allocated on the device since the last call, in GiB."""
        if self.device.type != "cuda":
            return 0.0
        peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return round(peak, 2)


def limits(bench: Bench) -> Row:
    """Peak rates: bytes/s of a copy, reads and writes both counted, and float16 operations/s."""
    count, side = (1 << 20, 256) if bench.quick else (1 << 30, 8192)
    source = torch.zeros(count, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    a = torch.randn(side, side, device=bench.device, dtype=bench.dtype)
    copied = 2 * count / bench.seconds(lambda: target.copy_(source))
    return {"bytes_per_s": copied, "flops": 2 * side**3 / bench.seconds(lambda: a @ a)}


def gpu_state() -> str:
    """Name, driver, clocks and memory of the GPU, as printed by `nvidia-smi`."""
    query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,memory.total,power.limit"
    try:
        return nvidia_smi(query)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"nvidia-smi: {error}"


def sm_clock() -> int | None:
    """Current clock of the multiprocessors in MHz, or None if `nvidia-smi` does not know it."""
    try:
        return int(nvidia_smi("clocks.sm").split()[0])
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return None


def nvidia_smi(query: str) -> str:
    """Values of a comma-separated list of `nvidia-smi` fields."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]  # no shell
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
