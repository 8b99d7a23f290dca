"""`python benchmarks/gpu_check.py [--out FILE]`: what a bare GPU machine can run of this project.

One command, at most eight minutes; what is not installed, or fails, is in the table in its own
words. The limits of the GPU are measured first, and every figure is given as a share of the one
that bounds it, with the clock that it was measured at. Weights are random. `--quick` is a trial run
of tiny models, on a CPU too.

1. Limits: copy bandwidth, and the peak of float16 products.
2. PE towers: float16, eager and compiled; images/s at batch 64, milliseconds at batch 1; cosine of
   the compiled one with eager float32.
3. PLM decoders: float16, a static cache; first token after 512, tokens/s after that.
4. Engines: each of our backends on this GPU, against the same graphs on the CPU: the demos first,
   and PE-Core-L14-336 and PLM-1B with random weights if there is time.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import perception_rt as prt
from benchmarks.flops import vision_flops
from benchmarks.generate_flops import decoder_weights
from perception_rt.archs import get_config
from perception_rt.cli import export_main
from perception_rt.config import PeConfig, VisionConfig
from perception_rt.models.decoder import Decoder, rope_1d
from perception_rt.models.layers import Rope, merge_heads, rotated_heads
from perception_rt.models.vision import VisionTower
from perception_rt.package.contract import DECODER
from perception_rt.package.manifest import Content
from perception_rt.plm_config import DecoderConfig, PlmConfig
from perception_rt.targets import TARGETS

BUDGET_S = 480
TOWERS = ("PE-Core-L14-336", "PE-Core-G14-448")
DECODERS = ("PLM-1B", "PLM-3B", "PLM-8B")
PROMPT, STEPS, SLOTS = 512, 64, 2048
_CALLS = 10
_MOST_WORDS = 300

DEMOS = ("PE-Demo", "PLM-Demo")
# Exports of the large ones take a minute or two each; they come last.
ENGINES = ("PE-Core-L14-336", "PLM-1B")
_MOST_IMAGES = 37  # of one call of an engine
_COMPARED = 8  # tokens of an answer, on the CPU too

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A model, exported for one of our backends."""

    model: str
    backend: str
    precision: str

    @property
    def how(self) -> str:
        """In a word."""
        return f"{self.backend} {self.precision}"

    @property
    def is_language_model(self) -> bool:
        """Whether it answers, and does not embed."""
        return self.model.startswith("PLM")


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


def tower_rows(bench: Bench, name: str, config: VisionConfig, peak: Row) -> Iterator[Row]:
    """Eager and compiled float16, the latter compared with eager float32."""
    torch.manual_seed(0)
    tower = VisionTower(config).to(bench.device).eval()
    initialize(tower)
    size, batch = config.image_size, 2 if bench.quick else 64
    pixels = torch.randn(batch, 3, size, size, device=bench.device)
    exact = tower(pixels[:1])
    tower = tower.to(bench.dtype)
    bench.forget_memory()
    pixels = pixels.to(bench.dtype)
    for how in ("eager", "torch.compile"):
        run = tower if how == "eager" else torch.compile(tower, mode="max-autotune-no-cudagraphs")
        cosine = F.cosine_similarity(run(pixels[:1]).float(), exact, dim=-1).min()
        many = bench.seconds(partial(run, pixels))
        one = bench.seconds(partial(run, pixels[:1]))
        yield {
            "model": name,
            "how": how,
            "images_per_s": batch / many,
            "batch_1_ms": one * 1e3,
            "cosine": float(cosine),
            "share_of_peak": batch * vision_flops(config) / many / peak["flops"],
            "memory_gib": bench.memory_gib(),
        }


def initialize(module: nn.Module) -> None:
    """Random matrices, gains of one, no biases."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
        else:
            nn.init.constant_(parameter, float(name.endswith("weight")))


class StaticCache:
    """An `Attention` kernel over one sequence's keys and values, in place."""

    def __init__(self, config: DecoderConfig, slots: int, device: torch.device, dtype: torch.dtype):
        shape = (config.n_layers, 2, 1, config.kv_heads, slots, config.head_dim)
        self.memory = torch.zeros(shape, device=device, dtype=dtype)
        # Else CUDA graphs are skipped: what they change must stay where it is.
        torch._dynamo.mark_static_address(self.memory)
        self.slots = torch.arange(slots, device=device)
        self.positions = self.slots[:1]
        self.layers = iter(self.memory)

    def start(self, positions: Tensor) -> None:
        """The positions (T,) of the tokens of the next pass."""
        self.positions, self.layers = positions, iter(self.memory.unbind(0))

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        heads: int,
        kv_heads: int | None = None,
        rope: Rope | None = None,
        causal: bool = False,
        mask: Any = None,
    ) -> Tensor:
        """Attention of (1, T, C) over all that is in the cache up to each token."""
        q, k, v = rotated_heads(query, key, value, heads=heads, kv_heads=kv_heads, rope=rope)
        keys, values = next(self.layers)
        keys.index_copy_(2, self.positions, k)
        values.index_copy_(2, self.positions, v)
        seen = self.slots <= self.positions[:, None]
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, enable_gqa=True)
        return merge_heads(y)


def decoder_rows(bench: Bench, name: str, config: DecoderConfig, peak: Row) -> Iterator[Row]:
    """Eager and compiled float16 (CUDA graphs): time to the first token, then tokens/s."""
    slots, prompt, steps = (64, 16, 4) if bench.quick else (SLOTS, PROMPT, STEPS)
    cache = StaticCache(config, slots, bench.device, bench.dtype)
    with torch.device("meta"):
        decoder = Decoder(config, attention=cache)
    decoder = decoder.to(bench.dtype).to_empty(device=bench.device).eval()
    initialize(decoder)
    bench.forget_memory()
    rope = rope_1d(config, slots, bench.device)

    def forward(ids: Tensor, positions: Tensor) -> Tensor:
        cache.start(positions)
        hidden = decoder.tok_embeddings(ids)
        for layer in decoder.layers:
            hidden = layer(hidden, Rope(rope.cos[positions], rope.sin[positions]))
        return decoder.head(decoder.norm(hidden[:, -1:])).argmax(-1)

    ids = torch.randint(0, config.vocab_size, (1, prompt), device=bench.device)
    weights = decoder_weights(config) * (2 if bench.dtype == torch.float16 else 4)
    answers = []
    for how in ("eager", "torch.compile"):
        compiled = torch.compile(forward, mode="reduce-overhead", fullgraph=True)
        step = forward if how == "eager" else compiled
        first = bench.seconds(lambda: forward(ids, cache.slots[:prompt]), 3)

        def answer(step: Callable[..., Tensor] = step) -> Tensor:
            token, found = forward(ids, cache.slots[:prompt]), []
            for index in range(steps):
                token = step(token, cache.slots[prompt + index : prompt + index + 1]).clone()
                found.append(token)
            return torch.cat(found, dim=1)

        answers.append(answer())
        # The prompt's own time is taken away.
        seconds = (bench.seconds(answer, 3) - first) / steps
        yield {
            "model": name,
            "how": how,
            "first_token_ms": first * 1e3,
            "tokens_per_s": 1 / seconds,
            "share_of_bandwidth": weights / seconds / peak["bytes_per_s"],
            "same_tokens": bool((answers[-1] == answers[0]).all()),
            "memory_gib": bench.memory_gib(),
        }


def engine_rows(
    bench: Bench, engine: Engine, out: Path, peak: Row, *, device: str = "cuda"
) -> Iterator[Row]:
    """A model by one of our backends on a device, against its graphs on the CPU."""
    import_module(TARGETS[engine.backend].session).check_device(device)
    if bench.device.type == "cuda":  # what torch still holds of the models before
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    started = time.perf_counter()
    arguments = ["--model", engine.model, "--backend", engine.backend, "--out", str(out)]
    arguments += ["--precision", engine.precision]
    arguments += [] if engine.is_language_model else ["--taps", "none"]
    arguments += [] if engine.model in DEMOS else ["--weights", "random"]
    with redirect_stdout(sys.stderr):
        status = export_main(arguments)
    if status:
        raise RuntimeError("the export failed; its words are above")
    row = {"model": engine.model, "how": engine.how, "export_s": time.perf_counter() - started}
    measure = _answers if engine.is_language_model else _embeddings
    yield row | measure(bench, out, device, peak)


def _embeddings(bench: Bench, package: Path, device: str, peak: Row) -> Row:
    """Of random images: the least cosine, images/s in batches of 37, batch 1, and the first one."""
    with prt.load(package, backend="onnxruntime") as cpu:
        size = cpu.image_spec
        shape = (_MOST_IMAGES, size.height, size.width, 3)
        images = list(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
        exact = cpu.embed_images(images[:2])
    loading = time.perf_counter()
    with prt.load(package, device=device) as engine:
        found = engine.embed_images(images[:2])
        ready = time.perf_counter()
        one = bench.seconds(lambda: engine.embed_images(images[:1]))
        many = bench.seconds(lambda: engine.embed_images(images, batch_size=_MOST_IMAGES), 3)
        memory = bench.used_gib()
        config = PeConfig.from_dict(engine.manifest.content.architecture).vision
    return {
        "images_per_s": _MOST_IMAGES / many,
        "batch_1_ms": one * 1e3,
        "cosine": float((found * exact).sum(axis=1).min()),
        "share_of_peak": _MOST_IMAGES * vision_flops(config) / many / peak["flops"],
        "load_to_first_s": ready - loading,
        "memory_gib": memory,
    }


def _answers(bench: Bench, package: Path, device: str, peak: Row) -> Row:
    """Of a prompt in ids: whether tokens are those of the CPU, the first token, and tokens/s."""
    prompt, steps = (16, 4) if bench.quick else (PROMPT, STEPS)
    ids = np.random.default_rng(0).integers(0, 256, prompt)
    with prt.load(package, backend="onnxruntime") as cpu:
        exact = cpu.generate_tokens(ids, max_new_tokens=_COMPARED)
    loading = time.perf_counter()
    with prt.load(package, device=device, cache=False) as engine:
        found = engine.generate_tokens(ids, max_new_tokens=_COMPARED)
        ready = time.perf_counter()
        first = bench.seconds(lambda: engine.generate_tokens(ids, max_new_tokens=1), 3)
        counts: list[int] = []
        whole = bench.seconds(
            lambda: counts.append(len(engine.generate_tokens(ids, max_new_tokens=1 + steps))), 3
        )
        memory = bench.used_gib()
        weights = _decoder_bytes(engine.manifest.content)
    tokens = counts[-1] - 1  # fewer than asked for, if an end token came
    row = {
        "first_token_ms": first * 1e3,
        "same_tokens": found == exact,
        "load_to_first_s": ready - loading,
        "memory_gib": memory,
    }
    if tokens > 0:
        per_s = tokens / (whole - first)
        row["tokens_per_s"] = per_s
        row["share_of_bandwidth"] = per_s * weights / peak["bytes_per_s"]
    return row


def _decoder_bytes(content: Content) -> int:
    """What a token reads: the weights of all parts of the decoder, in whatever format."""
    graphs = [graph for name, graph in content.graphs.items() if name.startswith(DECODER)]
    return sum(content.files[file].size_bytes for graph in graphs for file in graph.data)


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


def attempts(
    bench: Bench, folder: Path, peak: Row
) -> Iterator[tuple[Row, Callable[[], Iterator[Row]]]]:
    """What to measure: what it is called if it fails, and the rows."""
    tiny = VisionConfig(
        patch_size=8, width=64, layers=2, heads=2, mlp_ratio=4.0, output_dim=32, image_size=32,
        use_cls_token=True, attn_pooler_heads=2,
    )  # fmt: skip
    yield from _engines(bench, folder, peak, DEMOS)
    for name in TOWERS[: 1 if bench.quick else None]:
        tower = tiny if bench.quick else get_config(name).vision
        yield {"model": name}, partial(tower_rows, bench, name, tower, peak)
    for name in DECODERS[: 1 if bench.quick else None]:
        config = get_config(name)
        assert isinstance(config, PlmConfig)
        decoder = config.decoder
        if bench.quick:
            decoder = replace(
                decoder, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=128, max_seqlen=64
            )
        yield {"model": name}, partial(decoder_rows, bench, name, decoder, peak)
    if not bench.quick:
        yield from _engines(bench, folder, peak, ENGINES)


def _engines(
    bench: Bench, folder: Path, peak: Row, models: Sequence[str]
) -> Iterator[tuple[Row, Callable[[], Iterator[Row]]]]:
    """Each of the models by each backend and precision that there is for GPUs."""
    for model in models:
        for backend, target in TARGETS.items():
            for precision, devices in target.precisions.items():
                if "cuda" in devices and (precision != "fp32" or model in DEMOS):
                    engine = Engine(model=model, backend=backend, precision=precision)
                    out = folder / f"{model} {engine.how}"
                    yield (
                        {"model": model, "how": engine.how},
                        partial(engine_rows, bench, engine, out, peak),
                    )


def run(bench: Bench) -> Mapping[str, Any]:
    """All rows; one that fails is a row with its words."""
    rows: list[Row] = []
    started = time.monotonic()
    before = gpu_state()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        peak = limits(bench)
        for name, measure in attempts(bench, Path(folder), peak):
            if time.monotonic() > bench.deadline:
                rows.append({**name, "failed": "not begun: the time was up"})
                continue
            try:
                for figures in measure():
                    row = {**figures, "sm_mhz": sm_clock()}  # while the clock still is as it was
                    rows.append(row)
                    print(json.dumps(row), file=sys.stderr, flush=True)  # if all else is lost
            except Exception as error:  # whatever it is, the other rows are wanted
                words = " ".join(str(error).split())[:_MOST_WORDS]
                rows.append({**name, "failed": f"{type(error).__name__}: {words}"})
    return {
        "gpu": {"before": before, "after": gpu_state()},
        "torch": torch.__version__,
        "limits": peak,
        "rows": rows,
        "seconds": time.monotonic() - started,
    }


def markdown(result: Mapping[str, Any]) -> str:
    """A table; a figure that a row does not have is a dash."""
    names = ["model", "how"]
    for row in result["rows"]:
        names += [name for name in row if name not in names]
    peak = result["limits"]
    lines = [
        f"{result['gpu']['before']}; torch {result['torch']}; measured limits "
        f"{peak['flops'] / 1e12:.0f} TFLOP/s, {peak['bytes_per_s'] / 1e9:.0f} GB/s.",
        "",
        f"| {' | '.join(names)} |",
        "|---" * len(names) + "|",
    ]
    for row in result["rows"]:
        cells = (row.get(name, "-") for name in names)
        texts = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells)
        lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Measures, prints the table, writes JSON."""
    parser = argparse.ArgumentParser(description="What a GPU machine can run of this project.")
    parser.add_argument("--out", type=Path, help="a file for all figures, as JSON")
    parser.add_argument("--quick", action="store_true", help="a trial run of tiny models")
    options = parser.parse_args(arguments)
    if not (torch.cuda.is_available() or options.quick):
        print("gpu_check: torch finds no GPU; --quick tries the script on the CPU", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    deadline = time.monotonic() + BUDGET_S * 0.8
    result = run(Bench(device=device, quick=options.quick, deadline=deadline))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
