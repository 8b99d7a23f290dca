"""How times, memory and clocks are measured on a GPU, and what the GPU can do at most."""

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
    """Where figures are measured, and by what they are bounded.

    Attributes:
        device: of torch.
        quick: tiny models, few calls.
        deadline: a monotonic time, after which nothing new is begun.
    """

    device: torch.device
    quick: bool
    deadline: float

    @property
    def dtype(self) -> torch.dtype:
        """float16 on a GPU; a CPU has no fast products of it."""
        return torch.float16 if self.device.type == "cuda" else torch.float32

    def seconds(self, run: Callable[[], object], calls: int = _CALLS) -> float:
        """The median of several calls, after two that are not counted."""
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
        """Until the device has done everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def forget_memory(self) -> None:
        """What came before is not in the next `memory_gib`."""
        self.memory_gib()

    def used_gib(self) -> float:
        """Memory of the device that is not free, whoever has it."""
        if self.device.type != "cuda":
            return 0.0
        free, total = torch.cuda.mem_get_info()
        return round((total - free) / 2**30, 2)

    def memory_gib(self) -> float:
        """Peak memory of the device since the last call."""
        if self.device.type != "cuda":
            return 0.0
        peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return round(peak, 2)


def limits(bench: Bench) -> Row:
    """What the device can do at most: bytes/s copied, counted twice, and float16 operations/s."""
    count, side = (1 << 20, 256) if bench.quick else (1 << 30, 8192)
    source = torch.zeros(count, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    a = torch.randn(side, side, device=bench.device, dtype=bench.dtype)
    copied = 2 * count / bench.seconds(lambda: target.copy_(source))
    return {"bytes_per_s": copied, "flops": 2 * side**3 / bench.seconds(lambda: a @ a)}


def gpu_state() -> str:
    """Name, driver, clocks and memory of the GPU, as `nvidia-smi` states them."""
    query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,memory.total,power.limit"
    try:
        return _smi(query)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"nvidia-smi: {error}"


def sm_clock() -> int | None:
    """MHz of the multiprocessors just now; None where that is not known."""
    try:
        return int(_smi("clocks.sm").split()[0])
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return None


def _smi(query: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]  # no shell
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
