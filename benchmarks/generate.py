"""`python benchmarks/generate.py [--model PLM-1B]`: a language model's engines, in one run.

A photograph, a second question, guesses and batches through a package, and its decoder alone beside
transformers and onnxruntime-genai at the same shape. Each task runs in a process of its own. The
list of tasks runs `--rounds` times, every second time backwards, and samples are pooled, so that a
machine that slows down or speeds up meanwhile does so to every task. The machine's limits are
measured in each round, and the best counts. Peers that are not installed are skipped, and why.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

try:
    from benchmarks.encoder.worker import run_task as run_limits
    from benchmarks.generation.prepare import PACKAGE_DIRECTORY, photo_path
    from benchmarks.generation.report import (
        again_record,
        decoder_records,
        guess_records,
        markdown,
        photo_record,
        ratio_records,
        together_records,
    )
    from benchmarks.generation.runners import PEERS, Row, engine_row
    from benchmarks.generation.worker import run_task
    from benchmarks.machine import environment
    from perception_rt.archs import get_config
    from perception_rt.errors import BackendError, InputError, PerceptionError
    from perception_rt.package.manifest import Content
    from perception_rt.package.reader import open_package
    from perception_rt.plm_config import PlmConfig
    from perception_rt.targets import check_precision, get_target
except ModuleNotFoundError as missing:
    print(f'error: no module {missing.name}; run `pip install -e ".[dev]"` first', file=sys.stderr)
    sys.exit(2)

_SCHEMA = 1
_MOST = {"batch": 256, "layers": 256, "prompt": 1 << 20, "rounds": 100, "steps": 10_000}
_MOST |= {"threads": 1024, "tokens": 10_000}
_LIBRARIES = ("transformers", "onnxruntime-genai")


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, as everything else is."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What one process does in each round.

    Attributes:
        name: of its samples.
        values: for `generate_worker`.
        peer: whether it is skipped if it fails.
    """

    name: str
    values: Mapping[str, Any] = field(repr=False)
    peer: bool = False


@dataclass(slots=True, kw_only=True)
class Measured:
    """What the rounds gave.

    Attributes:
        samples: by task name, one for each round.
        limits: of each round.
        skipped: why, by task name.
    """

    samples: dict[str, list[Any]] = field(default_factory=dict)
    limits: list[dict[str, float]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    try:
        options = _parsed(arguments)
        result = run_benchmark(options)
        print(markdown(result))
        if options.out is not None:
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    except PerceptionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def run_benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """Measures everything that checked options ask for; raw samples are in the result."""
    photo = photo_path()
    started = time.monotonic()
    machine = environment()
    peers = _peer_versions() if options.peers else {}
    with tempfile.TemporaryDirectory(prefix="perception_rt-benchmark-") as work:
        package = options.package or _exported(options, work)
        with open_package(package) as opened:
            manifest = opened.manifest
        content = manifest.content
        config = _architecture(content)
        _check_length(options, config)
        measured = Measured()
        tasks = _requests(options, content, photo, measured)
        tasks += [_decoder(row, options) for row in _rows(options, content)]
        common = {
            "config": config.to_dict(),
            "package": str(package),
            "threads": options.threads,
            "work": work,
        }
        if options.peers:
            _progress("preparing onnxruntime-genai")
            build = Task(name=PEERS[-1].name, values={"do": "build genai"}, peer=True)
            _run(build, common, measured)
        _run_rounds(tasks, common, options, measured)
    kept = {name: value for name, value in vars(options).items() if name not in ("out", "package")}
    return {
        "schema": _SCHEMA,
        "environment": machine | peers,
        "settings": kept,
        "seconds": round(time.monotonic() - started),
        "model": {"name": content.name, "precision": _precision(content), "package": manifest.id},
        "weights": dict(content.weights),
        "peers": list(peers),
        "limits_by_round": measured.limits,
        "samples": measured.samples,
        "skipped": measured.skipped,
        **_figures(config, content, options, measured),
    }


def _exported(options: argparse.Namespace, work: str) -> Path:
    """A package of the architecture that was asked for, with random weights."""
    config = _config(options)
    _check_length(options, config)
    name = options.model
    if options.layers is not None:
        name += f" cut to {options.layers} layers"
    _progress(f"{name}: exporting {options.precision}")
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


def _requests(
    options: argparse.Namespace, content: Content, photo: Path, measured: Measured
) -> list[Task]:
    """Tasks for the whole package, which take its tokenizer."""
    if content.text is None:
        measured.skipped["requests"] = "the package has no tokenizer"
        return []
    about = [{"photo": str(photo), "max_tiles": tiles} for tiles in options.max_tiles]
    tokens = {"tokens": options.tokens}
    values: list[dict[str, Any]] = [
        *({"do": "photo", **picture, **tokens} for picture in about),
        *({"do": "again", **picture} for picture in about),
        {"do": "guess", **tokens},
        {"do": "together", "batches": options.batch, **tokens},
    ]
    return [Task(name=_task_name(v["do"], v.get("max_tiles")), values=v) for v in values]


def _rows(options: argparse.Namespace, content: Content) -> list[Row]:
    return [engine_row(content.target.precision), *(PEERS if options.peers else ())]


def _decoder(row: Row, options: argparse.Namespace) -> Task:
    values = {"do": "decoder", "row": asdict(row), "prompts": options.prompt}
    return Task(name=row.name, values={**values, "steps": options.steps}, peer=row in PEERS)


def _run_rounds(
    tasks: Sequence[Task],
    common: Mapping[str, Any],
    options: argparse.Namespace,
    measured: Measured,
) -> None:
    for index in range(options.rounds):
        where = f"round {index + 1} of {options.rounds}"
        _progress(f"{where}: limits")
        setup = {"threads": options.threads, "quick": options.quick}
        measured.limits.append(run_limits({"do": "limits", **setup}))
        for task in tasks if index % 2 == 0 else reversed(tasks):
            if task.name not in measured.skipped:
                _progress(f"{where}: {task.name}")
                sample = _run(task, common, measured)
                measured.samples.setdefault(task.name, []).append(sample)
    for name in measured.skipped:
        measured.samples.pop(name, None)


def _run(task: Task, common: Mapping[str, Any], measured: Measured) -> Any:
    """A task's result; a peer that fails has none, and is skipped from then on."""
    try:
        return run_task({**common, **task.values})
    except BackendError as error:
        if not task.peer:
            raise BackendError(f"{task.name} failed: {error}") from None
        measured.skipped[task.name] = str(error)
        return None


def _figures(
    config: PlmConfig, content: Content, options: argparse.Namespace, measured: Measured
) -> dict[str, Any]:
    """Everything that `markdown` shows."""
    limits = {key: max(m[key] for m in measured.limits) for key in measured.limits[0]}
    engine = engine_row(content.target.precision)
    taken = measured.samples
    photo, again = (
        [taken[name] for tiles in options.max_tiles if (name := _task_name(do, tiles)) in taken]
        for do in ("photo", "again")
    )
    decoder = [
        record
        for row in _rows(options, content)
        if row.name in taken
        for record in decoder_records(config, row, limits, taken[row.name])
    ]
    return {
        "limits": limits,
        "photo": [photo_record(config, limits[engine.limit], samples) for samples in photo],
        "again": [again_record(samples) for samples in again],
        "guess": guess_records(taken["guess"]) if "guess" in taken else [],
        "together": together_records(taken["together"]) if "together" in taken else [],
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
    """Options with their defaults, checked before any work; InputError names what is wrong."""
    parser = _Parser(prog="generate.py", description="Measure a language model on this machine.")
    parser.add_argument("--model", help="random weights of it (default: PLM-1B)")
    parser.add_argument("--layers", type=int, help="cut decoder and tower to so many, for a look")
    parser.add_argument("--precision", help="of the export (default: int4)")
    parser.add_argument("--blocks", choices=("int8", "int4"), help="of int4 (default: int8)")
    parser.add_argument("--package", type=Path, metavar="DIR", help="measure this one instead")
    parser.add_argument(
        "--max-tiles", action="append", type=int, help="of the photograph; default: 0 and 4"
    )
    parser.add_argument("--tokens", type=int, help="of each answer (default: 65)")
    parser.add_argument("--batch", action="append", type=int, help="default: 1, 2, 4 and 8")
    parser.add_argument(
        "--prompt", action="append", type=int, help="of the decoder alone; 128, 320 and 1344"
    )
    parser.add_argument("--steps", type=int, help="after each of those prompts (default: 24)")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="engines only")
    parser.add_argument("--threads", type=int, help="of every library (default: one per core)")
    parser.add_argument("--rounds", type=int, help="over all tasks (default: 2)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="raw samples and figures")
    parser.add_argument("--quick", action="store_true", help="a trial: few tokens, one round")
    options = parser.parse_args(arguments)
    options.max_tiles = sorted(set(options.max_tiles or [0, 4]))
    options.batch = sorted(set(options.batch or [1, 2, 4, 8]))
    options.prompt = sorted(set(options.prompt or [128, 320, 1344]))
    options.tokens = _or_default(options.tokens, 17 if options.quick else 65)
    options.steps = _or_default(options.steps, 4 if options.quick else 24)
    options.rounds = _or_default(options.rounds, 1 if options.quick else 2)
    options.threads = _or_default(options.threads, len(os.sched_getaffinity(0)))
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    made = ("model", "layers", "precision", "blocks")
    if options.package is not None:
        for name in made:
            if getattr(options, name) is not None:
                raise InputError(f"--package says what it is: leave out --{name}")
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
        _check_number(name, value, 1, _MOST[name])
    for value in options.max_tiles:
        _check_number("max-tiles", value, 0, 1024)
    # Of a batch, all must have begun before one has ended.
    _check_number("tokens", options.tokens, max(options.batch) + 2, _MOST["tokens"])
    out = options.out
    if out is not None and (out.suffix != ".json" or out.is_dir() or not out.parent.is_dir()):
        raise InputError(f"--out must be a .json file in an existing folder, not {str(out)!r:.80}")


def _config(options: argparse.Namespace) -> PlmConfig:
    """The architecture that `--model` and `--layers` name."""
    config = get_config(options.model)
    if not isinstance(config, PlmConfig):
        raise InputError(f"{options.model} is no language model; see benchmarks/embed.py")
    if options.layers is None:
        return config
    most = min(config.decoder.n_layers, config.vision.layers)
    _check_number("layers", options.layers, 1, most)
    return replace(
        config,
        decoder=replace(config.decoder, n_layers=options.layers),
        vision=replace(config.vision, layers=options.layers),
    )


def _check_length(options: argparse.Namespace, config: PlmConfig) -> None:
    longest, most = max(options.prompt) + options.steps, config.decoder.max_seqlen
    if longest > most:
        raise InputError(f"--prompt and --steps are {longest} tokens; the model has {most}")


def _check_number(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise InputError(f"--{name} must be {least} to {most}, not {value}")


def _or_default(value: int | None, default: int) -> int:
    return default if value is None else value


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
