"""`python benchmarks/generate.py [--model PLM-1B]`: a language model's engines, in one run.

Measures a package with a photograph, a second question about it, speculation and batches, and its
decoder alone beside transformers and onnxruntime-genai at the same shape. Each task runs in a
process of its own, and all tasks run `--rounds` times. A task or a limit that this machine or
installation cannot run is reported as unavailable with the reason; an engine that fails stops the
benchmark.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

try:
    from benchmarks import subprocess_task
    from benchmarks.command import check_number, check_out, or_default, run_command
    from benchmarks.generation.prepare import PACKAGE_DIRECTORY
    from benchmarks.generation.report import (
        again_record,
        decoder_records,
        lookup_records,
        markdown,
        photo_record,
        ratio_records,
        together_records,
    )
    from benchmarks.generation.runners import PEERS, Row, engine_row
    from benchmarks.machine import environment
    from benchmarks.photographs import SAMPLES, sample_photo
    from benchmarks.rounds import Measured, Task, best_limits, limit_tasks, progress, run_rounds
    from perception_rt.archs import get_config
    from perception_rt.errors import BackendError, InputError
    from perception_rt.package.manifest import Content
    from perception_rt.package.reader import Package, open_package
    from perception_rt.plm_config import PlmConfig
    from perception_rt.processing.llm_tokenizer import TokenizerSpec, open_tokenizer
    from perception_rt.targets import check_precision, get_target
    from training.arguments import Parser
except ModuleNotFoundError as missing:
    print(f'error: no module {missing.name}; run `pip install -e ".[dev]"` first', file=sys.stderr)
    sys.exit(2)

run_task = partial(subprocess_task.run_task, module="benchmarks.generation.worker")
run_limit = partial(subprocess_task.run_task, module="benchmarks.limits")

_SCHEMA = 2
_MOST = {"batch": 256, "layers": 256, "prompt": 1 << 20, "rounds": 100, "steps": 10_000}
_MOST |= {"threads": 1024, "tokens": 10_000}
_LIBRARIES = ("transformers", "onnxruntime-genai")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    return run_command(arguments, _parsed, run_benchmark, markdown)


def run_benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """Measures what checked options ask for; the result holds the figures and the raw samples."""
    started = time.monotonic()
    machine = environment()
    peers = _peer_versions() if options.peers else {}
    with tempfile.TemporaryDirectory(prefix="perception_rt-benchmark-") as work:
        package = options.package or _exported(options, work)
        with open_package(package) as opened:
            manifest, no_requests = opened.manifest, why_no_requests(opened)
        content = manifest.content
        config = _architecture(content)
        _check_length(options, config)
        common = {
            "config": config.to_dict(),
            "package": str(package),
            "threads": options.threads,
            "work": work,
        }
        measured = Measured(run=lambda values: run_task({**common, **values}))
        if no_requests:
            measured.unavailable["requests"] = no_requests
        limits = Measured(run=run_limit, label="limit")
        if options.peers:
            progress("preparing onnxruntime-genai")
            measured.try_task(Task(name=PEERS[-1].name, values={"do": "build genai"}))
        run_rounds(
            [*_requests(options, measured), *_decoders(options, content)],
            measured,
            limits,
            setup=limit_tasks(threads=options.threads, quick=options.quick),
            rounds=options.rounds,
        )
    kept = {name: value for name, value in vars(options).items() if name not in ("out", "package")}
    return {
        "schema": _SCHEMA,
        "environment": machine | peers,
        "settings": kept,
        "seconds": round(time.monotonic() - started),
        "model": {"name": content.name, "precision": _precision(content), "package": manifest.id},
        "weights": dict(content.weights),
        "peers": list(peers),
        "limits": best_limits(limits),
        "limit_samples": limits.samples,
        "unavailable_limits": limits.unavailable,
        "samples": measured.samples,
        "unavailable": measured.unavailable,
        **_figures(config, content, options, measured.samples, best_limits(limits)),
    }


def _exported(options: argparse.Namespace, work: str) -> Path:
    """Exports a package of the chosen architecture with random weights; returns its path."""
    config = _config(options)
    _check_length(options, config)
    name = options.model
    if options.layers is not None:
        name += f" cut to {options.layers} layers"
    progress(f"{name}: exporting {options.precision}")
    task = {
        "do": "prepare",
        "config": config.to_dict(),
        "model": name,
        "precision": options.precision,
        "blocks": options.blocks,
        "work": work,
    }
    try:
        run_task(task)
    except BackendError as error:
        raise BackendError(f"{name}: export failed: {error}") from None
    return Path(work) / PACKAGE_DIRECTORY


def why_no_requests(package: Package) -> str | None:
    """The reason why the package cannot answer requests on this installation, or None."""
    text = package.manifest.content.text
    if text is None:
        missing = find_spec("tokenizers") is None
        return "the package has no tokenizer" + (": tokenizers is not installed" if missing else "")
    spec = TokenizerSpec.from_dict(text, "text")
    try:
        open_tokenizer(spec, None if spec.file is None else package.read(spec.file))
    except BackendError as error:
        return str(error)
    return None


def _requests(options: argparse.Namespace, measured: Measured) -> list[Task]:
    """Tasks for the whole package; records a missing photograph as unavailable."""
    if "requests" in measured.unavailable:
        return []
    tokens = {"tokens": options.tokens}
    values: list[dict[str, Any]] = []
    try:
        photo = str(sample_photo(SAMPLES[0]))
        about = [{"photo": photo, "max_tiles": tiles} for tiles in options.max_tiles]
        values += [{"do": "photo", **picture, **tokens} for picture in about]
        values += [{"do": "again", **picture} for picture in about]
    except BackendError as error:
        measured.unavailable["photo"] = str(error)
    values += [{"do": "lookup", **tokens}, {"do": "together", "batches": options.batch, **tokens}]
    return [Task(name=_task_name(v["do"], v.get("max_tiles")), values=v, ours=True) for v in values]


def _decoders(options: argparse.Namespace, content: Content) -> list[Task]:
    """Tasks for the decoder alone: the engine and its peers."""
    values = {"do": "decoder", "prompts": options.prompt, "steps": options.steps}
    return [
        Task(name=row.name, values={**values, "row": asdict(row)}, ours=row not in PEERS)
        for row in _rows(options, content)
    ]


def _rows(options: argparse.Namespace, content: Content) -> list[Row]:
    return [engine_row(content.target.precision), *(PEERS if options.peers else ())]


def _figures(
    config: PlmConfig,
    content: Content,
    options: argparse.Namespace,
    samples: dict[str, list[Any]],
    limits: dict[str, float],
) -> dict[str, Any]:
    """Figures for each section of the report."""
    engine = engine_row(content.target.precision)
    photo, again = (
        [samples[name] for tiles in options.max_tiles if (name := _task_name(do, tiles)) in samples]
        for do in ("photo", "again")
    )
    decoder = [
        record
        for row in _rows(options, content)
        if row.name in samples
        for record in decoder_records(config, row, limits, samples[row.name])
    ]
    return {
        "photo": [photo_record(config, limits.get(engine.limit), rounds) for rounds in photo],
        "again": [again_record(rounds) for rounds in again],
        "lookup": lookup_records(samples["lookup"]) if "lookup" in samples else [],
        "together": together_records(samples["together"]) if "together" in samples else [],
        "decoder": decoder,
        "ratios": ratio_records(decoder, engine.name),
    }


def _task_name(do: str, max_tiles: int | None) -> str:
    return do if max_tiles is None else f"{do}, max_tiles {max_tiles}"


def _architecture(content: Content) -> PlmConfig:
    if content.family != "plm":
        raise InputError(f"{content.name} is no language model; see benchmarks/embed.py")
    return PlmConfig.from_dict(content.architecture)


def _precision(content: Content) -> str:
    blocks = content.target.options.get("blocks")
    return content.target.precision + (f" ({blocks} blocks)" if blocks else "")


def _peer_versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the options, fills in defaults and checks them before any work."""
    parser = Parser(prog="generate.py", description="Measure a language model on this machine.")
    add = parser.add_argument
    add("--model", help="a model, with random weights (default: PLM-1B)")
    add("--layers", type=int, help="layers of decoder and tower, for a shorter trial")
    add("--precision", help="precision of the export (default: int4)")
    add("--blocks", choices=("int8", "int4"), help="decoder blocks in int4 (default: int8)")
    add("--package", type=Path, metavar="DIR", help="a package to measure instead of an export")
    add("--max-tiles", action="append", type=int, help="repeatable; default: 0 and 4")
    add("--tokens", type=int, help="tokens of each answer (default: 65)")
    add("--batch", action="append", type=int, help="repeatable; default: 1, 2, 4 and 8")
    add("--prompt", action="append", type=int, help="repeatable; default: 128, 320 and 1344")
    add("--steps", type=int, help="tokens decoded after each prompt (default: 24)")
    add("--no-peers", dest="peers", action="store_false", help="leave out other libraries")
    add("--threads", type=int, help="threads of every library (default: one per core)")
    add("--rounds", type=int, help="rounds over all tasks (default: 2)")
    add("--out", type=Path, metavar="FILE.json", help="raw samples and figures")
    add("--quick", action="store_true", help="a trial: few tokens, one round")
    options = parser.parse_args(arguments)
    options.max_tiles = sorted(set(options.max_tiles or [0, 4]))
    options.batch = sorted(set(options.batch or [1, 2, 4, 8]))
    options.prompt = sorted(set(options.prompt or [128, 320, 1344]))
    options.tokens = or_default(options.tokens, 17 if options.quick else 65)
    options.steps = or_default(options.steps, 4 if options.quick else 24)
    options.rounds = or_default(options.rounds, 1 if options.quick else 2)
    options.threads = or_default(options.threads, len(os.sched_getaffinity(0)))
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    made = ("model", "layers", "precision", "blocks")
    if options.package is not None:
        for name in made:
            if getattr(options, name) is not None:
                raise InputError(f"--package already determines --{name}: leave out --{name}")
    else:
        options.model = options.model or "PLM-1B"
        options.precision = options.precision or "int4"
        if options.blocks is not None and options.precision != "int4":
            raise InputError("--blocks is for --precision int4")
        options.blocks = options.blocks or "int8"
        check_precision(get_target("onnxruntime"), options.precision)
        _config(options)
    numbers = [(name, value) for name in ("batch", "prompt") for value in getattr(options, name)]
    numbers += [(name, getattr(options, name)) for name in ("rounds", "steps", "threads")]
    for name, value in numbers:
        check_number(name, value, 1, _MOST[name])
    for value in options.max_tiles:
        check_number("max-tiles", value, 0, 1024)
    # All requests of a batch must have begun before the first one ends.
    check_number("tokens", options.tokens, max(options.batch) + 2, _MOST["tokens"])
    check_out(options.out)


def _config(options: argparse.Namespace) -> PlmConfig:
    """The architecture that `--model` and `--layers` select."""
    config = get_config(options.model)
    if not isinstance(config, PlmConfig):
        raise InputError(f"{options.model} is no language model; see benchmarks/embed.py")
    if options.layers is None:
        return config
    most = min(config.decoder.n_layers, config.vision.layers)
    check_number("layers", options.layers, 1, most)
    return replace(
        config,
        decoder=replace(config.decoder, n_layers=options.layers),
        vision=replace(config.vision, layers=options.layers),
    )


def _check_length(options: argparse.Namespace, config: PlmConfig) -> None:
    longest, most = max(options.prompt) + options.steps, config.decoder.max_seqlen
    if longest > most:
        raise InputError(f"--prompt and --steps are {longest} tokens; the model has {most}")


if __name__ == "__main__":
    sys.exit(main())
