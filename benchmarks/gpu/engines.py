"""Times our engines on a GPU and compares them with the same graphs on the CPU."""

import gc
import operator
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

import perception_rt as prt
from benchmarks.flops import decoder_bytes, vision_flops
from benchmarks.gpu.eager import PROMPT, STEPS
from benchmarks.gpu.timing import Bench, Row
from benchmarks.rounds import progress
from perception_rt.config import PeConfig
from perception_rt.errors import ExportError
from perception_rt.export import ExportOptions, export
from perception_rt.export.quantization.calibration import images
from perception_rt.plm_config import PlmConfig
from perception_rt.targets import TARGETS

DEMOS = ("PE-Demo", "PLM-Demo")
_MOST_IMAGES = 37  # in one engine call
_COMPARED = 8  # tokens of an answer that the CPU computes too


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A model exported for one of our backends."""

    model: str
    backend: str
    precision: str

    @property
    def how(self) -> str:
        """Backend and precision, the row's name in the table."""
        return f"{self.backend} {self.precision}"

    @property
    def is_language_model(self) -> bool:
        """True for a language model, False for an encoder."""
        return self.model.startswith("PLM")


def engine_rows(
    bench: Bench, engine: Engine, out: Path, peak: Row, *, device: str = "cuda"
) -> Iterator[Row]:
    """Yields the row of a model on one of our backends and a device."""
    import_module(TARGETS[engine.backend].session).check_device(device)
    if bench.device.type == "cuda":  # memory that torch holds for earlier models
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
    options = ExportOptions(
        out=out,
        model=engine.model,
        backend=engine.backend,
        precision=engine.precision,
        taps=None if engine.is_language_model else (),
        weights=None if engine.model in DEMOS else "random",
    )
    how, started = engine.how, time.perf_counter()
    try:
        export(options, progress)
    except ExportError:
        if not TARGETS[engine.backend].has_engines:
            raise
        how += " unfused"  # this GPU has no fused kernel; the row shows what that costs
        export(replace(options, allow_unfused=True), progress)
    row = {"model": engine.model, "how": how, "export_s": time.perf_counter() - started}
    measure = _answers if engine.is_language_model else _embeddings
    yield row | measure(bench, out, device, peak)


def _embeddings(bench: Bench, package: Path, device: str, peak: Row) -> Row:
    """Figures of an encoder on random images: lowest cosine, images/s, milliseconds of one."""
    with prt.Embedder.load(package, backend="onnxruntime") as cpu:
        size = cpu.image_spec
        shape = (_MOST_IMAGES, size.height, size.width, 3)
        pictures = list(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
        exact = cpu.embed_images(pictures[:2])
    loading = time.perf_counter()
    with prt.Embedder.load(package, device=device) as engine:
        found = engine.embed_images(pictures[:2])
        ready = time.perf_counter()
        one = bench.seconds(lambda: engine.embed_images(pictures[:1]))
        many = bench.seconds(lambda: engine.embed_images(pictures, batch_size=_MOST_IMAGES), 3)
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
    """Figures of a language model: tokens equal to the CPU's, and times of a random prompt."""
    prompt, steps = (16, 4) if bench.quick else (PROMPT, STEPS)
    picture = images(1, 200, 200)[0]

    def ask(model: prt.Generator) -> tuple[int, ...]:
        question = "What is in the picture?"
        return model.generate(
            question, images=[picture], max_tiles=0, max_new_tokens=_COMPARED
        ).tokens

    with prt.Generator.load(package, backend="onnxruntime") as cpu:
        exact = ask(cpu)
    loading = time.perf_counter()
    with prt.Generator.load(package, device=device, cache=False) as engine:
        found = ask(engine)
        ready = time.perf_counter()
        image = PlmConfig.from_dict(engine.manifest.content.architecture).image_token_id
        ids = np.random.default_rng(0).integers(0, 256, prompt)
        ids[ids == image] = image + 1
        first = bench.seconds(lambda: engine.generate_tokens(ids, max_new_tokens=1), 3)
        # From gaps between tokens: a long answer less a short one may be negative by noise.
        answer = engine.generate("x" * prompt, max_new_tokens=1 + steps, ignore_eos=True)
        gap = answer.timings.per_token_s
        assert gap is not None  # two tokens or more
        per_s = 1 / gap
        memory = bench.used_gib()
        weights = decoder_bytes(engine.manifest.content)
    return {
        "first_token_ms": first * 1e3,
        "same_tokens": sum(accumulate(map(operator.eq, found, exact), operator.and_)),
        "of_tokens": len(exact),
        "load_to_first_s": ready - loading,
        "memory_gib": memory,
        "tokens_per_s": per_s,
        "share_of_bandwidth": per_s * weights / peak["bytes_per_s"],
    }
